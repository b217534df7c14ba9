"""The prefix cache: features of the frozen layers, computed once per structure and kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.data.loader import edge_budget_batches
from matxfer.data.packed import flat_ranges
from matxfer.nn.backbone import Backbone, Features

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.data.batch import GraphBatch
    from matxfer.data.packed import PackedGraphs

#: Above this many bytes the features go to a file that the system pages in and out.
MEMORY_LIMIT_BYTES = 2 << 30


class PrefixCache:
    """Features after the first K layers of every graph of a pack, in flat arrays.

    Parameters
    ----------
    backbone
        The network; its first ``depth`` layers must not change while the cache lives.
    graphs
        The pack.
    depth
        Number of layers K; for K = 0 nothing is kept and batches start at the embedding.
    memory_limit_bytes
        Above it, features lie in a temporary memory-mapped file.
    """

    def __init__(
        self,
        backbone: Backbone,
        graphs: PackedGraphs,
        depth: int,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    ) -> None:
        self.graphs, self.depth = graphs, depth
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.node = self.edge = torch.empty(0)
        if depth == 0:
            return
        # The readout alone looks at nodes only.
        edge_dim = backbone.edge_dim if depth < backbone.n_layers else 0
        shapes = {
            "node": (int(graphs.node_offset[-1]), backbone.node_dim),
            "edge": (int(graphs.edge_offset[-1]), edge_dim),
        }
        size = 4 * sum(rows * columns for rows, columns in shapes.values())
        if size > memory_limit_bytes:
            self._folder = tempfile.TemporaryDirectory(prefix="matxfer-prefix-")
        self.node, self.edge = (self._allocate(name, shapes[name]) for name in ("node", "edge"))
        self._fill(backbone, with_edges=edge_dim > 0)

    def _allocate(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        if self._folder is None or 0 in shape:
            return torch.empty(shape)
        path = Path(self._folder.name) / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        return torch.from_numpy(array)

    def _fill(self, backbone: Backbone, *, with_edges: bool) -> None:
        rows = np.arange(len(self.graphs))
        node_offset, edge_offset = self.graphs.node_offset, self.graphs.edge_offset
        with torch.no_grad():
            for index in edge_budget_batches(self.graphs, rows):
                batch = self.graphs.batch(index)
                features = backbone.run(batch, backbone.embed(batch), 0, self.depth)
                first, last = index[0], index[-1] + 1  # batches follow the order of the pack
                self.node[node_offset[first] : node_offset[last]] = features.node
                if with_edges:
                    self.edge[edge_offset[first] : edge_offset[last]] = features.edge

    def batch(self, index: NDArray[np.int64]) -> tuple[GraphBatch, Features | None]:
        """Return a batch and its features after K layers (``None`` for K = 0)."""
        batch = self.graphs.batch(index)
        if self.depth == 0:
            return batch, None
        nodes = torch.from_numpy(flat_ranges(self.graphs.node_offset, index))
        if self.edge.shape[1] == 0:
            return batch, Features(self.node[nodes], self.edge[:0])
        edges = torch.from_numpy(flat_ranges(self.graphs.edge_offset, index))
        return batch, Features(self.node[nodes], self.edge[edges])
