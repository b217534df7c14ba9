"""What every backbone offers: layers that can be addressed, frozen and resumed one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from matxfer.data.batch import GraphLike
    from matxfer.graph import GraphOptions


@dataclass(slots=True, eq=False)
class Features:
    """The state between two layers.

    Attributes
    ----------
    node : (N, F) tensor
    edge : (E, D) tensor
    """

    node: Tensor
    edge: Tensor


@runtime_checkable
class Backbone(Protocol):
    """A message-passing network cut into embed, layer 0 … L-1.

    Features after ``k`` layers are resumable: ``run(g, embed(g), 0, L)`` equals
    ``run(g, run(g, embed(g), 0, k), k, L)``. Implementations are ``nn.Module`` whose parameters
    belong to ``blocks()``, in order from the input to the output.

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
