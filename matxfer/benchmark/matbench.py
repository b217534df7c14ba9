"""Matbench v0.1 (Dunn et al., npj Comput. Mater. 6, 138 (2020)): its structure tasks and folds.

The folds are those of its paper and package: ``KFold`` (classes: ``StratifiedKFold``) with five
parts, shuffled with the seed 18012019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from matxfer.data.table import column_numbers, crystals_or_errors
from matxfer.errors import OptionError
from matxfer.files import sha256

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.crystal import Crystal, CrystalError
    from matxfer.model import Model

    Floats = NDArray[np.float64]

N_FOLDS, SEED = 5, 18012019
#: The published mean absolute deviation of a task's values must be met as well as this.
_SAME_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class MatbenchTask:
    """A task of the benchmark whose inputs are structures.

    Parameters
    ----------
    name, published
        What the benchmark calls the task and its column of values.
    columns
        What tables of ours call that column; a learner's target is the first.
    rows
        Number of materials.
    spread
        Mean absolute deviation of the published values, of classes the part that is true.
    unit
        Of the published values.
    classes
        Whether the values are true and false.
    """

    name: str
    published: str
    columns: tuple[str, ...]
    rows: int
    spread: float
    unit: str
    classes: bool = False

    @property
    def logarithmic(self) -> bool:
        """Whether the benchmark has log10 of the values that our tables have."""
        return self.unit.startswith("log10(")

    @property
    def short(self) -> str:
        """Name without ``matbench_``."""
        return self.name.removeprefix("matbench_")

    def ids(self, n: int) -> list[str]:
        """Return the benchmark's ids of n rows, counted from 1."""
        digits = math.floor(math.log10(n)) + 1
        stem = self.name.replace("matbench", "mb").replace("_", "-")
        return [f"{stem}-{row + 1:0{digits}d}" for row in range(n)]

    def folds(self, values: Floats) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return the training and test rows of each fold."""
        from sklearn.model_selection import KFold, StratifiedKFold

        kind = StratifiedKFold if self.classes else KFold
        splitter = kind(N_FOLDS, shuffle=True, random_state=SEED)
        return list(splitter.split(np.zeros(len(values)), values))

    def seen_by(self, base: Model) -> bool:
        """Return whether a base model was trained on labels of this task, of test rows too."""
        return ("band_gap_ev" if self.classes else self.columns[0]) in base.heads


TASKS = {
    task.short: task
    for task in (
        MatbenchTask("matbench_jdft2d", "exfoliation_en", ("exfoliation_energy_mev_per_atom",),
                     636, 67.20200406491116, "meV/atom"),
        MatbenchTask("matbench_phonons", "last phdos peak",
                     ("last_phdos_peak_per_cm", "last_phdos_peak_cm1"),
                     1265, 323.78696979348734, "1/cm"),
        MatbenchTask("matbench_dielectric", "n", ("refractive_index",),
                     4764, 0.808534704217072, ""),
        MatbenchTask("matbench_log_gvrh", "log10(G_VRH)", ("shear_modulus_vrh_gpa",),
                     10987, 0.29313828328604646, "log10(GPa)"),
        MatbenchTask("matbench_log_kvrh", "log10(K_VRH)", ("bulk_modulus_vrh_gpa",),
                     10987, 0.2896736342937069, "log10(GPa)"),
        MatbenchTask("matbench_perovskites", "e_form", ("heat_of_formation_ev",),
                     18928, 0.5659924184827462, "eV"),
        MatbenchTask("matbench_mp_gap", "gap pbe", ("band_gap_ev",),
                     106113, 1.3271449960162496, "eV"),
        MatbenchTask("matbench_mp_is_metal", "is_metal", ("is_metal",),
                     106113, 0.43492314796490533, "", classes=True),
        MatbenchTask("matbench_mp_e_form", "e_form", ("formation_energy_ev_per_atom",),
                     132752, 1.0059220443295362, "eV/atom"),
    )
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class MatbenchData:
    """The materials of a task, in the benchmark's order.

    Attributes
    ----------
    task, path
        The task, and the file that was read.
    crystals
        Structures; an error stands where one cannot be used.
    values
        In the unit of the benchmark, of classes 0 and 1, (n,).
    stand_in
        Whether these are other rows than the benchmark's.
    """

    task: MatbenchTask
    path: Path
    crystals: list[Crystal | CrystalError]
    values: Floats
    stand_in: bool = False

    @cached_property
    def ids(self) -> list[str]:
        """The benchmark's ids of the rows."""
        return self.task.ids(len(self.values))

    @cached_property
    def checksum(self) -> str:
        """First digits of the file's SHA-256."""
        return sha256(self.path)[:12]


