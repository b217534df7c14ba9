"""The numbers of a figure as CSV."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows of equal keys, whole or not at all; unknown values are empty."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
