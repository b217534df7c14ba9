"""The source of a transfer: what a plugin does to it, and how unlike the target it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import MatxferError
from matxfer.html import Markup, join, table, tag
from matxfer.plot.retention import forgetting
from matxfer.report.drawing import drawn
from matxfer.report.parts import figure, missing, row
from matxfer.transfer.summary import retention_table

if TYPE_CHECKING:
    from matxfer.report.record import Record


def retention_section(record: Record) -> Any:
    """Return what the plugin's layers do to the source."""
    drift = retention_table(record.meta)
    retention = record.meta.get("retention") or {}
    if drift is None and not retention.get("source_error"):
        return missing("plugin.json says nothing of the source.")
    parts: list[Any] = [
        tag(
            "p",
            "A plugin keeps layers of its own, so predict never shows this: it is what would "
            "become of the source predictions, were the base to share the plugin's layers.",
        ),
        drift or "",
    ]

    def draw(axis: Any) -> None:
        forgetting(retention, ax=axis)

    try:
        changes = sum(e.get("change") is not None for e in (retention["source_error"]).values())
        alt = "change of the errors of each source property"
        picture = drawn("forgetting", alt, draw, 3.3, 0.8 + 0.3 * changes)
        parts.append(figure(picture, "Change of the source properties' errors."))
    except (KeyError, MatxferError):
        parts.append(
            missing(
                "No errors on source structures were measured: give --source-data TABLE to matxfer "
                "finetune, or to this report."
            )
        )
    return join(parts)


def shift_section(record: Record) -> Any:
    """Return whether source and target structures are alike, as far as it is known."""
    if record.diagnosis is not None:
        return _diagnosed(record.diagnosis)
    parts: list[Any] = []
    rows = []
    for part, kept in (record.meta.get("predictions") or {}).items():
        score = np.array(kept.get("ood") or [], dtype=np.float64)
        score = score[np.isfinite(score)]
        if len(score):
            beyond = f"{(score > 1).mean():.0%}"
            rows.append((part, len(score), float(np.median(score)), beyond, f"{score.max():.3g}"))
    if rows:
        head = ("rows", "n", "median distance", "beyond the rim (1; training: 5%)", "largest")
        caption = "Distance from the training rows, by fingerprints"
        parts.append(table(head, rows, caption))
    parts.append(
        missing(
            "Source and target were not compared: give --source-data and --data to this report, or "
            "run matxfer shift."
        )
    )
    return join(parts)


def _diagnosed(found: Any) -> Markup:
    from matxfer.domain.figures import draw_elements, draw_map

    lines = list(found.lines())
    shown = row(
        figure(
            drawn("map", "map of fingerprints", lambda axis: draw_map(axis, found), 3.3, 3.0),
            "Fingerprints of source and target.",
        ),
        figure(
            drawn("shift", "elements", lambda axis: draw_elements(axis, found), 5.0, 3.2),
            "How much more often an element occurs in the target.",
        ),
    )
    return join([tag("p", found.verdict), shown, tag("pre", "\n".join(lines))])
