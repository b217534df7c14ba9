"""Readouts: node features of the last layer → one number per crystal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from matxfer.data.batch import GraphLike, node_weights
from matxfer.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor


class AtomwiseReadout(nn.Module):
    """Mean over atoms of a per-atom output: y = Σ_i m_i f(h_i) / Σ_i m_i.

    Its outputs per atom are contributions that add up to the prediction.

    Parameters
    ----------
    node_dim, hidden_dim
        Widths of the node features and of the hidden layer.
    """

    kind = "atomwise"

    def __init__(self, node_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(node_dim),
            nn.Linear(node_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, 1),
        )

    def per_node(self, node: Tensor) -> Tensor:
        """Return the output of each node, shape (N,)."""
        output: Tensor = self.net(node).squeeze(-1)
        return output

    def forward(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Map node features (N, F) to outputs (B,)."""
        weighted = self.per_node(node) * node_weights(graphs)
        return weighted.new_zeros(graphs.num_graphs).index_add(0, graphs.batch, weighted)


class PooledReadout(nn.Module):
    """A network on the mean and the maximum of the node features over the atoms.

    For properties that are not averages over atoms: a gap is set by the extreme ones.

    Parameters
    ----------
    node_dim, hidden_dim
        Widths of the node features and of the hidden layer.
    """

    kind = "pooled"

    def __init__(self, node_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(node_dim)
        self.net = nn.Sequential(
            nn.Linear(2 * node_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 1)
        )

    def forward(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Map node features (N, F) to outputs (B,)."""
        output: Tensor = self.net(pool(self.norm(node), graphs)).squeeze(-1)
        return output


def pool(node: Tensor, graphs: GraphLike) -> Tensor:
    """Return mean and maximum of node features (N, F) over the atoms, shape (B, 2F)."""
    size = (graphs.num_graphs, node.shape[1])
    weighted = node * node_weights(graphs)[:, None].to(node.dtype)
    mean = node.new_zeros(size).index_add(0, graphs.batch, weighted)
    index = graphs.batch[:, None].expand_as(node)
    highest = node.new_zeros(size).scatter_reduce(0, index, node, "amax", include_self=False)
    return torch.cat([mean, highest], dim=1)


READOUTS: dict[str, type[AtomwiseReadout | PooledReadout]] = {
    AtomwiseReadout.kind: AtomwiseReadout,
    PooledReadout.kind: PooledReadout,
}


def make_readout(kind: str, node_dim: int, hidden_dim: int) -> AtomwiseReadout | PooledReadout:
    """Build a readout by name.

    Raises
    ------
    ValueError
        If there is no readout of that name.
    """
    if kind not in READOUTS:
        raise OptionError(f"unknown readout {kind!r}; known are {sorted(READOUTS)}")
    return READOUTS[kind](node_dim, hidden_dim)
