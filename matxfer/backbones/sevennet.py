"""SevenNet (Park et al., J. Chem. Theory Comput. 20, 4857 (2024)) cut into layers, on our graphs.

An equivariant network of the kind of NequIP. Convolutions, linear maps and gates are those of the
package ``sevenn``, called as they are; ours is where the graph comes from and where a layer ends.
Between two layers the scalars of an atom are its node features, and its vectors and tensors, which
turn with the crystal, are :attr:`Features.extra`: kept with the frozen layers, read by no readout.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import e3nn
import sevenn._keys as key
import torch
from e3nn.o3 import Irreps
from sevenn.nn.edge_embedding import BesselBasis, SphericalEncoding, XPLORCutoff
from sevenn.nn.interaction_blocks import NequIP_interaction_block
from sevenn.nn.self_connection import SelfConnectionLinearIntro, SelfConnectionOutro
from sevenn.util import infer_irreps_out
from torch import nn

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.errors import OptionError
from matxfer.graph import GraphOptions
from matxfer.nn.backbone import BackboneModule, Features

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.data.packed import PackedGraphs


class SevenNetEmbedding(nn.Module):
    """Elements to scalars, distances to radial functions, directions to spherical harmonics.

    Parameters
    ----------
    width
        Number of scalars.
    lmax
        Highest order of the spherical harmonics.
    n_radial
        Size of the basis of distances.
    cutoff_angstrom, smooth_from_angstrom
        Where messages end and where they begin to fade out.
    """

    def __init__(
        self,
        width: int,
        lmax: int,
        n_radial: int,
        cutoff_angstrom: float,
        smooth_from_angstrom: float,
    ) -> None:
        super().__init__()
        self.element = nn.Embedding(MAX_ATOMIC_NUMBER + 1, width)
        self.basis = BesselBasis(cutoff_angstrom, n_radial)
        self.cutoff = XPLORCutoff(cutoff_angstrom, smooth_from_angstrom)
        # An even parity of the vectors, as in the published networks: they tell left from right.
        self.spherical = SphericalEncoding(lmax, parity=1)

    def radial(self, vector: Tensor) -> Tensor:
        """Return radial functions (E, n_radial) that end at the cutoff, of vectors (E, 3)."""
        distance = torch.linalg.vector_norm(vector, dim=-1)
        faded: Tensor = self.basis(distance) * self.cutoff(distance)[:, None]
        return faded


class SevenNetLayer(nn.Module):
    """One interaction block: a convolution, a self-connection and a gate.

    Parameters
    ----------
    irreps_in, irreps_out
        Features of an atom before and after, scalars first.
    irreps_edge
        Spherical harmonics of an edge.
    n_radial
        Size of the basis of distances.
    mean_neighbors
        What the sum over neighbours is divided by.
    """

    def __init__(
        self,
        irreps_in: Irreps,
        irreps_out: Irreps,
        irreps_edge: Irreps,
        n_radial: int,
        mean_neighbors: float,
    ) -> None:
        super().__init__()
        silu, tanh = nn.functional.silu, torch.tanh
        last = irreps_out.lmax == 0
        blocks = NequIP_interaction_block(
            irreps_x=irreps_in,
            irreps_filter=irreps_edge,
            irreps_out_tp=infer_irreps_out(
                irreps_in, irreps_edge, irreps_out.lmax, "even" if last else "full", False
            ),
            irreps_out=irreps_out,
            weight_nn_layers=[n_radial, 64, 64],
            conv_denominator=mean_neighbors,
            train_conv_denominator=False,
            self_connection_pair=(SelfConnectionLinearIntro, SelfConnectionOutro),
            act_scalar={"e": silu, "o": tanh},
            act_gate={"e": silu, "o": tanh},
            act_radial=silu,
            bias_in_linear=False,
            num_species=1,
            t=0,
        )
        for name, built in blocks.items():
            block: Any = built
            if not getattr(block, "layer_instantiated", True):
                block.instantiate()
            self.add_module(name.removeprefix("0_"), block)
        convolution: Any = self.convolution
        divisor = convolution.denominator.detach()
        del convolution.denominator  # a parameter that is never trained
        convolution.register_buffer("denominator", divisor)
        self._leave_out_constants()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._leave_out_constants()  # e3nn's copies of itself forget it

    def _leave_out_constants(self) -> None:
        """Keep out of the state what follows from the shapes alone."""
        for module in self.modules():
            for name, value in list(module.named_buffers(recurse=False)):
                if name != "denominator":
                    module.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor, index: Tensor, radial: Tensor, harmonics: Tensor) -> Tensor:
        """Map features (N, ·) to features (N, ·), by edges with receiver and sender (2, E)."""
        data = {
            key.NODE_FEATURE: x,
            key.EDGE_IDX: index,
            key.EDGE_EMBEDDING: radial,
            key.EDGE_ATTR: harmonics,
        }
        for block in self.children():
            data = block(data)
        return data[key.NODE_FEATURE]


class SevenNetBackbone(BackboneModule):
    """SevenNet up to its readout, of the kind of SevenNet-0.

    Vectors of atoms that a symmetry maps onto each other differ, so the graphs are those of full
    cells.

    Parameters
    ----------
    n_layers
        Number of interactions; the last one gives scalars alone.
    channels
        Numbers of scalars, vectors, tensors of order 2, … of each atom.
    n_radial
        Size of the basis of distances.
    smooth_from_angstrom
        Distance at which messages begin to fade out.
    mean_neighbors
        What sums over neighbours are divided by at first; a trained network has its own.
    graph_options
        Graphs; their cutoff is that of the messages.
    """

    kind = "sevennet"
    edge_seconds: ClassVar[float] = 6e-4

    def __init__(
        self,
        n_layers: int = 5,
        channels: Sequence[int] = (128, 64, 32),
        n_radial: int = 8,
        smooth_from_angstrom: float = 4.5,
        mean_neighbors: float = 36.0,
        graph_options: GraphOptions | None = None,
    ) -> None:
        super().__init__()
        self.graph_options = graph_options or GraphOptions(cutoff_angstrom=5.0, symmetry=False)
        if self.graph_options.symmetry:
            raise OptionError("SevenNet has vectors of atoms in full cells: symmetry must be false")
        self.n_layers, self.channels, self.edge_dim = n_layers, tuple(channels), 0
        self.n_radial, self.smooth_from_angstrom = n_radial, smooth_from_angstrom
        self.mean_neighbors = mean_neighbors
        lmax = len(self.channels) - 1
        scalars = Irreps([(self.channels[0], (0, 1))])
        inner = Irreps([(n, (order, 1)) for order, n in enumerate(self.channels)])
        self.node_dim, self.extra_dim = scalars.dim, inner.dim - scalars.dim
        shapes = [scalars, *[inner] * (n_layers - 1), scalars]
        with _plain_pytorch():
            self.embedding = SevenNetEmbedding(
                self.node_dim,
                lmax,
                n_radial,
                self.graph_options.cutoff_angstrom,
                smooth_from_angstrom,
            )
            edge = self.embedding.spherical.irreps_out
            self.layers = nn.ModuleList(
                SevenNetLayer(shapes[k], shapes[k + 1], edge, n_radial, mean_neighbors)
                for k in range(n_layers)
            )

    def embed(self, graphs: GraphLike) -> Features:
        """Return the features before the first layer: node (N, F), and vectors that are zero."""
        embedding = self.embedding
        assert isinstance(embedding, SevenNetEmbedding)
        return self._features(embedding.element(graphs.z), graphs)

    def states(
        self, graphs: GraphLike, features: Features, start: int, stop: int
    ) -> Iterator[Features]:
        """Yield the features after each of the layers ``start … stop - 1``."""
        if start >= stop:
            return
        embedding = self.embedding
        assert isinstance(embedding, SevenNetEmbedding)
        radial = embedding.radial(graphs.edge_vector)
        harmonics = embedding.spherical(graphs.edge_vector)
        index = graphs.edge_index.flip(0)
        x = features.node
        if start:
            assert features.extra is not None
            x = torch.cat([features.node, features.extra], dim=1)
        for layer in self.layers[start:stop]:
            x = layer(x, index, radial, harmonics)
            yield self._features(x, graphs)

    def extra_rows_per_graph(self, graphs: PackedGraphs) -> NDArray[np.int64]:
        """Return the number of atoms of each graph, (G,)."""
        return graphs.nodes_per_graph

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON."""
        return {
            "kind": self.kind,
            "n_layers": self.n_layers,
            "channels": list(self.channels),
            "n_radial": self.n_radial,
            "smooth_from_angstrom": self.smooth_from_angstrom,
            "mean_neighbors": self.mean_neighbors,
            "graph": self.graph_options.to_json(),
        }

    def _features(self, x: Tensor, graphs: GraphLike) -> Features:
        """Divide what an atom has into scalars and the rest, zeros where there are only scalars."""
        node, extra = x[:, : self.node_dim], x[:, self.node_dim :]
        if not extra.shape[1]:
            extra = x.new_zeros(len(x), self.extra_dim)
        return Features(node, graphs.edge_vector[:, :0], extra)


@contextmanager
def _plain_pytorch() -> Iterator[None]:
    """Let e3nn build modules without TorchScript, which older PyTorch would get by default."""
    before = e3nn.get_optimization_defaults()["jit_mode"]
    e3nn.set_optimization_defaults(jit_mode="eager")
    try:
        yield
    finally:
        e3nn.set_optimization_defaults(jit_mode=before)
