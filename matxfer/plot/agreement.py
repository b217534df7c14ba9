"""Parity: predictions against true values, with density, marginals and the errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError
from matxfer.metrics import regression_metrics
from matxfer.plot import style
from matxfer.plot.values import Values, values_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: From so many points on their density is shown by colour, and intervals are not drawn.
CROWD = 150
#: Larger figures of points would make a file slow to open: they become pixels there.
_PIXELS_FROM = 3000
_BINS = 30


def parity(
    truth: Any,
    predicted: Any = None,
    *,
    data: Any = None,
    target: str | None = None,
    part: str = "test",
    lower: Any = None,
    upper: Any = None,
    density: bool | None = None,
    marginals: bool = True,
    scale: str = "auto",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw predictions against true values.

    Points on the diagonal are right; the box holds mean absolute error, root mean square error,
    R² and the number of points. Rows without a value or a prediction are left out and counted.

    Parameters
    ----------
    truth
        True values (n,), the name of their column in ``data``, or a plugin: the rows that it keeps.
    predicted
        Predictions (n,), or the name of their column.
    data
        Data frame of the columns, such as :func:`matxfer.predict` returns, joined with the values.
    target
        Column name of the property, whose end says the unit (``band_gap_ev``), for plain arrays.
    part
        Rows of a plugin: ``"val"`` or ``"test"``.
    lower, upper
        Bounds of intervals, (n,) or names of columns; drawn up to :data:`CROWD` points.
    density
        Whether colours show how crowded the points are; ``None``: from :data:`CROWD` points on.
    marginals
        Whether histograms of both axes are drawn beside them.
    scale
        ``"linear"``, ``"log"``, or ``"auto"``: logarithmic for a property that is fitted so.
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
        If no row has both, lengths differ, or a logarithmic scale meets values below zero.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.parity([1.0, 2.0, 3.1], [1.1, 1.9, 3.0], target="band_gap_ev")
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('band gap (eV)', 'predicted (eV)')
    """
    found = values_of(
        truth, predicted, data=data, target=target, part=part, lower=lower, upper=upper
    )
    with style.axes(ax) as axis:
        top = draw_parity(axis, found, density=density, marginals=marginals, scale=scale)
        if title:
            top.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def draw_parity(
    axis: Any,
    found: Values,
    *,
    density: bool | None = None,
    marginals: bool = True,
    scale: str = "auto",
) -> Any:
    """Draw parity on axes, see :func:`parity`; return the axes on top, which take the title."""
    shown = found.known("parity")
    logarithmic = _is_logarithmic(shown, scale)
    with style.axes(axis):
        limits = _limits(shown, logarithmic)
        if logarithmic:
            axis.set(xscale="log", yscale="log")
        axis.plot(limits, limits, color=style.GUIDE, linewidth=0.8, zorder=1, label="_diagonal")
        _points(axis, shown, logarithmic, len(shown) >= CROWD if density is None else density)
        axis.set(xlim=limits, ylim=limits, box_aspect=1)
        axis.set_xlabel(style.label(shown.prop.name) if shown.prop.name else "true value")
        axis.set_ylabel(style.with_unit("predicted", shown.prop.unit))
        axis.text(
            0.04, 0.96, errors_text(found), transform=axis.transAxes, va="top", fontsize=7,
            linespacing=1.3, parse_math=False, zorder=5,
        )  # fmt: skip
        return _marginals(axis, shown, logarithmic) if marginals else axis


def errors_text(found: Values) -> str:
    """Return errors as lines, with the number of rows and of those left out."""
    figures = regression_metrics(found.truth, found.predicted, found.prop)
    unit = f" {found.prop.unit}" if found.prop.unit else ""
    r2 = "–" if figures["r2"] is None else f"{figures['r2']:.3f}"
    missing = len(found) - figures["n"]
    out = f" ({missing} without)" if missing else ""
    drawn = f" of {found.rows}" if found.rows > len(found) else ""
    return (
        f"MAE {figures['mae']:.3g}{unit}\nRMSE {figures['rmse']:.3g}{unit}\nR² {r2}\n"
        f"n = {figures['n']}{drawn}{out}"
    )


def _is_logarithmic(shown: Values, scale: str) -> bool:
    if scale not in ("auto", "linear", "log"):
        raise OptionError(f"scale is {scale!r}, but must be auto, linear or log")
    positive = bool((shown.truth > 0).all() and (shown.predicted > 0).all())
    if scale == "log" and not positive:
        raise OptionError("a logarithmic scale needs values above zero; take scale='linear'")
    fitted = shown.prop.transform in ("log", "log10", "log1p")
    return scale == "log" or (scale == "auto" and positive and fitted)


def _limits(shown: Values, logarithmic: bool) -> tuple[float, float]:
    """Return limits of both axes, with a margin also where all values are equal."""
    both = np.concatenate([shown.truth, shown.predicted])
    low, high = float(both.min()), float(both.max())
    if logarithmic:
        margin = max((high / low) ** 0.06, 1.1)
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _points(axis: Any, shown: Values, logarithmic: bool, density: bool) -> None:
    x, y = shown.truth, shown.predicted
    order, colours = np.arange(len(x)), style.COLOURS[0]
    if density:
        crowd = _density(*(np.log(v) if logarithmic else v for v in (x, y)))
        order = np.argsort(crowd, kind="stable")  # the crowded ones on top
    elif shown.has_intervals and len(x) < CROWD:
        known = np.isfinite(shown.lower) & np.isfinite(shown.upper)
        axis.vlines(
            x[known], shown.lower[known], shown.upper[known], color=style.COLOURS[5],
            linewidth=0.7, zorder=2, label="intervals",
        )  # fmt: skip
    size = 16 if len(x) < CROWD else max(2.0, 12 * (CROWD / len(x)) ** 0.3)
    drawn = axis.scatter(
        x[order], y[order], s=size, c=crowd[order] if density else colours, linewidths=0,
        cmap=style.SEQUENTIAL if density else None, alpha=1.0 if density else 0.75, zorder=3,
        rasterized=len(x) > _PIXELS_FROM,
    )  # fmt: skip
    drawn.set_gid("points")


def _density(x: Floats, y: Floats) -> Floats:
    """Return how crowded it is around each point, (n,): a smoothed histogram, read at the point."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    n = 64
    at = []
    for values in (x, y):
        low, span = values.min(), np.ptp(values) or 1.0
        at.append((values - low) / span * (n - 1))
    counts = np.zeros((n, n))
    np.add.at(counts, (at[0].round().astype(int), at[1].round().astype(int)), 1.0)
    return np.asarray(map_coordinates(gaussian_filter(counts, 1.5), at, order=1, mode="nearest"))


def _marginals(axis: Any, shown: Values, logarithmic: bool) -> Any:
    """Draw histograms above and to the right; return the axes on top."""
    low, high = axis.get_xlim()
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    top = axis.inset_axes((0, 1.02, 1, 0.14), sharex=axis)
    side = axis.inset_axes((1.02, 0, 0.14, 1), sharey=axis)
    options: dict[str, Any] = {"bins": edges, "color": style.COLOURS[5], "linewidth": 0}
    top.hist(shown.truth, **options)
    side.hist(shown.predicted, orientation="horizontal", **options)
    for each in (top, side):
        each.axis("off")
    return top
