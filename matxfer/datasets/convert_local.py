"""From a local file with structures and properties to a table of ours, units checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matxfer.data.properties import unit_of
from matxfer.datasets.card import Column, DatasetCard, DatasetError
from matxfer.datasets.columns import RESERVED, distinct, read_columns
from matxfer.datasets.convert import write_table
from matxfer.datasets.fetch import output_table
from matxfer.datasets.local import ID_COLUMNS, STRUCTURE, open_source
from matxfer.files import sha256
from matxfer.provenance import provenance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from matxfer.datasets.local import Source

_ID = "material_id"


def convert_local(
    given: str | Path | pd.DataFrame,
    output: str | Path,
    *,
    columns: Sequence[str] = (),
    id_column: str | None = None,
    structure_column: str | None = None,
    on_row: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a table of the structures and properties of a file or data frame.

    Columns of numbers whose names end in a unit are kept; so are texts. A column of numbers whose
    name says no unit is left out, and told, unless ``columns`` names it.

    Parameters
    ----------
    given
        See :mod:`matxfer.datasets.local`; or a data frame.
    output
        Parquet file to write.
    columns
        ``SOURCE=NAME`` or ``SOURCE=NAME:UNIT``, see :func:`matxfer.datasets.columns.read_column`.
    id_column, structure_column
        Columns of ids and structures, where they have unusual names.
    on_row
        Called with the number of rows done since the last call.

    Returns
    -------
    dict
        ``table``, ``rows``, ``failed``, ``errors``, ``values`` as of
        :func:`matxfer.datasets.fetch.fetch_dataset`; ``left_out``: column → why.

    Raises
    ------
    DatasetError
        If the file is missing, of another kind or damaged, a column is missing, or units disagree
        or are missing.
    """
    path = Path(given) if isinstance(given, str | Path) else None
    source = open_source(Path(given) if isinstance(given, str) else given, structure_column)
    table = output_table(output)
    if path is not None and table.exists() and table.samefile(path):
        raise DatasetError(f"{table}: would be written over what is read; give another name")
    kinds = _kinds(source)
    stated = {column: unit_of(name) for column, name in source.results.items()}
    chosen = read_columns(columns, stated)
    if unknown := [c.source for c in chosen if c.source not in kinds]:
        raise DatasetError(f"{source.name}: no column {unknown[0]!r}; there are {sorted(kinds)}")
    name = _id_of(source, kinds, id_column)
    numbers, texts, left_out = _columns(source, kinds, chosen, name)
    card = DatasetCard(
        name=path.name.split(".")[0] if path is not None else "row",
        title=f"converted from {'a data frame' if path is None else path.name}",
        collection="local",
        licence="that of the source",
        url="",
        sha256="" if path is None else sha256(path),
        file_type="json",
        rows=0,
        doi=(),
        columns=distinct(numbers),
        structure_column=STRUCTURE,
        id_column=name,
        formula_column="formula",
        text_columns=tuple(texts),
    )
    found = write_table(card, source.rows(True), table, provenance(), on_row, source.name)
    return {"table": str(table), **asdict(found), "left_out": left_out}


def _kinds(source: Source) -> dict[str, Counter[str]]:
    """Return what stands in each column: so many numbers, texts, other things."""
    kinds: dict[str, Counter[str]] = {}
    for _, cells in source.rows(False):
        if isinstance(cells, str):
            continue
        for name, value in cells.items():
            if value is None or name == STRUCTURE:
                continue
            kind = "text" if isinstance(value, str) else "other"
            kinds.setdefault(name, Counter())["number" if _is_number(value) else kind] += 1
    return kinds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _id_of(source: Source, kinds: dict[str, Counter[str]], asked: str | None) -> str:
    if asked is not None and asked not in kinds:
        raise DatasetError(f"{source.name}: no column {asked!r}; there are {sorted(kinds)}")
    return asked or next((name for name in ID_COLUMNS if name in kinds), _ID)


def _columns(
    source: Source, kinds: dict[str, Counter[str]], chosen: Sequence[Column], name: str
) -> tuple[list[Column], list[str], dict[str, str]]:
    """Return columns of numbers and of texts, and why others are left out."""
    numbers, texts, left_out = list(chosen), [], {}
    asked = {column.source for column in chosen}
    for column, kind in kinds.items():
        if column in asked or column == name or column in RESERVED:
            continue
        ours = source.results.get(column, column)
        if ours != column and ours in kinds:
            left_out[column] = f"there is a column {ours!r}; take it with --column {column}=NAME"
        elif kind["number"]:
            if unit_of(ours):
                numbers.append(Column(column, ours, unit_of(ours)))
            else:
                left_out[column] = (
                    "no unit in its name; take it with --column "
                    f"{column}=NAME_WITH_UNIT, or {column}={column}:1 if it has none"
                )
        elif kind["text"]:
            texts.append(column)
        else:
            left_out[column] = "neither numbers nor text"
    return numbers, texts, left_out
