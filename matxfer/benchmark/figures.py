"""Figures as PNG and their numbers as CSV; drawn without pyplot, a program's backend stays."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: Colours that the colour-blind tell apart (Okabe & Ito 2008), and a marker for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style(k: int) -> dict[str, Any]:
    """Return colour and marker of the k-th curve of a figure."""
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}


def panels(n: int) -> tuple[Any, list[Any]] | None:
    """Return a figure of n panels side by side, and these, or None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(4.2 * n, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, n, squeeze=False)[0])


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows of equal keys, whole or not at all; unknown values are empty."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
