"""A pack of graphs through the network, in batches of bounded work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.data.loader import budget_batches
from matxfer.transfer.plugin import predict_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin

#: Edges and nodes of a batch: its tensors stay within a core's share of the cache, or fill a GPU.
WORK_CPU, WORK_GPU = 8_000, 200_000
#: An atom without neighbours costs about as much as so many edges.
_NODE_WORK = 4
_MAX_GRAPHS = 256


def predict_pack(
    model: Model,
    plugins: Sequence[Plugin],
    properties: Sequence[str],
    pack: PackedGraphs,
    *,
    singly: bool = False,
    on_batch: Callable[[NDArray[np.int64]], None] = lambda _: None,
) -> NDArray[np.float64]:
    """Return the predictions of a pack of graphs, shape (G, P).

    Parameters
    ----------
    model, plugins, properties
        The network, its plugins and the names of their P columns.
    pack
        G graphs. Those of like size meet in a batch; the order of the result is theirs.
    singly
        One graph per batch, to find out which one brings the process down.
    on_batch
        Called with the graphs of each batch before it is computed.
    """
    values = np.full((len(pack), len(properties)), np.nan)
    weight = pack.edges_per_graph + _NODE_WORK * pack.nodes_per_graph
    order = np.argsort(weight, kind="stable")
    limit = WORK_CPU if model.device.type == "cpu" else WORK_GPU
    batches = budget_batches(weight[order], order, limit, 1 if singly else _MAX_GRAPHS)
    with torch.inference_mode():
        for index in batches:
            on_batch(index)
            columns = predict_columns(model, plugins, pack.batch(index).to(model.device))
            values[index] = np.stack([columns[name] for name in properties], axis=1)
    return values
