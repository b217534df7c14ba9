"""The symmetry operations that a CIF block means, written out or by the name of a group."""

from __future__ import annotations

import gemmi
from gemmi import cif

from matxfer.crystal import CrystalError
from matxfer.readers.cif_fast import SYMOP_TAGS, Tags

_HALL_TAGS = ("_space_group_name_hall", "_symmetry_space_group_name_hall")
_NAME_TAGS = (
    "_space_group_name_h-m_alt",
    "_symmetry_space_group_name_h-m",
    "_symmetry_space_group_name_h-m_alt",
    "_space_group_name_h-m_ref",
)
_NUMBER_TAGS = ("_space_group_it_number", "_symmetry_int_tables_number")
WRITE_SYMOPS = "write the symmetry operations (_space_group_symop_operation_xyz) into the file"


def settings(tags: Tags) -> list[list[str]]:
    """Return the possible lists of operations: one if the file says which, two for two origins.

    Raises
    ------
    CrystalError
        If the space group is unknown, symbol and number contradict each other, or operations are
        missing.
    """
    for tag in SYMOP_TAGS:
        texts = tags.values(tag)
        if texts and not all(cif.is_null(text) for text in texts):
            _check_group(texts)
            return [texts]
    hall = tags.text(*_HALL_TAGS)
    if hall is not None:
        try:
            return [[op.triplet() for op in gemmi.symops_from_hall(hall)]]
        except (RuntimeError, ValueError):
            pass
    name, number = tags.text(*_NAME_TAGS), tags.text(*_NUMBER_TAGS)
    if name is None and number is None:
        return [["x,y,z"]]
    return [[op.triplet() for op in g.operations()] for g in _space_groups(tags, name, number)]


def _check_group(triplets: list[str]) -> None:
    """Refuse operations that are no group: with one lost, atoms on general positions are lost."""
    try:
        every = [gemmi.Op(text).wrap() for text in ("x,y,z", *triplets)]
        operations = {op.triplet(): op for op in every}
        group = gemmi.GroupOps(list(operations.values()))
        group.add_missing_elements()
    except (RuntimeError, ValueError) as error:
        # pymatgen would go on without the operation.
        raise CrystalError(
            f"a symmetry operation cannot be understood ({error})",
            "write the operations like 'x+1/2,-y,z'",
        ) from error
    if len(group) != len(operations):
        raise CrystalError(
            f"the symmetry operations are not those of a group: {len(operations)} are there of "
            f"{len(group)}",
            "export the file again, with all operations",
        )


def _space_groups(tags: Tags, name: str | None, number: str | None) -> list[gemmi.SpaceGroup]:
    alpha, gamma = (
        cif.as_number(tags.text(f"_cell_angle_{k}") or "90") for k in ("alpha", "gamma")
    )
    if name is None:
        reference = gemmi.find_spacegroup_by_number(int(cif.as_number(number or "", 0.0)))
        name = None if reference is None else reference.hm
    group = None if name is None else gemmi.find_spacegroup_by_name(name, alpha, gamma)
    if group is None:
        raise CrystalError(
            f"unknown space group {name or number!r}, and there are no symmetry operations",
            WRITE_SYMOPS,
        )
    if number is not None and cif.as_number(number) != group.number:
        raise CrystalError(
            f"space group {name!r} is number {group.number}, but the file says {number}",
            WRITE_SYMOPS,
        )
    if ":" in (name or "") or group.ext not in {"1", "2"}:
        return [group]
    return [g for g in gemmi.spacegroup_table() if g.hm == group.hm and g.ext in {"1", "2"}]
