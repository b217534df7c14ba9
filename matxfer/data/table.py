"""A property table: structures, target values in their unit and a split, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.copies import materials
from matxfer.errors import MatxferError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.crystal import Crystal, CrystalError
    from matxfer.readers.entry import Entry

SPLITS = ("train", "val", "test")
#: Other names that tables use for the parts of a split.
_SPLIT_ALIASES = {"valid": "val", "validation": "val", "training": "train"}


class TableError(MatxferError):
    """A table that cannot be used: names the file, what is wrong and the remedy."""


@dataclass(frozen=True, slots=True, eq=False)
class PropertyTable:
    """n rows of structures and values.

    Attributes
    ----------
    source
        Where the rows came from.
    crystals
        The structures; an error stands where a row has none.
    values
        For each target column its values in the column's unit, shape (n,), NaN where missing.
    split
        ``train``, ``val``, ``test`` or another word (rows to leave out), shape (n,).
    """

    source: str
    crystals: list[Crystal | CrystalError]
    values: dict[str, NDArray[np.float64]]
    split: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.crystals)


def read_property_table(
    table: str | Path | pd.DataFrame,
    targets: Sequence[str],
    *,
    split_column: str | None = None,
    structure_column: str | None = None,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    source: str | None = None,
) -> PropertyTable:
    """Read structures, targets and split of a Parquet or CSV table, or of a data frame.

    Parameters
    ----------
    table
        Path or data frame.
    targets
        Columns of values; units are those in their names.
    split_column
        Column that says ``train``, ``val`` or ``test``; without one, rows are split at random,
        those of one material (:mod:`matxfer.data.copies`) together.
    structure_column
        Column of structures, see :mod:`matxfer.readers`.
    seed, fractions
        Seed and shares (train, val, test) of the random split.
    source
        What messages call the table; default: its path.

    Raises
    ------
    TableError
        If the file or a column is missing, or no row has a value.
    """
    from matxfer.readers import crystals_of_table

    frame, found_source = open_table(table)
    source = source or found_source
    wanted = [*targets, *([split_column] if split_column else [])]
    for name in wanted:
        require_column(frame, name, source)
    if not len(frame):
        raise TableError(f"{source}: the table has no rows")
    values = {name: column_numbers(frame, name, source) for name in targets}
    if not any(np.isfinite(v).any() for v in values.values()):
        raise TableError(f"{source}: no row has a value in {list(targets)}")
    entries = crystals_of_table(frame, source, structure_column=structure_column)
    crystals = crystals_or_errors(entries)
    if split_column:
        split = split_words(frame[split_column])
        if not np.isin(split, SPLITS).any():
            raise TableError(
                f"{source}: column {split_column!r} holds none of {SPLITS}, but "
                f"{sorted(set(split.tolist()))[:5]}"
            )
    else:
        split = random_split(materials(crystals), fractions, seed)
    return PropertyTable(source, crystals, values, split)


def split_words(column: pd.Series[Any]) -> NDArray[np.str_]:
    """Return the part of the split of each row, (n,): those of ``SPLITS``, or other words."""
    words = column.astype(str).str.lower().replace(_SPLIT_ALIASES)
    return np.asarray(words.to_numpy().astype(str))


def random_split(
    material: NDArray[np.int64], fractions: tuple[float, float, float], seed: int
) -> NDArray[np.str_]:
    """Return a seeded random split of n rows into ``train``, ``val`` and ``test``, shape (n,).

    Parameters
    ----------
    material
        Number of each row's material, 0, 1, 2 …, (n,); rows of one material stay together.
    """
    n = len(material)
    size = np.bincount(material)
    order = np.random.default_rng(seed).permutation(len(size))
    first, second = round(n * fractions[0]), round(n * (fractions[0] + fractions[1]))
    begin = np.empty(len(size), dtype=np.int64)  # rows before each material, in random order
    begin[order] = np.cumsum(size[order]) - size[order]
    part = np.where(begin < first, "train", np.where(begin < second, "val", "test"))
    return np.asarray(part[material], dtype="<U5")


def open_table(table: str | Path | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return the data frame and where it came from."""
    from matxfer.readers import load_table

    if isinstance(table, str | Path):
        return load_table(table), str(table)
    return table, "<data frame>"


def require_column(
    frame: pd.DataFrame, column: str, source: str | Path, purpose: str = ""
) -> pd.Series[Any]:
    """Return a column.

    Raises
    ------
    TableError
        If there is none of that name: says which there are and, if told, what for it was wanted.
    """
    if column not in frame.columns:
        raise TableError(
            f"{source}: no column {column!r}{purpose}; the columns are {list(frame.columns)}"
        )
    return frame[column]


def rows_where(
    frame: pd.DataFrame, where: dict[str, list[Any]], source: str | Path, purpose: str = ""
) -> pd.DataFrame:
    """Return the rows that have one of the allowed values in every column named.

    Raises
    ------
    TableError
        If a column is missing, no row has one of the values (a misspelt one would leave rows in or
        out without a word), or no row is left.
    """
    chosen = np.ones(len(frame), dtype=bool)
    for column, values in where.items():
        named = require_column(frame, column, source, purpose)
        present = named.drop_duplicates().tolist()
        if unknown := [value for value in values if value not in present]:
            raise TableError(
                f"{source}: no row has {unknown[0]!r} in column {column!r}{purpose}; there are "
                f"{present[:5]}"
            )
        chosen &= named.isin(values).to_numpy()
    if not chosen.any():
        raise TableError(f"{source}: no row is left{purpose} by {where}")
    return frame[chosen]


def crystals_or_errors(entries: Iterable[Entry]) -> list[Crystal | CrystalError]:
    """Return what each row of a table holds: a crystal, or why there is none."""
    return [e.crystal if e.crystal is not None else _required(e.error) for e in entries]


def _required(error: CrystalError | None) -> CrystalError:
    assert error is not None, "an entry holds a crystal or an error"
    return error


def column_numbers(frame: pd.DataFrame, column: str, source: str) -> NDArray[np.float64]:
    """Return a column as numbers, NaN where it is empty or not finite.

    Raises
    ------
    TableError
        If a cell holds something else.
    """
    import pandas as pd

    numbers = pd.to_numeric(frame[column], errors="coerce")
    garbled = numbers.isna() & frame[column].notna()
    if garbled.any():
        row = int(np.flatnonzero(garbled.to_numpy())[0])
        raise TableError(
            f"{source}: row {row} of column {column!r} is {frame[column].iloc[row]!r}, which is "
            "not a number; correct it or leave it empty"
        )
    values = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)
