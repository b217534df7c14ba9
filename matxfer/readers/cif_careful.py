"""The careful CIF path: says what is wrong with a block, and leaves the rest to pymatgen.

pymatgen repairs silently: it takes a coordinate ``.`` as 0, skips sites whose symbol it does not
know, falls back to P1 if it does not know the space group, and ignores a formula that the atoms
contradict. A prediction for the wrong crystal is worse than none, so these are errors here.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import gemmi
import numpy as np
from gemmi import cif

from matxfer.crystal import MIN_DISTANCE_ANGSTROM, Crystal, CrystalError, overlap_error
from matxfer.errors import ErrorKind
from matxfer.readers.cif_fast import (
    CELL_TAGS,
    FRACT_TAGS,
    OCCUPANCY_TOLERANCE,
    Sites,
    Tags,
    agrees,
    cell_matrix,
    fractions,
    plain_element,
    read_fast,
)
from matxfer.readers.cif_settings import WRITE_SYMOPS, settings
from matxfer.readers.entry import bad_cell, bad_coordinates, describe, unknown_species

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_SYSTEM_TAGS = ("_space_group_crystal_system", "_symmetry_cell_setting")
#: Only with one of these can pymatgen expand a magnetic structure; moments alone it reads as P1.
_MAGNETIC_SYMMETRY = ("_symop_magn_operation", "magn.name_bns", "magn.number_bns")
#: Sites times operations above which pymatgen, whose time grows with the square, is not asked.
LARGE = 1000


def read_careful(block: cif.Block) -> Sites:
    """Read a block of whatever kind, or say why it cannot be used.

    Parameters
    ----------
    block
        A block of a parsed CIF document. It is not changed.

    Returns
    -------
    Lattice (3, 3) in Å, atomic numbers (n,) and fractional coordinates (n, 3), in pymatgen's
    order of sites (by electronegativity).

    Raises
    ------
    CrystalError
        For missing atoms, cell or coordinates, unknown species, disorder, overlapping atoms, an
        unclear setting of the space group, or atoms that contradict the declared formula.
    """
    tags = Tags(block)
    if tags.doubled:
        raise CrystalError(
            f"the item {tags.doubled[0]} stands twice in the block",
            "remove the one that is not meant",
        )
    _check_coordinates(tags)
    _check_cell(tags)
    guessed = _check_symbols(tags)
    _check_sites(tags)
    declared = _declared(tags)
    if guessed and declared is None:
        raise unknown_species(
            f"unknown species: the site label {guessed!r} is no element symbol and there is no "
            "_atom_site_type_symbol",
            "add the column _atom_site_type_symbol with element symbols",
        )
    candidates = settings(tags)
    if declared is None and len(candidates[0]) == 1 and _multiplicity_above_one(tags):
        raise CrystalError(
            "the sites have multiplicities above 1, but there are no symmetry operations",
            f"{WRITE_SYMOPS}, or correct _atom_site_symmetry_multiplicity",
        )
    found: list[Crystal] = []
    problem: CrystalError | None = None
    for operations in candidates:
        try:
            found.append(_read_setting(block.name, tags, operations, declared))
        except CrystalError as error:
            problem = error
    if not found:
        assert problem is not None
        raise problem
    if len(found) > 1:
        raise CrystalError(
            "the space group is given by a symbol or number with two origin choices, and both "
            "give a possible crystal",
            WRITE_SYMOPS,
        )
    parameters = found[0].to_pymatgen().lattice.parameters
    lattice = cell_matrix(parameters)
    return found[0].lattice if lattice is None else lattice, found[0].numbers, found[0].frac_coords


def has_atoms(block: cif.Block) -> bool:
    """Return whether a block lists atoms at all, with whatever coordinates."""
    return any(
        tag.startswith(
            (
                "_atom_site_fract",
                "_atom_site_cartn",
                "_atom_site_label",
                "_atom_site_type_symbol",
                "_atom_site.",
            )
        )
        for tag in _all_tags(block)
    )


def _all_tags(block: cif.Block) -> list[str]:
    tags = Tags(block)
    return [*tags.pairs, *tags.columns]


def _check_coordinates(tags: Tags) -> None:
    missing = [tag for tag in FRACT_TAGS if tag not in tags]
    if missing:
        if "_atom_site_cartn_x" in tags or "_atom_site.cartn_x" in tags:
            raise bad_coordinates(
                "missing coordinates: the block has Cartesian coordinates only",
                "convert it to fractional coordinates (_atom_site_fract_x, _y, _z) first",
            )
        raise bad_coordinates(
            f"missing coordinates: there is no {missing[0]}",
            "export the file again with atom sites and fractional coordinates",
        )
    labels = tags.values("_atom_site_label") or tags.values("_atom_site_type_symbol")
    if not labels:
        raise unknown_species(
            "unknown species: the sites have neither _atom_site_label nor _atom_site_type_symbol",
            "add the column _atom_site_type_symbol with element symbols",
        )
    bad = ~np.isfinite(fractions(tags)).all(axis=1)
    if bad.any():
        names = [labels[i] for i in np.flatnonzero(bad)[:5]]
        raise bad_coordinates(
            f"missing coordinates for site(s) {', '.join(names)}",
            "fill in numbers for the coordinates, or remove these sites if they are no atoms",
        )


def _check_cell(tags: Tags) -> None:
    absent = [tag for tag in CELL_TAGS if tags.text(tag) is None]
    if absent:
        # With the crystal system, pymatgen completes a, b, c and the angles.
        if tags.text(*_SYSTEM_TAGS) is None or "_cell_length_a" in absent:
            raise bad_cell(
                f"there is no complete unit cell: {absent[0]} is missing",
                "add the six _cell_length_* and _cell_angle_* items",
            )
        return
    if cell_matrix([cif.as_number(tags.text(tag) or "?") for tag in CELL_TAGS]) is None:
        values = ", ".join(str(tags.text(tag)) for tag in CELL_TAGS)
        raise bad_cell(
            f"the cell parameters {values} span no volume",
            "check the _cell_* items (Å and degrees)",
        )


def _check_symbols(tags: Tags) -> str | None:
    """Refuse symbols that are no elements; return a label whose element has to be guessed."""
    from pymatgen.core.periodic_table import Element

    symbols = tags.values("_atom_site_type_symbol")
    guessed = None
    for text in symbols or tags.values("_atom_site_label"):
        letters = re.match(r"[A-Za-z]*", text)
        name = letters[0] if letters else ""
        if name and Element.is_valid_symbol(name.title()):
            if not symbols and not plain_element(text) and len(name) > 1 and name[1].isupper():
                guessed = text
            continue
        usable = (
            not symbols
            and name
            and (
                Element.is_valid_symbol(name[:2].title())
                or Element.is_valid_symbol(name[0].upper())
            )
        )
        if not usable or name.lower().startswith(("wat", "oh", "va", "du", "x")):
            raise unknown_species(
                f"unknown species {text!r}",
                "use element symbols in _atom_site_type_symbol; write out groups and remove "
                "vacancies and dummy sites",
            )
        guessed = text
    return guessed


def _check_sites(tags: Tags) -> None:
    """Refuse disordered, dummy and hydrogen-carrying sites."""
    labels = tags.values("_atom_site_label") or tags.values("_atom_site_type_symbol")
    for label, text in zip(labels, tags.values("_atom_site_occupancy"), strict=False):
        occupancy = cif.as_number(text)
        if np.isfinite(occupancy) and occupancy and abs(occupancy - 1) > OCCUPANCY_TOLERANCE:
            raise CrystalError(
                f"disordered site {label!r}: its occupancy is {occupancy:g}",
                "order it first, e.g. by pymatgen's OrderDisorderedStructureTransformation",
                kind=ErrorKind.DISORDERED,
            )
    for label, text in zip(labels, tags.values("_atom_site_calc_flag"), strict=False):
        if text == "dum":
            raise unknown_species(f"site {label!r} is a dummy", "remove the dummy sites from it")
    for label, text in zip(labels, tags.values("_atom_site_attached_hydrogens"), strict=False):
        if cif.as_number(text, 0.0) > 0:
            raise bad_coordinates(
                f"missing coordinates: site {label!r} has {text} hydrogen(s) without a position",
                "add the hydrogen atoms to the file",
            )


def _multiplicity_above_one(tags: Tags) -> bool:
    values = tags.values("_atom_site_symmetry_multiplicity")
    return any(cif.as_number(text, 1.0) > 1.0 for text in values)


def _declared(tags: Tags) -> tuple[str, dict[int, int], float | None] | None:
    """Return the declared formula as text, its counts by atomic number, and Z."""
    from pymatgen.core.composition import Composition

    formula = tags.text("_chemical_formula_sum")
    if formula is None:
        return None
    try:
        amounts = Composition(formula).get_el_amt_dict()
        counts = {gemmi.Element(symbol).atomic_number: n for symbol, n in amounts.items()}
    except (ValueError, KeyError, TypeError):
        return None
    if 0 in counts or any(n != int(n) for n in counts.values()):
        return None
    if len(counts) != len(amounts):  # H and D
        return None
    z = tags.text("_cell_formula_units_z")
    return formula, {k: int(n) for k, n in counts.items()}, None if z is None else cif.as_number(z)


def _read_setting(
    name: str,
    tags: Tags,
    operations: Sequence[str],
    declared: tuple[str, dict[int, int], float | None] | None,
) -> Crystal:
    """Let pymatgen read the essentials with given operations, and check what it makes of them."""
    block = _essentials(name, tags, operations)
    if len(operations) * len(tags.values(FRACT_TAGS[0])) > LARGE:
        crystal = _read_large(block)
    else:
        crystal = _read_with_pymatgen(block.as_string())
    if declared is not None:
        formula, counts, z = declared
        if not agrees(crystal.numbers, counts, z):
            units = "" if z is None else f" with Z = {z:g}"
            cell = crystal.to_ase().symbols.formula.format("metal")
            raise CrystalError(
                f"the atoms and symmetry operations give {cell!r} per cell, but the file declares "
                f"{formula!r}{units}",
                "complete the atoms (hydrogen?) or the symmetry operations, or remove "
                "_chemical_formula_sum and _cell_formula_units_Z if they are wrong",
            )
    return crystal


def _read_large(block: cif.Block) -> Crystal:
    """Read what would take pymatgen minutes, if what is essential in it is plain."""
    found = read_fast(block)
    if found is None:
        raise CrystalError(
            f"too large: a block that is not plain may have {LARGE} atoms at most",
            "write element symbols, occupancies of 1 and the symmetry operations, or P1",
            kind=ErrorKind.TOO_LARGE,
        )
    return Crystal(*found)


def _read_with_pymatgen(text: str) -> Crystal:
    from pymatgen.io.cif import CifParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parser = CifParser.from_str(text, check_cif=False)
            structure = parser.parse_structures(primitive=False, on_error="raise")[0]
        except Exception as error:
            detail = describe(error)
            if "exceeded tolerance" in detail:
                raise CrystalError(
                    "overlapping atoms: a position is occupied more than once",
                    "list each atom once: either the asymmetric unit with the symmetry "
                    "operations, or the whole cell with x,y,z only",
                    kind=ErrorKind.OVERLAPPING_ATOMS,
                ) from error
            raise CrystalError(
                f"the block could not be read ({detail})", "check the CIF with a validator"
            ) from error
    crystal = Crystal.from_pymatgen(structure)
    _check_overlap(crystal, structure.distance_matrix)
    return crystal


def _check_overlap(crystal: Crystal, distance: NDArray[np.float64]) -> None:
    i, j = np.nonzero(np.triu(distance < MIN_DISTANCE_ANGSTROM, 1))
    if len(i):
        raise overlap_error(crystal, i, j, distance[i, j])


def _essentials(name: str, tags: Tags, operations: Sequence[str]) -> cif.Block:
    """Return a block of only what decides the structure, under the tags' usual spelling.

    pymatgen compares tags case-sensitively, reads a single site that is no loop letter by letter,
    and stumbles over free text; none of that is left here.
    """
    block = cif.Block(name.replace(" ", "_") or "block")
    for tag in (*CELL_TAGS, *_SYSTEM_TAGS):
        value = tags.text(tag)
        if value is not None:
            block.set_pair(tag, cif.quote(value))
    magnetic = tags.any_marked(_MAGNETIC_SYMMETRY)
    if tags.any_marked(("_cell_modulation", "_cell_wave_vector")):
        raise bad_cell(
            "an incommensurate structure has no unit cell of atoms",
            "use a commensurate approximant",
        )
    if magnetic:
        _copy_magnetic(block, tags)
    else:
        loop = block.init_loop("_symmetry_equiv_pos_", ["as_xyz"])
        for operation in operations:
            loop.add_row([cif.quote(operation)])
    labels = tags.values("_atom_site_label") or tags.values("_atom_site_type_symbol")
    columns = {"label": labels}
    if symbols := tags.values("_atom_site_type_symbol"):
        columns["type_symbol"] = symbols
    for axis, values in zip("xyz", fractions(tags).T, strict=True):
        columns[f"fract_{axis}"] = [f"{value:.12g}" for value in values]
    occupancy = tags.values("_atom_site_occupancy")
    # Sites that are neither empty nor full were refused before.
    columns["occupancy"] = [
        "0" if occupancy and cif.as_number(occupancy[i]) == 0.0 else "1" for i in range(len(labels))
    ]
    loop = block.init_loop("_atom_site_", list(columns))
    for row in zip(*columns.values(), strict=True):
        loop.add_row([cif.quote(value) for value in row])
    return block


def _copy_magnetic(block: cif.Block, tags: Tags) -> None:
    """Copy the items of the magnetic space group, with the tags that pymatgen looks for."""
    spelled = {
        "_space_group_magn.name_bns": "_space_group_magn.name_BNS",
        "_space_group_magn.number_bns": "_space_group_magn.number_BNS",
        "_space_group_magn.transform_bns_pp_abc": "_space_group_magn.transform_BNS_Pp_abc",
    }
    for tag in tags.pairs:
        if "_magn" in tag and (value := tags.text(tag)) is not None:
            block.set_pair(spelled.get(tag, tag), cif.quote(value))
    for tag in tags.columns:
        if "symop_magn" in tag and tag.endswith("xyz"):
            prefix, _, last = tag.rpartition("xyz")
            loop = block.init_loop(prefix, [f"xyz{last}"])
            for value in tags.values(tag):
                loop.add_row([cif.quote(value)])
