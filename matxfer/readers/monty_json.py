"""pymatgen structures in JSON, as monty and matbench write them.

Monty's decoder would import whatever module the file names, which is no thing to do with other
people's files, and ``Structure.from_dict`` hands it the properties of every site: so it is given
the lattice, the species and the coordinates, and nothing else.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.content import Content, File, read_text
from matxfer.readers.entry import Item, attempt, stem_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_REMEDY = "write it again with pymatgen's Structure.as_dict() or Structure.to('name.json')"
_LATTICE = ("matrix", "pbc", "a", "b", "c", "alpha", "beta", "gamma")
_SPECIES = ("element", "occu", "oxidation_state")
_KEYS_WITH_ID = ("material_id", "entry_id", "id", "task_id", "name")


def read_json(path: File) -> Iterator[Item]:
    """Yield one item per structure of a JSON document.

    Understood are a ``Structure`` dictionary; a dictionary with a ``structure`` key (as of a
    ``ComputedStructureEntry``); lists of these; a mapping of ids to these; a data frame in split
    form (``columns``, ``index``, ``data``: matbench); and ASE's JSON databases.

    Raises
    ------
    CrystalError
        If the file is empty, is no JSON or has another shape.
    """
    stem = stem_of(path)
    try:
        content = json.loads(read_text(path), object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise CrystalError("this JSON is nested too deeply", _REMEDY) from error
    except ValueError as error:
        raise CrystalError(f"this is no valid JSON ({error})", _REMEDY) from error
    if isinstance(content, dict) and {"ids", "nextid"} <= content.keys():
        from matxfer.readers.ase_database import read_ase_db

        if isinstance(path, Content):
            raise CrystalError("ASE reads its databases from disk only", "unpack the archive first")
        yield from read_ase_db(path, kind="json")
        return
    for frame, (name, value) in enumerate(_records(content, stem)):
        build = partial(crystal_of_json, value, name)
        yield frame, name, attempt(build, "the structure", _REMEDY)


def crystal_of_json(value: object, name: str = "") -> Crystal:
    """Return the crystal of a pymatgen structure in JSON form.

    Parameters
    ----------
    value
        A dictionary, its JSON text, or a pymatgen ``Structure``.
    name
        Id of the crystal.

    Raises
    ------
    CrystalError
        If there is no structure in it, or it is disordered or has unknown species.
    """
    from pymatgen.core.periodic_table import DummySpecies
    from pymatgen.core.structure import Structure

    if isinstance(value, str | bytes):
        value = json.loads(value, object_pairs_hook=unique_keys)
    if isinstance(value, dict) and not _is_structure(value):
        value = value.get("structure", value)
    if isinstance(value, dict):
        if not _is_structure(value):
            raise CrystalError(
                f"this is no pymatgen structure with a lattice (its keys: {_some(value)})", _REMEDY
            )
        value = Structure.from_dict(_essentials(value))
    if not isinstance(value, Structure):
        raise CrystalError(
            "there is no structure"
            if value is None
            else f"a {type(value).__name__} is no structure",
            _REMEDY,
        )
    for element in value.composition:
        # A dummy's Z is a hash: say its name instead.
        if isinstance(element, DummySpecies):
            raise CrystalError(
                f"unknown species {element.symbol!r}",
                "replace dummy species by elements",
                kind=ErrorKind.UNKNOWN_SPECIES,
            )
    return Crystal.from_pymatgen(value, id=name)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, for ``object_pairs_hook``, without keys that stand twice.

    Raises
    ------
    ValueError
        If a key stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice")
    return found


def id_of(value: object) -> str:
    """Return what names a structure in its dictionary, or ``""``."""
    if isinstance(value, dict):
        for key in _KEYS_WITH_ID:
            if isinstance(value.get(key), str | int):
                return str(value[key])
    return ""


def _records(content: object, stem: str) -> Iterator[tuple[str, object]]:
    if isinstance(content, dict):
        if _is_structure(content) or "structure" in content:
            yield stem, content
            return
        if {"columns", "data"} <= content.keys():
            yield from _split_frame(content, stem)
            return
        if content and all(isinstance(value, dict) for value in content.values()):
            yield from ((str(key), value) for key, value in content.items())
            return
        raise CrystalError(
            f"there is no structure in this JSON (its keys: {_some(content)})", _REMEDY
        )
    if not isinstance(content, list):
        raise CrystalError("there is no structure in this JSON", _REMEDY)
    if not content:
        raise CrystalError("the list of structures is empty", _REMEDY, kind=ErrorKind.EMPTY)
    for frame, value in enumerate(content):
        yield id_of(value) or (stem if len(content) == 1 else f"{stem}:{frame}"), value


def _split_frame(content: Mapping[str, Any], stem: str) -> Iterator[tuple[str, object]]:
    columns = [str(column) for column in content["columns"]]
    rows = content["data"]
    index = content.get("index") or [f"{stem}:{i}" for i in range(len(rows))]
    if not rows:
        raise CrystalError("the table is empty", _REMEDY, kind=ErrorKind.EMPTY)
    candidates = [i for i, name in enumerate(columns) if name == "structure"] or [
        i for i, value in enumerate(rows[0]) if isinstance(value, dict) and _is_structure(value)
    ]
    if not candidates:
        raise CrystalError(
            f"the table has no structure column (its columns: {', '.join(columns)})",
            "add a column 'structure' of pymatgen structures",
        )
    for name, row in zip(index, rows, strict=True):
        yield str(name), row[candidates[0]]


def _essentials(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the structure, without a word that could name code."""
    lattice = {key: value["lattice"][key] for key in _LATTICE if key in value["lattice"]}
    return {"lattice": lattice, "sites": [_site(site) for site in value["sites"]]}


def _site(site: Mapping[str, Any]) -> dict[str, Any]:
    species = [{key: part[key] for key in _SPECIES if key in part} for part in site["species"]]
    return {"species": species, "abc": site["abc"]}


def _is_structure(value: Mapping[str, Any]) -> bool:
    return "lattice" in value and "sites" in value


def _some(value: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(value)[:6])) or "none"
