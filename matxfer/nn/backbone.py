"""What every backbone offers: layers that can be addressed, frozen and resumed one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from torch import nn

from matxfer.graph import GraphOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.data.packed import PackedGraphs


@dataclass(slots=True, eq=False)
class Features:
    """The state between two layers.

    Attributes
    ----------
    node : (N, F) tensor
    edge : (E, D) tensor; D may be 0
    extra : (T, A) tensor, graph by graph
        What else the layers hand on and only they read, such as features of pairs of edges or
        vectors of the nodes, which turn with the crystal; None if there is nothing.
    """

    node: Tensor
    edge: Tensor
    extra: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Features:
        """Return the features on another device."""
        node, edge, extra = (
            None if value is None else value.to(device, non_blocking=non_blocking)
            for value in (self.node, self.edge, self.extra)
        )
        assert node is not None
        assert edge is not None
        return Features(node, edge, extra)


@runtime_checkable
class Backbone(Protocol):
    """A message-passing network cut into embed, layer 0 … L-1.

    Features after ``k`` layers are resumable: ``run(g, embed(g), 0, L)`` equals
    ``run(g, run(g, embed(g), 0, k), k, L)``. Implementations are ``nn.Module`` whose parameters
    belong to ``blocks()``, in order from the input to the output: :class:`BackboneModule` has the
    rest, and :func:`matxfer.testing.check_backbone` tells whether a network is one.

    Examples
    --------
    >>> import matxfer, torch
    >>> from ase.build import bulk
    >>> backbone = matxfer.load_model("mp-small").backbone
    >>> isinstance(backbone, torch.nn.Module), [name for name, _ in backbone.blocks()]
    (True, ['embed', 'layers.0', 'layers.1', 'layers.2'])
    >>> crystal = matxfer.Crystal.from_ase(bulk("Si"))
    >>> graph = matxfer.CrystalGraph.from_crystal(crystal, backbone.graph_options)
    >>> half = backbone.run(graph, backbone.embed(graph), 0, 2)  # frozen layers, once
    >>> last = backbone.run(graph, half, 2, 3)
    >>> bool(torch.equal(last.node, backbone.run(graph, backbone.embed(graph), 0, 3).node))
    True
    """

    n_layers: int
    node_dim: int
    edge_dim: int
    graph_options: GraphOptions

    def embed(self, graphs: GraphLike) -> Features:
        """Return the features before the first layer."""
        ...

    def run(self, graphs: GraphLike, features: Features, start: int, stop: int) -> Features:
        """Apply layers ``start … stop - 1``."""
        ...

    def states(
        self, graphs: GraphLike, features: Features, start: int, stop: int
    ) -> Iterator[Features]:
        """Yield the features after each of the layers ``start … stop - 1``."""
        ...

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield ``("embed", module)``, ``("layers.0", module)``, … in order of depth."""
        ...

    def config(self) -> dict[str, Any]:
        """Return what is needed to build the same network again, as JSON."""
        ...


class BackboneModule(nn.Module, ABC):
    """A backbone with what follows from ``embed`` and ``states`` done.

    A class of one's own sets :attr:`kind`, the attributes below and the modules ``embedding`` and
    ``layers``, and defines :meth:`embed`, :meth:`states` and :meth:`config`.

    Attributes
    ----------
    kind
        The name under which a package declares the class (:mod:`matxfer.nn.registry`).
    n_layers, node_dim, edge_dim
        Number of layers L, widths F and D of the features.
    extra_dim
        Width A of what else the layers hand on; 0: there is nothing.
    graph_options
        Graphs that the network works on.
    edge_seconds
        About how long one edge takes in a step of training all layers on one CPU core.
    """

    kind: ClassVar[str]
    edge_seconds: ClassVar[float] = 2e-5
    n_layers: int
    node_dim: int
    edge_dim: int
    extra_dim: int = 0
    graph_options: GraphOptions
    embedding: nn.Module
    layers: nn.ModuleList

    @abstractmethod
    def embed(self, graphs: GraphLike) -> Features:
        """Return the features before the first layer: node (N, F), edge (E, D)."""

    @abstractmethod
    def states(
        self, graphs: GraphLike, features: Features, start: int, stop: int
    ) -> Iterator[Features]:
        """Yield the features after each of the layers ``start … stop - 1``."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return ``kind``, ``graph`` (the graph options) and the constructor's arguments."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build the network that :meth:`config` described, with random weights."""
        options = {k: v for k, v in config.items() if k not in ("kind", "graph")}
        return cls(**options, graph_options=GraphOptions.from_json(config["graph"]))

    def extra_rows_per_graph(self, graphs: PackedGraphs) -> NDArray[np.int64]:
        """Return how many rows of :attr:`Features.extra` belong to each graph, (G,)."""
        return np.zeros(len(graphs), dtype=np.int64)

    def run(self, graphs: GraphLike, features: Features, start: int, stop: int) -> Features:
        """Apply layers ``start … stop - 1``."""
        for state in self.states(graphs, features, start, stop):
            features = state
        return features

    def forward(self, graphs: GraphLike) -> Features:
        """Return the features after the last layer."""
        return self.run(graphs, self.embed(graphs), 0, self.n_layers)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the embedding and the layers by name, from the input to the output."""
        yield "embed", self.embedding
        for k, layer in enumerate(self.layers):
            yield f"layers.{k}", layer
