"""Forces of a table: checked against the structures, in eV/Å, those of extreme frames left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal, CrystalError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

_REMEDY = "correct this row or remove it"


def read_forces(
    column: pd.Series[Any], crystals: list[Crystal | CrystalError], path: Path
) -> tuple[list[Crystal | CrystalError], list[NDArray[np.float32] | None]]:
    """Read the forces on the atoms of each structure.

    Parameters
    ----------
    column
        Lists of 3n numbers, row-major, in eV/Å; its index says the rows of the file.
    crystals
        The structures.
    path
        The table.

    Returns
    -------
    crystals
        The same, with an error where the forces cannot be used.
    forces
        Shape (n, 3) each, None where there is an error.
    """
    checked: list[Crystal | CrystalError] = []
    forces: list[NDArray[np.float32] | None] = []
    for (row, cell), crystal in zip(column.items(), crystals, strict=True):
        found = None if isinstance(crystal, CrystalError) else _array(cell)
        reason = ""
        if isinstance(crystal, Crystal):
            if found is None or found.size != 3 * crystal.n_sites:
                reason = f"column {column.name!r} does not hold 3 x {crystal.n_sites} numbers"
            elif not np.isfinite(found).all():
                atom = int(np.flatnonzero(~np.isfinite(found))[0]) // 3
                reason = f"the force on atom {atom} in column {column.name!r} is no finite number"
        if reason:
            checked.append(CrystalError(reason, _REMEDY, str(path), int(str(row))))
            forces.append(None)
        else:
            checked.append(crystal)
            forces.append(None if found is None else found.reshape(-1, 3).astype(np.float32))
    return checked, forces


def _array(cell: Any) -> NDArray[np.float64] | None:
    """Return the numbers of a cell in one row; None if it holds anything else."""
    try:
        return np.asarray(cell, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        return None


def above(
    forces: list[NDArray[np.float32] | None], limit_ev_per_a: float | None
) -> NDArray[np.bool_]:
    """Say which rows have a larger force than the limit on one of their atoms, shape (n,)."""
    if limit_ev_per_a is None:
        return np.zeros(len(forces), dtype=bool)
    return np.array(
        [
            row is not None and bool(np.linalg.norm(row, axis=1).max(initial=0) > limit_ev_per_a)
            for row in forces
        ],
        dtype=bool,
    )
