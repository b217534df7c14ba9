"""The eight small tasks, results published for them, and source rows that no pretraining used.

The tasks and their five splits are those of Chang, Wang & Ertekin, npj Comput. Mater. 8, 242
(2022).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matxfer.data.properties import unit_of
from matxfer.data.table import TableError, require_column
from matxfer.errors import OptionError
from matxfer.readers import load_table
from matxfer.readers.tables import ARRAY_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd

TASKS = (
    "jarvis_2d_eform",
    "expt_eform",
    "jarvis_2d_exfoliation",
    "jarvis_2d_dielectric_opt",
    "mp_elastic_anisotropy",
    "mp_eps_electronic",
    "mp_phonons",
    "mp_poisson_ratio",
)
_STRUCTURE = {"material_id", "formula", "n_sites", *ARRAY_COLUMNS}
_FOLDER, _PUBLISHED = "small_tasks", "published_results.json"
_REMEDY = "give the folder of the data tables with --data or $MATXFER_DATA"


def target_of(columns: Iterable[str]) -> str:
    """Return the target of a small task: its one column that is neither structure nor split."""
    return next(c for c in columns if c not in _STRUCTURE and not c.startswith("split_"))


@dataclass(frozen=True, slots=True, eq=False)
class TaskTable:
    """A small task: its table as read, its target and the target's unit."""

    path: Path
    frame: pd.DataFrame
    target: str

    @property
    def unit(self) -> str:
        """Unit of the target."""
        return unit_of(self.target)

    def thinned(self, split_column: str, share: float, seed: int) -> pd.DataFrame:
        """Return the table with a random part of the training rows, the others marked unused.

        Parameters
        ----------
        split_column
            The split; validation and test rows stay.
        share
            Part of the training rows that is kept, in (0, 1].
        seed
            Of the order in which rows are dropped: for one seed a smaller part lies in a larger.
        """
        words = require_column(self.frame, split_column, self.path).to_numpy(copy=True)
        train = np.random.default_rng(seed).permutation(np.flatnonzero(words == "train"))
        words[train[max(round(share * len(train)), 1) :]] = "unused"
        return self.frame.assign(**{split_column: words})


class DataFolder:
    """The folder of the data tables.

    Parameters
    ----------
    path
        Holds ``small_tasks/`` and the source tables; ``published_results.json`` lies there or in
        the folder above.

    Raises
    ------
    OptionError
        If there are no small tasks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tasks: dict[str, TaskTable] = {}
        if not (self.path / _FOLDER).is_dir():
            raise OptionError(f"{self.path}: there is no folder {_FOLDER!r} in it; {_REMEDY}")

    @property
    def names(self) -> list[str]:
        """The tasks that are there, the eight known ones first."""
        there = sorted(path.stem for path in (self.path / _FOLDER).glob("*.parquet"))
        return [*(t for t in TASKS if t in there), *(t for t in there if t not in TASKS)]

    def task(self, name: str) -> TaskTable:
        """Return a task.

        Raises
        ------
        OptionError
            If there is none of that name.
        """
        if name not in self._tasks:
            if name not in self.names:
                raise OptionError(
                    f"{self.path / _FOLDER}: no task {name!r}; choose among {self.names}, or "
                    f"{_REMEDY}"
                )
            path = self.path / _FOLDER / f"{name}.parquet"
            frame = load_table(path)
            self._tasks[name] = TaskTable(path, frame, target_of(frame.columns))
        return self._tasks[name]

    @cached_property
    def published(self) -> dict[str, dict[str, float]]:
        """Errors published for the tasks, by task and method; empty if the file is not there.

        Raises
        ------
        TableError
            If the file is damaged.
        """
        path = next((p for p in self.published_places if p.is_file()), None)
        if path is None:
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))["small_tasks"]
            methods = list(content["methods"])
            tasks: dict[str, dict[str, float]] = content["tasks"]
            return {t: {m: float(v[m]) for m in methods if m in v} for t, v in tasks.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TableError(
                f"{path}: not a file of published results ({error!r}); fetch it again, or move it "
                "away to go without"
            ) from error

    @property
    def published_places(self) -> tuple[Path, Path]:
        """Where the published results are looked for."""
        return self.path / _PUBLISHED, self.path.resolve().parent / _PUBLISHED

    # -- source rows ------------------------------------------------------------------------
    def source_rows(self, part: str, most: int, seed: int = 0) -> pd.DataFrame:
        """Return rows of the source tables, in which every table knows its own properties.

        Only rows with reliable labels are drawn, and none whose formula occurs in a small task: a
        plugin trained on that material would be asked about what it has seen.

        Parameters
        ----------
        part
            ``"test"``, which no pretraining reads, to measure on; ``"train"`` to rehearse.
        most
            At most so many rows of each table.
        seed
            Which rows are drawn.

        Raises
        ------
        TableError
            If a source table or a column of it is missing, or no row is left.
        """
        import pandas as pd

        taken = set[str]()
        for name in self.names:
            table = self.task(name)
            taken.update(require_column(table.frame, "formula", table.path))
        drawn = [source.rows(self.path, part, taken, most, seed) for source in SOURCES]
        return pd.concat(drawn, ignore_index=True)


@dataclass(frozen=True, slots=True)
class SourceTable:
    """A source table, its properties, and which of its rows have labels to be measured by."""

    name: str
    targets: Sequence[str]
    column: str
    reliable: Sequence[str]

    def rows(self, folder: Path, part: str, taken: set[str], most: int, seed: int) -> pd.DataFrame:
        """Return at most so many random reliable rows of a part, whose formula is not taken."""
        path = folder / f"{self.name}.parquet"
        if not path.is_file():
            raise TableError(
                f"{path}: not there, but the source's errors are measured on it; {_REMEDY}"
            )
        frame = load_table(path)
        wanted = require_column(frame, "split", path) == part
        wanted &= require_column(frame, self.column, path).isin(self.reliable)
        wanted &= ~require_column(frame, "formula", path).isin(taken)
        rows = np.flatnonzero(wanted)
        if not len(rows):
            raise TableError(
                f"{path}: no {part} row with {self.column} in {list(self.reliable)} and a formula "
                "that no small task has; check the table"
            )
        order = np.random.default_rng(seed).permutation(rows)
        kept = ["material_id", *ARRAY_COLUMNS, *self.targets]
        for name in kept:
            require_column(frame, name, path)
        return frame.iloc[np.sort(order[:most])][kept]


SOURCES = (
    SourceTable(
        "mp_formation_energy",
        ("formation_energy_ev_per_atom", "band_gap_ev"),
        "structure_source",
        ("crysxpp",),
    ),
    SourceTable(
        "mp_elasticity",
        ("bulk_modulus_vrh_gpa", "shear_modulus_vrh_gpa"),
        "source",
        ("cgcnn-me228", "matcalc"),
    ),
)
