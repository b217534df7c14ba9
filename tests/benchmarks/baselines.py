"""CGCNN and SchNet on matxfer's graphs, to compare the built-in network with.

Both take the same packed graphs as :class:`matxfer.nn.network.EdgeGatedNetwork`, on which each
node stands for a symmetry orbit: PyG sums messages at the target of an edge, which is our
receiver, and every receiver has all its neighbours, so features on the quotient graph are those on
the full one. Exception: CGCNN's batch norm counts each orbit once, whatever its multiplicity; it
does so in training and in use alike.

Both have the face of :class:`matxfer.nn.backbone.Backbone`, as far as training and prediction need
it, so :class:`matxfer.model.Model` and its heads work on top of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch_geometric.nn import CGConv
from torch_geometric.nn.models.schnet import InteractionBlock

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.graph import GraphOptions
from matxfer.nn.backbone import Features
from matxfer.nn.layers import GaussianBasis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from matxfer.data.batch import GraphLike


class _Baseline(nn.Module):
    """Embedding of the elements, Gaussians of the distances, L layers that update the nodes."""

    kind = "baseline"

    def __init__(
        self, n_layers: int, node_dim: int, basis_size: int, graph_options: GraphOptions | None
    ) -> None:
        super().__init__()
        self.graph_options = graph_options or GraphOptions()
        self.n_layers, self.node_dim, self.edge_dim = n_layers, node_dim, basis_size
        self.element = nn.Embedding(MAX_ATOMIC_NUMBER + 1, node_dim)
        self.basis = GaussianBasis(basis_size, self.graph_options.cutoff_angstrom)
        self.layers = nn.ModuleList()

    def update(self, layer: nn.Module, node: Tensor, edge: Tensor, graphs: GraphLike) -> Tensor:
        """Return the node features (N, F) after a layer."""
        raise NotImplementedError

    def embed(self, graphs: GraphLike) -> Features:
        """Return the features before the first layer: node (N, F), edge (E, basis_size)."""
        return Features(self.element(graphs.z), self.basis(_distance(graphs)))

    def run(self, graphs: GraphLike, features: Features, start: int, stop: int) -> Features:
        """Apply layers ``start … stop - 1``."""
        node = features.node
        for layer in self.layers[start:stop]:
            node = self.update(layer, node, features.edge, graphs)
        return Features(node, features.edge)

    def forward(self, graphs: GraphLike) -> Features:
        """Return the features after the last layer."""
        return self.run(graphs, self.embed(graphs), 0, self.n_layers)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the embedding and the layers by name, from the input to the output."""
        yield "embed", self.element
        for k, layer in enumerate(self.layers):
            yield f"layers.{k}", layer

    def config(self) -> dict[str, Any]:
        """Return the shape of the network as JSON."""
        return {
            "kind": self.kind,
            "n_layers": self.n_layers,
            "node_dim": self.node_dim,
            "basis_size": self.edge_dim,
            "graph": self.graph_options.to_json(),
        }


class CGCNN(_Baseline):
    """Crystal graph convolutions (Xie & Grossman, PRL 120, 145301 (2018)) by PyG's ``CGConv``.

    As published: 64 node features, 41 Gaussians, gated messages from [h_i, h_j, e_ij], batch norm
    of their sum. Unlike there: a learned embedding instead of tabulated element descriptors, all
    neighbours within our cutoff instead of the 12 nearest within 8 Å, PyG's residual without a
    softplus after it (and without the batch norm inside the message).

    Parameters
    ----------
    n_layers, node_dim, basis_size, graph_options
        As in :class:`matxfer.nn.network.EdgeGatedNetwork`.
    """

    kind = "cgcnn"

    def __init__(
        self,
        n_layers: int = 4,
        node_dim: int = 64,
        basis_size: int = 41,
        graph_options: GraphOptions | None = None,
    ) -> None:
        super().__init__(n_layers, node_dim, basis_size, graph_options)
        self.layers.extend(
            CGConv(node_dim, dim=basis_size, aggr="add", batch_norm=True) for _ in range(n_layers)
        )

    def update(self, layer: nn.Module, node: Tensor, edge: Tensor, graphs: GraphLike) -> Tensor:
        """Return the node features (N, F) after a layer."""
        updated: Tensor = layer(node, graphs.edge_index, edge)
        return updated


class SchNet(_Baseline):
    """Continuous-filter convolutions (Schütt et al., J. Chem. Phys. 148, 241722 (2018)).

    The interaction blocks are PyG's (filters from Gaussians, cosine cutoff, shifted softplus);
    PyG's whole ``SchNet`` finds its own neighbours in open space, so only its blocks serve here,
    with the lengths of our periodic edges.

    Parameters
    ----------
    n_layers, node_dim, basis_size, graph_options
        As in :class:`matxfer.nn.network.EdgeGatedNetwork`; filters are as wide as the nodes.
    """

    kind = "schnet"

    def __init__(
        self,
        n_layers: int = 4,
        node_dim: int = 64,
        basis_size: int = 50,
        graph_options: GraphOptions | None = None,
    ) -> None:
        super().__init__(n_layers, node_dim, basis_size, graph_options)
        cutoff = self.graph_options.cutoff_angstrom
        self.layers.extend(
            InteractionBlock(node_dim, basis_size, node_dim, cutoff) for _ in range(n_layers)
        )

    def update(self, layer: nn.Module, node: Tensor, edge: Tensor, graphs: GraphLike) -> Tensor:
        """Return the node features (N, F) after a layer."""
        update: Tensor = layer(node, graphs.edge_index, _distance(graphs), edge)
        return node + update


def _distance(graphs: GraphLike) -> Tensor:
    """Return the edge lengths in Å, shape (E,)."""
    return torch.linalg.vector_norm(graphs.edge_vector, dim=1)
