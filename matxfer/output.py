"""Rows of a prediction out: tables, structures, or a table on a terminal."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from matxfer.columns import INTEGERS, TEXTS, Row, arrow_schema, encodable, printable
from matxfer.errors import OptionError
from matxfer.output_metadata import KEY, write_sidecar
from matxfer.output_structures import write_ase_db, write_extxyz

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

#: What a spreadsheet takes for the beginning of a formula, unless the whole is a number.
_FORMULA_STARTS = ("=", "+", "-", "@")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?").fullmatch
_PARQUET_ROWS = 10_000
#: Rows of a table that are looked at before its column widths are fixed.
_TABLE_ROWS = 200


def output_format(path: str | Path) -> str:
    """Return ``csv``, ``parquet``, ``jsonl``, ``extxyz`` or ``db`` by the path's suffix.

    Raises
    ------
    ValueError
        For another suffix.
    """
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in _WRITERS:
        raise OptionError(
            f"{path}: cannot write {suffix or 'a file without a suffix'!r}; "
            f"use one of {', '.join(f'.{name}' for name in _WRITERS)}"
        )
    return suffix


def holds_structures(path: str | Path) -> bool:
    """Return whether files of this kind need rows that carry their structure."""
    return output_format(path) in {"extxyz", "db"}


def write_rows(
    rows: Iterable[Row],
    columns: Sequence[str],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """Write rows to a file as they come; return how many there were and how many had errors.

    The rows go to ``NAME.part``, renamed when all are there: a file under its own name is whole,
    and after an interruption the part that was computed is still on disk.

    Parameters
    ----------
    rows
        The rows; for extxyz and ASE databases with their structures
        (:func:`matxfer.output_structures.with_crystals`).
    columns
        What to write of each.
    path
        The file. Rows with errors that have no place in it go into ``NAME.errors.csv``.
    metadata
        Where the figures come from (:func:`matxfer.output_metadata.describe_prediction`): into
        the file where there is a place for it (Parquet, ASE), else beside it as
        ``NAME.meta.json``.
    """
    path = Path(path)
    kind = output_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    counter = Counter(rows)
    partial = path.with_name(f"{path.name}.part")
    facts = dict(metadata or {})
    if holds_structures(path):
        with _errors_aside(counter, path) as good:
            _WRITERS[kind](good, columns, partial, facts)
    else:
        _WRITERS[kind](counter, columns, partial, facts)
    if facts and kind not in {"parquet", "db"}:
        write_sidecar(path, facts)
    _to_disk(partial)
    partial.replace(path)
    _to_disk(path.parent)
    return counter.total, counter.failed


@contextmanager
def _errors_aside(rows: Iterable[Row], path: Path) -> Iterator[Iterator[Row]]:
    """Let rows with errors pass into a table of their own, which is there only if it has any."""
    aside = path.with_name(f"{path.name}.errors.csv")
    aside.unlink(missing_ok=True)
    columns = ("id", "source", "frame", "error_kind", "error")
    with ExitStack() as stack:
        writer = None

        def good() -> Iterator[Row]:
            nonlocal writer
            for row in rows:
                if row["error"] is None:
                    yield row
                    continue
                if writer is None:
                    file = stack.enter_context(aside.open("w", encoding="utf-8", newline=""))
                    writer = csv.writer(file, lineterminator="\n")
                    writer.writerow(columns)
                writer.writerow([_cell(column, row[column]) for column in columns])

        yield good()


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a power cut."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Counter:
    """Count rows and failures on their way through."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows, self.total, self.failed = rows, 0, 0

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            self.total += 1
            self.failed += row["error"] is not None
            yield row


