"""A second opinion on a file that was read: other libraries, and other ways through them."""

from __future__ import annotations

import io
import json
import re
import warnings
from typing import TYPE_CHECKING

import gemmi
import numpy as np
from gemmi import cif

from matxfer.crystal import Crystal, CrystalError
from matxfer.neighbors import neighbor_list

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Å; distances are compared up to this, and may differ by so much: rounded special positions are
#: put in place by us (0.1 Å) and left or merged by others.
CUTOFF, TOLERANCE = 4.0, 0.21
#: Larger structures are compared by composition and volume only.
MAX_SITES = 200


def differs(ours: Crystal, theirs: Crystal) -> str:
    """Return in what two crystals differ (sites, composition, volume, distances), or ``""``."""
    if ours.n_sites != theirs.n_sites:
        return f"sites: {ours.n_sites} and {theirs.n_sites}"
    if sorted(ours.numbers) != sorted(theirs.numbers):
        return "composition"
    if not np.isclose(ours.volume_angstrom3, theirs.volume_angstrom3, rtol=1e-3, atol=1e-3):
        return f"volume: {ours.volume_angstrom3:g} and {theirs.volume_angstrom3:g}"
    return "" if ours.n_sites > MAX_SITES else _other_distances(ours, theirs)


def _other_distances(ours: Crystal, theirs: Crystal) -> str:
    first, second = distances(ours, CUTOFF), distances(theirs, CUTOFF)
    n = min(len(first), len(second))
    if n and np.abs(first[:n] - second[:n]).max() > TOLERANCE:
        return f"distances: {np.abs(first[:n] - second[:n]).max():.2f} Å"
    longer = first if len(first) > n else second
    if len(longer) > n and longer[n] < CUTOFF - TOLERANCE:
        return f"number of distances: {len(first)} and {len(second)}"
    return ""


def distances(crystal: Crystal, cutoff: float) -> np.ndarray:
    """Return the sorted distances in Å up to the cutoff; of a crowded cell the shortest ones."""
    while crystal.n_sites**2 * cutoff**3 * 4.2 / crystal.volume_angstrom3 > 1e6:
        cutoff /= 2
    return np.sort(neighbor_list(crystal, cutoff)[3])


# -- CIF ----------------------------------------------------------------------------------------
def _block(text: str) -> cif.Block:
    document = cif.read_string(text, 0)
    blocks = [b for b in document if b.find_values("_atom_site_fract_x")] or list(document)
    return blocks[0]


def gemmi_crystal(text: str) -> Crystal:
    """Read a CIF with gemmi's own expansion of a small structure."""
    small = gemmi.make_small_structure_from_block(_block(text))
    sites = small.get_all_unit_cell_sites()
    lattice = np.array(small.cell.orth.mat.tolist()).T
    frac = [site.fract.tolist() for site in sites]
    return Crystal(lattice, [site.element.atomic_number for site in sites], frac)


def pymatgen_crystal(text: str) -> Crystal:
    """Read a CIF with pymatgen."""
    from pymatgen.io.cif import CifParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = CifParser.from_str(text, check_cif=False)
        return Crystal.from_pymatgen(parser.parse_structures(primitive=False)[0])


def ase_crystal(text: str) -> Crystal:
    """Read a CIF with ASE."""
    from ase.io.cif import read_cif

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Crystal.from_ase(next(iter(read_cif(io.BytesIO(text.encode()), slice(0, 1)))))


# -- other formats --------------------------------------------------------------------------------
def _poscar(data: bytes) -> Iterator[Crystal]:
    from pymatgen.io.vasp import Poscar

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = data.decode("utf-8-sig", "replace")
        if float(text.split("\n")[1].split()[0]) < 0:
            # pymatgen 2026.10 multiplies Cartesian coordinates by the volume.
            yield _poscar_by_hand(text.split("\n"))
            return
        yield Crystal.from_pymatgen(Poscar.from_str(text, read_velocities=False).structure)


def _poscar_by_hand(lines: list[str]) -> Crystal:
    """Read a POSCAR without frills, whose scale is minus the volume."""
    cell = np.array([line.split()[:3] for line in lines[2:5]], float)
    scale = (-float(lines[1]) / abs(np.linalg.det(cell))) ** (1 / 3)
    counts = [int(word) for word in lines[6].split()]
    symbols = zip(lines[5].split(), counts, strict=True)
    numbers = [gemmi.Element(symbol).atomic_number for symbol, n in symbols for _ in range(n)]
    rows = np.array([line.split()[:3] for line in lines[8 : 8 + sum(counts)]], float)
    cartesian = lines[7].strip()[0] in "cCkK"
    frac = rows @ np.linalg.inv(cell) if cartesian else rows
    return Crystal(cell * scale, numbers, frac)