def file_of(task: MatbenchTask, folder: Path) -> Path | None:
    """Return the file of a task in a folder: a table of ours, or the file as it is published."""
    names = [f"{task.name}.{kind}" for kind in ("parquet", "csv", "json.gz", "json")]
    return next((path for name in names if (path := folder / name).is_file()), None)


def read_task(task: MatbenchTask, folder: Path, *, stand_in: bool = False) -> MatbenchData:
    """Read a task from a local file.

    Parameters
    ----------
    task
        The task.
    folder
        Holds ``NAME.parquet`` or ``NAME.csv`` (with structures and one of ``task.columns``), or
        ``NAME.json.gz`` as published; rows in the benchmark's order.
    stand_in
        Take other rows than the benchmark's, to try the way.

    Raises
    ------
    OptionError
        If there is no such file, a value is missing, or number and spread of the values are not
        those of the benchmark.
    """
    path = file_of(task, folder)
    if path is None:
        raise OptionError(
            f"{folder}: there is no {task.name}.parquet; fetch it with: matxfer datasets fetch "
            f"{task.name} -o {folder / task.name}.parquet, or put the published {task.name}"
            ".json.gz there"
        )
    crystals, values = (_published if ".json" in path.suffixes else _table)(task, path)
    if len(missing := np.flatnonzero(~np.isfinite(values))):
        raise OptionError(f"{path}: row {missing[0]} has no value; the benchmark has all, fetch it")
    if task.classes and not np.isin(values, (0, 1)).all():
        raise OptionError(f"{path}: {task.published} must be true or false, 1 or 0, in every row")
    if stand_in:
        if len(values) < 2 * N_FOLDS:
            raise OptionError(f"{path}: {len(values)} rows are too few for {N_FOLDS} folds")
        return MatbenchData(task, path, crystals, values, stand_in=True)
    if len(values) != task.rows:
        raise OptionError(
            f"{path}: has {len(values)} rows where the benchmark has {task.rows}, so its folds "
            "would be others; fetch it again, or try the way with --stand-in"
        )
    spread = values.mean() if task.classes else np.abs(values - values.mean()).mean()
    if abs(spread / task.spread - 1) > _SAME_SPREAD:
        raise OptionError(
            f"{path}: the mean absolute deviation of the values is {spread:.6g}, but that of the "
            f"benchmark is {task.spread:.6g} {task.unit}; unit or values are others. Fetch it again"
        )
    return MatbenchData(task, path, crystals, values)


def _table(task: MatbenchTask, path: Path) -> tuple[list[Crystal | CrystalError], Floats]:
    from matxfer.readers import crystals_of_table, load_table

    frame = load_table(path)
    column = next((name for name in task.columns if name in frame.columns), None)
    if column is None:
        raise OptionError(f"{path}: there is no column {' or '.join(map(repr, task.columns))}")
    values = column_numbers(frame, column, str(path))
    if task.logarithmic:
        values = log10_of(values)
    return crystals_or_errors(crystals_of_table(frame, str(path))), values


def _published(task: MatbenchTask, path: Path) -> tuple[list[Crystal | CrystalError], Floats]:
    from functools import partial

    from matxfer.datasets.split_json import rows_of
    from matxfer.readers.entry import attempt
    from matxfer.readers.monty_json import crystal_of_json

    crystals: list[Crystal | CrystalError] = []
    values: list[float] = []
    for index, cells in rows_of(path, ["structure", task.published]):
        if isinstance(cells, str) or not isinstance(cells[task.published], int | float):
            raise OptionError(f"{path}: row {index} has no value; fetch it again")
        build = partial(crystal_of_json, cells["structure"], index)
        crystals.append(attempt(build, "the structure", "see the published file"))
        values.append(float(cells[task.published]))
    return crystals, np.asarray(values)


def log10_of(values: Floats) -> Floats:
    """Return logarithms, not finite where there are none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log10(values))
