"""ASE databases: SQLite files of any number of rows, a page at a time, and JSON documents."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.entry import Item, attempt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ase.db.row import AtomsRow

#: Rows per query: ASE fetches the whole answer of a query before it yields the first row.
_PAGE = 512
#: What a structure and its name need; results and data of a row can be a thousand times larger.
_COLUMNS = ("id", "numbers", "positions", "cell", "pbc", "key_value_pairs")


def read_ase_db(path: Path, kind: str = "db") -> Iterator[Item]:
    """Yield the rows of an ASE database, by ``material_id``, ``name`` or else the row id.

    Parameters
    ----------
    path
        The database file.
    kind
        ASE's name of the database type, ``db`` (SQLite) or ``json``.

    Raises
    ------
    CrystalError
        If the file is empty or no database.
    """
    for frame, row in enumerate(database_rows(path, kind)):
        if isinstance(row, CrystalError):
            yield frame, str(row.frame), CrystalError(row.reason, row.remedy)
            continue
        name = name_of_row(row)
        yield frame, name, crystal_of_row(row, name)


def database_rows(
    path: Path, kind: str = "db", *, more: Sequence[str] = ()
) -> Iterator[AtomsRow | CrystalError]:
    """Yield ASE's rows of a database in the order of their ids; an error for one that is damaged.

    Parameters
    ----------
    path, kind
        See :func:`read_ase_db`.
    more
        Columns that are wanted besides structures and key-value pairs: ``energy``, ``data`` …

    Raises
    ------
    CrystalError
        If the file is empty or no database.
    """
    import ase.db

    # ASE would turn an empty file into a database: look before it touches the user's file.
    with path.open("rb") as stream:
        head = stream.read(16)
    if not head:
        raise CrystalError(
            "the file is empty", "remove it, or write the database again", kind=ErrorKind.EMPTY
        )
    if kind == "db" and not head.startswith(b"SQLite format 3"):
        raise CrystalError("this is no ASE database (SQLite)", "check the file")
    with ase.db.connect(path, type=kind, use_lock_file=False) as database:
        yield from _paged(database, [*_COLUMNS, *more]) if kind == "db" else database.select()


def name_of_row(row: Any) -> str:
    """Return the id of a row: its ``material_id``, ``name`` or number."""
    return str(row.get("material_id") or row.get("name") or row.id)


def crystal_of_row(row: Any, name: str) -> Crystal | CrystalError:
    """Return the structure of a row, or what is wrong with it."""
    return attempt(partial(_crystal_of_row, row, name), f"row {row.id}", "write this row again")


def _paged(database: Any, columns: list[str]) -> Iterator[AtomsRow | CrystalError]:
    """Yield the rows in the order of their ids; a row that ASE cannot decode as an error."""
    last = 0
    while True:
        ids = [row.id for row in _select(database, f"id>{last}", ["id"], _PAGE)]
        if not ids:
            return
        if ids != sorted(set(ids)) or ids[0] <= last:  # or there would be no end
            raise CrystalError("the database is damaged: its ids do not ascend", "write it again")
        try:
            page: Sequence[AtomsRow | CrystalError] = _select(
                database, f"id>{last}", columns, _PAGE
            )
        except Exception:  # noqa: BLE001 - one bad row fails the page: look at each
            page = [_single(database, number, columns) for number in ids]
        yield from page
        last = ids[-1]


def _single(database: Any, number: int, columns: list[str]) -> AtomsRow | CrystalError:
    try:
        (row,) = _select(database, f"id={number}", columns, 1)
    except Exception as error:  # noqa: BLE001 - parsers raise anything; one row must not stop all
        problem = f"row {number} could not be read ({type(error).__name__}: {error})"
        return CrystalError(problem, "write this row again", frame=number)
    return row


def _select(database: Any, where: str, columns: list[str], limit: int) -> list[AtomsRow]:
    wanted = "data" in columns
    return list(
        database.select(where, sort="id", limit=limit, columns=columns, include_data=wanted)
    )


def _crystal_of_row(row: Any, name: str) -> Crystal:
    from ase import Atoms

    # Not row.toatoms(), which also rebuilds constraints and results that nobody asked for.
    atoms = Atoms(numbers=row.numbers, positions=row.positions, cell=row.cell, pbc=row.pbc)
    return Crystal.from_ase(atoms, id=name)
