"""Tables (Parquet, CSV): one structure per row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal, CrystalError
from matxfer.errors import ErrorKind
from matxfer.readers.content import open_binary
from matxfer.readers.entry import Entry, attempt, describe, entry_of
from matxfer.readers.formats import plain_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pandas as pd

ARRAY_COLUMNS = ("lattice", "numbers", "frac_coords")
#: Columns that hold a structure by themselves, in the order in which they are looked for.
SINGLE_COLUMNS = ("cif", "structure", "structure_path", "path", "file", "filename")
#: Rows of a table in memory at a time.
ROWS_AT_A_TIME = 4096
ID_COLUMNS = ("material_id", "id", "name")
_REMEDY = (
    "give lattice, numbers and frac_coords, a column 'cif' of CIF texts, 'structure' of pymatgen "
    "JSON, or 'path' of files; or name another one with structure_column (--structure-column)"
)


def load_table(
    path: str | Path, columns: Sequence[str] | None = None, *, limit: int | None = None
) -> pd.DataFrame:
    """Read a Parquet or CSV file, or an ASE database.

    Parameters
    ----------
    path
        ``.parquet``, ``.csv``, ``.csv.gz`` or ``.db``.
    columns
        The columns to read, all of them if None.
    limit
        At most so many rows; 0 shows the columns.

    Returns
    -------
    The table. Id columns of CSV files are text, so that ``007`` stays ``007``.

    Raises
    ------
    CrystalError
        If the file is missing, empty, of another kind, cannot be read or lacks a column.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise CrystalError(
            "there is no such file", "check the path", str(path), kind=ErrorKind.MISSING_FILE
        )
    if path.stat().st_size == 0:
        raise CrystalError(
            "the file is empty", "write the table again", str(path), kind=ErrorKind.EMPTY
        )
    wanted = None if columns is None else list(columns)
    try:
        if _is_parquet(path):
            present = _parquet_columns(path)
            _require(path, wanted, present)
            if limit == 0:
                return pd.DataFrame(columns=present if wanted is None else wanted)
            return pd.read_parquet(path, columns=wanted).iloc[:limit]
        if plain_name(path.name).endswith(".csv"):
            with open_binary(path) as stream:
                present = [str(name) for name in pd.read_csv(stream, nrows=0).columns]
            _require(path, wanted, present)
            with open_binary(path) as stream:
                return pd.read_csv(stream, usecols=wanted, dtype=_text_ids(), nrows=limit)
        if path.suffix.lower() == ".db":
            from matxfer.readers.ase_properties import frame_of_database

            frame = frame_of_database(path)
            _require(path, wanted, [str(name) for name in frame.columns])
            return (frame if wanted is None else frame[wanted]).iloc[:limit]
    except CrystalError as error:
        raise error.located(str(path), None) from error
    except Exception as error:
        raise CrystalError(
            f"the table could not be read ({describe(error)})",
            "check that it is complete and of the kind that its name says",
            str(path),
        ) from error
    raise CrystalError(
        f"{path.suffix or 'no suffix'!r} is not a kind of table that is read here",
        "use .parquet, .csv, .csv.gz or an ASE database (.db)",
        str(path),
        kind=ErrorKind.UNSUPPORTED_FORMAT,
    )


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    return [str(name) for name in pq.read_schema(path).names]


def _require(path: Path, wanted: list[str] | None, present: list[str]) -> None:
    missing = [name for name in wanted or [] if name not in present]
    if missing:
        raise CrystalError(
            f"there is no column {', '.join(map(repr, missing))} (columns: {', '.join(present)})",
            "check the names of the columns",
            str(path),
        )


