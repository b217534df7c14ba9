"""A transfer map: what was found, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.benchmark import figures
from matxfer.files import write_json
from matxfer.probing.cells import SCORES
from matxfer.probing.intervals import NEGATIVE

if TYPE_CHECKING:
    from matxfer.probing.rows import Row


@dataclass(frozen=True, slots=True, eq=False)
class TransferMap:
    """What sources, frozen depths and layers are worth for targets.

    Attributes
    ----------
    cells
        One row per target, number of training rows, source and depth, and one (``chosen``) for the
        depth of the smallest validation error of each split: test error in the target's unit, the
        reference's, ``gain`` (share by which the error is smaller, with ``low`` and ``high``) and
        ``verdict``.
    layers
        One row per target, source, way and block: what of the source's gain over random weights is
        lost (``alone``: what is there) with the block changed.
    structure
        One row per target and source: gain over the best features of the composition alone.
    groups
        Left-out groups: test errors, one row per target, group and source.
    affinity
        One row per target and score that needs no training: its rank correlation with the measured
        gain, see :func:`matxfer.probing.prediction.affinity_rows`.
    settings
        How it was measured.
    told
        What a person should know: rows left out and the like.
    """

    cells: list[Row]
    layers: list[Row] = field(default_factory=list)
    structure: list[Row] = field(default_factory=list)
    groups: list[Row] = field(default_factory=list)
    affinity: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def negative(self) -> list[Row]:
        """The cells that the interval calls negative transfer."""
        return [row for row in self.cells if row["verdict"] == NEGATIVE]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as one JSON object."""
        return asdict(self)

    def chosen(self) -> list[Row]:
        """Return the cells of the depth chosen on validation rows, all training rows."""
        most = self.settings["rows"][-1]
        return [row for row in self.cells if row["chosen"] and row["rows"] == most]

    def save(self, folder: str | Path) -> bool:
        """Write ``transfer_map`` as CSV, Parquet, JSON and PNG; say if the figure was drawn."""
        import pandas as pd

        from matxfer.probing.figure import draw

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "transfer_map.json", json.loads(json.dumps(self.to_json())))
        flat = [_flat(row) for row in self.cells]
        figures.write_csv(flat, folder / "transfer_map.csv")
        part = folder / ".transfer_map.parquet.part"
        pd.DataFrame(flat).to_parquet(part)
        part.replace(folder / "transfer_map.parquet")
        return draw(self.cells, self.chosen(), self.settings, folder / "transfer_map.png")


def _flat(row: Row) -> Row:
    """Return a cell with a column for each score."""
    scores = row["scores"] or dict.fromkeys(SCORES)
    return {k: v for k, v in row.items() if k != "scores"} | scores
