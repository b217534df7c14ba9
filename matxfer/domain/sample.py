"""What a diagnosis looks at: all structures for what is cheap, a sample of them for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.crystal import Crystal
from matxfer.data.copies import materials
from matxfer.data.loader import edge_budget_batches
from matxfer.data.store import pack_chunk
from matxfer.data.table import (
    SPLITS,
    TableError,
    column_numbers,
    crystals_or_errors,
    open_table,
    require_column,
    split_words,
)
from matxfer.domain.structures import StructureFacts, structure_facts
from matxfer.prediction import as_inputs
from matxfer.pretraining.exclusion import reduced_composition
from matxfer.readers import crystals_of_table, is_table, read
from matxfer.transfer.uncertainty import crystal_features

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model
    from matxfer.pretraining.exclusion import Composition

#: Parts of a split that a model was not fitted to.
HELD_OUT = ("val", "test")
#: Column of a split that is used where none is named.
SPLIT_COLUMN = "split"
#: Structures of one composition whose fingerprints differ by less than this, in units of the
#: spread of each feature, are one material.
SAME = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Collection:
    """All usable structures of an input.

    Attributes
    ----------
    name
        What messages call it.
    crystals
        The structures, n of them.
    values
        Column → values in its unit, (n,), NaN where missing.
    split
        ``train``, ``val``, ``test`` or another word, (n,); ``""`` where there is no split.
    failed
        How many structures could not be read.
    compositions
        Reduced compositions, (n,).
    """

    name: str
    crystals: list[Crystal]
    values: dict[str, NDArray[np.float64]]
    split: NDArray[np.str_]
    failed: int
    compositions: list[Composition]

    def __len__(self) -> int:
        return len(self.crystals)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Structures with what a model makes of them.

    Attributes
    ----------
    crystals
        n structures.
    facts
        What they are.
    layers
        Layer → pooled features, (n, D).
    predicted
        Source property → prediction in its unit, (n,); NaN for elements unknown to the model.
    index
        Where they stand in the collection, (n,).
    failed
        How many structures gave no graph.
    """

    crystals: list[Crystal]
    facts: StructureFacts
    layers: dict[int, NDArray[np.float64]]
    predicted: dict[str, NDArray[np.float64]]
    index: NDArray[np.int64]
    failed: int = 0
    compositions: list[Composition] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.crystals)

    def take(self, rows: NDArray[np.int64]) -> Sample:
        """Return some of the structures."""
        return Sample(
            [self.crystals[k] for k in rows],
            self.facts.take(rows),
            {layer: x[rows] for layer, x in self.layers.items()},
            {name: y[rows] for name, y in self.predicted.items()},
            self.index[rows],
            self.failed,
            [self.compositions[k] for k in rows],
        )


def read_collection(
    structures: Any,
    columns: Sequence[str] = (),
    *,
    split_column: str | None = None,
    structure_column: str | None = None,
) -> Collection:
    """Read all structures of an input, and columns of a table that has them.

    Parameters
    ----------
    structures
        A table or data frame, or whatever :func:`matxfer.predict` takes; or a collection, which is
        returned as it is.
    columns
        Columns of values to read where the input has them.
    split_column
        Column of the split; ``None``: ``split``, if it holds one.
    structure_column
        See :mod:`matxfer.readers`.

    Raises
    ------
    TableError
        If a column is named that is not there or holds no numbers, or no structure can be read.
    """
    if isinstance(structures, Collection):
        return structures
    table = hasattr(structures, "iloc") or (
        isinstance(structures, str | Path) and is_table(structures)
    )
    values: dict[str, NDArray[np.float64]] = {}
    if table:
        frame, name = open_table(structures)
        entries = crystals_of_table(frame, name, structure_column=structure_column)
        found = crystals_or_errors(entries)
        present = [column for column in columns if column in frame.columns]
        values = {column: column_numbers(frame, column, name) for column in present}
        split = _split(frame, split_column, name)
    else:
        name = str(structures) if isinstance(structures, str | Path) else "<structures>"
        given = as_inputs(structures, structure_column)
        found = crystals_or_errors(read(given) if isinstance(given, list) else given)
        split = np.full(len(found), "")
    rows = np.array([k for k, crystal in enumerate(found) if isinstance(crystal, Crystal)], int)
    if not len(rows):
        raise TableError(f"{name}: no structure could be read; the first says: {found[0]}")
    crystals = [crystal for crystal in found if isinstance(crystal, Crystal)]
    return Collection(
        name,
        crystals,
        {column: v[rows] for column, v in values.items()},
        split[rows],
        len(found) - len(rows),
        [reduced_composition(crystal) for crystal in crystals],
    )


def _split(frame: pd.DataFrame, column: str | None, source: str) -> NDArray[np.str_]:
    if column is None and SPLIT_COLUMN not in frame.columns:
        return np.full(len(frame), "")
    words = split_words(require_column(frame, column or SPLIT_COLUMN, source))
    if column is None and not np.isin(words, SPLITS).any():
        return np.full(len(frame), "")
    return words


