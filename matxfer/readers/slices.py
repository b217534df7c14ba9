"""Parquet tables slice by slice: rows stay in Arrow's packed form until somebody works on them.

A slice crosses a process border as one block of bytes, and a table of any length needs the memory
of a few slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from matxfer.crystal import CrystalError
from matxfer.readers.entry import Entry
from matxfer.readers.tables import ID_COLUMNS, crystals_of_table, find_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import pandas as pd


@dataclass(frozen=True, slots=True)
class TableSlice:
    """Some consecutive rows of a table.

    Parameters
    ----------
    source
        Path of the table.
    first_row
        Row of the table that comes first here.
    data
        The rows as an Arrow stream, only columns that are of use.
    structure_column
        As in :func:`matxfer.readers.read_file`.
    """

    source: str
    first_row: int
    data: bytes
    structure_column: str | None = None

    def entries(self, broken: Mapping[int, CrystalError] | None = None) -> Iterator[Entry]:
        """Yield one entry per row; ``broken`` rows (counted here) are not touched, but failed."""
        import pyarrow as pa

        frame = pa.ipc.open_stream(self.data).read_pandas()
        start = 0
        for stop in (*sorted(broken or {}), len(frame)):
            yield from self._rows(frame, start, stop)
            if broken and stop in broken:
                row = self.first_row + stop
                failure = broken[stop].located(self.source, row)
                yield Entry(self.source, row, _id_of(frame, stop, row), error=failure)
            start = stop + 1

    def _rows(self, frame: pd.DataFrame, start: int, stop: int) -> Iterator[Entry]:
        if start >= stop:
            return
        first = self.first_row + start
        part = frame.iloc[start:stop].reset_index(drop=True)
        yield from crystals_of_table(
            part, self.source, structure_column=self.structure_column, first_row=first
        )


def parquet_slices(
    path: Path, structure_column: str | None, rows: int, wanted: Callable[[int], bool]
) -> Iterator[TableSlice]:
    """Yield the slices of a Parquet file in order, none across the border of a row group.

    Parameters
    ----------
    path, structure_column
        The table.
    rows
        Largest number of rows of a slice.
    wanted
        Asked once for each slice, in order and with its number of rows, before it is read; row
        groups of which no slice is wanted are not read at all.

    Raises
    ------
    CrystalError
        Before the first slice, if there is no column of structures or no row.
    """
    import pyarrow.parquet as pq

    # Without pre-buffering pages are read as they are needed, not a row group at a time.
    with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        names = [str(name) for name in file.schema_arrow.names]
        found = find_columns(names, structure_column)
        if found is None or not file.metadata.num_rows:
            raise CrystalError("no structures here", "see read_file, which says what is wrong")
        columns = list(dict.fromkeys([*found, *(c for c in ID_COLUMNS if c in names)]))
        first = 0
        for group in range(file.metadata.num_row_groups):
            n = file.metadata.row_group(group).num_rows
            starts = range(0, n, rows)
            flags = [wanted(min(rows, n - start)) for start in starts]
            if any(flags):
                batches = file.iter_batches(rows, row_groups=[group], columns=columns)
                for start, flag, batch in zip(starts, flags, batches, strict=True):
                    if flag:
                        data = _packed(batch)
                        yield TableSlice(str(path), first + start, data, structure_column)
            first += n


def parquet_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, 0 if it cannot be read."""
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError):
        return 0


def _packed(batch: object) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:  # type: ignore[attr-defined]
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _id_of(frame: pd.DataFrame, index: int, row: int) -> str:
    for name in ID_COLUMNS:
        if name in frame.columns:
            return str(frame[name].iloc[index])
    return str(row)
