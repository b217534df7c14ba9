"""What crystals are, in words that a chemist knows: class, prototype, size, room, vacuum."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from matxfer.crystal import MAX_ATOMIC_NUMBER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import Crystal

#: Symmetry is looked for up to such displacements: relaxed cells of databases are a bit off.
SYMPREC_ANGSTROM = 0.05
#: A gap between atoms wider than this along a cell vector is vacuum: no bond and no van der Waals
#: gap of a layered crystal is as wide.
VACUUM_ANGSTROM = 6.0

#: Class by the first of these that a compound holds.
_ANIONS = {
    9: "fluorides", 8: "oxides", 17: "chlorides", 35: "bromides", 53: "iodides", 7: "nitrides",
    16: "sulfides", 34: "selenides", 52: "tellurides", 15: "phosphides", 33: "arsenides",
    6: "carbides", 1: "hydrides", 5: "borides", 14: "silicides",
}  # fmt: skip
#: Those of them that stand for each other in a structure type, and the number that stands for all.
_FRAME_ANIONS = (7, 8, 9, 16, 17, 34, 35, 52, 53)
_ANION = 0
_NOBLE_GASES = {2, 10, 18, 36, 54, 86}
_NAMES = {
    ("ABX3", 221): "cubic perovskite",
    ("AX", 225): "rock salt",
    ("AX", 221): "caesium chloride",
    ("AX", 216): "zinc blende",
    ("AX", 186): "wurtzite",
    ("AX2", 225): "fluorite",
    ("AX2", 136): "rutile",
    ("AX2", 164): "CdI2",
    ("AB2X4", 227): "spinel",
    ("AB", 221): "caesium chloride",
    ("ABC2", 225): "Heusler",
    ("ABC", 216): "half-Heusler",
    ("A", 225): "fcc",
    ("A", 229): "bcc",
    ("A", 227): "diamond",
    ("A", 194): "hexagonal",
}


@dataclass(frozen=True, slots=True, eq=False)
class StructureFacts:
    """Facts of n crystals, in their order.

    Attributes
    ----------
    fractions
        Share of each element among the atoms, (n, 119), by atomic number.
    kind
        Class of compounds by anion: ``oxides``, ``intermetallics``, ``elements`` …, (n,).
    prototype
        Anonymous formula and space group, all anions taken for one, such as ``ABX3 221``, (n,).
    n_primitive
        Atoms of the primitive cell, (n,).
    volume_angstrom3
        Volume per atom, (n,).
    vacuum_angstrom
        Widest gap between atoms along a cell vector, (n,).
    """

    fractions: NDArray[np.float64]
    kind: NDArray[np.str_]
    prototype: NDArray[np.str_]
    n_primitive: NDArray[np.int64]
    volume_angstrom3: NDArray[np.float64]
    vacuum_angstrom: NDArray[np.float64]

    def take(self, rows: NDArray[np.int64]) -> StructureFacts:
        """Return the facts of some crystals."""
        return StructureFacts(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def structure_facts(crystals: Sequence[Crystal]) -> StructureFacts:
    """Look at crystals, about 1 ms each."""
    symmetry = [_symmetry(crystal, crystal.numbers) for crystal in crystals]
    prototypes = [_prototype(c, found[0]) for c, found in zip(crystals, symmetry, strict=True)]
    return StructureFacts(
        element_fractions(crystals),
        np.array([chemical_class(np.unique(c.numbers)) for c in crystals], dtype=str),
        np.array(prototypes, dtype=str),
        np.array([size for _, size in symmetry], dtype=np.int64),
        np.array([c.volume_angstrom3 / c.n_sites for c in crystals], dtype=float),
        np.array([vacuum_angstrom(c) for c in crystals], dtype=float),
    )


def element_fractions(crystals: Sequence[Crystal]) -> NDArray[np.float64]:
    """Return the share of each element among the atoms, (n, 119), by atomic number."""
    counts = [np.bincount(c.numbers, minlength=MAX_ATOMIC_NUMBER + 1) / c.n_sites for c in crystals]
    return np.array(counts, dtype=float).reshape(-1, MAX_ATOMIC_NUMBER + 1)


def chemical_class(numbers: NDArray[np.int64]) -> str:
    """Return the class of a compound of these elements."""
    present = set(numbers.tolist()) - _NOBLE_GASES
    if len(present) < 2:
        return "elements"
    found = next((name for z, name in _ANIONS.items() if z in present), None)
    return found or "intermetallics"


def anonymous_formula(numbers: NDArray[np.int64]) -> str:
    """Return the formula without the elements, rarest first, anions as X: ``ABX3`` for CaTiO3.

    ``numbers`` are those of :func:`one_anion`.
    """
    kinds, counts = np.unique(numbers, return_counts=True)
    divisor = gcd(*counts.tolist())
    letters = iter("ABCDEFGHIJKLMNOPQRSTUVW" * 6)
    metals = sorted(c for z, c in zip(kinds.tolist(), counts.tolist(), strict=True) if z != _ANION)
    anions = [int(counts[kinds == _ANION].sum())] if (kinds == _ANION).any() else []
    words = [*((next(letters), c) for c in metals), *(("X", c) for c in anions)]
    return "".join(f"{letter}{c // divisor if c > divisor else ''}" for letter, c in words)


def one_anion(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return atomic numbers with all anions of a compound as one: its frame, whatever fills it."""
    anion = np.isin(numbers, _FRAME_ANIONS)
    return np.where(anion & (~anion).any(), _ANION, numbers)


def prototype_name(prototype: str) -> str:
    """Return a prototype with the name of a likely structure type, where it has one."""
    formula, number = prototype.split()
    known = _NAMES.get((formula, int(number)))
    text = f"{formula} in space group {number}" if int(number) else formula
    return f"{text} ({known})" if known else text


def vacuum_angstrom(crystal: Crystal) -> float:
    """Return the widest gap between neighbouring atoms along a cell vector, as planes are apart."""
    heights = 1 / np.linalg.norm(np.linalg.inv(crystal.lattice), axis=0)
    at = np.sort(crystal.frac_coords % 1.0, axis=0)
    gaps = np.diff(np.concatenate([at, at[:1] + 1]), axis=0).max(axis=0)
    return float((gaps * heights).max())


def _prototype(crystal: Crystal, number: int) -> str:
    frame = one_anion(crystal.numbers)
    if len(np.unique(frame)) < len(np.unique(crystal.numbers)):
        number = _symmetry(crystal, frame)[0]
    return f"{anonymous_formula(frame)} {number}"


def _symmetry(crystal: Crystal, numbers: NDArray[np.int64]) -> tuple[int, int]:
    """Return the number of the space group, 0 if there is none, and the primitive cell's atoms."""
    import moyopy

    if not all(crystal.pbc):
        return 0, crystal.n_sites
    lattice, positions = crystal.lattice.tolist(), crystal.frac_coords.tolist()
    try:
        cell = moyopy.Cell(lattice, positions, numbers.tolist())
        found = moyopy.MoyoDataset(cell, symprec=SYMPREC_ANGSTROM)
    except Exception:  # noqa: BLE001 - no symmetry was found, whatever the search stumbled over
        return 0, crystal.n_sites
    return int(found.number), len(found.prim_std_cell.numbers)