def read_table(path: Path, structure_column: str | None = None) -> Iterator[Entry]:
    """Yield one entry per row of a Parquet or CSV file, a bounded number of rows in memory.

    Raises
    ------
    CrystalError
        If the file cannot be read, has no rows or no structures.
    """
    source, done = str(path), 0
    frame = load_table(path, limit=0)
    columns = _structure_columns(frame, source, structure_column)
    wanted = list(dict.fromkeys([*columns, *[c for c in ID_COLUMNS if c in frame.columns]]))
    for part in _parts(path, wanted):
        yield from _rows(part, source, columns, done)
        done += len(part)
    if not done:
        raise CrystalError(
            "the table has no rows", "check how it was written", source, kind=ErrorKind.EMPTY
        )


def _parts(path: Path, columns: list[str]) -> Iterator[pd.DataFrame]:
    """Yield the rows of the columns, a few thousand at a time.

    Property columns can be as large as the structures (forces): they stay on disk.
    """
    if _is_parquet(path):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_A_TIME, columns=columns, use_threads=False):
                yield batch.to_pandas()
        return
    import pandas as pd

    with open_binary(path) as stream:
        yield from pd.read_csv(
            stream, usecols=columns, dtype=_text_ids(), chunksize=ROWS_AT_A_TIME, compression=None
        )


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _text_ids() -> dict[str, type]:
    """Return the kinds of columns in which ``007`` must stay ``007``."""
    return dict.fromkeys(ID_COLUMNS, str)


def crystals_of_table(
    frame: pd.DataFrame, source: str, *, structure_column: str | None = None, first_row: int = 0
) -> Iterator[Entry]:
    """Return one entry per row of a table, in order.

    Parameters
    ----------
    frame
        The table. Structures are in ``lattice`` (9 numbers, Å), ``numbers`` (n) and
        ``frac_coords`` (3n), as lists or as their JSON text; else in one column: CIF text,
        pymatgen JSON, paths relative to the table's folder, or in a frame in memory pymatgen
        structures, ASE atoms or crystals.
    source
        Path of the table, for messages and relative paths.
    structure_column
        The column to use, whatever the others are called.
    first_row
        Number of the first row, where the frame is a piece of a table.

    Raises
    ------
    CrystalError
        If the table has no rows or no structure column. Rows give error entries instead.
    """
    columns = _structure_columns(frame, source, structure_column)
    if not len(frame):
        raise CrystalError(
            "the table has no rows", "check how it was written", source, kind=ErrorKind.EMPTY
        )
    return _rows(frame, source, columns, first_row)


def _structure_columns(
    frame: pd.DataFrame, source: str, structure_column: str | None
) -> tuple[str, ...]:
    present = [str(name) for name in frame.columns]
    columns = find_columns(present, structure_column)
    if columns is None:
        reason = "no structure columns" if structure_column is None else "no column"
        name = "" if structure_column is None else f" {structure_column!r}"
        raise CrystalError(
            f"the table has {reason}{name} (its columns: {', '.join(present) or 'none'})",
            _REMEDY,
            source,
        )
    return columns


def find_columns(present: Sequence[str], structure_column: str | None) -> tuple[str, ...] | None:
    """Return the column or columns that hold the structures, None if there are none."""
    if structure_column is not None:
        return (structure_column,) if structure_column in present else None
    if set(ARRAY_COLUMNS) <= set(present):
        return ARRAY_COLUMNS
    return next(((name,) for name in SINGLE_COLUMNS if name in present), None)


def _rows(
    frame: pd.DataFrame, source: str, columns: tuple[str, ...], start: int = 0
) -> Iterator[Entry]:
    values = [frame[name].tolist() for name in columns]
    ids = _ids(frame, start)
    folder = Path(source).parent
    what, remedy = f"the structure in column(s) {', '.join(columns)}", "correct or remove this row"
    for i, cells in enumerate(zip(*values, strict=True)):
        build: Callable[[], Crystal]
        if len(columns) == 3:
            build = partial(_crystal_of_arrays, cells, ids[i])
        else:
            build = partial(_crystal_of_cell, cells[0], _Cell(columns[0], folder, ids[i]))
        yield entry_of(source, (start + i, ids[i], attempt(build, what, remedy)))


