"""Frames: structures with energy, forces and stress, read from tables and extended XYZ files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.table import (
    SPLITS,
    TableError,
    crystals_or_errors,
    open_table,
    random_split,
    require_column,
    rows_where,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

#: Columns of a table of frames.
#: From so many formulas on, frames of one formula stay in one part of a random split.
_FEW_FORMULAS = 10
ENERGY, FORCES, STRESS = "energy_ev", "forces_ev_per_a", "stress_ev_per_a3"


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
    """

    source: str
    crystals: list[Crystal | CrystalError]
    energy_ev: NDArray[np.float64]
    forces_ev_per_a: list[NDArray[np.float64] | None]
    stress_ev_per_a3: NDArray[np.float64]
    split: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.crystals)


def read_frames(
    table: str | Path | pd.DataFrame,
    *,
    split_column: str | None = None,
    where: dict[str, list[Any]] | None = None,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> Frames:
    """Read a table of frames.

    Parameters
    ----------
    table
        Parquet or CSV file, or data frame, with the columns ``energy_ev``, ``forces_ev_per_a`` and
        ``stress_ev_per_a3`` (those that there are; lists of 3n and 9 numbers).
    split_column
        Column that says ``train``, ``val`` or ``test``; where it names no ``val``, a tenth of the
        training frames is taken at random. Without a column all are split at random; frames of one
        formula stay together where there are ten formulas or more.
    where
        Values that a row must have in other columns to be read.
    seed, fractions
        Of the random split.

    Raises
    ------
    TableError
        If a column is missing, or no frame has an energy or forces.
    """
    from matxfer.readers import crystals_of_table

    frame, source = open_table(table)
    if not len(frame):
        raise TableError(f"{source}: the table has no rows")
    if ENERGY not in frame.columns and FORCES not in frame.columns:
        raise TableError(
            f"{source}: neither a column {ENERGY!r} nor {FORCES!r}; there are {list(frame.columns)}"
        )
    if where:
        frame = rows_where(frame, where, source)
    crystals = crystals_or_errors(crystals_of_table(frame, source))
    n = len(frame)
    energy = np.full(n, np.nan)
    if ENERGY in frame.columns:
        energy = frame[ENERGY].to_numpy(dtype=np.float64, na_value=np.nan)
    forces: list[NDArray[np.float64] | None] = [None] * n
    if FORCES in frame.columns:
        for row, cell in enumerate(frame[FORCES]):
            crystal = crystals[row]
            if isinstance(crystal, CrystalError) or cell is None:
                continue
            found = np.asarray(cell, dtype=np.float64).ravel()
            if found.size != 3 * crystal.n_sites or not np.isfinite(found).all():
                crystals[row] = CrystalError(
                    f"{FORCES!r} does not hold 3 x {crystal.n_sites} finite numbers",
                    "correct this row or remove it",
                    source,
                    row,
                )
                continue
            forces[row] = found.reshape(-1, 3)
    stress = np.full((n, 3, 3), np.nan)
    if STRESS in frame.columns:
        for row, cell in enumerate(frame[STRESS]):
            if cell is not None and len(cell) == 9:
                stress[row] = np.asarray(cell, dtype=np.float64).reshape(3, 3)
    if split_column is None:
        split = random_split(_materials(crystals), fractions, seed)
    else:
        words: NDArray[Any] = (
            require_column(frame, split_column, source).astype(str).str.lower().to_numpy()
        )
        split = words.astype("<U8")
        if not np.isin(split, SPLITS).any():
            raise TableError(f"{source}: column {split_column!r} holds none of {SPLITS}")
        if not (split == "val").any():
            train = np.flatnonzero(split == "train")
            taken = np.random.default_rng(seed).permutation(train)[: max(len(train) // 10, 1)]
            split[taken] = "val"
    return Frames(source, crystals, energy, forces, stress, split)


def _materials(crystals: list[Crystal | CrystalError]) -> NDArray[np.int64]:
    """Number the formulas, or the frames where there are few formulas, (n,)."""
    names = ["" if isinstance(c, CrystalError) else c.formula for c in crystals]
    found, numbers = np.unique(names, return_inverse=True)
    if len(found) < _FEW_FORMULAS:
        return np.arange(len(crystals))
    return np.asarray(numbers, dtype=np.int64)
