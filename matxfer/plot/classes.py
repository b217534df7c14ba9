"""Probabilities of classes: whether they are frequencies, and how well they tell classes apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError
from matxfer.plot import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: More curves than this are not told apart.
_CURVES = len(style.COLOURS)


def reliability(
    labels: Any,
    probabilities: Any,
    *,
    classes: Any = None,
    bins: int = 10,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how often a class occurs against the probability that a classifier gave it.

    Bars are 95 % intervals (Wilson) of what was found; the histogram above says how many samples
    there are of each probability.

    Parameters
    ----------
    labels
        True classes, (n,).
    probabilities
        Of two classes that of the second one, (n,) or (n, 2); of K classes (n, K): then the
        probability of the likeliest class is drawn against how often it was right.
    classes
        The classes in the order of the columns; ``None``: the labels, sorted.
    bins
        Number of bins of equal width.
    title
        Above the figure.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If shapes do not agree, a probability is not between 0 and 1, or no row is left.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.reliability(["metal", "gap", "gap"], [0.9, 0.2, 0.1], classes=["gap", "metal"])
    >>> ax.get_xlabel()
    'predicted probability of metal'
    """
    hit, given, words = _binary(labels, probabilities, classes)
    edges = np.linspace(0, 1, bins + 1)
    which = np.minimum((given * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = count > 0
    mean = np.bincount(which, given, bins)[filled] / count[filled]
    found = np.bincount(which, hit, bins)[filled] / count[filled]
    low, high = _wilson(found, count[filled])
    gap = float(np.sum(count[filled] * np.abs(found - mean)) / count.sum())
    with style.axes(ax) as axis:
        axis.plot([0, 1], [0, 1], color=style.GUIDE, linewidth=0.8, label="_diagonal")
        axis.errorbar(
            mean, found, yerr=[found - low, high - found], color=style.COLOURS[0], marker="o",
            capsize=2, elinewidth=0.8,
        )  # fmt: skip
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.set_xlabel(style.plain(words[0]))
        axis.set_ylabel(style.plain(words[1]))
        text = f"calibration error {gap:.3f}\nn = {len(given)}"
        axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=7)
        top = axis.inset_axes((0, 1.02, 1, 0.14), sharex=axis)
        top.hist(given, bins=edges.tolist(), color=style.COLOURS[5])
        top.axis("off")
        if title:
            top.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def roc(
    labels: Any,
    probabilities: Any,
    *,
    classes: Any = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many of a class are found against how many others are taken for it.

    The receiver operating characteristic: a curve for every threshold of the probability. Of two
    classes there is one curve, that of the second; of more, one for each against the rest, at most
    seven, the commonest. The area under a curve is in its legend.

    Parameters
    ----------
    labels, probabilities, classes
        As in :func:`matxfer.plot.reliability`.
    title
        Above the figure.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If shapes do not agree, a probability is not between 0 and 1, or all samples are of one
        class.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.roc(["metal", "gap", "gap"], [0.9, 0.2, 0.1], classes=["gap", "metal"])
    >>> ax.get_legend().get_texts()[0].get_text()
    'metal (1): AUC 1.000'
    """
    truth, given, known = _checked(labels, probabilities, classes, "roc")
    columns = range(len(known)) if len(known) > 2 else [1]
    size = {k: int((truth == known[k]).sum()) for k in columns}
    shown = [k for k in size if 0 < size[k] < len(truth)]
    if not shown:
        raise OptionError("roc: all samples are of one class, so there is nothing to tell apart")
    with style.axes(ax) as axis:
        axis.plot([0, 1], [0, 1], color=style.GUIDE, linewidth=0.8, label="_diagonal")
        for n, k in enumerate(sorted(shown, key=lambda k: -size[k])[:_CURVES]):
            x, y = _roc_curve(truth == known[k], given[:, k])
            area = float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
            label = style.plain(f"{known[k]} ({size[k]}): AUC {area:.3f}")
            axis.plot(x, y, color=style.COLOURS[n], label=label)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.set_xlabel("share of the others taken for it")
        axis.set_ylabel("share of the class found")
        axis.legend(loc="lower right", title=f"n = {len(truth)}", alignment="left", frameon=False)
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def _roc_curve(hit: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    """Return false and true positive rates from the strictest threshold to the loosest."""
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    found = np.cumsum(hit[order])[ends]
    wrong = ends + 1 - found
    return np.append(0, wrong / (~hit).sum()), np.append(0, found / hit.sum())


def probabilities_by_class(
    labels: Any,
    probabilities: Any,
    *,
    classes: Any = None,
    bins: int = 20,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a histogram of the predicted probabilities for the samples of each class.

    Parameters
    ----------
    labels, probabilities, classes
        As in :func:`matxfer.plot.reliability`. Of two classes the probability of the second one is
        drawn; of more, that which the sample's own class was given. Of more than seven classes the
        commonest are drawn.
    bins
        Number of bins of equal width.
    title
        Above the figure.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If shapes do not agree or a probability is not between 0 and 1.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.probabilities_by_class(
    ...     ["metal", "gap", "gap"], [0.9, 0.2, 0.1], classes=["gap", "metal"]
    ... )
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['gap (2)', 'metal (1)']
    """
    truth, given, known = _checked(labels, probabilities, classes, "probabilities_by_class")
    masks = [truth == name for name in known]
    order = np.argsort([-mask.sum() for mask in masks], kind="stable")[:_CURVES]
    edges = np.linspace(0, 1, bins + 1)
    of = f"predicted probability of {known[1]}" if len(known) == 2 else "probability of its class"
    with style.axes(ax) as axis:
        for n, k in enumerate(sorted(order)):
            values = given[masks[k], 1 if len(known) == 2 else k]
            options: dict[str, Any] = {"bins": edges, "color": style.COLOURS[n]}
            axis.hist(values, alpha=0.25, **options)
            label = style.plain(f"{known[k]} ({len(values)})")
            axis.hist(values, histtype="step", label=label, **options)
        axis.set_xlim(0, 1)
        axis.set_xlabel(style.plain(of))
        axis.set_ylabel("samples")
        axis.legend(loc="best", alignment="left", frameon=False)
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def _binary(labels: Any, probabilities: Any, classes: Any) -> tuple[Floats, Floats, list[str]]:
    """Return which samples hold what was predicted, its probability, and words for both axes."""
    truth, given, known = _checked(labels, probabilities, classes, "reliability")
    if len(known) == 2:
        name = known[1]
        words = [f"predicted probability of {name}", f"share that is {name}"]
        return (truth == name).astype(float), given[:, 1], words
    best = given.argmax(axis=1)
    words = ["probability of the likeliest class", "share that is right"]
    return (known[best] == truth).astype(float), given.max(axis=1), words


def _checked(
    labels: Any, probabilities: Any, classes: Any, what: str
) -> tuple[NDArray[Any], Floats, NDArray[Any]]:
    """Return labels (n,) and probabilities (n, K) of samples that have them, and the classes."""
    truth, given = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    known = np.unique(truth) if classes is None else np.asarray(classes)
    if given.ndim == 1:
        given = np.column_stack([1 - given, given])
    if len(known) == 1 and given.shape[1] == 2 and classes is None:
        raise OptionError("all labels are of one class; name both with classes=")
    if given.shape != (len(truth), len(known)):
        raise OptionError(
            f"probabilities are of shape {given.shape}, but there are {len(truth)} labels of "
            f"{len(known)} classes {known.tolist()}"
        )
    good = np.isfinite(given).all(axis=1)
    truth, given = truth[good], given[good]
    if not len(truth):
        raise OptionError(f"{what}: no sample has probabilities")
    if given.min() < -1e-9 or given.max() > 1 + 1e-9:
        raise OptionError("probabilities must be between 0 and 1")
    if unknown := set(truth.tolist()) - set(known.tolist()):
        raise OptionError(f"label {min(map(str, unknown))!r} is none of {known.tolist()}")
    return truth, given.clip(0, 1), known


def _wilson(share: Floats, n: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return 95 % bounds of shares of n samples (Wilson, JASA 22, 209 (1927))."""
    z = 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)
