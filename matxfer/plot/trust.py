"""Calibration: whether intervals hold what they promise."""

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
