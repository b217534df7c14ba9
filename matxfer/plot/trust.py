"""Calibration: whether intervals hold what they promise, and probabilities are frequencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.properties import apply_transform
from matxfer.errors import OptionError
from matxfer.plot import style
from matxfer.plot.values import Values, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_LEVELS = np.linspace(0.02, 0.98, 49)
#: What a calibrated model does in so many of 100 cases is shaded.
_SURE = 0.95


def calibration(
    truth: Any,
    predicted: Any = None,
    *,
    data: Any = None,
    target: str | None = None,
    lower: Any = None,
    upper: Any = None,
    level: float = 0.9,
    reference: Any = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many values intervals hold against how many they promise.

    The intervals of every level are those given, stretched. With a reference they are conformal
    (Lei et al., JASA 113, 1094 (2018)): at each level so wide that they hold that share of the
    reference rows; without one, as a normal distribution of errors would have it. The shade shows
    where a calibrated model lies in 95 of 100 cases, by the number of rows alone.

    Parameters
    ----------
    truth, predicted, data, target
        As in :func:`matxfer.plot.parity`. Of a plugin the test rows are drawn, and its validation
        rows, which it was calibrated on, are the reference.
    lower, upper
        Bounds of the intervals, (n,), or names of columns.
    level
        Share that these intervals promise to hold.
    reference
        Rows like those drawn, which the model was not trained on: ``(truth, predicted, lower,
        upper)``, each (m,).
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
        If no row has a value, a prediction and an interval, or the level is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from matxfer import plot
    >>> truth = np.linspace(0, 1, 50)
    >>> ax = plot.calibration(truth, truth * 0, lower=truth * 0 - 0.9, upper=truth * 0 + 0.9)
    >>> ax.get_xlabel()
    'promised coverage (%)'
    """
    found = values_of(truth, predicted, data=data, target=target, lower=lower, upper=upper)
    ruler: Values | None = None
    if predicted is None:
        level = found.level
        ruler = _reference_of_plugin(truth)
    elif reference is not None:
        y, f, low, high = reference
        ruler = values_of(y, f, target=found.prop.name, lower=low, upper=high)
    if not 0 < level < 1:
        raise OptionError(f"level is {level}, but must be between 0 and 1")
    with style.axes(ax) as axis:
        draw_calibration(axis, found, level, ruler)
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def draw_calibration(axis: Any, found: Values, level: float, reference: Values | None) -> None:
    """Draw the curve of some rows, with reference rows that say how wide intervals have to be."""
    scores = relative_errors(found)
    held = None if reference is None else relative_errors(reference)
    nominal, reach, low, high = _intervals(len(scores), level, held)
    coverage = (scores[None] <= reach[:, None]).mean(axis=1)
    own = float((scores <= 1).mean())
    axis.fill_between(
        100 * nominal, 100 * low, 100 * high, color=style.COLOURS[5], alpha=0.3, linewidth=0,
        label="calibrated, 95 %",
    )  # fmt: skip
    axis.plot([0, 100], [0, 100], color=style.GUIDE, linewidth=0.8, label="_diagonal")
    axis.plot(100 * nominal, 100 * coverage, color=style.COLOURS[0], label="found")
    axis.plot(
        [100 * level], [100 * own], linestyle="none", marker="o", color=style.COLOURS[1],
        label=f"intervals of {100 * level:.0f} %: {100 * own:.0f} %", zorder=4,
    )  # fmt: skip
    axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axis.set_xlabel("promised coverage (%)")
    axis.set_ylabel("values inside (%)")
    axis.legend(loc="upper left", title=f"n = {len(scores)}", alignment="left", frameon=False)


def relative_errors(found: Values) -> Floats:
    """Return errors in units of the reach of the intervals, (n,): up to 1 a value is inside.

    On the scale on which the property is fitted, where the intervals are symmetric; where one side
    was cut at a limit (a gap is never negative), by the other side.

    Raises
    ------
    OptionError
        If no row has a value, a prediction and a finite interval.
    """
    if not found.has_intervals:
        raise OptionError("calibration needs the bounds of intervals, one pair per row")
    scale = found.prop.transform
    columns = (found.truth, found.predicted, found.lower, found.upper)
    y, f, low, high = (apply_transform(scale, np.asarray(c, dtype=np.float64)) for c in columns)
    with np.errstate(invalid="ignore"):
        reach = np.fmax(high - f, f - low)
        good = np.isfinite(y) & np.isfinite(f) & np.isfinite(reach) & (reach >= 0)
    if not good.any():
        raise OptionError("calibration: no row has a value, a prediction and a finite interval")
    error, reach = np.abs(y - f)[good], reach[good]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / reach)


def _reference_of_plugin(plugin: Any) -> Values | None:
    try:
        found = values_of(plugin, part="val")
    except OptionError:
        return None
    return found if found.has_intervals else None


def _intervals(
    n: int, level: float, reference: Floats | None
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return levels, how far intervals have to be stretched, and where their coverage may lie."""
    from scipy.stats import betabinom, binom, norm

    tails = ((1 - _SURE) / 2, (1 + _SURE) / 2)
    if reference is None:
        reach = norm.ppf((1 + _LEVELS) / 2) / norm.ppf((1 + level) / 2)
        low, high = (binom.ppf(tail, n, _LEVELS) / n for tail in tails)
        return _LEVELS, reach, low, high
    m = len(reference)
    rank = np.ceil((m + 1) * _LEVELS).astype(int)
    nominal, rank = _LEVELS[rank <= m], rank[rank <= m]
    reach = np.sort(reference)[rank - 1]
    # Of n new rows, as many as a Pólya urn with the ranks of m old ones gives (Vovk 2012).
    low, high = (betabinom.ppf(tail, n, rank, m + 1 - rank) / n for tail in tails)
    return nominal, reach, low, high


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


def _binary(labels: Any, probabilities: Any, classes: Any) -> tuple[Floats, Floats, list[str]]:
    """Return which samples hold what was predicted, its probability, and words for both axes."""
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
        raise OptionError("reliability: no sample has probabilities")
    if given.min() < -1e-9 or given.max() > 1 + 1e-9:
        raise OptionError("probabilities must be between 0 and 1")
    if unknown := set(truth.tolist()) - set(known.tolist()):
        raise OptionError(f"label {min(map(str, unknown))!r} is none of {known.tolist()}")
    given = given.clip(0, 1)
    if len(known) == 2:
        name = known[1]
        words = [f"predicted probability of {name}", f"share that is {name}"]
        return (truth == name).astype(float), given[:, 1], words
    best = given.argmax(axis=1)
    words = ["probability of the likeliest class", "share that is right"]
    return (known[best] == truth).astype(float), given.max(axis=1), words


def _wilson(share: Floats, n: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return 95 % bounds of shares of n samples (Wilson, JASA 22, 209 (1927))."""
    z = 1.96
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.minimum(centre - half, share), np.maximum(centre + half, share)
