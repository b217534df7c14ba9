"""Readouts: node features of the last layer → one number per crystal."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from matxfer.data.batch import GraphLike, node_weights
from matxfer.errors import OptionError
from matxfer.nn.layers import polynomial_envelope

if TYPE_CHECKING:
    from torch import Tensor


#: Keeps the slope of a standard deviation finite where all atoms are equal.
_TINY_VARIANCE = 1e-6


class _OutputPerAtom(nn.Module):
    """A network of two layers on the features of each node."""

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


class AtomwiseReadout(_OutputPerAtom):
    """Mean over atoms of a per-atom output: y = Σ_i m_i f(h_i) / Σ_i m_i.

    Its outputs per atom are contributions that add up to the prediction.

    Parameters
    ----------
    node_dim, hidden_dim
        Widths of the node features and of the hidden layer.
    """

    kind = "atomwise"

    def forward(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Map node features (N, F) to outputs (B,)."""
        weighted = self.per_node(node) * node_weights(graphs)
        return weighted.new_zeros(graphs.num_graphs).index_add(0, graphs.batch, weighted)


class DeepAtomwiseReadout(AtomwiseReadout):
    """The same with three hidden layers, as CHGNet has it.

    Parameters
    ----------
    node_dim, hidden_dim
        Widths of the node features and of the hidden layers.
    """

    kind = "deep_atomwise"

    def __init__(self, node_dim: int, hidden_dim: int) -> None:
        super().__init__(node_dim, hidden_dim)
        widths = (node_dim, hidden_dim, hidden_dim, hidden_dim)
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.net = nn.Sequential(nn.LayerNorm(node_dim), *hidden, nn.Linear(hidden_dim, 1))


class LinearAtomwiseReadout(AtomwiseReadout):
    """The same with a linear map alone, as SevenNet has it.

    Parameters
    ----------
    node_dim
        Width of the node features.
    hidden_dim
        Not used: there is no hidden layer.
    """

    kind = "linear_atomwise"

    def __init__(self, node_dim: int, hidden_dim: int) -> None:
        super().__init__(node_dim, hidden_dim)
        self.net = nn.Sequential(nn.Linear(node_dim, 1))