def _ids(frame: pd.DataFrame, start: int) -> list[str]:
    numbers = [str(row) for row in range(start, start + len(frame))]
    for name in ID_COLUMNS:
        if name in frame.columns:
            return [
                number if _is_missing(value) else str(value)
                for number, value in zip(numbers, frame[name].tolist(), strict=True)
            ]
    return numbers


def _is_missing(value: object) -> bool:
    """Return whether a cell is empty: None, NaN, pandas' NA or blank text."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return True
    return type(value).__name__ in {"NAType", "NaTType"} or (
        isinstance(value, str) and not value.strip()
    )


def _crystal_of_arrays(cells: tuple[Any, ...], name: str) -> Crystal:
    arrays = []
    for column, cell in zip(ARRAY_COLUMNS, cells, strict=True):
        if _is_missing(cell):
            raise CrystalError(
                f"missing {column}: the cell is empty", "fill in this row or remove it"
            )
        try:
            value = json.loads(cell) if isinstance(cell, str) else cell
            if isinstance(value, np.ndarray) and value.dtype != object:
                arrays.append(value.astype(np.float64))
                continue
            # Parquet gives nested lists as arrays of arrays.
            arrays.append(np.hstack([np.ravel(part) for part in value]).astype(np.float64))
        except (ValueError, TypeError) as error:
            raise CrystalError(
                f"the column {column!r} does not hold a list of numbers ({describe(error)})",
                "write lists as JSON text, for example [3.9, 0, 0]",
            ) from error
    lattice, numbers, frac = arrays
    return Crystal(lattice, numbers, frac, id=name)


@dataclass(frozen=True, slots=True)
class _Cell:
    """Where a cell stands: its column, the table's folder and the row's id."""

    column: str
    folder: Path
    id: str


def _crystal_of_cell(cell: object, place: _Cell) -> Crystal:
    """Read a cell by what it is, since --structure-column may name any kind."""
    from matxfer.readers.monty_json import crystal_of_json
    from matxfer.readers.objects import crystal_of_object

    if _is_missing(cell):
        raise CrystalError(
            f"missing structure: the cell in column {place.column!r} is empty",
            "fill in this row or remove it",
        )
    if isinstance(cell, CrystalError):  # what a reader found out already
        raise cell
    crystal = crystal_of_object(cell, place.id)
    if crystal is not None:
        return crystal
    if not isinstance(cell, str):
        return crystal_of_json(cell, place.id)
    text = cell.strip()
    if text.startswith(("{", '"{')):
        return crystal_of_json(text, place.id)
    if "\n" in text or text.startswith(("data_", "#")):
        return crystal_of_cif(text, place.id)
    return _crystal_of_path(place.folder / text, place.id)


def crystal_of_cif(text: str, name: str) -> Crystal:
    """Return the one crystal of a CIF text.

    Raises
    ------
    CrystalError
        If there is none, there are several, or it cannot be used.
    """
    from matxfer.readers.cif import crystals_of_text

    return _only([result for _, _, result in crystals_of_text(text, name)], name)


def _crystal_of_path(path: Path, name: str) -> Crystal:
    from matxfer.readers import is_table, read_file

    if is_table(path):
        raise CrystalError(
            f"{path} is a table, not a structure", "give the path of one structure per row"
        )
    return _only([entry.crystal or entry.error for entry in read_file(path)], name)


def _only(results: Sequence[Crystal | CrystalError | None], name: str) -> Crystal:
    if len(results) != 1:
        raise CrystalError(
            f"there are {len(results)} structures where the row needs one",
            "split the file, or give it to the reader directly",
        )
    result = results[0]
    if isinstance(result, Crystal):
        return result.with_id(name)
    assert result is not None
    # The row is the place to report; the inner file goes into the reason.
    inner = f"{result.source}: {result.reason}" if result.source else result.reason
    raise CrystalError(inner, result.remedy, kind=result.kind)
