"""The source tables of a pretraining run side by side: graphs, values, split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.store import graph_store
from matxfer.data.table import TableError, read_property_table
from matxfer.files import sha256

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.pretraining.config import PretrainConfig


@dataclass(frozen=True, slots=True, eq=False)
class SourceData:
    """All sources side by side.

    Attributes
    ----------
    graphs
        One pack of all tables' graphs, G in all.
    values
        Property name → values in its unit, shape (G,), NaN where a table has none.
    split
        ``train``, ``val``, ``test``, or another word for rows to leave out, shape (G,).
    errors
        Rows that gave no graph, and why.
    tables
        What is recorded of each table in the card.
    """

    graphs: PackedGraphs
    values: dict[str, NDArray[np.float64]]
    split: NDArray[np.str_]
    errors: dict[int, str]
    tables: list[dict[str, Any]]

    def rows(self, part: str) -> NDArray[np.int64]:
        """Return the usable rows of a part of the split."""
        return np.flatnonzero((self.split == part) & (self.graphs.nodes_per_graph > 0))


def load_sources(
    config: PretrainConfig, on_progress: Callable[[int], None] | None = None
) -> SourceData:
    """Read every table of a configuration and open (or build) their graphs."""
    from matxfer.readers import load_table

    names = list(dict.fromkeys(t for source in config.sources for t in source.targets))
    crystals, splits, tables = [], [], []
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    for source in config.sources:
        path = config.folder / source.table
        frame = load_table(path)
        table = read_property_table(
            frame,
            source.targets,
            split_column=source.split_column,
            seed=config.seed,
            source=str(path),
        )
        split = table.split
        for column, allowed in source.report_only.items():
            if column not in frame.columns:
                raise TableError(f"{path}: no column {column!r} to report on")
            outside = ~frame[column].isin(allowed).to_numpy()
            split = np.where(outside & (split != "train"), "unused", split)
        crystals += table.crystals
        splits.append(split)
        for name in names:
            columns[name].append(table.values.get(name, np.full(len(table), np.nan)))
        parts, counts = np.unique(split, return_counts=True)
        tables.append(
            {
                "table": path.name,
                "sha256": sha256(path),
                "targets": source.targets,
                "split_column": source.split_column,
                "rows": dict(zip(parts.tolist(), counts.tolist(), strict=True)),
                "report_only": source.report_only,
            }
        )
    store = graph_store(crystals, config.graph, on_progress=on_progress)
    return SourceData(
        store.graphs,
        {name: np.concatenate(parts) for name, parts in columns.items()},
        np.concatenate(splits),
        store.errors,
        tables,
    )
