"""The periodic table as a heat map, and the errors of predictions by element."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import OptionError
from matxfer.plot import style
from matxfer.plot.values import values_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

#: First and last atomic numbers of the two rows below the table.
_LANTHANIDES, _ACTINIDES = (57, 71), (89, 103)
#: Elements up to lawrencium have a place; no model knows the later ones.
_LAST = 103
STATISTICS = ("mae", "mean", "count")


def place(z: int) -> tuple[int, float]:
    """Return column and row of an element, from 0, with the f block below."""
    for row, (first, last) in enumerate((_LANTHANIDES, _ACTINIDES)):
        if first <= z <= last:
            return z - first + 3, 7.3 + row
    begins = (1, 3, 11, 19, 37, 55, 87)
    period = sum(z >= begin for begin in begins) - 1
    step = z - begins[period]
    if period == 0:
        return (0, 0) if z == 1 else (17, 0)
    if period < 3:
        return (step if step < 2 else step + 10), period
    if period > 4 and step > 15:  # after the f block
        return step - 14, period
    return step, period


def periodic_table(
    values: Mapping[Any, float],
    label: str = "",
    *,
    signed: bool | None = None,
    framed: Iterable[Any] = (),
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a value per element as a heat map; grey: no value.

    Parameters
    ----------
    values
        Symbol or atomic number → value; NaN: no value.
    label
        Of the colours, with the unit.
    signed
        Whether zero is the middle of the colours (blue below, orange above); ``None``: where a
        value is below zero.
    framed
        Elements in a thick frame.
    limits
        Values of the first and the last colour; ``None``: those of the values.
    title
        Above the table.
    ax
        Axes to draw on; ``None``: a new figure, 5 inches wide.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If something is no element.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.periodic_table({"Fe": 0.2, "O": -0.1}, "mean residual (eV)")
    >>> sum(text.get_text() == "Fe" for text in ax.texts)
    1
    """
    from ase.data import chemical_symbols

    known = {_number(key): float(value) for key, value in values.items()}
    known = {z: value for z, value in known.items() if np.isfinite(value) and z <= _LAST}
    thick = {_number(key) for key in framed}
    around_zero = any(v < 0 for v in known.values()) if signed is None else signed
    with style.axes(ax, width=5.0, height=3.1) as axis:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.patches import Rectangle

        scale = Normalize(*(limits or _limits(list(known.values()), around_zero)))
        colours: Any = ScalarMappable(scale, style.diverging() if around_zero else style.SEQUENTIAL)
        for z in range(1, _LAST + 1):
            column, row = place(z)
            colour = colours.to_rgba(known[z]) if z in known else style.MISSING
            axis.add_patch(
                Rectangle(
                    (column, -row), 0.94, 0.94, facecolor=colour, edgecolor="black",
                    linewidth=1.6 if z in thick else 0.3, zorder=2 if z in thick else 1,
                    gid=f"element-{chemical_symbols[z]}",
                )
            )  # fmt: skip
            axis.text(
                column + 0.47, 0.44 - row, chemical_symbols[z], ha="center", va="center",
                fontsize=_font_size(axis), color=readable_on(colour), zorder=3,
            )  # fmt: skip
        axis.set_xlim(-0.1, 18.1)
        axis.set_ylim(-9.2, 1.1)
        axis.set_aspect("equal")
        axis.axis("off")
        if known:
            bar = axis.figure.colorbar(
                colours, ax=axis, orientation="horizontal", shrink=0.7, pad=0.02, aspect=30
            )
            bar.set_label(style.plain(label))
        if title:
            axis.set_title(style.plain(title))
    return axis  # type: ignore[no-any-return]


