"""Bonds without direction and pairs of them, from the directed edges of full cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs

#: Directions on which bonds are told apart; one that confuses two bonds gives way to the next.
_DIRECTIONS = (
    (0.5257311, 0.8090170, 0.2623987),
    (0.3090170, -0.4539905, 0.8357119),
    (-0.7071068, 0.1736482, 0.6854509),
)
#: Opposite edges cancel to this part of an Å; different bonds of two atoms differ by far more.
_OPPOSITE_ANGSTROM = 1e-3


def undirected(edge_index: Tensor, edge_vector: Tensor) -> tuple[Tensor, Tensor]:
    """Match each edge j → i with i → j, its opposite.

    Parameters
    ----------
    edge_index
        Sender and receiver, (2, E).
    edge_vector
        From receiver to sender in Å, (E, 3).

    Returns
    -------
    bond : (E,) tensor
        The bond that each edge is one direction of, of U = E/2.
    edge : (U,) tensor
        One edge of each bond.

    Raises
    ------
    OptionError
        If an edge has no opposite: the graph is not one of a full cell.
    """
    n_edges = edge_index.shape[1]
    bond = edge_index.new_empty(n_edges)
    if not n_edges:
        return bond, bond
    sender, receiver = edge_index[0], edge_index[1]
    vector = edge_vector.detach().double()
    pair = torch.minimum(sender, receiver) * (int(edge_index.max()) + 1)
    pair += torch.maximum(sender, receiver)
    for direction in _DIRECTIONS:
        along = vector @ vector.new_tensor(direction)
        # The same for both edges of a bond, also where it leads to an image of the same atom.
        number = torch.where(
            sender == receiver, along.abs(), torch.where(sender > receiver, along, -along)
        )
        order = torch.argsort(number)
        order = order[torch.argsort(pair[order], stable=True)]
        if n_edges % 2:
            break
        first, second = order[0::2], order[1::2]
        opposite = (vector[first] + vector[second]).abs().amax(1) < _OPPOSITE_ANGSTROM
        opposite &= (sender[first] == receiver[second]) & (receiver[first] == sender[second])
        if bool(opposite.all()):
            # Bonds in the order of their first edges, and the lower edge to stand for each.
            edge, rank = torch.minimum(first, second).sort()
            bond[first[rank]] = bond[second[rank]] = torch.arange(len(edge), device=bond.device)
            return bond, edge
    raise OptionError(
        "an edge has no opposite: this network needs graphs of full cells, whose options say "
        "symmetry=False"
    )


def edge_pairs(receiver: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Return all ordered pairs of different near edges of one receiver.

    Parameters
    ----------
    receiver
        Of each edge, (E,).
    near
        Indices of the edges that are paired, (S,).

    Returns
    -------
    first, second : (T,) tensors
        Indices of edges, sorted by receiver.
    """
    near = near[torch.argsort(receiver[near], stable=True)]
    _, count = torch.unique_consecutive(receiver[near], return_counts=True)
    per_edge = torch.repeat_interleave(count, count)  # (S,) how many share its receiver
    group_start = torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
    first = torch.repeat_interleave(torch.arange(len(near), device=near.device), per_edge)
    begin = torch.cumsum(per_edge, 0) - per_edge
    within = torch.arange(len(first), device=near.device) - begin[first]
    second = group_start[first] + within
    different = first != second
    return near[first[different]], near[second[different]]


def pairs_per_graph(graphs: PackedGraphs, cutoff_angstrom: float) -> NDArray[np.int64]:
    """Return how many pairs :func:`edge_pairs` finds in each graph, with edges up to a cutoff."""
    vector = torch.from_numpy(np.array(graphs.edge_vector_angstrom))
    near = (torch.linalg.vector_norm(vector, dim=1) < cutoff_angstrom).numpy()
    shift = np.repeat(graphs.node_offset[:-1], graphs.edges_per_graph)
    n_nodes = int(graphs.node_offset[-1])
    degree = np.bincount((graphs.receiver + shift)[near], minlength=n_nodes)
    row = np.repeat(np.arange(len(graphs)), graphs.nodes_per_graph)
    pairs = np.zeros(len(graphs), dtype=np.int64)
    np.add.at(pairs, row, degree * (degree - 1))
    return pairs
