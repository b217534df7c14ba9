"""Frames: structures with energy, forces and stress, and a split of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.table import SPLITS, TableError, random_split, require_column, split_words
from matxfer.potential.frame_files import read_frame_file
from matxfer.potential.labels import (
    ENERGY,
    FORCES,
    NAMES,
    STRESS,
    LabelError,
    energy_of,
    forces_of,
    names_in,
    stress_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from ase import Atoms
    from numpy.typing import NDArray

    Source = str | Path | pd.DataFrame

#: From so many formulas on, frames of one formula stay in one part of a random split.
_FEW_FORMULAS = 10
#: Columns that say from which set of calculations a frame is.
_GROUPS = ("group", "config_type")


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """n frames.

    Attributes
    ----------
    source
        Where they came from.
    crystals
        The structures; an error stands where a frame cannot be used.
    energy_ev
        Energy of the cell, (n,), NaN where there is none.
    forces_ev_per_a
        Forces on the atoms, (n_atoms, 3) each, None where there are none.
    stress_ev_per_a3
        ∂E/∂ε over the volume, negative for a compressed cell, (n, 3, 3), NaN where there is none.
    split
        ``train``, ``val``, ``test`` or another word (frames to leave out), (n,).
    group
        Set of calculations that each is from, as its file and its columns say, (n,).
    file
        Number of the file that each is from, (n,).
    labels
        Each file, and under which names it has energy, forces and stress.
    """

    source: str
    crystals: list[Crystal | CrystalError]
    energy_ev: NDArray[np.float64]
    forces_ev_per_a: list[NDArray[np.float64] | None]
    stress_ev_per_a3: NDArray[np.float64]
    split: NDArray[np.str_]
    group: NDArray[np.str_]
    file: NDArray[np.int64]
    labels: list[tuple[str, dict[str, str]]]

    def __len__(self) -> int:
        return len(self.crystals)

    @property
    def name(self) -> str:
        """Names of the files, without their folders."""
        return ", ".join(Path(source).name for source, _ in self.labels)


def read_frames(
    table: Source | Sequence[Source] | Sequence[Atoms],
    *,
    split_column: str | None = None,
    where: dict[str, list[Any]] | None = None,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> Frames:
    """Read frames.

    Parameters
    ----------
    table
        Parquet or CSV tables, or data frames, with the columns ``energy_ev``, ``forces_ev_per_a``
        and ``stress_ev_per_a3`` (those that there are; lists of 3n and 9 numbers); extended XYZ
        files with these or other names of :data:`matxfer.potential.labels.NAMES`; or outputs that
        ASE reads. One, or several. Or ASE atoms whose calculators have been asked already.
    split_column
        Column that says ``train``, ``val`` or ``test``; where it names no ``val``, a tenth of the
        training frames is taken at random. Without a column all are split at random; equal
        structures, and where there are ten formulas or more frames of one formula, stay together.
    where
        Values that a row must have in other columns to be read.
    seed, fractions
        Of the random split.

    Raises
    ------
    TableError
        If a file or column is missing, or no frame has an energy or forces. A frame that cannot be
        used is an error among the crystals.
    """
    import pandas as pd

    given: list[Any] = [table] if isinstance(table, str | Path | pd.DataFrame) else list(table)
    if not given:
        raise TableError("no files of frames were given")
    if all(hasattr(one, "get_positions") for one in given):  # ASE's, without importing ASE
        given = [given]
    parts = [_read(one, split_column, where, several=len(given) > 1) for one in given]
    crystals = [crystal for part in parts for crystal in part.crystals]
    split = np.concatenate([part.split for part in parts])
    source = ", ".join(part.source for part in parts)
    if split_column is None:
        # Wide enough for "failed".
        split = random_split(_materials(crystals), fractions, seed).astype("<U8")
    elif not np.isin(split, SPLITS).any():
        raise TableError(
            f"{source}: column {split_column!r} holds none of {SPLITS}, but "
            f"{sorted(set(split.tolist()))[:5]}"
        )
    elif not (split == "val").any():
        train = np.flatnonzero(split == "train")
        taken = np.random.default_rng(seed).permutation(train)[: max(len(train) // 10, 1)]
        split[taken] = "val"
    return Frames(
        source,
        crystals,
        np.concatenate([part.energy_ev for part in parts]),
        [forces for part in parts for forces in part.forces_ev_per_a],
        np.concatenate([part.stress_ev_per_a3 for part in parts]),
        split,
        np.concatenate([part.group for part in parts]),
        np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        [label for part in parts for label in part.labels],
    )


def _read(
    table: Source | list[Atoms],
    split_column: str | None,
    where: dict[str, list[Any]] | None,
    *,
    several: bool,
) -> Frames:
    """Read one file; its split is that of the column."""
    frame, crystals, source = read_frame_file(table, where)
    labels = names_in([str(name) for name in frame.columns])
    if ENERGY not in labels and FORCES not in labels:
        raise TableError(
            f"{source}: there are neither energies nor forces (columns {list(frame.columns)}); "
            f"name them {ENERGY} and {FORCES}, or {NAMES[ENERGY][0]} and {NAMES[FORCES][0]}"
        )
    n = len(frame)
    split: NDArray[Any] = np.full(n, "", dtype="<U8")
    if split_column is not None:
        split = split_words(require_column(frame, split_column, source)).astype("<U8")
    read = Frames(
        source,
        crystals,
        np.full(n, np.nan),
        [None] * n,
        np.full((n, 3, 3), np.nan),
        split,
        _groups(frame, Path(source).name if several else ""),
        np.zeros(n, dtype=np.int64),
        [(source, labels)],
    )
    cells = {what: frame[name].tolist() for what, name in labels.items()}
    for row, crystal in enumerate(crystals):
        if isinstance(crystal, CrystalError):
            continue
        try:
            _fill(read, row, crystal, {what: column[row] for what, column in cells.items()})
        except LabelError as error:
            crystals[row] = CrystalError(
                str(error),
                "correct this frame, remove it, or leave out what was not calculated",
                source,
                int(frame.index[row]),
            )
    return read


def _fill(read: Frames, row: int, crystal: Crystal, cells: dict[str, Any]) -> None:
    """Read what was calculated of a frame."""
    ((_, labels),) = read.labels
    if ENERGY in cells:
        read.energy_ev[row] = energy_of(cells[ENERGY], labels[ENERGY])
    if FORCES in cells:
        read.forces_ev_per_a[row] = forces_of(cells[FORCES], labels[FORCES], crystal.n_sites)
    if STRESS in cells:
        stress = stress_of(cells[STRESS], labels[STRESS], crystal.volume_angstrom3)
        if stress is not None:
            read.stress_ev_per_a3[row] = stress
    if np.isnan(read.energy_ev[row]) and read.forces_ev_per_a[row] is None:
        raise LabelError(f"there is neither an energy nor are there forces ({labels})")


def _groups(frame: pd.DataFrame, name: str) -> NDArray[np.str_]:
    column = next((c for c in _GROUPS if c in frame.columns), None)
    words = [""] * len(frame) if column is None else frame[column].fillna("").tolist()
    return np.array([": ".join(filter(None, (name, str(word)))) for word in words], dtype=str)


def _materials(crystals: list[Crystal | CrystalError]) -> NDArray[np.int64]:
    """Return the number of each formula, or of each frame where there are few formulas, (n,)."""
    import pandas as pd

    names = ["" if isinstance(c, CrystalError) else c.formula for c in crystals]
    found, numbers = np.unique(names, return_inverse=True)
    if len(found) >= _FEW_FORMULAS:
        return np.asarray(numbers, dtype=np.int64)
    keys = [
        str(row) if isinstance(c, CrystalError) else c.content_key().hex()
        for row, c in enumerate(crystals)
    ]
    return np.asarray(pd.factorize(np.array(keys))[0], dtype=np.int64)