def residuals_by_element(
    truth: Any,
    predicted: Any = None,
    formulas: Any = None,
    *,
    data: Any = None,
    target: str | None = None,
    part: str = "test",
    statistic: str = "mae",
    least: int = 1,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the errors of the materials that hold an element, for every element.

    An element is judged by all materials with it, however little of it they hold: neighbours share
    blame. Elements in less than five materials are marked by a dot: their figure says little.

    Parameters
    ----------
    truth, predicted, data, target, part
        As in :func:`matxfer.plot.parity`.
    formulas
        Formulas or structures (n,), or the name of a column; ``None``: ``formula`` of ``data``.
    statistic
        ``"mae"``: mean absolute error; ``"mean"``: mean of prediction − truth, which says whether
        an element is over- or underestimated; ``"count"``: number of materials.
    least
        Elements in fewer materials are left grey.
    title
        Above the table.
    ax
        Axes to draw on; ``None``: a new figure.

    Returns
    -------
    Axes

    Raises
    ------
    OptionError
        If the compositions are not known, no row can be used, or there is no such statistic.

    Examples
    --------
    >>> from matxfer import plot
    >>> ax = plot.residuals_by_element(
    ...     [1.0, 2.0], [1.5, 2.0], ["NaCl", "NaF"], target="band_gap_ev", statistic="mean"
    ... )
    >>> ax.figure.axes[-1].get_xlabel()
    'mean of predicted − true band gap (eV)'
    """
    if statistic not in STATISTICS:
        raise OptionError(f"statistic is {statistic!r}, but must be one of {STATISTICS}")
    found = values_of(
        truth, predicted, data=data, target=target, part=part, formulas=_formulas(formulas)
    ).known("residuals by element")
    if not len(found.formulas):
        raise OptionError("residuals by element need the formulas of the rows")
    residual = found.predicted - found.truth
    by_element = element_residuals(residual, found.formulas)
    if statistic == "count":
        words = "materials with the element"
        values = {z: float(len(each)) for z, each in by_element.items()}
    else:
        figure = np.abs if statistic == "mae" else np.asarray
        values = {z: float(np.mean(figure(each))) for z, each in by_element.items()}
        sort = "mean absolute error" if statistic == "mae" else "mean of predicted − true"
        name = style.quantity(found.prop.name)
        words = f"{sort}{' of' if statistic == 'mae' and name else ''} {name}".strip()
        words += f" ({found.prop.unit})" if found.prop.unit else ""
    enough = {z: v for z, v in values.items() if len(by_element[z]) >= least}
    axis = periodic_table(enough, words, signed=statistic == "mean", title=title, ax=ax)
    for z in enough:
        if len(by_element[z]) < _FEW:
            column, row = place(z)
            axis.plot(
                column + 0.8, 0.8 - row, marker=".", markersize=2.5, color="black", zorder=4,
                linestyle="none", markeredgecolor="white", markeredgewidth=0.3,
            )  # fmt: skip
    return axis


_FEW = 5


def element_residuals(
    residual: NDArray[np.float64], formulas: Sequence[str]
) -> dict[int, NDArray[np.float64]]:
    """Return the residuals of all materials that hold an element, by atomic number.

    Raises
    ------
    OptionError
        If a formula cannot be read.
    """
    found: dict[int, list[float]] = {}
    for value, formula in zip(residual, formulas, strict=True):
        for z in elements_of(formula):
            found.setdefault(z, []).append(float(value))
    return {z: np.array(values) for z, values in sorted(found.items())}


def elements_of(formula: str) -> set[int]:
    """Return the atomic numbers of a formula.

    Raises
    ------
    OptionError
        If it cannot be read.
    """
    from pymatgen.core.composition import Composition

    try:
        return {element.Z for element in Composition(formula).elements}
    except (ValueError, AttributeError, TypeError) as error:
        raise OptionError(f"formula {formula!r} cannot be read ({error})") from error


def _formulas(given: Any) -> Any:
    """Return formulas of structures, or what was given if it is words already."""
    if given is None or isinstance(given, str):
        return given
    items = list(given)
    if all(isinstance(item, str) for item in items):
        return items
    return [item if isinstance(item, str) else _formula(item) for item in items]


def _formula(structure: Any) -> str:
    formula = getattr(structure, "formula", None)  # ours and pymatgen's
    if isinstance(formula, str):
        return formula
    if hasattr(structure, "get_chemical_formula"):  # ASE's
        return str(structure.get_chemical_formula())
    raise OptionError(f"a {type(structure).__name__} is neither a formula nor a structure")


def _number(key: Any) -> int:
    from ase.data import atomic_numbers

    if isinstance(key, str) and key != "X" and key in atomic_numbers:
        return int(atomic_numbers[key])
    if isinstance(key, int | np.integer) and 1 <= key < 119:
        return int(key)
    raise OptionError(f"{key!r} is no element; give symbols or atomic numbers")


def _limits(values: list[float], around_zero: bool) -> tuple[float, float]:
    if around_zero:
        most = max((abs(v) for v in values), default=1.0) or 1.0
        return -most, most
    high = max(values, default=1.0)
    return 0.0, high or 1.0


def readable_on(colour: Any) -> str:
    """Return black or white, whichever can be read on a colour (WCAG relative luminance)."""
    from matplotlib.colors import to_rgb

    channels = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = float(np.dot((0.2126, 0.7152, 0.0722), channels))
    return "black" if luminance > 0.179 else "white"


def _font_size(axis: Any) -> float:
    """Return a size at which a symbol of two letters fits into its square."""
    width = axis.figure.get_figwidth() * axis.get_position().width
    return float(np.clip(1.25 * width, 3.5, 8.0))
