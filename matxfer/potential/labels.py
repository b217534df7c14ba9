"""What was calculated of a frame: its names in tables and extended XYZ, its shapes, its checks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import MatxferError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

#: Columns of a table of frames, in eV, eV/Å and eV/Å³.
ENERGY, FORCES, STRESS = "energy_ev", "forces_ev_per_a", "stress_ev_per_a3"
#: Names that these have, without regard to case; the first that a source has is read. Marked
#: reference values come first: beside them, plain ones are often those of another model. The
#: energy comes before the free energy, since tables of ground states are written so.
NAMES: dict[str, tuple[str, ...]] = {
    ENERGY: ("ref_energy", "dft_energy", ENERGY, "energy", "total_energy", "free_energy"),
    FORCES: ("ref_forces", "ref_force", "dft_forces", "dft_force", FORCES, "forces", "force"),
    STRESS: (
        *("ref_stress", "dft_stress", STRESS, "stress"),
        *("ref_virial", "ref_virials", "dft_virial", "dft_virials", "virial", "virials"),
    ),
}
#: Places of ASE's six stresses (xx, yy, zz, yz, xz, xy) in the matrix.
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


class LabelError(MatxferError):
    """A value that cannot be used: what is wrong with it."""


def names_in(present: Iterable[str]) -> dict[str, str]:
    """Return under which name a source has energy, forces and stress, those that it has."""
    known = {name.lower(): name for name in present}
    found = {}
    for what, names in NAMES.items():
        name = next((known[name] for name in names if name in known), None)
        if name is not None:
            found[what] = name
    return found


def energy_of(cell: Any, name: str) -> float:
    """Return an energy in eV, NaN where there is none.

    Raises
    ------
    LabelError
        If the cell holds anything but one finite number.
    """
    found = _numbers(cell, name)
    if found is None:
        return float("nan")
    if found.size != 1 or not np.isfinite(found).all():
        raise LabelError(f"{name!r} is {_shown(cell)}, which is no finite number")
    return float(found[0])


def forces_of(cell: Any, name: str, n_atoms: int) -> NDArray[np.float64] | None:
    """Return forces (n_atoms, 3) in eV/Å, None where there are none.

    Raises
    ------
    LabelError
        If the cell does not hold three finite numbers per atom.
    """
    found = _numbers(cell, name)
    if found is None:
        return None
    if found.size != 3 * n_atoms:
        raise LabelError(f"{name!r} holds {found.size} numbers, not 3 x {n_atoms}")
    if not np.isfinite(found).all():
        atom = int(np.flatnonzero(~np.isfinite(found))[0]) // 3
        raise LabelError(f"the force on atom {atom} in {name!r} is no finite number")
    return found.reshape(-1, 3)


def stress_of(cell: Any, name: str, volume_angstrom3: float) -> NDArray[np.float64] | None:
    """Return a stress (3, 3) in eV/Å³, negative for a compressed cell; None where there is none.

    Nine numbers are the matrix, six the components xx, yy, zz, yz, xz, xy as in ASE. A virial is
    -σ V in eV, positive for a compressed cell, as programs of machine-learnt potentials write it.

    Raises
    ------
    LabelError
        If the cell does not hold nine or six finite numbers, or the matrix is not symmetric.
    """
    found = _numbers(cell, name)
    if found is None:
        return None
    if found.size not in (6, 9):
        raise LabelError(
            f"{name!r} holds {found.size} numbers, not 9 (a matrix) or 6 (xx, yy, zz, yz, xz, xy)"
        )
    if not np.isfinite(found).all():
        raise LabelError(f"a component of {name!r} is no finite number")
    stress = found[_VOIGT] if found.size == 6 else found.reshape(3, 3)
    if np.abs(stress - stress.T).max() > 1e-2 * max(float(np.abs(stress).max()), 0.1):
        raise LabelError(f"{name!r} is no symmetric matrix: {np.round(stress, 4).tolist()}")
    return -stress / volume_angstrom3 if "virial" in name.lower() else stress


def _numbers(cell: Any, name: str) -> NDArray[np.float64] | None:
    """Return what a cell holds in one row of numbers, None if it is empty."""
    if cell is None or type(cell).__name__ == "NAType":
        return None
    try:
        value = json.loads(cell) if isinstance(cell, str) else cell
        # Parquet gives nested lists as arrays of arrays.
        nested = isinstance(value, list | tuple) or getattr(value, "dtype", "") == np.dtype("O")
        parts = [np.ravel(part) for part in value] if nested else [np.ravel(value)]
        return np.concatenate([np.zeros(0), *parts]).astype(np.float64)
    except (TypeError, ValueError):
        raise LabelError(f"{name!r} is {_shown(cell)}, not numbers") from None


def _shown(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) < 50 else f"{text[:47]}..."