def write_csv(rows: Iterable[Row], columns: Sequence[str], file: TextIO) -> None:
    """Write rows as CSV, missing values empty, numbers to 7 significant digits.

    Texts come from other people's files and file names. One that a spreadsheet would take for a
    formula gets a ``'`` in front, and control characters but line ends are written as escapes.
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(column, row[column]) for column in columns])


def _cell(column: str, value: Any) -> Any:
    if isinstance(value, float):
        # The network computes in single precision: more digits would be noise.
        return f"{value:.7g}"
    if value is None or column not in TEXTS:
        return value
    text = printable(str(value), keep="\n")
    return f"'{text}" if text.startswith(_FORMULA_STARTS) and not _NUMBER(text) else text


def _csv_file(
    rows: Iterable[Row], columns: Sequence[str], path: Path, metadata: Mapping[str, Any]
) -> None:
    del metadata  # comment lines would break other people's readers
    with path.open("w", encoding="utf-8", newline="") as file:
        write_csv(rows, columns, file)


def _jsonl_file(
    rows: Iterable[Row], columns: Sequence[str], path: Path, metadata: Mapping[str, Any]
) -> None:
    del metadata
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            record = {column: row[column] for column in columns}
            file.write(encodable(json.dumps(record, ensure_ascii=False)) + "\n")


def _parquet_file(
    rows: Iterable[Row], columns: Sequence[str], path: Path, metadata: Mapping[str, Any]
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = parquet_schema(columns, metadata)
    texts = [column for column in columns if column in TEXTS]
    iterator = iter(rows)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while chunk := list(islice(iterator, _PARQUET_ROWS)):
            for row in chunk:
                row |= {c: encodable(row[c]) for c in texts if row[c] is not None}
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def parquet_schema(columns: Sequence[str], metadata: Mapping[str, Any]) -> Any:
    """Return the schema of a Parquet file of predictions: types, units, and where they come from.

    Parameters
    ----------
    columns
        The columns.
    metadata
        What :func:`matxfer.output_metadata.describe_prediction` says; goes under ``matxfer``.
    """
    units: Mapping[str, str] = metadata.get("units", {})
    schema = arrow_schema(columns)
    for k, column in enumerate(columns):
        if units.get(column):
            schema = schema.set(k, schema.field(k).with_metadata({"unit": units[column]}))
    facts = json.dumps(dict(metadata), ensure_ascii=False)
    return schema.with_metadata({KEY: facts}) if metadata else schema


_WRITERS: dict[str, Callable[[Iterable[Row], Sequence[str], Path, Mapping[str, Any]], None]] = {
    "csv": _csv_file,
    "parquet": _parquet_file,
    "jsonl": _jsonl_file,
    "extxyz": write_extxyz,
    "db": write_ase_db,
}


def print_rows(rows: Iterable[Row], columns: Sequence[str]) -> tuple[int, int]:
    """Print rows as they come, a table on a terminal, CSV into a pipe; return as write_rows."""
    if sys.stdout.isatty():
        return print_table(rows, columns)
    counter = Counter(rows)
    write_csv(counter, columns, sys.stdout)
    return counter.total, counter.failed


def print_table(rows: Iterable[Row], columns: Sequence[str]) -> tuple[int, int]:
    """Print rows as a readable table; return how many there were and how many had errors.

    A table of more than a screenful is cut, and says how to get the rest.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    counter = Counter(rows)
    iterator = iter(counter)
    shown = list(islice(iterator, _TABLE_ROWS))
    properties = [c for c in columns if c not in TEXTS | INTEGERS]
    frames = any(row["frame"] for row in shown)
    leading = ["id", *(["frame"] if frames else []), "formula", "n_sites"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in leading:
        table.add_column(escape(column), overflow="fold")
    for column in properties:
        table.add_column(column, justify="right", overflow="fold")
    failures = []
    for row in shown:
        if row["error"] is not None:
            failures.append(row)
        cells = ["" if row[c] is None else escape(printable(str(row[c]))) for c in leading]
        cells += ["–" if row[c] is None else f"{row[c]:.4g}" for c in properties]
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for row in failures:
        place = f"{row['source']} (frame {row['frame']})" if frames else str(row["source"])
        words = escape(printable(f"{place}: {row['error']}"))
        console.print(f"[red]error[/red] {words}", markup=True, highlight=False)
    rest = sum(1 for _ in iterator)
    if rest:
        console.print(f"… and {rest} more rows; write them all with -o OUT.csv")
    return counter.total, counter.failed