def _xyz(data: bytes) -> Iterator[Crystal]:
    from ase.io import iread

    # ASE ends at an empty line between frames.
    text = re.sub(r"\n\s*\n(?=\d+ *\r?\n)", "\n", data.decode("utf-8-sig", "replace").lstrip())
    for atoms in iread(io.StringIO(text), ":", format="extxyz"):
        yield Crystal.from_ase(atoms)


def _json(data: bytes) -> Iterator[Crystal]:
    for structure in _structures(json.loads(data)):
        yield _of_dictionary(structure)


def _json_lines(data: bytes) -> Iterator[Crystal]:
    for line in data.decode("utf-8", "replace").split("\n"):
        if line.strip():
            value = json.loads(line)
            if "numbers" in value:
                yield Crystal(value["lattice"], value["numbers"], value["frac_coords"])
            else:
                yield _of_dictionary(value.get("structure", value))


def _structures(value: object) -> Iterator[dict]:
    """Find the structures of a document without knowing its shape."""
    if isinstance(value, dict):
        if "sites" in value and "lattice" in value:
            yield value
        else:
            for part in value.values():
                yield from _structures(part)
    elif isinstance(value, list):
        for part in value:
            yield from _structures(part)


def _of_dictionary(structure: dict) -> Crystal:
    """Read the dictionary by hand, where the reader asks pymatgen."""
    numbers = []
    for site in structure["sites"]:
        (species,) = site["species"]
        numbers.append(gemmi.Element(species["element"]).atomic_number)
    abc = [site["abc"] for site in structure["sites"]]
    return Crystal(structure["lattice"]["matrix"], numbers, abc)


def _table(data: bytes, kind: str) -> Iterator[Crystal]:
    import pandas as pd
    import pyarrow.parquet as pq

    file = io.BytesIO(data)
    rows = (
        pd.read_csv(file).to_dict("records") if kind == "csv" else pq.read_table(file).to_pylist()
    )
    for row in rows:
        if "cif" in row:
            yield gemmi_crystal(row["cif"])
            continue
        cells = [row[name] for name in ("lattice", "numbers", "frac_coords")]
        yield Crystal(*[json.loads(c) if isinstance(c, str) else c for c in cells])


def _database(path: Path) -> Iterator[Crystal]:
    import ase.db

    with ase.db.connect(path, use_lock_file=False) as database:
        for row in database.select():
            yield Crystal.from_ase(row.toatoms())


def second_opinion(path: Path, data: bytes, crystals: list[Crystal]) -> str:
    """Return in what all other readers differ from ours, ``""`` if one agrees, or why none can.

    Parameters
    ----------
    path
        The file; its name says the format.
    data
        Its bytes.
    crystals
        What our reader made of it: all of its structures, none of them refused.
    """
    name = path.name
    if name.endswith(".cif"):
        return _cif_opinion(data, crystals)
    readers = {
        "a.vasp": lambda: _poscar(data),
        "a.extxyz": lambda: _xyz(data),
        "a.json": lambda: _json(data),
        "a.jsonl": lambda: _json_lines(data),
        "a.csv": lambda: _table(data, "csv"),
        "a.parquet": lambda: _table(data, "parquet"),
        "a.db": lambda: _database(path),
        "b.json": lambda: _database(path),
    }
    if name not in readers:
        return "no second reader"
    try:
        others = list(readers[name]())
    except Exception as error:  # noqa: BLE001 - the other one may fail as it likes
        return f"the second reader fails: {type(error).__name__}"
    if len(others) != len(crystals):
        return f"DIFFERENT: {len(crystals)} and {len(others)} structures"
    problems = [p for a, b in zip(crystals, others, strict=True) if (p := differs(a, b))]
    return f"DIFFERENT: {problems[0]}" if problems else ""


def _cif_opinion(data: bytes, crystals: list[Crystal]) -> str:
    if len(crystals) != 1:
        return "several blocks"
    text = data.decode("utf-8-sig", "replace")
    problems = []
    for read in (gemmi_crystal, pymatgen_crystal, ase_crystal):
        try:
            problem = differs(crystals[0], read(text))
        except (CrystalError, Exception):  # noqa: BLE001 - the other one may fail as it likes
            continue
        if not problem:
            return ""
        problems.append(f"{read.__name__.partition('_')[0]} {problem}")
    if problems:
        return f"DIFFERENT: {'; '.join(problems)}"
    return "the second reader fails: all"
