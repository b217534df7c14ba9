"""Keeping materials out of pretraining, so that nobody can say that a transfer gain is memory.

A row is left out if its material id or its reduced composition occurs in a table that was named.
Structures that match have equal reduced compositions, so this is at least as strict as a
structure match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal
from matxfer.data.table import TableError
from matxfer.files import sha256

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.crystal import CrystalError

Composition = tuple[tuple[int, int], ...]


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
        Column of material ids; a table may lack it.
    """

    table: str
    where: dict[str, list[Any]] = field(default_factory=dict)
    id_column: str = "material_id"


def reduced_composition(crystal: Crystal) -> Composition:
    """Return (atomic number, count) in order, the counts divided by their common divisor."""
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
        """Say which rows have an id to keep out, shape (n,)."""
        if ids is None:
            return np.zeros(n, dtype=bool)
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

    def to_json(self) -> dict[str, Any]:
        """Return what the card records."""
        return {
            "tables": self.tables,
            "ids": len(self.ids),
            "compositions": len(self.compositions),
        }


def read_exclusions(configs: Iterable[ExcludeConfig], folder: Path) -> Exclusions:
    """Read the tables whose materials are kept out.

    Raises
    ------
    TableError
        If a table or a column is missing, or no row is meant.
    """
    from matxfer.readers import crystals_of_table, load_table

    ids: set[str] = set()
    compositions: set[Composition] = set()
    tables = []
    for config in configs:
        path = folder / config.table
        frame = load_table(path)
        for column, values in config.where.items():
            if column not in frame.columns:
                raise TableError(f"{path}: no column {column!r} to exclude by")
            frame = frame[frame[column].isin(values)]
        if not len(frame):
            raise TableError(f"{path}: no row is left to exclude by {config.where}")
        if config.id_column in frame.columns:
            ids.update(frame[config.id_column].astype(str))
        entries = crystals_of_table(frame.reset_index(drop=True), str(path))
        compositions.update(reduced_composition(e.crystal) for e in entries if e.crystal)
        tables.append({"table": path.name, "sha256": sha256(path), "where": config.where})
    return Exclusions(ids, compositions, tables)
