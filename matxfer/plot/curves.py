"""Learning: the error after each epoch, and the error against the number of training rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError
from matxfer.plot import style
from matxfer.plot.values import column

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes


def training_curve(
    curves: Any,
    *,
    best: int | None = None,
    label: str = "",
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw errors after each epoch.

    Parameters
    ----------
    curves
        Name → error after each epoch; or a plugin, of which all trials that were trained are drawn,
        the chosen one thick; or the rows of a ``learning_curves.csv`` (a data frame or a list of
        dicts with ``epoch``, ``train_loss`` and ``val_loss``).
    best
        Epoch (from 0) whose weights were kept: marked.
    label
        Of the errors, with their unit.
    title
        Above the figure.
    legend
        Whether to name the curves.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If there is no curve.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.training_curve({"validation": [0.4, 0.2, 0.25]}, best=1, label="MAE (eV)")
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('epoch', 'MAE (eV)')
    """
    if isinstance(getattr(curves, "meta", None), dict):
        named, best, label = curves_of(curves.meta)
    else:
        named = _losses(curves)
    named = {name: values for name, values in named.items() if len(values)}
    if not named:
        raise OptionError("there is no learning curve: nothing was trained epoch by epoch")
    with style.axes(ax) as axis:
        positive = True
        for k, (name, values) in enumerate(named.items()):
            y = np.asarray(values, dtype=np.float64)
            positive &= bool((y[np.isfinite(y)] > 0).all())
            look = style.style(k) if k < len(style.COLOURS) else {"color": style.GUIDE}
            shape = look.pop("marker", "o")
            marker = shape if len(y) == 1 else ""  # a line through one point is invisible
            axis.plot(
                np.arange(1, len(y) + 1), y, marker=marker, label=style.plain(name),
                linewidth=1.6 if k == 0 else 0.9, zorder=3 if k == 0 else 2, **look,
            )  # fmt: skip
        first = np.asarray(next(iter(named.values())), dtype=np.float64)
        if best is not None and 0 <= best < len(first):
            axis.plot(
                [best + 1], [first[best]], linestyle="none", marker="o", markersize=5, zorder=4,
                color=style.COLOURS[0], markeredgecolor=style.ink(),
                label=f"kept: epoch {best + 1}",
            )  # fmt: skip
        if positive:
            axis.set_yscale("log")
            _plain_ticks(axis.yaxis)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("epoch")
        axis.set_ylabel(style.plain(label or "error"))
        if legend:
            axis.legend()
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def curves_of(meta: Mapping[str, Any]) -> tuple[dict[str, Sequence[float]], int | None, str]:
    """Return the curves that a plugin keeps, the epoch that was kept and the label of the errors.

    The chosen trial comes first, then ``trial k`` for the k-th of ``meta["trials"]`` that has a
    curve of its own; a mean of two readouts has none, but theirs.
    """
    prop = (meta.get("head") or {}).get("property") or {}
    label = f"MAE ({fitted_unit(str(prop.get('unit', '')), str(prop.get('transform', '')))})"
    named: dict[str, Sequence[float]] = {}
    best = None
    if meta.get("history"):
        named["validation"], best = meta["history"], meta.get("best_epoch")
        if meta.get("train_history"):
            named["training"] = meta["train_history"]
    for k, trial in enumerate(meta.get("trials") or (), 1):
        if trial.get("history") and trial["history"] != meta.get("history"):
            named[f"trial {k}"] = trial["history"]
    return named, best, label.replace("()", "").strip()


def fitted_unit(unit: str, transform: str) -> str:
    """Return the unit of the scale on which a property is fitted."""
    if transform in ("log", "log10", "log1p"):
        return f"{transform} of {unit}" if unit else transform
    return "fitted scale" if transform.startswith("bounded") else unit


def _losses(curves: Any) -> dict[str, Sequence[float]]:
    if hasattr(curves, "to_dict") and hasattr(curves, "columns"):
        curves = curves.to_dict("records")
    if isinstance(curves, dict):
        return dict(curves)
    rows = list(curves)
    if rows and not isinstance(rows[0], dict):
        return {"error": rows}
    names = {"train_loss": "training", "val_loss": "validation"}
    return {
        words: [row[key] for row in rows] for key, words in names.items() if rows and key in rows[0]
    }


def learning_curve(
    rows: Any,
    errors: Any = None,
    *,
    groups: Any = None,
    data: Any = None,
    label: str = "test MAE",
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw errors against the number of training rows, both logarithmic.

    Several errors of one size (splits, seeds) are drawn as their mean and their range.

    Parameters
    ----------
    rows
        Numbers of training rows, (n,), or the name of their column.
    errors
        Errors, (n,), or the name of their column.
    groups
        What each belongs to (a model, a strategy), (n,), or the name of a column; ``None``: all
        to one.
    data
        Data frame of the columns.
    label
        Of the errors, with their unit.
    title
        Above the figure.
    legend
        Whether to name the groups.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If lengths differ or nothing is left to draw.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.learning_curve([20, 20, 200], [0.3, 0.5, 0.1], label="test MAE (eV)")
    >>> [round(float(y), 3) for y in ax.lines[0].get_ydata()]
    [0.4, 0.1]
    """
    sizes, found, named = (column(each, data) for each in (rows, errors, groups))
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(found, dtype=np.float64)
    names = [""] * len(x) if named is None else [str(name) for name in named]
    if not len(x) == len(y) == len(names):
        raise OptionError(f"{len(x)} sizes, {len(y)} errors and {len(names)} groups; give as many")
    good = np.isfinite(x) & np.isfinite(y) & (x > 0)
    if not good.any():
        raise OptionError("learning curve: there is no error of a known number of rows")
    with style.axes(ax) as axis:
        for k, name in enumerate(dict.fromkeys(names)):
            mine = good & np.array([each == name for each in names])
            steps = np.unique(x[mine])
            values = [y[mine & (x == step)] for step in steps]
            mean = np.array([v.mean() for v in values])
            bars = [
                mean - np.array([v.min() for v in values]),
                np.array([v.max() for v in values]) - mean,
            ]
            axis.errorbar(
                steps, mean, yerr=bars, label=style.plain(name) or None, capsize=2, elinewidth=0.8,
                **style.style(k),
            )  # fmt: skip
        axis.set_xscale("log")
        if (y[good] > 0).all():
            axis.set_yscale("log")
            _plain_ticks(axis.yaxis)
        ticks = _spread_ticks(np.unique(x[good]))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("training rows")
        axis.set_ylabel(style.plain(label))
        if legend and any(names):
            axis.legend()
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def _spread_ticks(sizes: Any) -> list[float]:
    """Return sizes that lie far enough apart on a logarithmic axis for their numbers."""
    kept: list[float] = []
    apart = (sizes[-1] / sizes[0]) ** 0.12
    for size in sizes:
        if not kept or size / kept[-1] >= apart:
            kept.append(float(size))
    return kept


def _plain_ticks(axis: Any) -> None:
    """Write numbers as numbers on a logarithmic axis, few enough to be read."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis.axes.autoscale_view()
    low, high = axis.get_view_interval()
    wide = high / max(low, 1e-300) > 300
    axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
    if high / max(low, 1e-300) < 2:  # no power of ten may be inside
        from matplotlib.ticker import MaxNLocator

        axis.set_major_locator(MaxNLocator(4))
        axis.set_minor_locator(NullLocator())
