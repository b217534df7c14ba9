"""Rows of a prediction out: CSV, Parquet, JSON lines, or a table on a terminal."""

from __future__ import annotations

import csv
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from matxfer.prediction import Row

_INTEGERS = ("frame", "n_sites")
_TEXTS = ("id", "source", "formula", "error_kind", "error")
_PARQUET_ROWS = 10_000
#: Rows of a table that are looked at before its column widths are fixed.
_TABLE_ROWS = 200


def output_format(path: str | Path) -> str:
    """Return ``csv``, ``parquet`` or ``jsonl`` by the path's suffix.

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


def write_rows(rows: Iterable[Row], columns: Sequence[str], path: str | Path) -> tuple[int, int]:
    """Write rows to a file as they come; return how many there were and how many had errors.

    The rows go to ``NAME.part``, renamed when all are there: a file under its own name is whole,
    and after an interruption the part that was computed is still on disk.
    """
    path = Path(path)
    write = _WRITERS[output_format(path)]
    path.parent.mkdir(parents=True, exist_ok=True)
    counter = Counter(rows)
    partial = path.with_name(f"{path.name}.part")
    write(counter, columns, partial)
    partial.replace(path)
    return counter.total, counter.failed


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
    """Write rows as CSV, missing values empty, numbers to 7 significant digits."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_text(row[column]) for column in columns])


def _text(value: Any) -> Any:
    # The network computes in single precision: more digits would be noise.
    return f"{value:.7g}" if isinstance(value, float) else value


def _csv_file(rows: Iterable[Row], columns: Sequence[str], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        write_csv(rows, columns, file)


def _jsonl_file(rows: Iterable[Row], columns: Sequence[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            record = {column: row[column] for column in columns}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _parquet_file(rows: Iterable[Row], columns: Sequence[str], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def kind(column: str) -> Any:
        if column in _TEXTS:
            return pa.string()
        return pa.int64() if column in _INTEGERS else pa.float64()

    schema = pa.schema([(column, kind(column)) for column in columns])
    iterator = iter(rows)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while chunk := list(islice(iterator, _PARQUET_ROWS)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


_WRITERS: dict[str, Callable[[Iterable[Row], Sequence[str], Path], None]] = {
    "csv": _csv_file,
    "parquet": _parquet_file,
    "jsonl": _jsonl_file,
}


def print_table(rows: Iterable[Row], columns: Sequence[str]) -> tuple[int, int]:
    """Print rows as a readable table; return how many there were and how many had errors.

    A table of more than a screenful is cut, and says how to get the rest.
    """
    from rich.console import Console
    from rich.table import Table

    counter = Counter(rows)
    iterator = iter(counter)
    shown = list(islice(iterator, _TABLE_ROWS))
    properties = [c for c in columns if c not in (*_TEXTS, *_INTEGERS)]
    frames = any(row["frame"] for row in shown)
    leading = ["id", *(["frame"] if frames else []), "formula", "n_sites"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in leading:
        table.add_column(column, overflow="fold")
    for column in properties:
        table.add_column(column, justify="right", overflow="fold")
    failures = []
    for row in shown:
        if row["error"] is not None:
            failures.append(row)
        cells = ["" if row[c] is None else str(row[c]) for c in leading]
        cells += ["–" if row[c] is None else f"{row[c]:.4g}" for c in properties]
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for row in failures:
        place = f"{row['source']} (frame {row['frame']})" if frames else str(row["source"])
        console.print(f"[red]error[/red] {place}: {row['error']}", markup=True, highlight=False)
    rest = sum(1 for _ in iterator)
    if rest:
        console.print(f"… and {rest} more rows; write them all with -o OUT.csv")
    return counter.total, counter.failed
