"""Keeping materials out of pretraining, so that nobody can say that a transfer gain is memory.

A row is left out if its material id or its reduced composition occurs in a table that was named.
A structure match needs equal reduced compositions (pymatgen's ``StructureMatcher`` compares them
first, unless it is asked for anonymous matches). So this leaves out whatever id and structure
match together would, and all polymorphs besides.

Rows of train and of val are left out: val chooses the epoch, and so the weights. Rows of test
stay, since nothing is learnt from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.table import TableError, require_column, rows_where
from matxfer.files import sha256
from matxfer.options import check_kinds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

#: Atomic numbers in rising order, each with its count; the counts have no common divisor.
Composition: TypeAlias = tuple[tuple[int, int], ...]

#: The parts of a split that shape the weights.
LEARNT_FROM = ("train", "val")
_DEFAULT_ID_COLUMN = "material_id"
_PURPOSE = " to exclude by"


@dataclass(frozen=True, slots=True)
class ExcludeConfig:
    """A table whose materials are kept out.

    Parameters
    ----------
    table
        Parquet or CSV file, relative to the configuration file.
    where
        Column → values: only these rows count; empty: all.
    id_column
        Column of material ids. Without ``material_id`` a table counts by composition alone.
    """

    table: str
    where: dict[str, list[Any]] = field(default_factory=dict)
    id_column: str = _DEFAULT_ID_COLUMN

    def __post_init__(self) -> None:
        check_kinds(self, f"exclude ({self.table})")


def reduced_composition(crystal: Crystal) -> Composition:
    """Return (atomic number, count) in order, the counts divided by their common divisor.

    From the atoms themselves: formulas are written in many ways (O and O2, NaCl and ClNa).
    """
    numbers, counts = np.unique(crystal.numbers, return_counts=True)
    divisor = gcd(*counts.tolist())
    return tuple(zip(numbers.tolist(), (counts // divisor).tolist(), strict=True))


class Exclusions:
    """Ids and reduced compositions of the materials to keep out.

    Parameters
    ----------
    ids, compositions
        Of the materials.
    tables
        What is recorded of the tables they come from.
    """

    def __init__(
        self, ids: set[str], compositions: set[Composition], tables: list[dict[str, Any]]
    ) -> None:
        self.ids, self.compositions, self.tables = ids, compositions, tables

    def by_id(self, ids: Sequence[str] | None, n: int) -> NDArray[np.bool_]:
        """Say which of n rows have an id to keep out, shape (n,); without ids none has."""
        if ids is None:
            return np.zeros(n, dtype=bool)
        if len(ids) != n:
            raise ValueError(f"{len(ids)} ids for {n} rows")
        return np.fromiter((i in self.ids for i in ids), dtype=bool, count=n)

    def by_composition(self, crystals: Sequence[Crystal | CrystalError]) -> NDArray[np.bool_]:
        """Say which rows have a composition to keep out, shape (n,); errors never have."""
        return np.fromiter(
            (
                isinstance(c, Crystal) and reduced_composition(c) in self.compositions
                for c in crystals
            ),
            dtype=bool,
            count=len(crystals),
        )

    def matches(
        self, ids: Sequence[str] | None, crystals: Sequence[Crystal | CrystalError]
    ) -> NDArray[np.bool_]:
        """Say which rows are to be kept out, by id or by composition, shape (n,)."""
        return self.by_id(ids, len(crystals)) | self.by_composition(crystals)

    def leave_out(
        self,
        split: NDArray[np.str_],
        ids: Sequence[str] | None,
        crystals: Sequence[Crystal | CrystalError],
    ) -> tuple[NDArray[np.str_], dict[str, int]]:
        """Mark the rows of train and val that are to be kept out.

        Parameters
        ----------
        split
            Part that each row belongs to, shape (n,).
        ids
            Material ids of the rows as text, None if there are none.
        crystals
            Structures of the rows.

        Returns
        -------
        split
            The same with ``excluded`` for these rows, shape (n,).
        counts
            How many were left out of ``train`` and of ``val``, and how many of both
            ``by_id`` and ``by_composition`` (most are in either).
        """
        learnt = np.isin(split, LEARNT_FROM)
        by_id = self.by_id(ids, len(crystals)) & learnt
        by_composition = self.by_composition(crystals) & learnt
        out = by_id | by_composition
        counts = {part: int((out & (split == part)).sum()) for part in LEARNT_FROM}
        counts |= {"by_id": int(by_id.sum()), "by_composition": int(by_composition.sum())}
        return np.where(out, "excluded", split), counts

    def to_json(self) -> dict[str, Any]:
        """Return what the card records."""
        return {
            "tables": self.tables,
            "ids": len(self.ids),
            "compositions": len(self.compositions),
        }


def read_exclusions(configs: Iterable[ExcludeConfig], folder: Path) -> Exclusions:
    """Read the tables whose materials are kept out.

    Parameters
    ----------
    configs
        The tables, their paths relative to ``folder``.
    folder
        Folder of the configuration file.

    Raises
    ------
    TableError
        If a table or a column is missing, no row has a value of ``where``, or a row has neither
        an id nor a structure that can be read, so that its material would not be kept out.
    """
    from matxfer.readers import load_table

    ids: set[str] = set()
    compositions: set[Composition] = set()
    tables: list[dict[str, Any]] = []
    for config in configs:
        path = folder / config.table
        try:
            frame = _rows(load_table(path), config, path)
            names, found = _ids(frame, config, path), _compositions(frame, path)
        except CrystalError as error:
            raise TableError(str(error)) from error
        for row, name, composition in zip(frame.index, names, found, strict=True):
            if name is None and composition is None:
                raise TableError(
                    f"{path}: row {row} has no id and no structure that can be read, so its "
                    "material cannot be kept out; correct or remove it"
                )
        ids.update(name for name in names if name is not None)
        compositions.update(c for c in found if c is not None)
        tables.append(
            {
                "table": path.name,
                "sha256": sha256(path),
                "where": config.where,
                "rows": len(frame),
                "ids": len(set(names) - {None}),
                "compositions": len(set(found) - {None}),
                # These rows are kept out by their ids alone.
                "unreadable_structures": found.count(None),
            }
        )
    return Exclusions(ids, compositions, tables)


def _rows(frame: pd.DataFrame, config: ExcludeConfig, path: Path) -> pd.DataFrame:
    """Return the rows that count, numbered as in the file."""
    frame = frame.reset_index(drop=True)
    if not len(frame):
        raise TableError(f"{path}: the table has no rows to exclude")
    return rows_where(frame, config.where, path, _PURPOSE)


def _ids(frame: pd.DataFrame, config: ExcludeConfig, path: Path) -> list[str | None]:
    """Return the ids as text, None where there is none: "nan" would match other missing ids."""
    if config.id_column not in frame.columns and config.id_column == _DEFAULT_ID_COLUMN:
        return [None] * len(frame)
    column = require_column(frame, config.id_column, path, _PURPOSE)
    texts = column.astype(str).str.strip()
    missing = (column.isna() | (texts == "")).tolist()
    return [None if gone else text for gone, text in zip(missing, texts.tolist(), strict=True)]


def _compositions(frame: pd.DataFrame, path: Path) -> list[Composition | None]:
    from matxfer.readers import crystals_of_table

    return [
        None if entry.crystal is None else reduced_composition(entry.crystal)
        for entry in crystals_of_table(frame, str(path))
    ]
