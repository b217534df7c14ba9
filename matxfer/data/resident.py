"""A graph pack that lives in an accelerator's memory: a batch is a gather there, nothing is sent.

A pack of a hundred thousand structures takes about 1 GB; gathering on the device costs
microseconds, while gathering on the host and sending costs more than a small network's step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.data.batch import GraphBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs

#: Share of the free memory of the device that a resident pack may take.
MEMORY_SHARE = 0.4
#: Arrays of the pack that batches are made of.
_GATHERED = ("numbers", "multiplicity", "sender", "receiver", "edge_vector_angstrom")


class ResidentGraphs:
    """Batches of a pack as :meth:`matxfer.data.packed.PackedGraphs.batch` makes them, on a device.

    Parameters
    ----------
    graphs
        The pack; its arrays are copied to the device once.
    device
        Where to.
    """

    def __init__(self, graphs: PackedGraphs, device: torch.device) -> None:
        self.nodes_per_graph = graphs.nodes_per_graph
        self.edges_per_graph = graphs.edges_per_graph
        self.device = device
        self._node_offset = torch.from_numpy(np.array(graphs.node_offset)).to(device)
        self._edge_offset = torch.from_numpy(np.array(graphs.edge_offset)).to(device)
        self._flat = {
            name: torch.from_numpy(np.array(getattr(graphs, name))).to(device) for name in _GATHERED
        }

    @staticmethod
    def fits(graphs: PackedGraphs, device: torch.device) -> bool:
        """Say whether the pack may move to a device: a CUDA one with memory to spare."""
        if device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(device)
        need = sum(getattr(graphs, name).nbytes for name in _GATHERED)
        return bool(need < MEMORY_SHARE * free)

    def batch(self, index: NDArray[np.int64]) -> GraphBatch:
        """Gather the graphs at ``index`` into one batch of tensors on the device."""
        rows = torch.from_numpy(index).to(self.device)
        n_nodes = int(self.nodes_per_graph[index].sum())
        n_edges = int(self.edges_per_graph[index].sum())
        node, node_count = _flat_ranges(self._node_offset, rows, n_nodes)
        edge, edge_count = _flat_ranges(self._edge_offset, rows, n_edges)
        first_node = torch.cumsum(node_count, 0) - node_count
        shift = torch.repeat_interleave(first_node, edge_count, output_size=n_edges)
        flat = self._flat
        return GraphBatch(
            z=flat["numbers"][node].long(),
            multiplicity=flat["multiplicity"][node].float(),
            edge_index=torch.stack([flat["sender"][edge] + shift, flat["receiver"][edge] + shift]),
            edge_vector=flat["edge_vector_angstrom"][edge],
            batch=torch.repeat_interleave(
                torch.arange(len(index), device=self.device), node_count, output_size=n_nodes
            ),
            num_graphs=len(index),
        )


def _flat_ranges(offset: Tensor, rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges ``offset[k] … offset[k + 1]``; return them with their lengths.

    The total is told, so that the host need not wait for the device to count.
    """
    start, count = offset[rows], offset[rows + 1] - offset[rows]
    before = torch.cumsum(count, 0) - count
    shift = torch.repeat_interleave(start - before, count, output_size=total)
    return shift + torch.arange(total, device=offset.device), count