def draw(rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """Return up to n of the rows, drawn at random, in their order."""
    if len(rows) <= n:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


def make_sample(
    model: Model,
    collection: Collection,
    rows: NDArray[np.int64],
    layers: Sequence[int],
    on_progress: Callable[[int], None] | None = None,
) -> Sample:
    """Run a model over some structures of a collection; what gives no graph is left out.

    About 4 ms per structure: graph, network and symmetry.
    """
    crystals = [collection.crystals[k] for k in rows]
    parts, kept = [], []
    failed = 0
    for begin in range(0, len(crystals), 200):
        chunk = crystals[begin : begin + 200]
        graphs, errors = pack_chunk(chunk, model.backbone.graph_options)
        good = np.flatnonzero(graphs.nodes_per_graph > 0)
        failed += len(errors)
        parts.append(run_layers(model, graphs, good, layers))
        kept += (begin + good).tolist()
        if on_progress is not None:
            on_progress(len(chunk))
    chosen = [crystals[k] for k in kept]
    index = rows[np.array(kept, dtype=np.int64)]
    return Sample(
        chosen,
        structure_facts(chosen),
        {layer: np.concatenate([p[0][layer] for p in parts]) for layer in layers},
        {name: np.concatenate([p[1][name] for p in parts]) for name in model.heads},
        index,
        failed,
        [collection.compositions[k] for k in index],
    )


def run_layers(
    model: Model, graphs: PackedGraphs, rows: NDArray[np.int64], layers: Sequence[int]
) -> tuple[dict[int, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Return pooled features by layer, (n, D), and source predictions, (n,), of some graphs.

    Predictions for elements unknown to the model are NaN.
    """
    backbone = model.backbone
    pooled: dict[int, list[NDArray[np.float64]]] = {layer: [] for layer in layers}
    predicted: dict[str, list[NDArray[np.float64]]] = {name: [] for name in model.heads}
    order: list[NDArray[np.int64]] = []
    with torch.inference_mode():
        for index in edge_budget_batches(graphs, rows):
            batch = graphs.batch(index)
            state = backbone.embed(batch)
            for layer, features in enumerate(
                [state, *backbone.states(batch, state, 0, backbone.n_layers)]
            ):
                if layer in pooled:
                    pooled[layer].append(crystal_features([features.node], batch).double().numpy())
            for name, values in model.predict_features(features, batch).items():
                predicted[name].append(values)
            order.append(index)
    back = np.argsort(np.concatenate([np.zeros(0, np.int64), *order]), kind="stable")
    width = 2 * backbone.node_dim
    known = np.where(graphs.has_elements_outside(model.elements)[rows], np.nan, 1.0)
    return (
        {k: np.concatenate([np.zeros((0, width)), *v])[back] for k, v in pooled.items()},
        {k: np.concatenate([np.zeros(0), *v])[back] * known for k, v in predicted.items()},
    )


def distinct(sample: Sample, scale: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return a number for each structure, the same for copies of one material, (n,).

    Copies have equal structures or ids, or the composition and (nearly) the fingerprint of another:
    other settings and relaxations of one crystal. ``scale`` is the spread of each feature of the
    last layer kept.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    x = sample.layers[max(sample.layers)] / np.where(scale > 0, scale, np.inf)
    n = len(sample)
    first: dict[int, int] = {}
    pairs = [(k, first.setdefault(int(m), k)) for k, m in enumerate(materials(sample.crystals))]
    groups: dict[Composition, list[int]] = {}
    for k, composition in enumerate(sample.compositions):
        groups.setdefault(composition, []).append(k)
    for members in groups.values():
        # Each joins the first one that is as near; a chain of small steps makes no copy.
        waiting = np.array(members)
        while len(waiting) > 1:
            near = ((x[waiting] - x[waiting[0]]) ** 2).mean(axis=1) < SAME**2
            near[0] = True
            pairs += [(int(waiting[0]), int(k)) for k in waiting[near]]
            waiting = waiting[~near]
    index = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    joined = coo_array((np.ones(index.shape[1]), (index[0], index[1])), shape=(n, n))
    return np.asarray(connected_components(joined, directed=False)[1], dtype=np.int64)


def both(source: Sample, target: Sample) -> Sample:
    """Return the structures of two samples, one after the other; their ids are kept apart.

    An id is a name within its table: only where the composition agrees does it mean the same
    material in both, which :func:`distinct` cannot see.
    """
    compositions = [*source.compositions, *target.compositions]
    names = _joint_ids(source, target)
    crystals = [
        c.with_id(name) if name != c.id else c
        for c, name in zip([*source.crystals, *target.crystals], names, strict=True)
    ]
    facts = {
        f: np.concatenate([getattr(source.facts, f), getattr(target.facts, f)])
        for f in StructureFacts.__dataclass_fields__
    }
    return Sample(
        crystals,
        StructureFacts(**facts),
        {k: np.concatenate([x, target.layers[k]]) for k, x in source.layers.items()},
        _joined(source.predicted, target.predicted),
        np.concatenate([source.index, target.index]),
        source.failed + target.failed,
        compositions,
    )


def _joined(
    a: Mapping[str, NDArray[np.float64]], b: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    return {name: np.concatenate([a[name], b[name]]) for name in a}


def _joint_ids(source: Sample, target: Sample) -> list[str]:
    """Return ids that are equal in both samples only where they name one material.

    Row numbers, which stand in for missing ids, name none.
    """
    names = [c.id for c in source.crystals]
    known = dict(zip(names, source.compositions, strict=True))
    for crystal, composition in zip(target.crystals, target.compositions, strict=True):
        own = not crystal.id.isdigit() and known.get(crystal.id) in (None, composition)
        names.append(crystal.id if own else f"target {crystal.id}")
    return names
