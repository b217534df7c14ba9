"""Valid files of every format, and seeded mutations of them that tend to hurt parsers."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pandas as pd
from ase.build import bulk
from ase.spacegroup import crystal as spacegroup_crystal
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter

EXAMPLES = Path(__file__).resolve().parents[2] / "datasets" / "examples"
#: A module that nothing may ever import: it is named where decoders look for code.
CANARY = "matxfer_fuzz_canary"

#: Words that are put where another one stood.
_WORDS = (
    "nan", "inf", "-inf", "1e999", "-1", "0", "1", "0.5", "1e-300", "99999999999999999999", "1e5",
    "0x10", "１", "²", "1.2.3", "--1", "1(2)", ".", "?", "''", '"', "'", ";", "#", "$", "\x00",
    "\ufeff", "loop_", "data_", "data_x", "save_", "stop_", "global_", "_cell_length_a",
    "_atom_site_fract_x", "_atom_site_occupancy", "_atom_site_type_symbol", "x,y,z", "-x,-y,-z",
    "x+1/2,y,z", "x,y", "x-y,x,z+1/6", "2x,y,z", "x/0,y,z", "x+y+z,x+y,x", "P 1", "F m -3 m",
    "R -3 m", "D", "T", "X", "Va", "Wat", "Na1+", "Fe3+", "CA", "Uuo", "Og", "null", "true", "[]",
    "{}", "NaN", "Infinity", '"lattice"', '"sites"', '"matrix"', "@module", "@class",
    "../../etc/passwd", "/dev/zero", "=1+1", "{{{{", "[[[[", "T T F", "Lattice=", "pbc=", "Direct",
    "Cartesian", "Selective dynamics", "-3", "1000000000",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seeds:
    """Valid files of one reader: a name whose suffix says the format, and contents."""

    name: str
    contents: tuple[bytes, ...]
    text: bool = True


def mutated(seeds: Seeds, number: int) -> bytes:
    """Return the file of a number: a valid one with one to four changes."""
    rng = random.Random(f"{seeds.name}/{number}")
    data = bytearray(rng.choice(seeds.contents))
    if seeds.name.endswith(".gz") and number % 2:
        # Of a compressed file nearly every change is found by its checksum: change what is inside.
        inner = Seeds(seeds.name, tuple(map(gzip.decompress, seeds.contents)), text=False)
        data = bytearray(gzip.decompress(data))
        _change_bytes(data, rng, inner)
        return gzip.compress(bytes(data), 1, mtime=0)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if seeds.text and rng.random() < 0.75:
            data = bytearray(_change_text(bytes(data), rng))
        else:
            _change_bytes(data, rng, seeds)
    return bytes(data)


def _change_text(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    lines = text.split("\n")
    k, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(9)
    if kind == 0:
        del lines[k]
    elif kind == 1:
        lines.insert(other, lines[k])
    elif kind == 2:
        lines[k], lines[other] = lines[other], lines[k]
    elif kind == 3:
        lines.insert(k, rng.choice(_WORDS))
    elif kind == 4:
        lines = lines[: k + 1]
    else:
        pieces = _pieces(lines[k])
        places = [i for i, piece in enumerate(pieces) if piece.strip()]
        if places:
            i = rng.choice(places)
            pieces[i] = _changed_word(pieces[i], rng) if kind < 8 else ""
            lines[k] = "".join(pieces)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _pieces(line: str) -> list[str]:
    """Cut a line into words and what stands between them."""
    pieces, word = [""], None
    for letter in line[:20_000]:
        kind = letter.isalnum() or letter in ".-+_"
        if kind != word:
            pieces.append("")
            word = kind
        pieces[-1] += letter
    return [*pieces, line[20_000:]]


def _changed_word(word: str, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(_WORDS)
    try:
        value = float(word)
        int(10 * value)  # which nan and inf are not
    except (ValueError, OverflowError):
        k = rng.randrange(len(word))
        return word[:k] + rng.choice("aA0 -.,'\"_()[]{}:@\\\té\x1b") + word[k + rng.randrange(2) :]
    changed = rng.choice((value + 0.5, -value, value * 10, value / 3, value + 1e-4, 1 - value))
    return f"{changed:.{rng.choice((1, 4, 8))}f}" if "." in word else str(int(changed))


def _change_bytes(data: bytearray, rng: random.Random, seeds: Seeds) -> None:
    if not data:
        return
    a = rng.randrange(len(data))
    b = min(len(data), a + rng.choice((1, 1, 2, 4, 8, 64, 512)))
    kind = rng.randrange(7)
    if kind == 0:
        data[a] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[a:b] = rng.randbytes(b - a)
    elif kind == 2:
        del data[a:b]
    elif kind == 3:
        data[a:a] = data[a:b] * rng.choice((1, 1, 2, 50))
    elif kind == 4:
        del data[a:]
    elif kind == 5:
        data[a : a + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
    else:
        other = rng.choice(seeds.contents)
        c = rng.randrange(len(other))
        data[a:b] = other[c : c + b - a]


# -- the seeds ----------------------------------------------------------------------------------
def all_seeds() -> dict[str, Seeds]:
    """Return the seeds of every reader, cheap readers first."""
    atoms = [
        bulk("NaCl", "rocksalt", a=5.64),
        bulk("NaCl", "rocksalt", a=5.64, cubic=True),
        bulk("Ti", "hcp", a=2.95, c=4.68),
        spacegroup_crystal(
            ("Ti", "O"), [(0, 0, 0), (0.305, 0.305, 0)], spacegroup=136,
            cellpar=[4.59, 4.59, 2.96, 90, 90, 90],
        ),
    ]  # fmt: skip
    skewed = atoms[2].copy()
    skewed.set_cell(skewed.cell.array + 0.3 * np.eye(3)[::-1], scale_atoms=True)
    atoms.append(skewed)
    found = {
        "extxyz": Seeds("a.extxyz", tuple(_written(a, "extxyz") for a in [*atoms, atoms[:3]])),
        "poscar": Seeds(
            "a.vasp", tuple(_written(a, "vasp", direct=d) for a in atoms for d in (0, 1))
        ),
        "cif": Seeds("a.cif", tuple(_cifs(atoms))),
        "cif without operations": Seeds("b.cif", tuple(_without_operations())),
        "pymatgen json": Seeds("a.json", tuple(_json_documents(atoms))),
        "json lines": Seeds("a.jsonl", (_json_lines(atoms),)),
        "parquet": Seeds("a.parquet", _tables(atoms, "parquet"), text=False),
        "csv": Seeds("a.csv", _tables(atoms, "csv")),
        "ase json db": Seeds("b.json", (_database(atoms, ".json"),)),
        "ase sqlite db": Seeds("a.db", (_database(atoms, ".db"),), text=False),
        "zip": Seeds("a.zip", _zips(atoms), text=False),
        "tar.gz": Seeds("a.tar.gz", _tars(atoms, "w:gz"), text=False),
        "tar": Seeds("a.tar", _tars(atoms, "w"), text=False),
    }
    for suffix, kind in (("xsf", "xsf"), ("gen", "gen"), ("cfg", "cfg"), ("res", "res"),
                         ("traj", "traj")):  # fmt: skip
        found[f"ase {kind}"] = Seeds(
            f"a.{suffix}", tuple(_written(a, kind) for a in atoms[:4]), text=kind != "traj"
        )
    return found


def _written(atoms: object, kind: str, **options: object) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        ase.io.write(path, atoms, format=kind, **options)
        return path.read_bytes()


def _cifs(atoms: list[ase.Atoms]) -> list[bytes]:
    texts = [path.read_bytes() for path in sorted(EXAMPLES.glob("*.cif"))]
    for one in atoms:
        structure = AseAtomsAdaptor.get_structure(one)
        texts.append(str(CifWriter(structure)).encode())
        texts.append(str(CifWriter(structure, symprec=0.01)).encode())
        texts.append(_written(one, "cif"))
    return texts


def _without_operations() -> list[bytes]:
    """Return CIFs whose symmetry is a symbol only: these go the careful way."""
    texts = []
    for path in sorted(EXAMPLES.glob("*.cif")):
        lines = path.read_text().split("\n")
        kept = []
        inside = False
        for k, line in enumerate(lines):
            if line.strip() == "loop_" and "symop" in lines[k + 1] + lines[k + 2]:
                inside = True
            elif inside and (line.strip() == "loop_" or not line.strip()):
                inside = False
            if not inside:
                kept.append(line)
        texts.append("\n".join(kept).encode())
    return texts


def _json_documents(atoms: list[ase.Atoms]) -> list[bytes]:
    dictionaries = [AseAtomsAdaptor.get_structure(one).as_dict() for one in atoms]
    evil = {"@module": CANARY, "@class": "Run", "x": 1}
    for dictionary in dictionaries[1:3]:
        dictionary["properties"] = {"a": evil}
        dictionary["sites"][0]["properties"] = {"b": evil, "c": [evil]}
    frame = {
        "columns": ["structure", "y"],
        "index": [5, 6],
        "data": [[d, 1.0] for d in dictionaries[:2]],
    }
    entry = {"@module": CANARY, "@class": "ComputedStructureEntry", "structure": dictionaries[0]}
    documents = [*dictionaries, dictionaries[:2], {"a": dictionaries[0]}, frame, entry]
    return [json.dumps(document).encode() for document in documents]


def _json_lines(atoms: list[ase.Atoms]) -> bytes:
    lines = [{"id": f"s{k}", "structure": AseAtomsAdaptor.get_structure(one).as_dict()}
             for k, one in enumerate(atoms[:3])]  # fmt: skip
    lines.append({"id": "arrays", **_arrays(atoms[1])})
    return "\n".join(json.dumps(line) for line in lines).encode()


def _arrays(one: ase.Atoms) -> dict[str, list]:
    return {"lattice": one.cell.array.ravel().tolist(), "numbers": one.numbers.tolist(),
            "frac_coords": one.get_scaled_positions().ravel().tolist()}  # fmt: skip


def _tables(atoms: list[ase.Atoms], kind: str) -> tuple[bytes, ...]:
    frames = [pd.DataFrame([{"id": f"s{k}", **_arrays(a)} for k, a in enumerate(atoms)])]
    cifs = [path.read_text() for path in sorted(EXAMPLES.glob("*.cif"))[:3]]
    frames.append(pd.DataFrame({"material_id": ["a", "b", "c"], "cif": cifs}))
    found = []
    for frame in frames:
        file = io.BytesIO()
        if kind == "csv":
            frame.to_csv(file, index=False)
        else:
            frame.to_parquet(file)
        found.append(file.getvalue())
    return tuple(found)


def _database(atoms: list[ase.Atoms], suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        with ase.db.connect(path) as database:
            for k, one in enumerate(atoms):
                database.write(one, material_id=f"mp-{k}", gap=0.5 * k)
        return path.read_bytes()


def _members(atoms: list[ase.Atoms]) -> dict[str, bytes]:
    cif = (EXAMPLES / "MgO.cif").read_bytes()
    return {"a.cif": cif, "../up.cif": cif, "/abs.cif": cif, "d/POSCAR": _written(atoms[0], "vasp"),
            "d/r.extxyz": _written(atoms[:2], "extxyz")}  # fmt: skip


def _zips(atoms: list[ase.Atoms]) -> tuple[bytes, ...]:
    found = []
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data in _members(atoms).items():
                archive.writestr(name, data)
        found.append(file.getvalue())
    return tuple(found)


def _tars(atoms: list[ase.Atoms], mode: str) -> tuple[bytes, ...]:
    found = []
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode, format=layout) as archive:
            for name, data in _members(atoms).items():
                info = tarfile.TarInfo(name if layout == tarfile.GNU_FORMAT else f"é{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("link.cif")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
        found.append(file.getvalue())
    return tuple(found)
