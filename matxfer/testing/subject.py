"""A backbone under test, and what its checks ask of it again and again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.data.packed import PackedGraphs
from matxfer.graph import build_graph
from matxfer.nn.backbone import Features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from matxfer.crystal import Crystal
    from matxfer.data.batch import GraphBatch
    from matxfer.graph import GraphOptions
    from matxfer.nn.backbone import BackboneModule


@dataclass(slots=True, eq=False)
class Subject:
    """What is tried.

    Attributes
    ----------
    backbone
        In evaluation mode.
    elements
        Atomic numbers that it knows, three or more.
    rtol
        Largest difference that counts as none, as a part of a layer's largest feature.
    """

    backbone: BackboneModule
    elements: tuple[int, ...]
    rtol: float
    #: Largest feature of each layer on ordinary crystals, (L + 1,).
    scale: list[float] = field(default_factory=list)

    @property
    def options(self) -> GraphOptions:
        """Graph options of the backbone."""
        return self.backbone.graph_options

    def pack(
        self, crystals: Sequence[Crystal | None], options: GraphOptions | None = None
    ) -> PackedGraphs:
        """Build graphs; ``None`` becomes one without atoms."""
        made = options or self.options
        return PackedGraphs.pack([None if c is None else build_graph(c, made) for c in crystals])

    def batch(self, *crystals: Crystal | None) -> GraphBatch:
        """Build graphs side by side."""
        return self.pack(crystals).batch(np.arange(len(crystals)))

    def layers(self, graphs: GraphBatch, backbone: BackboneModule | None = None) -> list[Features]:
        """Return the features of the embedding and of all layers."""
        network = backbone or self.backbone
        with torch.no_grad():
            first = network.embed(graphs)
            return [first, *network.states(graphs, first, 0, network.n_layers)]

    def sites(self, crystal: Crystal, options: GraphOptions | None = None) -> list[Tensor]:
        """Return the node features of every atom of a cell, layer by layer, (n_sites, F)."""
        graph = build_graph(crystal, options or self.options)
        index = torch.from_numpy(graph.node_of_site.astype(np.int64))
        batch = PackedGraphs.pack([graph]).batch(np.array([0]))
        return [state.node[index] for state in self.layers(batch)]

    def difference(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        """Return the largest difference of node features, as a part of their layer's scale."""
        assert len(left) == len(right), f"{len(left)} layers against {len(right)}"
        worst = 0.0
        for a, b, scale in zip(left, right, self.scale, strict=True):
            assert a.shape == b.shape, f"shape {tuple(a.shape)} against {tuple(b.shape)}"
            if a.numel():
                apart = float((a.detach().double() - b.detach().double()).abs().max()) / scale
                worst = max(worst, apart if apart == apart else float("inf"))  # noqa: PLR0124 - NaN
        return worst

    def same(self, left: Sequence[Tensor], right: Sequence[Tensor], what: str) -> None:
        """Assert that node features agree."""
        difference = self.difference(left, right)
        assert difference <= self.rtol, (
            f"{what}: features differ by {difference:.2g} of the largest, more than {self.rtol:g}"
        )


def nodes(states: Sequence[Features]) -> list[Tensor]:
    """Return the node features of states."""
    return [state.node for state in states]


def detached(features: Features) -> Features:
    """Return a copy in memory of its own."""
    extra = features.extra
    return Features(
        features.node.detach().clone(),
        features.edge.detach().clone(),
        None if extra is None else extra.detach().clone(),
    )


def in_double(graphs: GraphBatch) -> GraphBatch:
    """Return graphs in double precision."""
    return replace(
        graphs,
        edge_vector=graphs.edge_vector.double(),
        multiplicity=graphs.multiplicity.double(),
    )
