"""Paths in, a stream of crystals or located errors out.

Formats: CIF, POSCAR/CONTCAR, (extended) XYZ, ASE databases, pymatgen JSON, JSON lines, Parquet and
CSV tables, and a few more through ASE; single files compressed or not, archives of them, and
standard input. A bad structure never ends the stream: it becomes an :class:`Entry` with an error
that says where it stands and what to do.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from matxfer.crystal import CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.entry import Entry, Item, describe, entry_of, stem_of
from matxfer.readers.formats import (
    NAMED_ONLY,
    SUPPORTED,
    kind_of,
    standard_input,
    streamed_kind,
    with_standard_input,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pandas as pd

    from matxfer.readers.archive import Member
    from matxfer.readers.content import File

__all__ = [
    "Entry",
    "crystals_of_table",
    "expand",
    "is_archive",
    "is_single",
    "is_table",
    "load_table",
    "members_of",
    "read",
    "read_file",
    "read_member",
    "standard_input",
    "with_standard_input",
]


def expand(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """Yield the files that the inputs stand for, in the order of the inputs.

    Parameters
    ----------
    inputs
        Files; directories, searched recursively for files of known formats in sorted order; and
        glob patterns (``**`` too), sorted. A CSV file in a directory of structures nearly always
        holds their labels, and an archive a copy of them, so these and JSON lines are read only
        when they are named. A path that does not exist is yielded as it is, for :func:`read_file`
        to report; ``cif:-`` and the like are standard input (:func:`standard_input`).
    """
    for given in inputs:
        path = Path(given)
        if streamed_kind(path) is not None:
            yield path
        elif path.is_dir():
            yield from sorted(
                file
                for file in path.rglob("*")
                if (kind := kind_of(file)) is not None
                and kind not in NAMED_ONLY
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
    path = Path(path)
    return _guarded(str(path), stem_of(path), lambda: _entries(path, structure_column))


def members_of(path: str | Path) -> Iterator[Member]:
    """Yield the names and contents of an archive's structure files, for :func:`read_member`.

    Parsing takes longer than unpacking: hand the members to worker processes.

    Raises
    ------
    CrystalError
        If the archive cannot be read, or holds no structure files.
    """
    from matxfer.readers.archive import members

    return members(Path(path))


def read_member(archive: str | Path, member: Member) -> Iterator[Entry]:
    """Yield the structures of one member of an archive; their source is ``archive!member``."""
    name, content = member
    source = f"{archive}!{name}"
    if isinstance(content, CrystalError):
        return iter([entry_of(source, (0, name, content))])
    kind = kind_of(content.path) or ""
    return _guarded(
        source, stem_of(content), lambda: (entry_of(source, i) for i in _items(content, kind))
    )


def _guarded(source: str, stem: str, make: Callable[[], Iterator[Entry]]) -> Iterator[Entry]:
    """Yield what ``make`` yields; an exception becomes the last entry, and nothing an error."""
    frame = 0
    try:
        for entry in make():
            yield entry
            frame = entry.frame + 1 if entry.source == source else frame + 1
    except CrystalError as error:
        yield entry_of(source, (frame, stem, error))
        return
    except Exception as error:  # noqa: BLE001 - parsers raise anything; one file must not stop all
        failure = CrystalError(
            f"the file could not be read from here on ({describe(error)})",
            "check that it is complete and of the format that its name says",
        )
        yield entry_of(source, (frame, stem, failure))
        return
    if frame == 0:
        failure = CrystalError(
            "there are no structures in this file", "check how it was written", kind=ErrorKind.EMPTY
        )
        yield entry_of(source, (0, stem, failure))


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
    return kind_of(Path(path)) in {"csv", "parquet"}


def is_single(path: str | Path) -> bool:
    """Say whether a path is of a format that holds one structure, or few (CIF, POSCAR)."""
    return kind_of(Path(path)) in {"cif", "poscar"}


def is_archive(path: str | Path) -> bool:
    """Return whether the name of the file says that it is an archive."""
    return kind_of(Path(path)) == "archive"


def _entries(path: Path, structure_column: str | None) -> Iterator[Entry]:
    source = str(path)
    if (piped := streamed_kind(path)) is not None:
        from matxfer.readers.piped import read_piped

        return (entry_of(source, item) for item in read_piped(piped))
    kind = kind_of(path)
    if not path.exists():
        raise CrystalError("there is no such file", "check the path", kind=ErrorKind.MISSING_FILE)
    if path.is_dir():
        raise CrystalError(
            "this is a directory",
            "give it to read(), which looks into it",
            kind=ErrorKind.UNSUPPORTED_FORMAT,
        )
    if not path.is_file():
        raise CrystalError("this is no file", "copy what it yields into a file first")
    if kind is None:
        raise CrystalError(
            f"the format of {path.name!r} is not supported",
            SUPPORTED,
            kind=ErrorKind.UNSUPPORTED_FORMAT,
        )
    if kind == "archive":
        return (entry for member in members_of(path) for entry in read_member(path, member))
    if kind in {"csv", "parquet"}:
        from matxfer.readers.tables import read_table

        return read_table(path, structure_column)
    if kind == "db":
        from matxfer.readers.ase_database import read_ase_db

        return (entry_of(source, item) for item in read_ase_db(path))
    return (entry_of(source, item) for item in _items(path, kind))


def _items(file: File, kind: str) -> Iterator[Item]:
    if kind == "cif":
        from matxfer.readers.cif import read_cif

        return read_cif(file)
    if kind == "json":
        from matxfer.readers.monty_json import read_json

        return read_json(file)
    if kind == "jsonl":
        from matxfer.readers.json_lines import read_json_lines

        return read_json_lines(file)
    from matxfer.readers import atomistic

    if kind.startswith("ase:"):
        return atomistic.read_with_ase(file, kind.removeprefix("ase:"))
    readers = {"poscar": atomistic.read_poscar, "xyz": atomistic.read_xyz}
    return readers[kind](file)
