"""Figures of a diagnosis: a map of the fingerprints, the elements, residuals by element."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.benchmark.figures import COLOURS, save
from matxfer.data.properties import unit_of
from matxfer.domain.covariate import components

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.domain.diagnosis import Diagnosis

#: Blue, white, orange: poles that the colour-blind tell apart.
_DIVERGING = ("#2166AC", "#F7F7F7", "#B35806")
#: First and last atomic numbers of the two rows below the table.
_LANTHANIDES, _ACTINIDES = (57, 71), (89, 103)


def draw_diagnosis(diagnosis: Diagnosis, path: str | Path) -> bool:
    """Draw all figures that there is something for into one PNG file; say if it was possible.

    Left: the two first principal components of the last layer's fingerprints. Middle: how much
    more often an element occurs in the target, in percentage points. Right: difference between
    target and source values per atom of each element, or values against source predictions of
    another quantity.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rules = diagnosis.concept
    three = bool(rules.elements) or rules.points is not None
    figure = Figure(figsize=(17 if three else 12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1, 3 if three else 2, squeeze=False, width_ratios=[1, 1.9, 1.1][: 3 if three else 2]
    )[0]
    _map(axes[0], diagnosis)
    _elements(figure, axes[1], diagnosis)
    if rules.elements:
        _residuals(axes[2], diagnosis)
    elif rules.points is not None:
        _relation(axes[2], diagnosis)
    save(figure, Path(path))
    return True


def _map(axis: Any, diagnosis: Diagnosis) -> None:
    source, target = diagnosis.source, diagnosis.target
    layer = max(source.layers)
    at = components(np.concatenate([source.layers[layer], target.layers[layer]]), 2)
    parts = (
        ("source", at[: len(source)], COLOURS[0], "o"),
        ("target", at[len(source) :], COLOURS[1], "^"),
    )
    for name, points, colour, marker in parts:
        label = f"{name} (n = {len(points)})"
        axis.scatter(
            points[:, 0], points[:, -1], s=12, c=colour, marker=marker, alpha=0.5, lw=0, label=label
        )
    axis.set_xlabel(f"principal component 1 of layer {layer} (no unit)")
    axis.set_ylabel("principal component 2 (no unit)")
    axis.set_title(f"Fingerprints, AUC {diagnosis.covariate.auc:.3f}")
    axis.legend(loc="best", fontsize=8)


def _elements(figure: Any, axis: Any, diagnosis: Diagnosis) -> None:
    there = (diagnosis.source.facts.fractions > 0).mean(axis=0)
    here = (diagnosis.target.facts.fractions > 0).mean(axis=0)
    present = {int(z): 100 * float(here[z] - there[z]) for z in np.flatnonzero(here + there > 0)}
    label = "structures that hold it, target − source (percentage points)"
    _periodic_table(figure, axis, present, label, set(diagnosis.covariate.unseen.numbers))
    axis.set_title("Elements (thick frame: unseen in the source)")


def _periodic_table(
    figure: Any, axis: Any, values: dict[int, float], label: str, framed: set[int]
) -> None:
    """Draw a value per element as a heat map, white at zero; grey: no structure holds it."""
    from ase.data import chemical_symbols
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    limit = max((abs(v) for v in values.values()), default=1.0) or 1.0
    scale = Normalize(-limit, limit)
    colours = LinearSegmentedColormap.from_list("gap", _DIVERGING)
    for z in range(1, 104):
        column, row = _place(z)
        colour = colours(scale(values[z])) if z in values else "#CFCFCF"
        thick = z in framed
        axis.add_patch(
            Rectangle(
                (column, -row), 0.94, 0.94, facecolor=colour, edgecolor="black",
                lw=2.0 if thick else 0.3, zorder=2 if thick else 1,
            )
        )  # fmt: skip
        dark = z in values and abs(values[z]) > 0.65 * limit
        axis.text(
            column + 0.47, 0.47 - row, chemical_symbols[z], ha="center", va="center", fontsize=7,
            color="white" if dark else "black", zorder=3,
        )  # fmt: skip
    axis.set_xlim(-0.1, 18.1)
    axis.set_ylim(-9.2, 1.1)
    axis.set_aspect("equal")
    axis.axis("off")
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(scale, colours), ax=axis, orientation="horizontal", shrink=0.7, pad=0.02
    )
    bar.set_label(label)


def _place(z: int) -> tuple[int, float]:
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


def _residuals(axis: Any, diagnosis: Diagnosis) -> None:
    rules = diagnosis.concept
    ranked = sorted(rules.elements.items(), key=lambda item: item[1][0])
    if len(ranked) > 24:
        ranked = ranked[:12] + ranked[-12:]
    names = [f"{symbol} ({n})" for symbol, (_, n) in ranked]
    sizes: NDArray[np.float64] = np.array([value for _, (value, _) in ranked])
    colours = [COLOURS[0] if size < 0 else COLOURS[1] for size in sizes]
    axis.barh(np.arange(len(sizes)), sizes, color=colours)
    axis.set_yticks(np.arange(len(sizes)), names, fontsize=7)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_ylabel("element (number of compounds)")
    unit = rules.unit or "no unit"
    axis.set_xlabel(f"target − source, per share of the element ({unit})")
    axis.set_title(f"Difference by element, MAE {rules.mae:.3g} {rules.unit}".rstrip())


def _relation(axis: Any, diagnosis: Diagnosis) -> None:
    rules = diagnosis.concept
    assert rules.points is not None, "drawn only where there are points"
    x, y = rules.points
    axis.scatter(x, y, s=12, c=COLOURS[1], marker="^", alpha=0.5, lw=0)
    axis.set_xlabel(f"predicted {rules.source} ({unit_of(rules.source) or 'no unit'})")
    axis.set_ylabel(f"{rules.target} ({rules.unit or 'no unit'})")
    figures = rules.maps.get(rules.source, {})
    axis.set_title(f"Another quantity, Spearman {figures.get('spearman', float('nan')):.2f}")
