"""Relaxed structures as frames: what a calculation has relaxed has neither forces nor stress.

Databases of relaxed structures are far larger than those of forces, and tell for each of their
materials where the slope of the energy is zero: its bond lengths and its volume. Forces of such
structures are below the threshold of their relaxation, some 10 meV/Å.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal
from matxfer.data.table import crystals_or_errors, open_table, rows_where
from matxfer.potential.frames import Frames

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    import pandas as pd


def relaxed_frames(
    table: str | Path | pd.DataFrame,
    *,
    where: dict[str, list[Any]] | None = None,
    n: int = 6000,
    max_sites: int = 12,
    leave_out: Collection[str] = (),
    seed: int = 0,
) -> Frames:
    """Return relaxed structures as training frames without energies, forces and stresses zero.

    Parameters
    ----------
    table
        Table of structures.
    where
        Values that a row must have in other columns.
    n
        At most so many, drawn at random.
    max_sites
        Larger cells are left out: small ones tell as much in less time.
    leave_out
        Reduced formulas to leave out, such as those that are to be tested on.
    seed
        Of the draw.

    Raises
    ------
    TableError
        If a column is missing, or no row is left.
    """
    from matxfer.readers import crystals_of_table

    frame, source = open_table(table)
    if where:
        frame = rows_where(frame, where, source)
    order = np.random.default_rng(seed).permutation(len(frame))
    chosen: list[Crystal] = []
    outside = set(leave_out)
    # By and by: parsing a large table for a few rows of it takes longer than the rest.
    for start in range(0, len(order), n):
        if len(chosen) >= n:
            break
        rows = np.sort(order[start : start + n])
        for crystal in crystals_or_errors(crystals_of_table(frame.iloc[rows], source)):
            fits = isinstance(crystal, Crystal) and 1 <= crystal.n_sites <= max_sites
            if fits and isinstance(crystal, Crystal) and crystal.formula not in outside:
                chosen.append(crystal)
    chosen = chosen[:n]
    size = len(chosen)
    return Frames(
        source=source,
        crystals=list(chosen),
        energy_ev=np.full(size, np.nan),
        forces_ev_per_a=[np.zeros((c.n_sites, 3)) for c in chosen],
        stress_ev_per_a3=np.zeros((size, 3, 3)),
        split=np.full(size, "train", dtype="<U8"),
        group=np.full(size, "relaxed", dtype="<U8"),
        file=np.zeros(size, dtype=np.int64),
        labels=[(source, {})],
    )
