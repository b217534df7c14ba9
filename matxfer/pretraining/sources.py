"""The source tables of a pretraining run side by side: graphs, values, split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.data.store import graph_store
from matxfer.data.table import (
    TableError,
    crystals_or_errors,
    read_property_table,
    require_column,
    rows_where,
)
from matxfer.files import sha256
from matxfer.pretraining.exclusion import read_exclusions
from matxfer.pretraining.forces import above, read_forces

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.crystal import CrystalError
    from matxfer.pretraining.config import PretrainConfig, SourceConfig
    from matxfer.pretraining.exclusion import Exclusions


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
    weight
        Weight of each row in the loss, shape (G,).
    noise_angstrom
        Spread of the displacements of a row that teaches denoising, else 0, shape (G,).
    forces_ev_per_a
        Forces on the nodes, shape (N, 3), NaN where a table has none; None if no table has any.
    labelled
        Whether a row has values, not geometry alone, shape (G,).
    """

    graphs: PackedGraphs
    values: dict[str, NDArray[np.float64]]
    split: NDArray[np.str_]
    errors: dict[int, str]
    tables: list[dict[str, Any]]
    weight: NDArray[np.float32]
    noise_angstrom: NDArray[np.float32]
    forces_ev_per_a: NDArray[np.float32] | None
    labelled: NDArray[np.bool_]

    @property
    def force_scale_ev_per_a(self) -> float:
        """Root mean square of the components of the forces."""
        assert self.forces_ev_per_a is not None
        square = np.nanmean(np.square(self.forces_ev_per_a, dtype=np.float64))
        return float(np.sqrt(square))

    def rows(self, part: str, *, labelled: bool = False) -> NDArray[np.int64]:
        """Return the usable rows of a part of the split; the labelled ones only, if so asked."""
        usable = (self.split == part) & (self.graphs.nodes_per_graph > 0)
        if labelled:
            usable &= self.labelled
        return np.flatnonzero(usable)


@dataclass(slots=True)
class _Table:
    """One source as read."""

    crystals: list[Crystal | CrystalError]
    values: dict[str, NDArray[np.float64]]
    split: NDArray[np.str_]
    weight: NDArray[np.float32]
    forces: list[NDArray[np.float32] | None]
    record: dict[str, Any]


def load_sources(
    config: PretrainConfig, on_progress: Callable[[int], None] | None = None
) -> SourceData:
    """Read every table of a configuration and open (or build) their graphs.

    Graphs of labelled tables are built as ``config.graph`` says, those of tables that teach
    displacements or forces of the full cell, since vectors have not its symmetry.
    """
    exclusions = read_exclusions(config.exclude, config.folder) if config.exclude else None
    # Labelled tables first: they share one store.
    sources = sorted(config.sources, key=lambda source: source.needs_full_cell)
    tables = [_read(source, config, exclusions) for source in sources]
    names = list(dict.fromkeys(t for source in sources for t in source.targets))
    full_cell = replace(config.graph, symmetry=False)
    packs: list[PackedGraphs] = []
    errors: dict[int, str] = {}
    done = 0
    for whole, options in ((False, config.graph), (True, full_cell)):
        chosen = [t for s, t in zip(sources, tables, strict=True) if s.needs_full_cell == whole]
        if chosen:
            crystals = [crystal for table in chosen for crystal in table.crystals]
            store = graph_store(crystals, options, on_progress=on_progress)
            packs.append(store.graphs)
            errors |= {done + row: reason for row, reason in store.errors.items()}
            done += len(crystals)
    values = {
        name: np.concatenate([t.values.get(name, np.full(len(t.split), np.nan)) for t in tables])
        for name in names
    }
    noise = [
        np.full(len(table.split), source.denoise_angstrom, dtype=np.float32)
        for source, table in zip(sources, tables, strict=True)
    ]
    graphs = PackedGraphs.concatenate(packs)
    labelled = [
        np.full(len(t.split), bool(s.targets)) for s, t in zip(sources, tables, strict=True)
    ]
    forces = None
    if any(source.forces for source in sources):
        forces = _forces_of_nodes(graphs, [row for table in tables for row in table.forces])
    return SourceData(
        graphs,
        values,
        np.concatenate([table.split for table in tables]),
        errors,
        [table.record for table in tables],
        np.concatenate([table.weight for table in tables]),
        np.concatenate(noise),
        forces,
        np.concatenate(labelled),
    )


