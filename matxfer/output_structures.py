"""Structures out, with their predictions: extended XYZ and ASE databases.

Rows without a structure or a prediction have no place in these; they go into ``NAME.errors.csv``.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.columns import CRYSTAL, RESULTS, TEXTS, Row, encodable
from matxfer.errors import MatxferError, OptionError
from matxfer.output_metadata import KEY
from matxfer.readers import read
from matxfer.readers.formats import streamed_kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ase import Atoms

    from matxfer.readers import Entry

#: Rows per transaction of a database.
_TRANSACTION = 1000


def with_crystals(
    rows: Iterable[Row], inputs: Sequence[str], structure_column: str | None = None
) -> Iterator[Row]:
    """Yield the rows, each with its structure, which is read a second time.

    Parameters
    ----------
    rows
        One row per structure of the inputs, in order: before any are left out.
    inputs, structure_column
        What was predicted.

    Raises
    ------
    OptionError
        For standard input, which cannot be read twice.
    MatxferError
        If the inputs have changed in between.
    """
    if any(streamed_kind(Path(name)) is not None for name in inputs):
        raise OptionError(
            "structures are read a second time when they are written, and standard input cannot "
            "be: write CSV, Parquet or JSON lines, or give a file"
        )
    return _joined(rows, read(inputs, structure_column=structure_column))


def _joined(rows: Iterable[Row], entries: Iterator[Entry]) -> Iterator[Row]:
    for row in rows:
        entry = next(entries, None)
        if entry is None or (entry.source, entry.frame) != (row["source"], row["frame"]):
            raise MatxferError(f"{row['source']}: changed while it was predicted; start again")
        row[CRYSTAL] = entry.crystal
        yield row


def write_extxyz(
    rows: Iterable[Row], columns: Sequence[str], path: Path, metadata: Mapping[str, Any]
) -> None:
    """Write one frame per row, the columns in its comment line (ASE: ``atoms.info``)."""
    from ase.io.extxyz import write_xyz

    del metadata  # has no place in it: the caller writes it beside the file
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            atoms = _atoms(row)
            atoms.info = _info(row, columns)
            write_xyz(file, [atoms])


def write_ase_db(
    rows: Iterable[Row], columns: Sequence[str], path: Path, metadata: Mapping[str, Any]
) -> None:
    """Write an ASE database: numbers as ``key_value_pairs``, texts as ``data`` too."""
    from ase.db import connect

    path.unlink(missing_ok=True)  # ASE would add to it
    database = connect(path, type="db", append=False, use_lock_file=False)
    iterator = iter(rows)
    names: dict[str, str] = {}
    started = False
    while chunk := list(islice(iterator, _TRANSACTION)):
        started = True
        with database:
            for row in chunk:
                info = _info(row, columns)
                pairs = {names.setdefault(c, _key(c)): v for c, v in info.items() if _storable(v)}
                database.write(_atoms(row), key_value_pairs=pairs, data=info)
    if not started:
        raise MatxferError(f"{path.name}: there is no structure to write; see the errors")
    database.metadata = {KEY: dict(metadata)}


def _atoms(row: Row) -> Atoms:
    crystal = row.get(CRYSTAL)
    if crystal is None:  # a programming error, or standard input, which cannot be read twice
        raise OptionError("structures can be written only of rows that carry them")
    atoms: Atoms = crystal.to_ase()
    if results := row.get(RESULTS):
        from ase.calculators.singlepoint import SinglePointCalculator

        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _info(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    """Return the columns that have a value; texts without line ends, which would end the frame."""
    found: dict[str, Any] = {}
    for column in columns:
        value = row[column]
        if value is None or column in {"n_sites", "formula", "error", "error_kind"}:
            continue  # the structure says the first two; rows with an error do not come here
        found[column] = " ".join(encodable(value).split()) if column in TEXTS else value
    return found


def _key(column: str) -> str:
    """Return the key of a column in an ASE database, where the row's number is called ``id``."""
    from ase.db.core import reserved_keys

    name = "".join(letter if letter.isalnum() or letter == "_" else "_" for letter in column)
    if name == "id":
        return "material_id"
    return f"predicted_{name}" if name in reserved_keys or not name[0].isalpha() else name


def _storable(value: object) -> bool:
    """Return whether ASE takes a value: no text that looks like a number, such as the id 007."""
    from ase.db.core import str_represents

    if not isinstance(value, str):
        return True
    return not any(str_represents(value, kind) for kind in (bool, int, float))
