"""Local files with structures and properties, row by row, whatever their layout.

ASE databases; tables (Parquet, CSV) and data frames; JSON as pandas and matminer write data frames
(split, records, columns, index; one object per line), with pymatgen's structures as dictionaries.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.crystal import CrystalError
from matxfer.datasets.card import DatasetError
from matxfer.datasets.split_json import is_split, rows_of
from matxfer.readers.ase_properties import RESULTS, plain, rows_with_properties
from matxfer.readers.content import open_text, read_text
from matxfer.readers.formats import kind_of
from matxfer.readers.monty_json import unique_keys
from matxfer.readers.tables import find_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd

#: The cell that holds the structure, or the error that stands in its place.
STRUCTURE = "structure"
#: Columns in which an id is looked for, in this order.
ID_COLUMNS = ("material_id", "id", "name", "mpid", "task_id", "entry_id", "jid", "mbid")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that can be gone through more than once.

    Attributes
    ----------
    name
        What messages call it.
    rows
        Called with whether structures are wanted, returns index and cells of each row; or what is
        wrong with it.
    results
        What columns are called whose unit the source states.
    """

    name: str
    rows: Callable[[bool], Iterator[tuple[str, dict[str, Any] | str]]]
    results: dict[str, str] = field(default_factory=dict)


def open_source(given: Path | pd.DataFrame, structure_column: str | None = None) -> Source:
    """Return the rows of a file or data frame.

    Parameters
    ----------
    given
        The file, or a data frame.
    structure_column
        Column of structures, where it has an unusual name.

    Raises
    ------
    DatasetError
        If the file is missing or of another kind.
    """
    if not isinstance(given, Path):
        return Source("<data frame>", partial(_frame_rows, given, "<data frame>", structure_column))
    if not given.is_file():
        raise DatasetError(f"{given}: there is no such file; check the path")
    name, kind = str(given), kind_of(given)
    if kind == "db":
        return Source(name, partial(_database_rows, given, "db"), RESULTS)
    if kind in {"csv", "parquet"}:
        return Source(name, partial(_table_rows, given, structure_column))
    if kind == "jsonl":
        return Source(name, partial(_line_rows, given, structure_column))
    if kind != "json":
        raise DatasetError(
            f"{name}: not a file with structures and properties that is read here; give an ASE "
            "database (.db), a table (.parquet, .csv) or a data frame as .json, .json.gz or .jsonl"
        )
    return _open_json(given, structure_column)


def _open_json(given: Path, structure_column: str | None) -> Source:
    name = str(given)
    if is_split(given):
        return Source(name, partial(_split_rows, given, structure_column))
    content = _document(given)
    if isinstance(content, dict) and {"ids", "nextid"} <= content.keys():
        return Source(name, partial(_database_rows, given, "json"), RESULTS)
    return Source(name, partial(_json_rows, content, given, structure_column))


def _database_rows(path: Path, kind: str, _: bool) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for index, (name, structure, cells) in enumerate(rows_with_properties(path, kind)):
        yield str(index), _clean(cells) | {"material_id": name, STRUCTURE: structure}


def _table_rows(
    path: Path, structure_column: str | None, structures: bool
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    from matxfer.readers import load_table

    yield from _frame_rows(load_table(path), str(path), structure_column, structures)


def _frame_rows(
    frame: pd.DataFrame, source: str, structure_column: str | None, structures: bool
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    from matxfer.readers import crystals_of_table

    names = [str(name) for name in frame.columns]
    hidden = set(find_columns(names, structure_column) or ())
    kept = [k for k, name in enumerate(names) if name not in hidden]
    columns = [frame.iloc[:, k].tolist() for k in kept]
    entries = crystals_of_table(frame, source, structure_column=structure_column)
    for row, index in enumerate(frame.index.tolist()):
        cells = {names[k]: column[row] for k, column in zip(kept, columns, strict=True)}
        if structures:
            entry = next(entries)
            cells[STRUCTURE] = entry.crystal or entry.error
        yield str(index), _clean(cells)


def _split_rows(
    path: Path, structure_column: str | None, _: bool
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    column = structure_column or STRUCTURE
    for index, cells in rows_of(path, [column]):
        yield index, cells if isinstance(cells, str) else _record(cells, column)


def _line_rows(
    path: Path, structure_column: str | None, _: bool
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with open_text(path) as stream:
        for index, line in enumerate(stream):
            if line.isspace():
                continue
            try:
                value = json.loads(line, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                yield str(index), f"the line is no JSON ({error})"
                continue
            yield str(index), _record(value, structure_column or STRUCTURE)


def _document(path: Path) -> Any:
    try:
        return json.loads(read_text(path), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError, CrystalError) as error:
        raise DatasetError(f"{path}: not readable as JSON ({error}); write it again") from error


def _json_rows(
    content: Any, path: Path, structure_column: str | None, _: bool
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    column = structure_column or STRUCTURE
    for index, value in _records(content, column, path):
        yield index, _record(value, column)


def _records(content: Any, column: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield index and value of each row of a document that is no data frame in split form."""
    if isinstance(content, list):
        return ((str(k), value) for k, value in enumerate(content))
    if isinstance(content, dict) and content and all(isinstance(v, dict) for v in content.values()):
        if column in content and "lattice" not in content[column]:  # pandas' columns
            indices = list(content[column])
            return (
                (index, {name: cells.get(index) for name, cells in content.items()})
                for index in indices
            )
        return ((key, {"id": key, **value}) for key, value in content.items())
    raise DatasetError(
        f"{path}: neither a data frame in JSON nor a list of objects with a structure; write it "
        'with DataFrame.to_json(orient="split") or "records"'
    )


def _record(value: Any, column: str) -> dict[str, Any] | str:
    """Return the cells of an object, its structure under :data:`STRUCTURE`."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__} where an object with a structure should be"
    if column not in value:
        return f"there is no {column!r} (it has {', '.join(map(str, list(value)[:6]))})"
    cells = {str(name): cell for name, cell in value.items() if name != column}
    return _clean(cells) | {STRUCTURE: value[column]}


def _clean(cells: dict[str, Any]) -> dict[str, Any]:
    """Return cells with Python's numbers; true and false are 1 and 0."""
    found = {name: plain(value) for name, value in cells.items()}
    return {name: float(v) if isinstance(v, bool) else v for name, v in found.items()}
