"""The built-in backbone: an edge-updating crystal graph network with three-body terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.graph import GraphOptions
from matxfer.nn.backbone import BackboneModule, Features
from matxfer.nn.layers import EdgeGatedLayer, GaussianBasis, angular_basis, polynomial_envelope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from matxfer.data.batch import GraphLike


class Embedding(nn.Module):
    """Atomic numbers to node features, distances to edge features.

    Parameters
    ----------
    node_dim, edge_dim
        Widths of the node and edge features.
    basis_size
        Number of Gaussians on [0, cutoff].
    cutoff_angstrom
        Cutoff in Å.
    """

    def __init__(
        self, node_dim: int, edge_dim: int, basis_size: int, cutoff_angstrom: float
    ) -> None:
        super().__init__()
        self.element = nn.Embedding(MAX_ATOMIC_NUMBER + 1, node_dim)
        self.basis = GaussianBasis(basis_size, cutoff_angstrom)
        self.bond = nn.Linear(basis_size, edge_dim)

    def forward(self, z: Tensor, distance: Tensor) -> Features:
        """Map (N,) atomic numbers and (E,) distances in Å to features."""
        return Features(self.element(z), self.bond(self.basis(distance)))


class EdgeGatedNetwork(BackboneModule):
    """Embedding and L edge-gated layers; invariant to rotation, translation and choice of cell.

    Only distances and, with ``angular_dim``, angles at the receiving atom enter, so features are
    invariant by construction; messages fade out smoothly at the cutoff, so they are twice
    continuously differentiable in the positions.

    Parameters
    ----------
    n_layers
        Number of message-passing layers L.
    node_dim, edge_dim
        Widths of node and edge features.
    basis_size
        Number of Gaussians for distances.
    angular_dim
        Channels of the three-body terms (:class:`matxfer.nn.layers.AngularTerms`); 0: none.
    graph_options
        Graphs that the network works on (its cutoff is also that of the envelope).
    """

    kind = "edge_gated"

    def __init__(
        self,
        n_layers: int = 4,
        node_dim: int = 128,
        edge_dim: int = 64,
        basis_size: int = 40,
        graph_options: GraphOptions | None = None,
        angular_dim: int = 0,
    ) -> None:
        super().__init__()
        self.graph_options = graph_options or GraphOptions()
        self.n_layers, self.node_dim, self.edge_dim = n_layers, node_dim, edge_dim
        self.basis_size, self.angular_dim = basis_size, angular_dim
        cutoff = self.graph_options.cutoff_angstrom
        self.embedding = Embedding(node_dim, edge_dim, basis_size, cutoff)
        self.layers = nn.ModuleList(
            EdgeGatedLayer(node_dim, edge_dim, angular_dim) for _ in range(n_layers)
        )

    def embed(self, graphs: GraphLike) -> Features:
        """Return the features before the first layer: node (N, F), edge (E, D)."""
        features: Features = self.embedding(graphs.z, _distance(graphs))
        return features

    def states(
        self, graphs: GraphLike, features: Features, start: int, stop: int
    ) -> Iterator[Features]:
        """Yield the features after each of the layers ``start … stop - 1``."""
        if start >= stop:
            return
        cutoff = self.graph_options.cutoff_angstrom
        distance = _distance(graphs)
        envelope = polynomial_envelope(distance, cutoff)[:, None]  # (E, 1)
        degree = envelope.new_zeros(graphs.z.shape[0], 1)
        degree = degree.index_add(0, graphs.edge_index[1], envelope)  # (N, 1)
        angular = None
        if self.angular_dim:
            angular = angular_basis(graphs.edge_vector / distance[:, None])  # (E, 8)
        node, edge = features.node, features.edge
        for layer in self.layers[start:stop]:
            node, edge = layer(node, edge, graphs.edge_index, envelope, degree, angular)
            yield Features(node, edge)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON."""
        return {
            "kind": self.kind,
            "n_layers": self.n_layers,
            "node_dim": self.node_dim,
            "edge_dim": self.edge_dim,
            "basis_size": self.basis_size,
            "angular_dim": self.angular_dim,
            "graph": self.graph_options.to_json(),
        }


def _distance(graphs: GraphLike) -> Tensor:
    """Return the edge lengths in Å, shape (E,)."""
    distance: Tensor = torch.linalg.vector_norm(graphs.edge_vector, dim=1)
    return distance
