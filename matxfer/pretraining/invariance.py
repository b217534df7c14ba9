"""Features of a pretraining that shall resemble those of structures without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.loader import LabelledBatch
from matxfer.data.store import graph_store
from matxfer.data.table import TableError, crystals_or_errors
from matxfer.files import sha256
from matxfer.invariance.callback import DomainInvariance, crystal_means
from matxfer.readers import crystals_of_table, load_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.pretraining.config import PretrainConfig
    from matxfer.pretraining.module import PretrainModule


def domain_invariance(
    config: PretrainConfig, on_progress: Callable[[int], None] | None = None
) -> tuple[DomainInvariance, dict[str, Any]] | None:
    """Return the callback of a configuration and what is recorded of its table, if it has one.

    The batch of a step depends on seed and step alone: a resumed run sees the same.

    Raises
    ------
    TableError
        If the table holds fewer than two usable structures.
    """
    told = config.invariant
    if told is None:
        return None
    path = config.folder / told.table
    entries = crystals_of_table(load_table(path), str(path))
    store = graph_store(crystals_or_errors(entries), config.graph, on_progress=on_progress)
    graphs = store.graphs
    rows = np.flatnonzero(graphs.nodes_per_graph > 0)
    if len(rows) < 2:
        raise TableError(f"{path}: {len(rows)} usable structure(s), but at least 2 are needed")

    def batch(step: int) -> GraphBatch:
        size = min(config.training.batch_size, len(rows))
        draw = np.random.default_rng((config.seed, step))
        return graphs.batch(draw.choice(rows, size, replace=False))

    def features(module: PretrainModule, of: LabelledBatch | GraphBatch) -> Tensor:
        if isinstance(of, LabelledBatch):  # the step has run the network on it
            return crystal_means(module.last_nodes, of.graphs)
        return crystal_means(module.model.backbone(of).node, of)

    record = {
        "table": path.name,
        "sha256": sha256(path),
        "rows": len(rows),
        "method": told.method,
        "strength": told.strength,
    }
    return DomainInvariance(told.method, batch, features, told.strength, config.seed), record
