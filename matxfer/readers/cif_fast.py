"""The fast CIF path: plain ordered structures with explicit symmetry operations, through gemmi.

It answers only where it is sure, and returns None otherwise. The expansion is ours rather than
``gemmi.SmallStructure.get_all_unit_cell_sites`` because that one merges whatever lies within
0.4 Å without saying so and leaves special positions as they were rounded in the file.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias, cast

import gemmi
import numpy as np
from gemmi import cif

from matxfer.crystal import MIN_DISTANCE_ANGSTROM, CrystalError
from matxfer.errors import ErrorKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: Lattice (3, 3) in Å, atomic numbers (n,), fractional coordinates (n, 3).
Sites: TypeAlias = tuple["NDArray[np.float64]", "NDArray[np.int64]", "NDArray[np.float64]"]

#: Two symmetry images of one atom closer than this are one atom on a special position whose
#: coordinates were rounded: three digits in a 30 Å cell are off by 0.05 Å.
SAME_SITE_ANGSTROM = 0.1
#: Planes closer than this: rounding a difference vector need not give the nearest image.
MIN_PLANE_SPACING_ANGSTROM = 1.0
OCCUPANCY_TOLERANCE = 1e-4
#: Bounds the temporary arrays of the expansion to a few MB.
MAX_PAIRS = 200_000
#: Distances between sites and images that are looked at, about a second.
MAX_DISTANCES = 50_000_000
MAX_IMAGES = 2_000_000

CELL_TAGS = tuple(f"_cell_{kind}" for kind in ("length_a", "length_b", "length_c")) + tuple(
    f"_cell_{kind}" for kind in ("angle_alpha", "angle_beta", "angle_gamma")
)
FRACT_TAGS = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")
SYMOP_TAGS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
#: Signs of a magnetic structure, whose operations act on moments too.
MAGNETIC_MARKS = ("_magn", "_atom_site_moment", "_cell_modulation", "_cell_wave_vector")

_DECISIVE = ("_cell_", "_atom_site_", "_symmetry_", "_space_group_", "_chemical_formula_sum")
_TYPE_SYMBOL = re.compile(r"([A-Z][a-z]?)(?:\d*[+-]|[+-]\d+)?")
_LABEL = re.compile(r"([A-Z][a-z]?)\d*")
_FORMULA_PART = re.compile(r"([A-Z][a-z]?)(\d*)(?:\s+|$)")


class Tags:
    """The items of a CIF block by lower-case tag (CIF tags ignore case)."""

    __slots__ = ("columns", "doubled", "pairs")

    def __init__(self, block: cif.Block) -> None:
        self.pairs: dict[str, str] = {}
        self.columns: dict[str, tuple[cif.Loop, int]] = {}
        #: Items of the structure that stand twice: libraries differ in which they take.
        self.doubled: list[str] = []
        for item in block:
            pair = cast("list[str] | None", item.pair)
            if pair is not None:
                tag = pair[0].lower()
                if tag in self or (not pair[1] and tag.startswith(_DECISIVE)):
                    self._double(tag, pair[1])
                self.pairs[tag] = pair[1]
            elif (loop := item.loop) is not None:
                for index, name in enumerate(loop.tags):
                    tag = name.lower()
                    if tag in self:
                        self._double(tag, None)
                    self.columns[tag] = (loop, index)

    def _double(self, tag: str, value: str | None) -> None:
        if tag.startswith(_DECISIVE) and (value is None or self.pairs.get(tag) != value):
            self.doubled.append(tag)

    def __contains__(self, tag: str) -> bool:
        return tag in self.columns or tag in self.pairs

    def any_marked(self, marks: Sequence[str]) -> bool:
        """Return whether a tag contains one of ``marks``."""
        names = " ".join((*self.pairs, *self.columns))
        return any(mark in names for mark in marks)

    def text(self, *tags: str) -> str | None:
        """Return the unquoted value of the first of ``tags`` that has one."""
        for tag in tags:
            value = self.pairs.get(tag)
            if value is not None and not cif.is_null(value):
                return cif.as_string(value).strip()
        return None

    def values(self, tag: str) -> list[str]:
        """Return a column unquoted, as a list of one value where it is no loop, [] if absent."""
        entry = self.columns.get(tag)
        if entry is None:
            return [cif.as_string(self.pairs[tag])] if tag in self.pairs else []
        loop, index = entry
        values = loop.values[index :: loop.width()]
        return [cif.as_string(v) if v[0] in "'\";" else v for v in values]


def read_fast(block: cif.Block) -> Sites | None:
    """Read a block that leaves no room for doubt.

    Parameters
    ----------
    block
        A block of a parsed CIF document.

    Returns
    -------
    Lattice (3, 3) in Å (a along x, b in the xy plane), atomic numbers (n,) and fractional
    coordinates (n, 3) in [0, 1), atoms in the order of the file; or None if the careful path has
    to decide.
    """
    tags = Tags(block)
    present = all(tag in tags.columns for tag in FRACT_TAGS)
    if not present or tags.doubled or tags.any_marked(MAGNETIC_MARKS):
        return None
    numbers = _numbers(tags)
    operations = _operations(tags)
    lattice = cell_matrix([cif.as_number(tags.pairs.get(tag, "?")) for tag in CELL_TAGS])
    if numbers is None or operations is None or lattice is None or not _plain_sites(tags):
        return None
    frac = fractions(tags)
    if not np.isfinite(frac).all():
        return None
    multiplicity = np.ones(len(frac), dtype=np.int64)
    if len(operations[0]) > 1:
        expanded = expand(lattice, frac, *operations)
        if expanded is None:
            return None
        frac, of_site = expanded
        multiplicity = np.bincount(of_site)
        numbers = numbers[of_site]
    frac = frac - np.floor(frac)
    if not _counts_agree(tags, numbers) or not _multiplicities_agree(tags, multiplicity):
        return None
    return lattice, numbers, frac


def cell_matrix(parameters: Sequence[float]) -> NDArray[np.float64] | None:
    """Return the cell vectors as rows in Å from a, b, c (Å) and α, β, γ (degrees), or None.

    Both paths use it, so that a crystal does not turn when the path changes.
    """
    if not all(0.0 < value < 1e4 for value in parameters) or max(parameters[3:]) >= 180.0:
        return None
    lattice = np.array(gemmi.UnitCell(*parameters).orth.mat.tolist()).T
    volume = lattice[0, 0] * lattice[1, 1] * lattice[2, 2]
    return lattice if np.isfinite(volume) and volume > 1e-3 else None


def fractions(tags: Tags) -> NDArray[np.float64]:
    """Return the fractional coordinates, shape (m, 3); missing ones are NaN.

    A coordinate written as 0.3333 or 0.6667 (sixths too) means the fraction: taken literally it
    breaks the symmetry of the crystal. Coordinates with a standard uncertainty were refined, so
    they are meant as written.
    """
    texts = [tags.values(tag) for tag in FRACT_TAGS]
    frac = np.array([[cif.as_number(text) for text in column] for column in texts])
    sixths = np.rint(frac * 6.0)
    with np.errstate(invalid="ignore"):
        near = (np.abs(frac * 6.0 - sixths) < 6e-4) & (np.mod(sixths, 3.0) != 0.0)
    for axis, row in zip(*np.nonzero(near), strict=True):
        text = texts[axis][row]
        digits = len(text.partition(".")[2])
        ideal = sixths[axis, row] / 6.0
        in_last_digits = (abs(frac[axis, row]) - abs(ideal)) * 10.0**digits
        # Rounded (0.6667) or cut off (0.6666), but not 0.6668.
        if "(" not in text and -1.0 < in_last_digits < 0.5:
            frac[axis, row] = ideal
    return np.ascontiguousarray(frac.T)


def expand(
    lattice: NDArray[np.float64],
    frac: NDArray[np.float64],
    rotations: NDArray[np.float64],
    translations: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Apply the operations of a space group to the sites of the asymmetric unit.

    Each site is first moved onto its special position, the mean of its images under the
    operations that leave it in place; after that its images coincide to rounding error.

    Parameters
    ----------
    lattice
        Cell vectors as rows, shape (3, 3), in Å.
    frac
        Sites of the asymmetric unit, shape (m, 3).
    rotations, translations
        The g operations, shapes (g, 3, 3) and (g, 3), acting on fractional coordinates.

    Returns
    -------
    Fractional coordinates (n, 3) and the index of the site each atom comes from (n,); or None if
    atoms come closer than 0.5 Å without being clearly the same, or if the sites overlap.

    Raises
    ------
    CrystalError
        If there are more than two million images.
    """
    g, m = len(rotations), len(frac)
    if g * m > MAX_IMAGES:
        raise CrystalError(
            f"too large: {m} sites and {g} symmetry operations",
            "use a smaller cell",
            kind=ErrorKind.TOO_LARGE,
        )
    if (1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0)).min() < MIN_PLANE_SPACING_ANGSTROM:
        return None
    images = _images(frac, rotations, translations)
    own = images - frac[:, None]  # (m, g, 3)
    own -= np.rint(own)
    distance2 = _squared_length(own, lattice)  # (m, g)
    stays = distance2 < SAME_SITE_ANGSTROM**2
    if ((distance2 < MIN_DISTANCE_ANGSTROM**2) & ~stays).any():
        return None
    # Of large ones only the graph is asked for overlaps: here it takes time quadratic in m.
    if m > 1 and m * m * g <= MAX_DISTANCES and _sites_overlap(lattice, frac, images):
        return None
    order = stays.sum(axis=1)  # (m,) order of each site's symmetry group
    special = frac + (own * stays[..., None]).sum(axis=1) / order[:, None]
    images = _images(special, rotations, translations)
    # Equal images share a bin; the shift keeps the usual fractions off the bins' edges, and the
    # count below catches the rest.
    bins = np.floor(np.mod(images + 3.7e-6, 1.0) * 1e5).astype(np.int64)
    key = (bins[..., 0] * 100_000 + bins[..., 1]) * 100_000 + bins[..., 2]  # (m, g)
    key += np.arange(m)[:, None] * 10**15
    _, first = np.unique(key, return_index=True)
    first.sort()
    of_site = first // g
    if not np.array_equal(np.bincount(of_site, minlength=m) * order, np.full(m, g)):
        return None
    return images.reshape(-1, 3)[first], of_site


