"""A published dataset becomes one of our tables: Parquet, a structure per row, units in the names.

A row that cannot be used keeps its place: its structure or value is missing, and the column
``error`` says why.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from matxfer.crystal import Crystal, CrystalError
from matxfer.datasets.card import DatasetError
from matxfer.datasets.split_json import rows_of
from matxfer.readers.entry import attempt
from matxfer.readers.monty_json import crystal_of_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from matxfer.datasets.card import DatasetCard

#: Rows in memory at a time.
ROWS_AT_A_TIME = 1024
#: Errors that are kept in the record; all are in the table.
_SHOWN = 5


@dataclass(slots=True)
class Conversion:
    """What became of a published file.

    Attributes
    ----------
    rows, failed
        Number of rows, and of those among them that lack something because of an error.
    errors
        The first few errors, with their rows.
    values
        Number of values of each column.
    """

    rows: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, reasons: list[str]) -> None:
        """Count a row's errors."""
        self.failed += 1
        if len(self.errors) < _SHOWN:
            self.errors.append(f"row {self.rows} ({name}): {'; '.join(reasons)}")


def convert(
    card: DatasetCard,
    published: Path,
    table: Path,
    facts: dict[str, Any] | None = None,
    on_row: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the table of a published file, whole or not at all.

    Parameters
    ----------
    card
        Its card.
    published
        The file.
    table
        Parquet file to write: ``material_id``, ``formula``; ``n_sites``, ``lattice`` (9, row-major,
        Å), ``numbers`` (n) and ``frac_coords`` (3n) where the set has structures; the columns of
        the card in the units of their names; ``error``.
    facts
        What the file's metadata say besides the card.
    on_row
        Called with the number of rows done since the last call.

    Raises
    ------
    DatasetError
        If the file is damaged, of another layout or without rows.
    """
    rows = rows_of(published, card.source_columns)
    return write_table(card, rows, table, facts, on_row, str(published))


def write_table(
    card: DatasetCard,
    rows: Iterable[tuple[str, dict[str, Any] | str]],
    table: Path,
    facts: dict[str, Any] | None = None,
    on_row: Callable[[int], None] | None = None,
    source: str = "",
) -> Conversion:
    """Write the table of rows as they are published: each its index and cells, or what is wrong.

    The other parameters are those of :func:`convert`; ``source`` is what messages call the rows.
    """
    import pyarrow.parquet as pq

    schema = _schema(card, facts or {})
    found = Conversion(values={column.name: 0 for column in card.columns})
    temporary = table.with_name(f".{table.name}.part")
    waiting: list[dict[str, Any]] = []
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for index, cells in rows:
                waiting.append(_row(card, index, cells, found))
                found.rows += 1
                if len(waiting) == ROWS_AT_A_TIME:
                    writer.write_table(_arrow(waiting, schema))
                    waiting = []
                if on_row is not None:
                    on_row(1)
            if waiting:
                writer.write_table(_arrow(waiting, schema))
        if not found.rows:
            raise DatasetError(f"{source or card.name}: there are no rows")
        temporary.replace(table)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _row(
    card: DatasetCard, index: str, cells: dict[str, Any] | str, found: Conversion
) -> dict[str, Any]:
    """Return a row of the table; its errors are counted."""
    reasons: list[str] = []
    if isinstance(cells, str):
        reasons.append(cells)
        cells = {}
    name = _text(cells.get(card.id_column)) or f"{card.name}-{index}"
    row: dict[str, Any] = {"material_id": name, "formula": _text(cells.get(card.formula_column))}
    if card.structure_column and not reasons:
        given = cells[card.structure_column]
        build = partial(crystal_of_json, given, name)
        crystal = (
            given
            if isinstance(given, Crystal | CrystalError)
            else attempt(build, "the structure", "see the published file")
        )
        if isinstance(crystal, CrystalError):
            reasons.append(crystal.reason)
        else:
            row |= _arrays(crystal)
    for column in card.columns:
        try:
            row[column.name] = value = _number(cells.get(column.source), column.conversion())
            found.values[column.name] += value is not None
        except ValueError as error:
            reasons.append(f"{column.source}: {error}")
    row |= {column: _text(cells.get(column)) for column in card.text_columns}
    if reasons:
        row["error"] = "; ".join(reasons)
        found.note(name, reasons)
    return row


def _arrays(crystal: Crystal) -> dict[str, Any]:
    return {
        "formula": crystal.formula,
        "n_sites": crystal.n_sites,
        "lattice": crystal.lattice.ravel(),
        "numbers": crystal.numbers,
        "frac_coords": crystal.frac_coords.ravel(),
    }


def _number(value: object, convert_: Callable[[float], float]) -> float | None:
    """Return a value in the table's unit, None where there is none.

    Raises
    ------
    ValueError
        If it is neither a number nor missing.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:40]!r} is not a number")  # noqa: TRY004 - of a file
    try:
        number = convert_(float(value))
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite in the unit of the table")
    return number


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _schema(card: DatasetCard, facts: dict[str, Any]) -> Any:
    import pyarrow as pa

    structure = [
        ("n_sites", pa.int32()),
        ("lattice", pa.list_(pa.float64())),
        ("numbers", pa.list_(pa.int16())),
        ("frac_coords", pa.list_(pa.float64())),
    ]
    fields = [
        ("material_id", pa.string()),
        ("formula", pa.string()),
        *(structure if card.structure_column else []),
        *((column.name, pa.float64()) for column in card.columns),
        *((column, pa.string()) for column in card.text_columns),
        ("error", pa.string()),
    ]
    meta = json.dumps({"card": card.to_json(), **facts}, ensure_ascii=False)
    return pa.schema(fields, metadata={"matxfer_dataset": meta})


def _arrow(rows: list[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    columns = [pa.array([row.get(f.name) for row in rows], type=f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)
