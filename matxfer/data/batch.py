"""A batch of graphs as the network sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class GraphLike(Protocol):
    """What a backbone reads from a batch; :class:`GraphBatch` and PyG batches both have it.

    ``z`` (N,) atomic numbers; ``multiplicity`` (N,) atoms that each node stands for;
    ``edge_index`` (2, E) sender and receiver; ``edge_vector`` (E, 3) in Å from receiver to sender;
    ``batch`` (N,) graph of each node; ``num_graphs`` B.
    """

    z: Tensor
    multiplicity: Tensor
    edge_index: Tensor
    edge_vector: Tensor
    batch: Tensor
    num_graphs: int


@dataclass(slots=True, eq=False)
class GraphBatch:
    """B graphs side by side (shapes and units as in :class:`GraphLike`)."""

    z: Tensor
    multiplicity: Tensor
    edge_index: Tensor
    edge_vector: Tensor
    batch: Tensor
    num_graphs: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GraphBatch:
        """Return the batch on another device."""
        names = ("z", "multiplicity", "edge_index", "edge_vector", "batch")
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        return GraphBatch(**moved, num_graphs=self.num_graphs)


def node_weights(graphs: GraphLike) -> Tensor:
    """Return each node's share of its crystal's atoms, shape (N,); sums to one per graph."""
    total = graphs.multiplicity.new_zeros(graphs.num_graphs)
    total.index_add_(0, graphs.batch, graphs.multiplicity)
    return graphs.multiplicity / total[graphs.batch]