class SumReadout(_OutputPerAtom):
    """Sum over the atoms of the cell of a per-atom output: y = Σ_i m_i f(h_i).

    For properties of a whole cell as it is given (a magnetisation per cell); a supercell has
    another value. Properties of a material are means, for which this learns the size of the cell.

    Parameters
    ----------
    node_dim, hidden_dim
        Widths of the node features and of the hidden layer.
    """

    kind = "sum"

    def forward(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Map node features (N, F) to outputs (B,)."""
        each = self.per_node(node)
        weighted = each * graphs.multiplicity.to(each.dtype)
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
    parts: tuple[str, ...] = ("mean", "highest")

    def __init__(self, node_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(node_dim)
        self.net = nn.Sequential(
            nn.Linear(len(self.parts) * node_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 1)
        )

    def forward(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Map node features (N, F) to outputs (B,)."""
        output: Tensor = self.net(pool(self.norm(node), graphs, self.parts)).squeeze(-1)
        return output


class ExtremaReadout(PooledReadout):
    """A network on mean, maximum and minimum of the node features over the atoms."""

    kind = "extrema"
    parts = ("mean", "highest", "lowest")


class AttentionReadout(nn.Module):
    """A network on averages over the atoms, each with learned weights: y = f([Σ_i α_ih v_ih]_h).

    α_ih = m_i exp(s_ih) / Σ_j m_j exp(s_jh) over the atoms of a crystal, with scores s of as many
    heads (Veličković et al., ICLR 2018) and the atoms m_i that a node stands for.

    Parameters
    ----------
    node_dim, hidden_dim
        Widths of the node features and of the hidden layer.
    """

    kind = "attention"
    n_heads = 4

    def __init__(self, node_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(node_dim)
        self.score = nn.Linear(node_dim, self.n_heads)
        self.value = nn.Linear(node_dim, self.n_heads * (node_dim // self.n_heads))
        self.net = nn.Sequential(
            nn.Linear(self.value.out_features, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 1)
        )

    def forward(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Map node features (N, F) to outputs (B,)."""
        normed = self.norm(node)
        size = (graphs.num_graphs, self.n_heads)
        # Bounded scores need no maximum subtracted: exp cannot overflow.
        weight = torch.exp(4 * torch.tanh(self.score(normed).float() / 4))
        weight = weight * graphs.multiplicity[:, None]
        total = weight.new_zeros(size).index_add(0, graphs.batch, weight)
        weight = weight / total.clamp(min=1e-12)[graphs.batch]  # (N, H)
        value = self.value(normed).unflatten(1, (self.n_heads, -1)) * weight[:, :, None]
        pooled = value.new_zeros(graphs.num_graphs, self.value.out_features)
        output: Tensor = self.net(pooled.index_add(0, graphs.batch, value.flatten(1))).squeeze(-1)
        return output


class VectorReadout(nn.Module):
    """One vector per atom that turns with the crystal: v_i = Σ_j w_ij f(e_ij) (r_ij / d_ij).

    Parameters
    ----------
    edge_dim, hidden_dim
        Widths of the edge features and of the hidden layer.
    """

    def __init__(self, edge_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(edge_dim),
            nn.Linear(edge_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, 1),
        )

    def forward(self, edge: Tensor, graphs: GraphLike, cutoff_angstrom: float) -> Tensor:
        """Map edge features (E, D) to vectors (N, 3). On full cells only: atoms have directions."""
        vector = graphs.edge_vector
        distance = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        envelope = polynomial_envelope(distance, cutoff_angstrom)
        pull = self.net(edge).to(vector.dtype) * envelope * vector / distance.clamp(min=1e-6)
        total: Tensor = pull.new_zeros(len(graphs.z), 3)
        return total.index_add(0, graphs.edge_index[1], pull)


def pool(node: Tensor, graphs: GraphLike, parts: tuple[str, ...] = PooledReadout.parts) -> Tensor:
    """Return statistics of node features (N, F) over the atoms, shape (B, kF).

    Parameters
    ----------
    parts
        Of ``"mean"``, ``"spread"`` (standard deviation), ``"highest"``, ``"lowest"``.
    """
    size = (graphs.num_graphs, node.shape[1])
    index = graphs.batch[:, None].expand_as(node)
    pooled = []
    for part in parts:
        if part in ("mean", "spread"):
            weight = node_weights(graphs)[:, None].to(node.dtype)
            mean = node.new_zeros(size).index_add(0, graphs.batch, node * weight)
            if part == "spread":
                deviation = (node - mean[graphs.batch]).square() * weight
                variance = node.new_zeros(size).index_add(0, graphs.batch, deviation)
                mean = (variance + _TINY_VARIANCE).sqrt()
            pooled.append(mean)
        else:
            reduce = {"highest": "amax", "lowest": "amin"}[part]
            pooled.append(
                node.new_zeros(size).scatter_reduce(0, index, node, reduce, include_self=False)
            )
    return torch.cat(pooled, dim=1)


Readout = AtomwiseReadout | SumReadout | PooledReadout | AttentionReadout

READOUTS: dict[str, type[Readout]] = {
    readout.kind: readout
    for readout in (
        AtomwiseReadout,
        DeepAtomwiseReadout,
        LinearAtomwiseReadout,
        SumReadout,
        PooledReadout,
        ExtremaReadout,
        AttentionReadout,
    )
}


def make_readout(kind: str, node_dim: int, hidden_dim: int) -> Readout:
    """Build a readout by name.

    Raises
    ------
    ValueError
        If there is no readout of that name.
    """
    if kind not in READOUTS:
        raise OptionError(f"unknown readout {kind!r}; known are {sorted(READOUTS)}")
    return READOUTS[kind](node_dim, hidden_dim)
