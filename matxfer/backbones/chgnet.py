"""CHGNet (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) cut into layers, on our graphs.

The convolutions and bases are those of the package ``chgnet``, called as they are; ours is where
the graph comes from (one neighbour list, no converter) and where a layer ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from chgnet.model.encoders import AngleEncoder, AtomEmbedding, BondEncoder
from chgnet.model.layers import AngleUpdate, AtomConv, BondConv
from torch import nn

from matxfer.backbones.bonds import edge_pairs, pairs_per_graph, undirected
from matxfer.errors import OptionError
from matxfer.graph import GraphOptions
from matxfer.nn.backbone import BackboneModule, Features

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.data.packed import PackedGraphs


@dataclass(frozen=True, slots=True, eq=False)
class _Geometry:
    """What the layers need to know of a batch with E edges, U bonds and T pairs of near bonds."""

    atom_graph: Tensor  # (E, 2) receiver, sender
    bond: Tensor  # (E,) bond of each edge
    edge: Tensor  # (U,) one edge of each bond
    atom_weight: Tensor  # (U, W)
    bond_weight: Tensor  # (U, W)
    bond_graph: Tensor  # (T, 3) atom in the middle, its two bonds


class CHGNetEmbedding(nn.Module):
    """Elements, bonds and angles to features, and the weights that fade messages out.

    Parameters
    ----------
    width
        Of all features.
    n_radial, n_angular
        Sizes of the bases.
    cutoff_angstrom, bond_cutoff_angstrom
        Reach of the atoms' messages and of the bonds'.
    envelope_power
        Of the polynomial that ends at a cutoff.
    """

    def __init__(
        self,
        width: int,
        n_radial: int,
        n_angular: int,
        cutoff_angstrom: float,
        bond_cutoff_angstrom: float,
        envelope_power: int,
    ) -> None:
        super().__init__()
        self.atom_embedding = AtomEmbedding(width)
        self.bond_basis_expansion = BondEncoder(
            atom_graph_cutoff=cutoff_angstrom,
            bond_graph_cutoff=bond_cutoff_angstrom,
            num_radial=n_radial,
            cutoff_coeff=envelope_power,
            learnable=True,
        )
        self.bond_embedding = nn.Linear(n_radial, width, bias=False)
        self.bond_weights_ag = nn.Linear(n_radial, width, bias=False)
        self.bond_weights_bg = nn.Linear(n_radial, width, bias=False)
        self.angle_basis_expansion = AngleEncoder(num_angular=n_angular, learnable=True)
        self.angle_embedding = nn.Linear(n_angular, width, bias=False)


class CHGNetLayer(nn.Module):
    """One interaction: messages to atoms, then to bonds, then to angles.

    Parameters
    ----------
    width
        Of all features.
    bonds, angles
        Whether anything above reads the bonds and the angles that it would update.
    """

    def __init__(self, width: int, *, bonds: bool, angles: bool) -> None:
        super().__init__()
        two: dict[str, Any] = {"atom_fea_dim": width, "bond_fea_dim": width, "gMLP_norm": "layer"}
        three = two | {"angle_fea_dim": width}
        self.atom = AtomConv(**two, hidden_dim=width)
        self.bond = BondConv(**three, hidden_dim=width) if bonds else None
        self.angle = AngleUpdate(**three, hidden_dim=0) if angles else None

    def forward(
        self, node: Tensor, bond: Tensor, angle: Tensor, geometry: _Geometry
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update atoms (N, W), bonds (U, W) and angles (T, W)."""
        node = self.atom(node, bond, geometry.atom_weight, geometry.atom_graph, geometry.bond)
        if len(angle) and self.bond is not None:
            bond = self.bond(node, bond, geometry.bond_weight, angle, geometry.bond_graph)
            if self.angle is not None:
                angle = self.angle(node, bond, angle, geometry.bond_graph)
        return node, bond, angle


