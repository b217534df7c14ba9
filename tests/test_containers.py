"""Archives, standard input, JSON lines and large tables: what is read, how much is in memory."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import subprocess
import sys
import tarfile
import zipfile
from typing import TYPE_CHECKING

import ase.db
import ase.io
import numpy as np
import pandas as pd
import pytest
from pymatgen.io.cif import CifWriter

import matxfer.readers.ase_database
import matxfer.readers.tables
from matxfer.crystal import Crystal, CrystalError
from matxfer.readers import expand, members_of, read, read_file, read_member, standard_input
from matxfer.readers.content import FREE_BYTES, MIB, check_size
from matxfer.readers.piped import cif_blocks, read_piped

if TYPE_CHECKING:
    from pathlib import Path

NACL = Crystal(4 * (1 - np.eye(3)), [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])


def cif(crystal: Crystal = NACL) -> bytes:
    return str(CifWriter(crystal.to_pymatgen())).encode()


def extxyz(n: int = 1) -> bytes:
    file = io.StringIO()
    ase.io.write(file, [NACL.to_ase()] * n, format="extxyz")
    return file.getvalue().encode()


def poscar() -> bytes:
    file = io.StringIO()
    ase.io.write(file, NACL.to_ase(), format="vasp")
    return file.getvalue().encode()


FILES = {
    "a.cif": cif(),
    "run/POSCAR": poscar(),
    "run/frames.extxyz": extxyz(2),
    "b.cif.gz": gzip.compress(cif()),
    "readme.md": b"x",
    "labels.csv": b"id,y\n1,2\n",
    "sub/.hidden.cif": cif(),
    "__MACOSX/._a.cif": b"\x00\x05\x16",
    "s.json": json.dumps(NACL.to_pymatgen().as_dict()).encode(),
}
FOUND = [
    ("a.cif", 0, "a"),
    ("run/POSCAR", 0, "run"),
    ("run/frames.extxyz", 0, "frames:0"),
    ("run/frames.extxyz", 1, "frames:1"),
    ("b.cif.gz", 0, "b"),
    ("s.json", 0, "s"),
]


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """Write an archive of the kind that its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    ends = {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz"}
    with tarfile.open(path, f"w:{ends.get(path.suffix[1:], '')}") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


# -- archives ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_archives_are_read_like_folders(tmp_path: Path, name: str) -> None:
    path = pack(tmp_path / name, FILES)
    entries = list(read([path]))
    assert [e.error for e in entries] == [None] * len(entries)
    expected = [(f"{path}!{member}", frame, id_) for member, frame, id_ in FOUND]
    assert [(e.source, e.frame, e.id) for e in entries] == expected
    for entry in entries:
        assert entry.crystal is not None
        assert entry.crystal.volume_angstrom3 == pytest.approx(NACL.volume_angstrom3, rel=1e-5)
    # The same in worker processes, which are sent the members.
    sent = [pickle.loads(pickle.dumps(member)) for member in members_of(path)]
    again = [entry for member in sent for entry in read_member(path, member)]
    assert [(e.source, e.frame, e.id, e.crystal) for e in again] == [
        (e.source, e.frame, e.id, e.crystal) for e in entries
    ]
    # In a folder an archive is passed over: it nearly always holds a copy of the folder.
    assert list(expand([tmp_path])) == []


def test_archives_are_read_as_a_stream(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar.gz", {f"{k}.cif": cif() for k in range(200)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 200)
    entries = list(read_file(path))
    assert entries[0].crystal is not None  # although the end is missing
    assert entries[-1].error is not None
    assert entries[-1].source == str(path)
    assert entries[-1].frame == len(entries) - 1 > 0


def test_names_that_point_elsewhere_are_only_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    secret = tmp_path / "secret.cif"
    secret.write_bytes(cif(Crystal(3 * np.eye(3), [26], [[0, 0, 0]])))
    names = ["../../evil.cif", str(tmp_path / "absolute.cif"), "a\nb\x1b[31m.cif", "C:\\x.cif"]
    for kind in ("a.zip", "a.tar"):
        path = pack(tmp_path / kind, dict.fromkeys(names, cif()))
        before = sorted(tmp_path.rglob("*"))
        entries = list(read_file(path))
        assert [e.source for e in entries] == [f"{path}!{name}" for name in names]
        assert all(e.crystal is not None for e in entries)
        assert sorted(tmp_path.rglob("*")) == before  # nothing has been written anywhere


def test_links_devices_and_archives_inside_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.cif"
    secret.write_bytes(cif())
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("s.cif", tarfile.SYMTYPE), ("h.cif", tarfile.LNKTYPE),
                           ("f.cif", tarfile.FIFOTYPE), ("c.cif", tarfile.CHRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        info = tarfile.TarInfo("good.cif")
        info.size = len(cif())
        archive.addfile(info, io.BytesIO(cif()))
    entries = list(read_file(path))
    assert ["link, device" in str(e.error) for e in entries] == [True] * 4 + [False]
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("s.cif")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
        archive.writestr("inner.zip", b"PK")
        archive.writestr("x.db", b"SQLite format 3")
        archive.writestr("x.traj", b"x")
        archive.writestr("x.parquet", b"x")
    entries = list(read_file(path))
    assert [e.crystal for e in entries] == [None] * 5
    assert "not followed" in str(entries[0].error)
    assert all("unpack the archive" in str(e.error) for e in entries)


def test_a_bad_member_leaves_the_others(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"a.cif": cif(), "b.cif": b"nonsense", "c.cif": cif()})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("c.cif").header_offset
    data[offset + 60] ^= 0xFF  # inside the compressed text: the checksum will not agree
    path.write_bytes(data)
    entries = list(read_file(path))
    assert [e.error is None for e in entries] == [True, False, False]
    assert entries[1].source == f"{path}!b.cif"
    assert "could not be read" in str(entries[2].error)
    for content in (b"", b"PK\x03\x04 nonsense", b"nonsense" * 100):
        path.write_bytes(content)
        (entry,) = read_file(path)
        assert entry.error is not None
        assert entry.error.source == str(path)
    (entry,) = read_file(pack(path, {"readme.txt": b"x"}))
    assert "no structure files" in str(entry.error)


# -- bombs ------------------------------------------------------------------------------------
def in_little_memory(
    code: str, *words: object, megabytes: int = 500
) -> subprocess.CompletedProcess:
    """Run Python in an address space of this size."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * MIB,) * 2)

    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True,
        check=False, timeout=120, preexec_fn=limit,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


READ = (
    "import sys\nfrom matxfer.readers import read_file\n"
    "for e in read_file(sys.argv[1]): print(e.source, '|', e.error)"
)


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz", "cif.gz", "xyz.gz",
                                  "xyz.bz2", "csv.gz", "json.xz", "jsonl.gz"])  # fmt: skip
def test_decompression_bombs_are_refused(tmp_path: Path, kind: str) -> None:
    """100 MiB of zeros in a few hundred kB at most, read in 500 MiB of address space."""
    path = tmp_path / f"bomb.{kind}"
    zeros = bytes(MIB)
    if kind == "zip":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("a.cif", "w") as member,
        ):
            for _ in range(100):
                member.write(zeros)
    else:
        opener = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind.rpartition(".")[2]]
        with opener(path, "wb") as file:
            if kind.startswith("tar"):
                info = tarfile.TarInfo("a.cif")
                info.size = 100 * MIB
                file.write(info.tobuf())
            for _ in range(100):
                file.write(zeros)
    assert path.stat().st_size < 2 * MIB
    done = in_little_memory(READ, path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.strip().splitlines()
    assert "decompression bomb" in line or "too large" in line


def test_the_bounds_are_on_size_and_ratio() -> None:
    check_size(FREE_BYTES, 1)
    check_size(100 * MIB, MIB)
    with pytest.raises(CrystalError, match="decompression bomb"):
        check_size(FREE_BYTES + 1, 1)
    with pytest.raises(CrystalError, match="too large"):
        check_size(2 * MIB, 2 * MIB, MIB)


def test_lying_headers(tmp_path: Path) -> None:
    """Sizes that are announced are not believed: zip, tar, extended tar header, xyz."""
    path = pack(tmp_path / "a.zip", {"a.cif": cif()})
    data = path.read_bytes()
    size = len(cif()).to_bytes(4, "little")
    path.write_bytes(data.replace(size, (2**31).to_bytes(4, "little")))
    assert "too large" in str(next(read_file(path)).error) or "bomb" in str(
        next(read_file(path)).error
    )
    for kind, size in (
        (tarfile.REGTYPE, 2**33),
        (tarfile.XHDTYPE, 2**32),
        (tarfile.GNUTYPE_LONGNAME, 2**32),
    ):
        info = tarfile.TarInfo("a.cif")
        info.type, info.size = kind, size
        path = tmp_path / "a.tar"
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + cif())
        entries = list(read_file(path))
        assert all(entry.error is not None for entry in entries)
        assert ["too large", "1 MiB"][kind != tarfile.REGTYPE] in str(entries[0].error)
    path = tmp_path / "a.xyz"
    for count in ("99999999999", "9" * 5000, "²", "٣"):
        path.write_text(f"{count}\n\nNa 0 0 0\n")
        assert next(read_file(path)).error is not None


# -- compressed files and JSON lines ----------------------------------------------------------
@pytest.mark.parametrize("end", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["a.cif", "POSCAR", "a.extxyz", "a.json", "a.csv", "a.jsonl"])
def test_compressed_files(tmp_path: Path, name: str, end: str) -> None:
    structure = json.dumps(NACL.to_pymatgen().as_dict())
    data = {
        "a.cif": cif(), "POSCAR": poscar(), "a.extxyz": extxyz(), "a.json": structure.encode(),
        "a.csv": pd.DataFrame({"id": ["007"], "structure": [structure]}).to_csv().encode(),
        "a.jsonl": structure.encode(),
    }[name]  # fmt: skip
    path = tmp_path / f"{name}.{end}"
    path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[end].compress(data))
    (entry,) = read_file(path)
    assert entry.error is None
    assert entry.id == {"a.csv": "007", "a.jsonl": "a:0", "POSCAR": tmp_path.name}.get(
        name, name.partition(".")[0]
    )


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    structure = NACL.to_pymatgen().as_dict()
    arrays = {"lattice": NACL.lattice.tolist(), "numbers": [11, 17],
              "frac_coords": NACL.frac_coords.tolist()}  # fmt: skip
    lines = [
        json.dumps({"id": "x", "structure": structure}),
        json.dumps({"material_id": "mp-1", **arrays}),
        "",
        json.dumps({"name": "c", "cif": cif().decode()}),
        "{broken",
        json.dumps({"formula": "NaCl"}),
        "[" * 100_000,
        '{"lattice": 1, "lattice": 2}',
        json.dumps(structure),
    ]
    path.write_text("\n".join(lines))
    entries = list(read_file(path))
    assert [e.id for e in entries] == ["x", "mp-1", "c", "a:3", "a:4", "a:5", "a:6", "a:7"]
    assert [e.error is None for e in entries] == [True] * 3 + [False] * 4 + [True]
    assert "twice" in str(entries[6].error)


# -- standard input ---------------------------------------------------------------------------
def piped(kind: str, data: bytes) -> list[tuple[int, str, Crystal | CrystalError]]:
    return list(read_piped(kind, io.BytesIO(data)))


def test_standard_input() -> None:
    two = (
        b"# a comment\n" + cif() + b"data_global\n_x 1\n" + cif() + b"data_bad\n_atom_site_label x"
    )
    items = piped("cif", two)
    assert [(frame, name) for frame, name, _ in items] == [
        (0, "NaCl:0"),
        (1, "NaCl:1"),
        (2, "bad:2"),
    ]
    assert [isinstance(result, Crystal) for _, _, result in items] == [True, True, False]
    assert len(piped("poscar", poscar())) == 1
    assert [name for _, name, _ in piped("extxyz", extxyz(3))] == [f"stdin:{k}" for k in range(3)]
    assert len(piped("jsonl", json.dumps(NACL.to_pymatgen().as_dict()).encode() * 1 + b"\n")) == 1
    with pytest.raises(CrystalError, match="--input-format"):
        piped("", cif())


def test_text_fields_do_not_end_a_block() -> None:
    text = "data_a\n_x\n;\ndata_not\n;\ndata_b\n_y 1\nDATA_c\n"
    blocks = list(cif_blocks(io.StringIO(text)))
    assert blocks == ["data_a\n_x\n;\ndata_not\n;\n", "data_b\n_y 1\n", "DATA_c\n"]


@pytest.mark.parametrize(("kind", "data"), [("cif", cif() * 2), ("extxyz", extxyz(2)), ("", b"x")])
def test_standard_input_through_read(kind: str, data: bytes) -> None:
    code = (
        "import sys\nfrom matxfer.readers import read\n"
        "for e in read([sys.argv[1]]): print(e.source, e.frame, e.crystal is not None)"
    )
    name = standard_input(kind) if kind else "-"
    done = subprocess.run([sys.executable, "-c", code, name], input=data, capture_output=True,
                          check=True)  # fmt: skip
    lines = done.stdout.decode().splitlines()
    assert lines == ([f"{name} 0 True", f"{name} 1 True"] if kind else ["- 0 False"])


# -- large tables and databases ---------------------------------------------------------------
def test_tables_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matxfer.readers.tables, "ROWS_AT_A_TIME", 4)
    n = 11
    frame = pd.DataFrame(
        {
            "lattice": [(NACL.lattice * (1 + k / 100)).ravel().tolist() for k in range(n)],
            "numbers": [[11, 17]] * n,
            "frac_coords": [NACL.frac_coords.ravel().tolist()] * n,
        }
    )
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.parquet", "a.csv"):
        entries = list(read_file(tmp_path / name))
        assert [(e.frame, e.id) for e in entries] == [(k, str(k)) for k in range(n)]
        edges = [e.crystal.lattice[0, 1] for e in entries]
        np.testing.assert_allclose(edges, [4 * (1 + k / 100) for k in range(n)])
        parts = matxfer.readers.tables._parts(tmp_path / name, ["lattice"])
        assert [len(part) for part in parts] == [4, 4, 3]


def test_ase_database_is_read_a_page_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.db"
    with ase.db.connect(path) as database:
        for k in range(10):
            database.write(NACL.to_ase(), material_id=f"mp-{k}", data={"big": np.zeros(1000)})
        del database[4]
    monkeypatch.setattr(matxfer.readers.ase_database, "_PAGE", 3)
    sizes = []
    real = matxfer.readers.ase_database._select

    def select(*args):
        rows = real(*args)
        sizes.append(len(rows))
        return rows

    monkeypatch.setattr(matxfer.readers.ase_database, "_select", select)
    before = path.read_bytes()
    entries = read_file(path)
    first = next(entries)
    assert max(sizes) == 3
    assert len(sizes) == 2
    assert [first.id, *[e.id for e in entries]] == [f"mp-{k}" for k in range(10) if k != 3]
    assert path.read_bytes() == before
    # A row that cannot be decoded costs itself only.
    import sqlite3

    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE systems SET positions = x'0102' WHERE id = 6")
        connection.execute("UPDATE systems SET key_value_pairs = '{broken' WHERE id = 8")
    entries = list(read_file(path))
    assert [e.frame for e in entries if e.error is not None] == [4, 6]
    assert len(entries) == 9


def test_a_database_whose_ids_do_not_ascend_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As damaged indices can make it: a page that ends before it began, again and again."""
    path = tmp_path / "a.db"
    with ase.db.connect(path) as database:
        for _ in range(3):
            database.write(NACL.to_ase())
    real = matxfer.readers.ase_database._select

    def turned(*args):
        return real(*args)[::-1]

    monkeypatch.setattr(matxfer.readers.ase_database, "_select", turned)
    (entry,) = read_file(path)
    assert "do not ascend" in str(entry.error)