def _forces_of_nodes(
    graphs: PackedGraphs, rows: list[NDArray[np.float32] | None]
) -> NDArray[np.float32]:
    """Put the forces of all rows end to end as the nodes lie, NaN for rows without, (N, 3)."""
    # A row whose structure gave no graph has no nodes.
    parts = [
        np.full((n, 3), np.nan, dtype=np.float32) if row is None or not n else row
        for row, n in zip(rows, graphs.nodes_per_graph.tolist(), strict=True)
    ]
    return np.concatenate(parts)


def _read(source: SourceConfig, config: PretrainConfig, exclusions: Exclusions | None) -> _Table:
    """Read one table; its rows keep their order, those to leave out say so in the split."""
    from matxfer.readers import load_table

    path = config.folder / source.table
    frame = load_table(path).reset_index(drop=True)
    if source.where:
        frame = rows_where(frame, source.where, path, " to learn from")
    if source.targets:
        read = read_property_table(
            frame,
            source.targets,
            split_column=source.split_column,
            seed=config.seed,
            source=str(path),
        )
        crystals, values, split = read.crystals, read.values, read.split
    else:
        crystals, values, split = _unlabelled(frame, source, path)
    forces: list[NDArray[np.float32] | None] = [None] * len(crystals)
    if source.forces:
        told = require_column(frame, source.forces, path, " of forces")
        crystals, forces = read_forces(told, crystals, path)
        split = np.where(above(forces, source.max_force_ev_per_a), "above max_force", split)
    if source.max_sites is not None:
        keep = [not isinstance(c, Crystal) or c.n_sites <= source.max_sites for c in crystals]
        crystals = [crystal for crystal, kept in zip(crystals, keep, strict=True) if kept]
        forces = [row for row, kept in zip(forces, keep, strict=True) if kept]
        values = {name: column[keep] for name, column in values.items()}
        frame, split = frame[keep], split[keep]
    for column, allowed in source.report_only.items():
        outside = ~require_column(frame, column, path).isin(allowed).to_numpy()
        split = np.where(outside & (split != "train"), "unused", split)
    record: dict[str, Any] = {}
    if exclusions is not None:
        ids = frame["material_id"].astype(str).tolist() if "material_id" in frame.columns else None
        hit = exclusions.matches(ids, crystals) & (split != "test")
        split = np.where(hit, "excluded", split)
        record["excluded"] = exclusions.to_json()
    weight = np.ones(len(split), dtype=np.float32)
    for column, weights in source.row_weights.items():
        by_word = {str(word): factor for word, factor in weights.items()}
        factors = require_column(frame, column, path).astype(str).map(by_word)
        weight *= factors.fillna(1.0).to_numpy(dtype=np.float32)
    if source.forces:
        # What is not learnt from shall not set the scale either.
        forces = [f if part == "train" else None for f, part in zip(forces, split, strict=True)]
        if all(row is None for row in forces):
            raise TableError(f"{path}: no row has forces in {source.forces!r} to learn from")
    parts, counts = np.unique(split, return_counts=True)
    record = {
        "table": path.name,
        "sha256": sha256(path),
        "targets": source.targets,
        "denoise_angstrom": source.denoise_angstrom,
        "forces": source.forces,
        "max_force_ev_per_a": source.max_force_ev_per_a,
        "split_column": source.split_column,
        "where": source.where,
        "rows": dict(zip(parts.tolist(), counts.tolist(), strict=True)),
        "report_only": source.report_only,
        "row_weights": source.row_weights,
        **record,
    }
    return _Table(crystals, values, split, weight, forces, record)


def _unlabelled(
    frame: pd.DataFrame, source: SourceConfig, path: Path
) -> tuple[list[Crystal | CrystalError], dict[str, NDArray[np.float64]], NDArray[np.str_]]:
    """Read structures only; without a split column all of them train."""
    from matxfer.readers import crystals_of_table

    entries = crystals_of_table(frame, str(path))
    split = np.full(len(frame), "train", dtype="<U8")
    if source.split_column:
        words = require_column(frame, source.split_column, path).astype(str).str.lower()
        split = np.where(words == "train", "train", "unused")
    return crystals_or_errors(entries), {}, split
