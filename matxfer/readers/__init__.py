"""Paths in, a stream of crystals or located errors out.

Formats: CIF, POSCAR/CONTCAR, (extended) XYZ, ASE databases, pymatgen JSON, Parquet and CSV tables,
and a few more through ASE. Single files may be gzip-compressed. A bad structure never ends the
stream: it becomes an :class:`Entry` with an error that says where it stands and what to do.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from matxfer.crystal import CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.atomistic import ASE_BY_PATH, ASE_NAMES, ASE_SUFFIXES
from matxfer.readers.entry import Entry, Item, describe, entry_of, stem_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import pandas as pd

__all__ = [
    "Entry",
    "crystals_of_table",
    "expand",
    "is_single",
    "is_table",
    "load_table",
    "read",
    "read_file",
]

_CIF = (".cif", ".mcif")
_TABLES = (".parquet", ".csv", ".csv.gz")
_POSCAR = (".vasp", ".poscar", ".contcar")
_XYZ = (".xyz", ".extxyz")
_SUPPORTED = (
    f"supported are {', '.join((*_CIF, *_POSCAR, *_XYZ, '.json', '.db', *_TABLES, *ASE_SUFFIXES))},"
    " files named POSCAR, CONTCAR, XDATCAR, OUTCAR or vasprun.xml, and .gz of single files"
)


def expand(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the files that the inputs stand for, in the order of the inputs.

    Parameters
    ----------
    inputs
        Files; directories, searched recursively for files of known formats in sorted order; and
        glob patterns (``**`` too), sorted. A CSV file in a directory of structures nearly always
        holds their labels, so CSV files are read only when they are named. A path that does not
        exist is yielded as it is, for :func:`read_file` to report.
    """
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            yield from sorted(
                file
                for file in path.rglob("*")
                if _kind(file) not in {None, "csv"}
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and file.is_file()
            )
        elif not path.exists() and glob.has_magic(str(given)):
            # Path.glob takes no absolute patterns before Python 3.13.
            matches = sorted(glob.glob(str(given), recursive=True))  # noqa: PTH207
            yield from (Path(match) for match in matches or [str(given)])
        else:
            yield path


def read_file(path: str | Path, *, structure_column: str | None = None) -> Iterator[Entry]:
    """Yield the structures of one file; what cannot be read becomes an error entry.

    Parameters
    ----------
    path
        The file.
    structure_column
        For tables: the column that holds the structures.

    Returns
    -------
    At least one entry, in the order of the file. After a bad frame, row or block reading goes on
    where the format allows; where it does not, the last error says so.
    """
    source, path = str(path), Path(path)
    frame = 0
    try:
        for entry in _entries(path, source, structure_column):
            yield entry
            frame = entry.frame + 1
    except CrystalError as error:
        yield entry_of(source, (frame, stem_of(path), error))
        return
    except Exception as error:  # noqa: BLE001 - parsers raise anything; one file must not stop all
        failure = CrystalError(
            f"the file could not be read from here on ({describe(error)})",
            "check that it is complete and of the format that its name says",
        )
        yield entry_of(source, (frame, stem_of(path), failure))
        return
    if frame == 0:
        failure = CrystalError(
            "there are no structures in this file", "check how it was written", kind=ErrorKind.EMPTY
        )
        yield entry_of(source, (0, stem_of(path), failure))


def read(inputs: Iterable[str | Path], *, structure_column: str | None = None) -> Iterator[Entry]:
    """Yield the structures of all inputs, in order; see :func:`expand` and :func:`read_file`."""
    for path in expand([inputs] if isinstance(inputs, str | Path) else inputs):
        yield from read_file(path, structure_column=structure_column)


def load_table(path: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Read a Parquet or CSV table; see :func:`matxfer.readers.tables.load_table`."""
    from matxfer.readers import tables

    return tables.load_table(path, columns)


def crystals_of_table(
    frame: pd.DataFrame, source: str, *, structure_column: str | None = None
) -> Iterator[Entry]:
    """Yield one entry per row; see :func:`matxfer.readers.tables.crystals_of_table`."""
    from matxfer.readers import tables

    return tables.crystals_of_table(frame, source, structure_column=structure_column)


def is_table(path: str | Path) -> bool:
    """Return whether the name of the file says that it is a table."""
    return _kind(Path(path)) in {"csv", "parquet"}


def is_single(path: str | Path) -> bool:
    """Say whether a path is of a format that holds one structure, or few (CIF, POSCAR)."""
    return _kind(Path(path)) in {"cif", "poscar"}


def _kind(path: Path) -> str | None:  # noqa: PLR0911 - one return per format
    """Return the format by the file's name: ours, or ``ase:`` and ASE's name; None if unknown."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    suffix = Path(plain).suffix
    if suffix in _CIF:
        return "cif"
    if suffix in _XYZ:
        return "xyz"
    if suffix in {".csv", ".json"}:
        return suffix[1:]
    if name.endswith((".parquet", ".db")):
        return name.rpartition(".")[2]
    if (ase := ASE_SUFFIXES.get(suffix)) and not (ase in ASE_BY_PATH and plain != name):
        return f"ase:{ase}"
    if plain in ASE_NAMES:
        return f"ase:{ASE_NAMES[plain]}"
    if suffix in _POSCAR or _named_poscar(plain):
        return "poscar"
    return None


def _named_poscar(name: str) -> bool:
    """Return whether a name is one like POSCAR, POSCAR_001, POSCAR.orig or Si-CONTCAR."""
    names = ("poscar", "contcar")
    return name.startswith(names) or name.endswith(names)


def _entries(path: Path, source: str, structure_column: str | None) -> Iterator[Entry]:
    kind = _kind(path)
    if not path.exists():
        raise CrystalError("there is no such file", "check the path", kind=ErrorKind.MISSING_FILE)
    if path.is_dir():
        raise CrystalError(
            "this is a directory",
            "give it to read(), which looks into it",
            kind=ErrorKind.UNSUPPORTED_FORMAT,
        )
    if kind is None:
        raise CrystalError(
            f"the format of {path.name!r} is not supported",
            _SUPPORTED,
            kind=ErrorKind.UNSUPPORTED_FORMAT,
        )
    if kind in {"csv", "parquet"}:
        from matxfer.readers.tables import read_table

        return read_table(path, structure_column)
    return (entry_of(source, item) for item in _items(path, kind))


def _items(path: Path, kind: str) -> Iterator[Item]:
    if kind == "cif":
        from matxfer.readers.cif import read_cif

        return read_cif(path)
    if kind == "json":
        from matxfer.readers.monty_json import read_json

        return read_json(path)
    from matxfer.readers import atomistic

    if kind.startswith("ase:"):
        return atomistic.read_with_ase(path, kind.removeprefix("ase:"))
    readers = {
        "poscar": atomistic.read_poscar,
        "xyz": atomistic.read_xyz,
        "db": atomistic.read_ase_db,
    }
    return readers[kind](path)
