"""Structures of other libraries in memory → crystals, without importing these libraries."""

from __future__ import annotations

from typing import Any

from matxfer.crystal import Crystal


def is_atoms(item: object) -> bool:
    """Say whether this is an ASE ``Atoms``."""
    return hasattr(item, "get_positions")


def is_structure(item: object) -> bool:
    """Say whether this is a pymatgen ``Structure``."""
    return hasattr(item, "frac_coords") and hasattr(item, "lattice")


def crystal_of_object(item: Any, name: str = "") -> Crystal | None:
    """Return the crystal of a ``Crystal``, ASE ``Atoms`` or pymatgen ``Structure``.

    Parameters
    ----------
    item
        Anything; ``None`` is returned for what holds no structure.
    name
        Id of the crystal; one that has its own keeps it where this is empty.

    Raises
    ------
    CrystalError
        If the structure cannot be used, as with disorder or unknown species.
    """
    if isinstance(item, Crystal):
        return item.with_id(name) if name else item
    if is_atoms(item):
        return Crystal.from_ase(item, id=name)
    if is_structure(item):
        from matxfer.readers.monty_json import crystal_of_json

        return crystal_of_json(item, name)
    return None