class CHGNetBackbone(BackboneModule):
    """CHGNet up to its readout, of the kind of version 0.3.0.

    A bond has one set of features for both directions, and a bond's messages come from the angles
    at both of its atoms, so the graphs are those of full cells.

    Parameters
    ----------
    n_layers
        Number of interactions; the last one updates atoms alone.
    width
        Of the features of atoms, bonds and angles.
    n_radial, n_angular
        Sizes of the bases of distances and angles.
    bond_cutoff_angstrom
        Bonds up to this length have angles and messages among them.
    envelope_power
        Of the polynomial that ends at the cutoffs.
    graph_options
        Graphs; their cutoff is that of the atoms' messages.
    """

    kind = "chgnet"
    edge_seconds: ClassVar[float] = 2e-4

    def __init__(
        self,
        n_layers: int = 4,
        width: int = 64,
        n_radial: int = 31,
        n_angular: int = 31,
        bond_cutoff_angstrom: float = 3.0,
        envelope_power: int = 8,
        graph_options: GraphOptions | None = None,
    ) -> None:
        super().__init__()
        self.graph_options = graph_options or GraphOptions(cutoff_angstrom=6.0, symmetry=False)
        if self.graph_options.symmetry:
            raise OptionError("the bonds of CHGNet belong to full cells: symmetry must be false")
        self.n_layers, self.node_dim = n_layers, width
        self.edge_dim = self.extra_dim = width
        self.n_radial, self.n_angular = n_radial, n_angular
        self.bond_cutoff_angstrom, self.envelope_power = bond_cutoff_angstrom, envelope_power
        self.embedding = CHGNetEmbedding(
            width,
            n_radial,
            n_angular,
            self.graph_options.cutoff_angstrom,
            bond_cutoff_angstrom,
            envelope_power,
        )
        # Angles that were updated are read by the bonds of the next layer, bonds by its atoms.
        self.layers = nn.ModuleList(
            CHGNetLayer(width, bonds=k < n_layers - 1, angles=k < n_layers - 2)
            for k in range(n_layers)
        )

    def embed(self, graphs: GraphLike) -> Features:
        """Return the features before the first layer: node (N, W), edge (E, W), extra (T, W)."""
        embedding, vector = self.embedding, graphs.edge_vector
        assert isinstance(embedding, CHGNetEmbedding)
        distance = torch.linalg.vector_norm(vector, dim=1)
        edge = embedding.bond_embedding(embedding.bond_basis_expansion.rbf_expansion_ag(distance))
        first, second = self._pairs(graphs, distance)
        unit = vector / distance[:, None]
        angle = embedding.angle_basis_expansion(unit[first], unit[second])
        node = embedding.atom_embedding(graphs.z - 1)
        return Features(node, edge, embedding.angle_embedding(angle))

    def states(
        self, graphs: GraphLike, features: Features, start: int, stop: int
    ) -> Iterator[Features]:
        """Yield the features after each of the layers ``start … stop - 1``."""
        if start >= stop:
            return
        geometry = self._geometry(graphs)
        node, angle = features.node, features.extra
        assert angle is not None
        bond = features.edge.index_select(0, geometry.edge)
        for layer in self.layers[start:stop]:
            node, bond, angle = layer(node, bond, angle, geometry)
            yield Features(node, bond.index_select(0, geometry.bond), angle)

    def extra_rows_per_graph(self, graphs: PackedGraphs) -> NDArray[np.int64]:
        """Return the number of angles of each graph, (G,)."""
        return pairs_per_graph(graphs, self.bond_cutoff_angstrom)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON."""
        return {
            "kind": self.kind,
            "n_layers": self.n_layers,
            "width": self.node_dim,
            "n_radial": self.n_radial,
            "n_angular": self.n_angular,
            "bond_cutoff_angstrom": self.bond_cutoff_angstrom,
            "envelope_power": self.envelope_power,
            "graph": self.graph_options.to_json(),
        }

    def _pairs(self, graphs: GraphLike, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pairs of edges, (T,) each, whose angles are looked at."""
        near = (distance.detach() < self.bond_cutoff_angstrom).nonzero().squeeze(1)
        return edge_pairs(graphs.edge_index[1], near)

    def _geometry(self, graphs: GraphLike) -> _Geometry:
        embedding = self.embedding
        assert isinstance(embedding, CHGNetEmbedding)
        bond, edge = undirected(graphs.edge_index, graphs.edge_vector)
        distance = torch.linalg.vector_norm(graphs.edge_vector, dim=1)
        first, second = self._pairs(graphs, distance)
        receiver = graphs.edge_index[1]
        basis, length = embedding.bond_basis_expansion, distance.index_select(0, edge)
        return _Geometry(
            atom_graph=graphs.edge_index.flip(0).t(),
            bond=bond,
            edge=edge,
            atom_weight=embedding.bond_weights_ag(basis.rbf_expansion_ag(length)),
            bond_weight=embedding.bond_weights_bg(basis.rbf_expansion_bg(length)),
            bond_graph=torch.stack([receiver[first], bond[first], bond[second]], dim=1),
        )
