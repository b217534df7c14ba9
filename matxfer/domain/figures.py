"""Figures of a diagnosis: a map of the fingerprints, the elements, residuals by element."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.properties import unit_of
from matxfer.domain.covariate import components
from matxfer.errors import OptionError
from matxfer.plot.elements import periodic_table
from matxfer.plot.maps import embedding_map
from matxfer.plot.style import COLOURS, new_figure, save

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.domain.diagnosis import Diagnosis


def draw_diagnosis(diagnosis: Diagnosis, path: str | Path) -> bool:
    """Draw all figures that there is something for into one PNG file; say if it was possible.

    Left: the two first principal components of the last layer's fingerprints. Middle: how much
    more often an element occurs in the target, in percentage points. Right: difference between
    target and source values per atom of each element, or values against source predictions of
    another quantity.
    """
    rules = diagnosis.concept
    three = bool(rules.elements) or rules.points is not None
    try:
        figure = new_figure(17 if three else 12, 5)
    except OptionError:
        return False
    axes = figure.subplots(
        1, 3 if three else 2, squeeze=False, width_ratios=[1, 1.9, 1.1][: 3 if three else 2]
    )[0]
    draw_map(axes[0], diagnosis)
    draw_elements(axes[1], diagnosis)
    if rules.elements:
        _residuals(axes[2], diagnosis)
    elif rules.points is not None:
        _relation(axes[2], diagnosis)
    save(figure, Path(path))
    return True


def draw_map(axis: Any, diagnosis: Diagnosis) -> None:
    """Draw source and target as points, near those with like fingerprints."""
    source, target = diagnosis.source, diagnosis.target
    layer = max(source.layers)
    at = components(np.concatenate([source.layers[layer], target.layers[layer]]), 2)
    flat = np.column_stack([at, np.zeros(len(at))])[:, :2]  # of two structures there is one alone
    parts = {"source": flat[: len(source)], "target": flat[len(source) :]}
    embedding_map(
        parts, method="none", title=f"Fingerprints, AUC {diagnosis.covariate.auc:.3f}", ax=axis
    )
    axis.set_xlabel(f"principal component 1 of layer {layer} (no unit)")
    axis.set_ylabel("principal component 2 (no unit)")


def draw_elements(axis: Any, diagnosis: Diagnosis) -> None:
    """Draw how much more often each element occurs in the target."""
    there = (diagnosis.source.facts.fractions > 0).mean(axis=0)
    here = (diagnosis.target.facts.fractions > 0).mean(axis=0)
    present = {int(z): 100 * float(here[z] - there[z]) for z in np.flatnonzero(here + there > 0)}
    periodic_table(
        present,
        "structures that hold it, target − source (percentage points)",
        signed=True,
        framed=diagnosis.covariate.unseen.numbers,
        title="Elements (thick frame: unseen in the source)",
        ax=axis,
    )


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
