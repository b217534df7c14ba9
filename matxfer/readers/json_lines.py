"""JSON lines: one structure per line."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, TextIO

from matxfer.crystal import Crystal, CrystalError
from matxfer.readers.content import MAX_PART_BYTES, File, open_text
from matxfer.readers.entry import Item, attempt, stem_of
from matxfer.readers.monty_json import crystal_of_json, id_of, unique_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

_REMEDY = (
    "write one JSON object per line: a pymatgen structure, one under 'structure', CIF text under "
    "'cif', or 'lattice', 'numbers' and 'frac_coords'; an 'id' beside it"
)


def read_json_lines(path: File) -> Iterator[Item]:
    """Yield one item per line that is not empty.

    Raises
    ------
    CrystalError
        If a line is longer than any structure.
    """
    with open_text(path) as stream:
        yield from items_of_lines(stream, stem_of(path))


def items_of_lines(stream: TextIO, stem: str) -> Iterator[Item]:
    """Yield the items of a stream; see :func:`read_json_lines`."""
    frame = 0
    while line := stream.readline(MAX_PART_BYTES + 1):
        if len(line) > MAX_PART_BYTES:
            raise CrystalError("too large: a line without an end", _REMEDY)
        if line.isspace():
            continue
        try:
            value = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            yield frame, f"{stem}:{frame}", CrystalError(f"the line is no JSON ({error})", _REMEDY)
        else:
            name = id_of(value) or f"{stem}:{frame}"
            yield frame, name, attempt(partial(_crystal, value, name), "the structure", _REMEDY)
        frame += 1


def _crystal(value: object, name: str) -> Crystal:
    if isinstance(value, dict):
        if {"lattice", "numbers", "frac_coords"} <= value.keys():
            return Crystal(value["lattice"], value["numbers"], value["frac_coords"], id=name)
        if isinstance(value.get("cif"), str):
            from matxfer.readers.tables import crystal_of_cif

            return crystal_of_cif(value["cif"], name)
    return crystal_of_json(value, name)
