"""One immutable crystal structure, the only form in which structures move through matxfer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.errors import ErrorKind, MatxferError

if TYPE_CHECKING:
    from ase import Atoms
    from numpy.typing import ArrayLike, NDArray
    from pymatgen.core.structure import Structure

MAX_ATOMIC_NUMBER = 118
MIN_VOLUME_ANGSTROM3 = 1e-3
#: Closer than this, two atoms are one atom written twice: the shortest bond known (H-H) is 0.74 Å.
MIN_DISTANCE_ANGSTROM = 0.5
#: Less room per atom than this, and some are closer than 0.5 Å however they are packed (d³/√2).
MIN_VOLUME_PER_ATOM_ANGSTROM3 = MIN_DISTANCE_ANGSTROM**3 / 2**0.5
#: Beyond these no crystal is meant, and searches for neighbours overflow or never end.
MAX_LENGTH_ANGSTROM = 1e4
MAX_SEARCH_STEPS = 1e8
MAX_FRACTION = 1e6


class CrystalError(MatxferError):
    """A structure that cannot be used: what is wrong, where it stands and what to do about it.

    Parameters
    ----------
    reason
        What is wrong, in one clause.
    remedy
        What the user can do about it.
    source
        File or table that the structure came from, if known.
    frame
        Index of the structure inside its source (frame, row or CIF block), if known.
    kind
        Which of the known kinds of problems it is.

    Examples
    --------
    >>> from matxfer import Crystal
    >>> Crystal([[1, 0, 0], [0, 1, 0], [1, 1, 0]], [29], [[0, 0, 0]])
    Traceback (most recent call last):
    matxfer.crystal.CrystalError: ...
    """

    def __init__(
        self,
        reason: str,
        remedy: str = "",
        source: str | None = None,
        frame: int | None = None,
        kind: ErrorKind = ErrorKind.UNREADABLE,
    ) -> None:
        self.kind = kind
        self.reason = reason
        self.remedy = remedy
        self.source = source
        self.frame = frame
        super().__init__(reason)

    def located(self, source: str | None, frame: int | None) -> CrystalError:
        """Return the same error with its place filled in where it was missing."""
        return CrystalError(
            self.reason,
            self.remedy,
            self.source if self.source is not None else source,
            self.frame if self.frame is not None else frame,
            self.kind,
        )

    def __str__(self) -> str:
        place = self.source or ""
        if self.frame is not None:
            place = f"{place} (frame {self.frame})" if place else f"frame {self.frame}"
        text = f"{place}: {self.reason}" if place else self.reason
        return f"{text}; {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[type[CrystalError], tuple[Any, ...]]:
        return CrystalError, (self.reason, self.remedy, self.source, self.frame, self.kind)


@dataclass(frozen=True, slots=True, eq=False)
class Crystal:
    """A crystal structure (lattice in Å, fractional coordinates), immutable and checked.

    Parameters
    ----------
    lattice
        Cell vectors as rows, shape (3, 3), in Å.
    numbers
        Atomic numbers, shape (n,).
    frac_coords
        Fractional coordinates, shape (n, 3).
    pbc
        Periodicity along each cell vector.
    id
        Free identifier, carried through to predictions.

    Raises
    ------
    CrystalError
        For wrong shapes, no atoms, non-finite numbers, a cell without volume or unknown species.
        Overlapping atoms are found where distances are computed, in :mod:`matxfer.graph`, or here
        on demand by :meth:`check_distances`.

    Examples
    --------
    >>> from matxfer import Crystal
    >>> salt = Crystal(
    ...     [[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]]
    ... )
    >>> salt.formula, salt.n_sites, round(salt.volume_angstrom3, 1)
    ('NaCl', 2, 43.9)
    """

    lattice: NDArray[np.float64]
    numbers: NDArray[np.int64]
    frac_coords: NDArray[np.float64]
    pbc: tuple[bool, bool, bool] = (True, True, True)
    id: str = ""

    def __init__(
        self,
        lattice: ArrayLike,
        numbers: ArrayLike,
        frac_coords: ArrayLike,
        pbc: bool | tuple[bool, bool, bool] = True,
        id: str = "",  # noqa: A002 - the field's own name
    ) -> None:
        try:
            lattice_ = np.array(lattice, dtype=np.float64).reshape(3, 3)
            numbers_ = np.array(numbers, dtype=np.float64).reshape(-1)
            frac_ = np.array(frac_coords, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise CrystalError(
                f"lattice, numbers or coordinates are not numeric arrays ({error})",
                "give a 3×3 lattice, n atomic numbers and n×3 fractional coordinates",
                kind=ErrorKind.BAD_COORDINATES,
            ) from error
        if frac_.size != 3 * numbers_.size:
            raise CrystalError(
                f"{numbers_.size} atoms but {frac_.size} coordinates",
                "give three fractional coordinates for every atom",
                kind=ErrorKind.BAD_COORDINATES,
            )
        flags = (pbc,) * 3 if isinstance(pbc, bool | np.bool_) else tuple(pbc)
        if len(flags) != 3:
            raise CrystalError(f"pbc has {len(flags)} entries", "give one flag per cell vector")
        _check(lattice_, numbers_, frac_, periodic=all(flags))
        for name, array in (
            ("lattice", lattice_),
            ("numbers", numbers_.astype(np.int64)),
            ("frac_coords", frac_.reshape(-1, 3)),
        ):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "pbc", tuple(bool(flag) for flag in flags))
        object.__setattr__(self, "id", str(id))

    # -- what it is ---------------------------------------------------------------------------
    @property
    def n_sites(self) -> int:
        """Number of atoms in the cell."""
        return len(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def volume_angstrom3(self) -> float:
        """Cell volume in Å³."""
        return float(abs(np.linalg.det(self.lattice)))

    @property
    def cart_coords(self) -> NDArray[np.float64]:
        """Cartesian coordinates in Å, shape (n, 3)."""
        return self.frac_coords @ self.lattice

    @property
    def formula(self) -> str:
        """Reduced chemical formula, metals first (``NaCl``, ``MgO``, ``CaTiO3``)."""
        from ase.data import chemical_symbols
        from ase.formula import Formula

        numbers, counts = np.unique(self.numbers, return_counts=True)
        symbols = {chemical_symbols[z]: int(c) for z, c in zip(numbers, counts, strict=True)}
        return Formula.from_dict(symbols).reduce()[0].format("metal")

    def content_key(self) -> bytes:
        """Return a 32-byte digest of lattice, species, coordinates and pbc (not of the id)."""
        digest = hashlib.sha256(self.lattice.tobytes())
        digest.update(self.numbers.tobytes())
        digest.update(self.frac_coords.tobytes())
        digest.update(bytes(self.pbc))
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Crystal):
            return NotImplemented
        return self.id == other.id and self.content_key() == other.content_key()

    def __hash__(self) -> int:
        return hash((self.id, self.content_key()))

    def __repr__(self) -> str:
        label = f"{self.id!r}, " if self.id else ""
        return f"Crystal({label}{self.formula}, {self.n_sites} sites)"

    def __reduce__(self) -> tuple[type[Crystal], tuple[Any, ...]]:
        return Crystal, (self.lattice, self.numbers, self.frac_coords, self.pbc, self.id)

    def with_id(self, id: str) -> Crystal:  # noqa: A002 - the field's own name
        """Return the same crystal under another id."""
        return Crystal(self.lattice, self.numbers, self.frac_coords, self.pbc, id)

    def check_distances(self) -> None:
        """Raise a :class:`CrystalError` if two atoms come closer than 0.5 Å, images too."""
        from matxfer.neighbors import neighbor_list

        receiver, sender, _, distance = neighbor_list(self, MIN_DISTANCE_ANGSTROM)
        if len(distance):
            raise overlap_error(self, receiver, sender, distance)

    def check_elements(self, known: frozenset[int]) -> None:
        """Raise a :class:`CrystalError` if there are elements that a model was not trained on."""
        foreign = sorted(set(self.numbers.tolist()) - known)
        if foreign:
            from ase.data import chemical_symbols

            names = ", ".join(chemical_symbols[z] for z in foreign)
            raise CrystalError(
                f"the model has never seen the element(s) {names}",
                "use a model that was trained on them",
                kind=ErrorKind.UNKNOWN_ELEMENT,
            )

    # -- from and to other libraries ----------------------------------------------------------
    @classmethod
    def from_pymatgen(cls, structure: Structure, id: str = "") -> Crystal:  # noqa: A002
        """Build from a pymatgen ``Structure``; disordered sites raise :class:`CrystalError`."""
        if not structure.is_ordered:
            site = next(s for s in structure if not s.is_ordered)
            raise CrystalError(
                f"disordered site {site.species_string!r} at {np.round(site.frac_coords, 4)}",
                "order it first, e.g. by pymatgen's OrderDisorderedStructureTransformation",
                kind=ErrorKind.DISORDERED,
            )
        try:
            numbers = [site.specie.Z for site in structure]
        except AttributeError as error:
            raise CrystalError(
                f"unknown species in {structure.formula!r}",
                "replace dummy species by elements",
                kind=ErrorKind.UNKNOWN_SPECIES,
            ) from error
        return cls(
            structure.lattice.matrix, numbers, structure.frac_coords, structure.lattice.pbc, id
        )

    def to_pymatgen(self) -> Structure:
        """Return a pymatgen ``Structure``."""
        from pymatgen.core.lattice import Lattice
        from pymatgen.core.structure import Structure

        return Structure(
            Lattice(self.lattice, pbc=self.pbc), self.numbers.tolist(), self.frac_coords
        )

    @classmethod
    def from_ase(cls, atoms: Atoms, id: str = "") -> Crystal:  # noqa: A002
        """Build from ASE ``Atoms``; missing cell vectors are completed along non-periodic axes."""
        pbc = tuple(bool(flag) for flag in atoms.pbc)
        missing = ~np.asarray(atoms.cell.any(axis=1))
        if np.any(missing & np.asarray(pbc)):
            raise CrystalError(
                "a periodic axis has no cell vector",
                "set the cell or switch pbc off along it",
                kind=ErrorKind.BAD_CELL,
            )
        cell = atoms.cell.complete()
        try:
            frac = np.linalg.solve(np.asarray(cell).T, atoms.positions.T).T
        except np.linalg.LinAlgError as error:
            raise CrystalError(
                "the cell has no volume", "check the cell vectors", kind=ErrorKind.BAD_CELL
            ) from error
        return cls(np.asarray(cell), atoms.numbers, frac, pbc, id)  # type: ignore[arg-type]

    def to_ase(self) -> Atoms:
        """Return ASE ``Atoms``."""
        from ase import Atoms

        return Atoms(
            numbers=self.numbers, cell=self.lattice, scaled_positions=self.frac_coords, pbc=self.pbc
        )


def overlap_error(
    crystal: Crystal,
    receiver: NDArray[np.int64],
    sender: NDArray[np.int64],
    distance_angstrom: NDArray[np.float64],
) -> CrystalError:
    """Describe the closest pair of atoms of a neighbour list as an error."""
    k = int(np.argmin(distance_angstrom))
    i, j = int(receiver[k]), int(sender[k])
    return CrystalError(
        f"atoms {i} and {j} (Z = {crystal.numbers[i]}, {crystal.numbers[j]}) overlap: they are "
        f"{distance_angstrom[k]:.3f} Å apart, less than {MIN_DISTANCE_ANGSTROM} Å",
        "remove the duplicate atom, or check the cell and the coordinates",
        kind=ErrorKind.OVERLAPPING_ATOMS,
    )


def _search_steps(lattice: NDArray[np.float64], n_sites: int) -> float:
    """Return about how many pairs a search for neighbours within 6 Å looks at, 6 ns each.

    That is so in narrow cells, of which many images lie within the radius; others have bins.
    """
    images = float(np.prod(1.0 + 12.0 * np.linalg.norm(np.linalg.inv(lattice), axis=0)))
    return images * n_sites**2 if images > 1e4 else 0.0


def _check(
    lattice: NDArray[np.float64],
    numbers: NDArray[np.float64],
    frac: NDArray[np.float64],
    *,
    periodic: bool,
) -> None:
    """Raise :class:`CrystalError` for what no crystal can be; ``periodic`` means in all three."""
    if numbers.size == 0:
        raise CrystalError("there are no atoms", "remove the empty structure", kind=ErrorKind.EMPTY)
    if not np.isfinite(lattice).all():
        raise CrystalError(
            "the lattice has missing or infinite entries",
            "fill in the cell",
            kind=ErrorKind.BAD_CELL,
        )
    if not np.isfinite(frac).all():
        bad = np.flatnonzero(~np.isfinite(frac.reshape(-1, 3)).all(axis=1))
        raise CrystalError(
            f"missing or infinite coordinates for atom(s) {bad[:5].tolist()}",
            "fill in the coordinates or remove these atoms",
            kind=ErrorKind.BAD_COORDINATES,
        )
    volume = abs(np.linalg.det(lattice))
    if volume < MIN_VOLUME_ANGSTROM3:
        raise CrystalError(
            f"the cell volume is {volume:.2g} Å³", "check the cell vectors", kind=ErrorKind.BAD_CELL
        )
    longest = float(np.linalg.norm(lattice, axis=1).max())
    # No spacing of lattice planes is below volume / longest²: mostly there is no more to compute.
    skewed = volume < longest**2 and _search_steps(lattice, numbers.size) > MAX_SEARCH_STEPS
    if longest > MAX_LENGTH_ANGSTROM or skewed:
        raise CrystalError(
            f"the cell is degenerate: its longest vector is {longest:.3g} Å, its volume "
            f"{volume:.3g} Å³",
            "check the cell vectors, or reduce the cell",
            kind=ErrorKind.BAD_CELL,
        )
    if periodic and volume < MIN_VOLUME_PER_ATOM_ANGSTROM3 * numbers.size:
        raise CrystalError(
            f"overlapping atoms: {numbers.size} of them in {volume:.3g} Å³",
            "check the cell vectors (Å) and the atoms",
            kind=ErrorKind.OVERLAPPING_ATOMS,
        )
    if not periodic and (extent := float(np.ptp(frac @ lattice, axis=0).max())) > (
        MAX_LENGTH_ANGSTROM
    ):
        raise CrystalError(
            f"the atoms are {extent:.3g} Å apart, and there is no cell or only a part of one",
            "check the coordinates and the cell",
            kind=ErrorKind.BAD_COORDINATES,
        )
    if np.abs(frac).max() > MAX_FRACTION:
        raise CrystalError(
            f"coordinates far outside of the cell ({np.abs(frac).max():.3g} cells)",
            "check the coordinates, or wrap them into the cell",
            kind=ErrorKind.BAD_COORDINATES,
        )
    unknown = ~(np.isfinite(numbers) & (numbers >= 1) & (numbers <= MAX_ATOMIC_NUMBER))
    unknown |= numbers != np.rint(numbers)
    if unknown.any():
        raise CrystalError(
            f"unknown species: atomic number(s) {np.unique(numbers[unknown])[:5].tolist()}",
            f"use the elements Z = 1 … {MAX_ATOMIC_NUMBER}",
            kind=ErrorKind.UNKNOWN_SPECIES,
        )