def _images(
    frac: NDArray[np.float64], rotations: NDArray[np.float64], translations: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return R x + t for all sites and operations, shape (m, g, 3)."""
    # One product with the stacked rotations: many small ones are several times slower.
    stacked = rotations.transpose(2, 0, 1).reshape(3, -1)
    return (frac @ stacked).reshape(len(frac), -1, 3) + translations


def _squared_length(
    delta: NDArray[np.float64], lattice: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return |delta|² in Å² of fractional vectors (..., 3), shape (...)."""
    cartesian = delta.reshape(-1, 3) @ lattice
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", cartesian, cartesian)
    return squares.reshape(delta.shape[:-1])


def _sites_overlap(
    lattice: NDArray[np.float64], frac: NDArray[np.float64], images: NDArray[np.float64]
) -> bool:
    """Return whether an image (m, g, 3) of one site lies within 0.5 Å of another site (m, 3)."""
    m, g = images.shape[:2]
    step = max(1, MAX_PAIRS // (m * g))
    for start in range(0, m, step):
        delta = images[None] - frac[start : start + step, None, None]  # (step, m, g, 3)
        delta -= np.rint(delta)
        close: NDArray[np.bool_] = np.any(
            _squared_length(delta, lattice) < MIN_DISTANCE_ANGSTROM**2, axis=2
        )
        rows = np.arange(len(close))
        close[rows, start + rows] = False  # a site's own images were looked at before
        if close.any():
            return True
    return False


def _numbers(tags: Tags) -> NDArray[np.int64] | None:
    """Return the atomic numbers (m,) if every symbol is plainly an element."""
    symbols = tags.values("_atom_site_type_symbol")
    pattern = _TYPE_SYMBOL if symbols else _LABEL
    numbers = [plain_element(s, pattern) for s in symbols or tags.values("_atom_site_label")]
    return np.array(numbers, dtype=np.int64) if numbers and all(numbers) else None


@lru_cache(maxsize=4096)
def plain_element(symbol: str, pattern: re.Pattern[str] = _LABEL) -> int:
    """Return the atomic number of a symbol that can be read in one way only, else 0."""
    match = pattern.fullmatch(symbol)
    return int(gemmi.Element(match[1]).atomic_number) if match else 0


def _operations(tags: Tags) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    for tag in SYMOP_TAGS:
        if tag in tags:
            return _parse_operations(tuple(tags.values(tag)))
    return None


@lru_cache(maxsize=1024)
def _parse_operations(
    triplets: tuple[str, ...],
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return rotations (g, 3, 3) and translations (g, 3) if the triplets form a group."""
    try:
        operations = [gemmi.Op(triplet).wrap() for triplet in triplets]
        group = gemmi.GroupOps(operations)
        group.add_missing_elements()
    except (RuntimeError, ValueError):
        return None
    names = {op.triplet() for op in operations}
    if len(group) != len(operations) or len(names) != len(operations) or "x,y,z" not in names:
        return None
    rotations = np.array([op.rot for op in operations], dtype=np.float64) / gemmi.Op.DEN
    translations = np.array([op.tran for op in operations], dtype=np.float64) / gemmi.Op.DEN
    if not np.isin(rotations, (-1.0, 0.0, 1.0)).all():
        return None
    return rotations, translations


def _plain_sites(tags: Tags) -> bool:
    """Return whether all sites are fully occupied, real and free of disorder groups."""
    for value in tags.values("_atom_site_occupancy"):
        # The CIF dictionary's default for "." is full occupancy; "?" is for the careful path.
        if value not in {"1", "1.0", "."} and not (
            abs(cif.as_number(value) - 1.0) <= OCCUPANCY_TOLERANCE
        ):
            return False
    doubtful = (
        ("_atom_site_disorder_group", {".", "?", "0"}),
        ("_atom_site_disorder_assembly", {".", "?"}),
        ("_atom_site_attached_hydrogens", {".", "?", "0"}),
    )
    if any(not allowed.issuperset(tags.values(tag)) for tag, allowed in doubtful if tag in tags):
        return False
    return "dum" not in tags.values("_atom_site_calc_flag")


@lru_cache(maxsize=4096)
def _parse_formula(text: str) -> dict[int, int] | None:
    """Return counts by atomic number for a formula such as ``Na4 Cl4``, else None."""
    parts = _FORMULA_PART.findall(text)
    if "".join(a + b for a, b in parts) != "".join(text.split()):
        return None
    counts: dict[int, int] = {}
    for symbol, count in parts:
        number = int(gemmi.Element(symbol).atomic_number)
        counts[number] = counts.get(number, 0) + int(count or 1)
    return None if 0 in counts else counts


def _counts_agree(tags: Tags, numbers: NDArray[np.int64]) -> bool:
    """Return whether the atoms agree with the declared formula and Z, as far as declared."""
    formula = tags.text("_chemical_formula_sum")
    if formula is None:
        return True
    declared = _parse_formula(formula)
    if not declared:
        return False
    z = tags.text("_cell_formula_units_z")
    return agrees(numbers, declared, None if z is None else cif.as_number(z))


def agrees(numbers: NDArray[np.int64], declared: dict[int, int], z: float | None) -> bool:
    """Return whether the atoms are the declared formula, ``z`` times if that is known.

    pymatgen writes the formula of the whole cell beside the number of reduced formula units in
    it, so a formula that is already the whole cell, and divisible by ``z``, agrees too.
    """
    found = Counter(numbers.tolist())
    if found.keys() != declared.keys():
        return False
    ratios = {found[k] / declared[k] for k in found}
    ratio = ratios.pop()
    if ratios:
        return False
    if z is None or ratio == z:
        return True
    return ratio == 1 and all(count % z == 0 for count in declared.values())


def _multiplicities_agree(tags: Tags, multiplicity: NDArray[np.int64]) -> bool:
    """Return whether the declared multiplicities, where they are numbers, are those found."""
    declared = tags.values("_atom_site_symmetry_multiplicity")
    return all(
        cif.is_null(text) or cif.as_number(text) == found
        for text, found in zip(declared, multiplicity, strict=False)
    )
