"""The transfer map as a heat map: targets by sources, and by frozen depth for each source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matxfer.plot.style import save
from matxfer.probing.cells import SCRATCH
from matxfer.probing.intervals import BETTER, NEGATIVE
from matxfer.probing.rows import by, is_baseline

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matxfer.probing.rows import Row

#: Orange, white, blue: poles that the colour-blind tell apart; blue is a gain.
_DIVERGING = ("#B35806", "#F7F7F7", "#2166AC")
#: Colours end at this gain, so that one bad cell does not wash out the others.
_LIMIT = 0.6
_CELL, _LEFT, _HEADER = (0.62, 0.34), 2.4, 1.25
#: Panels of frozen depths in one row of the figure.
_IN_ROW = 4


def draw(cells: Sequence[Row], chosen: Sequence[Row], settings: Row, path: Path) -> bool:
    """Draw the map; return whether matplotlib is there to do it.

    Top: the frozen depth chosen on validation rows. Below: every depth, a panel per source.
    Numbers are percent by which the test error is smaller; bold: the interval excludes zero;
    hatched: negative transfer.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    chosen = [r for r in chosen if not r["source"].startswith(settings["against"])]
    most = settings["rows"][-1]
    deep = [
        r for r in cells
        if r["rows"] == most and r["depth"] is not None and not is_baseline(r["source"])
    ]  # fmt: skip
    targets = list(by(chosen, lambda r: r["target"]))
    columns = list(by(chosen, lambda r: r["source"]))
    sources = list(by(deep, lambda r: r["source"]))
    lines = [sources[k : k + _IN_ROW] for k in range(0, len(sources), _IN_ROW)]
    depths = max((len({r["depth"] for r in deep if r["source"] == s}) for s in sources), default=1)
    panel = _CELL[1] * len(targets)
    across = max((len(line) for line in lines), default=1)
    width = _LEFT + max(1.35 * _CELL[0] * len(columns), across * (depths * _CELL[0] + 0.3)) + 0.4
    height = _HEADER + panel + 0.5 + len(lines) * (panel + 0.85) + 0.9
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    def axes(left: float, top: float, wide: float) -> Any:
        """Return a panel at a place in inches from the left and the top."""
        at = (left / width, 1 - (top + panel) / height, wide / width, panel / height)
        return figure.add_axes(at)

    wide = 1.35 * _CELL[0] * len(columns)
    first = axes(_LEFT, _HEADER, wide)
    _heat(first, chosen, targets, columns, "source")
    first.set_xticklabels(columns, rotation=25, ha="left", fontsize=8)
    top = _HEADER + panel + 0.5
    for line in lines:
        for k, source in enumerate(line):
            mine = [r for r in deep if r["source"] == source]
            own = sorted({r["depth"] for r in mine})
            left = _LEFT + k * (depths * _CELL[0] + 0.3)
            axis = axes(left, top + 0.35, len(own) * _CELL[0])
            _heat(axis, mine, targets, own, "depth")
            axis.set_title(source, fontsize=8, pad=16)
            if k:
                axis.set_yticklabels([])
        top += panel + 0.85
    reference = (
        "the same network trained from scratch"
        if settings["against"] == SCRATCH
        else "the same network with random weights"
    )
    figure.suptitle(
        f"Test error less by (%), against {reference}", fontsize=10, y=1 - 0.15 / height, va="top"
    )
    figure.text(
        0.01, 0.62 / height,
        "top: frozen depth K chosen on validation rows; below: each K (0: composition alone)\n"
        "bold: 95 % interval over the splits excludes zero; hatched: negative transfer",
        fontsize=7.5, va="center",
    )  # fmt: skip
    _colour_bar(figure, (0.62, 0.45 / height, 0.34, 0.13 / height))
    save(figure, path)
    return True


def _heat(
    axis: Any, rows: Sequence[Row], targets: Sequence[str], columns: Sequence[Any], key: str
) -> None:
    from matplotlib.patches import Rectangle

    scale, colours = _scale()
    for row in rows:
        x, y = columns.index(row[key]), targets.index(row["target"])
        negative = row["verdict"] == NEGATIVE
        axis.add_patch(
            Rectangle(
                (x, y), 1, 1, facecolor=colours(scale(row["gain"])), lw=0.5,
                edgecolor="black" if negative else "white", hatch="////" if negative else None,
            )
        )  # fmt: skip
        dark = abs(row["gain"]) > 0.65 * _LIMIT
        text = axis.text(
            x + 0.5, y + 0.5, _percent(row["gain"]), ha="center", va="center", fontsize=8,
            color="white" if dark else "black",
            weight="bold" if row["verdict"] in (BETTER, NEGATIVE) else "normal",
        )  # fmt: skip
        if negative:  # a number on a hatch cannot be read
            text.set_bbox({"facecolor": colours(scale(row["gain"])), "edgecolor": "none", "pad": 1})
    axis.set_xlim(0, len(columns))
    axis.set_ylim(len(targets), 0)
    axis.set_xticks([k + 0.5 for k in range(len(columns))], list(map(str, columns)), fontsize=8)
    axis.set_yticks([k + 0.5 for k in range(len(targets))], list(targets), fontsize=8)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    if key == "depth":
        axis.set_xticks([k + 0.5 for k in range(len(columns))], [f"K={c}" for c in columns])


def _percent(gain: float) -> str:
    """Return percent with a sign, none for what rounds to zero."""
    whole = round(100 * gain)
    return f"{whole:+d}" if whole else "0"


def _scale() -> tuple[Any, Any]:
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    return Normalize(-_LIMIT, _LIMIT), LinearSegmentedColormap.from_list("gain", _DIVERGING)


def _colour_bar(figure: Any, place: tuple[float, float, float, float]) -> None:
    from matplotlib.cm import ScalarMappable

    scale, colours = _scale()
    axis = figure.add_axes(place)
    bar = figure.colorbar(
        ScalarMappable(scale, colours), cax=axis, orientation="horizontal", extend="both"
    )
    ticks = (-0.6, -0.3, 0.0, 0.3, 0.6)
    bar.set_ticks(ticks, labels=[f"{_percent(t)} %" for t in ticks])
    axis.tick_params(labelsize=7)
