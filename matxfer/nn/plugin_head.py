"""The head of a plugin: layers it reads, readout, scaler, and the source prediction it starts from.

value = inverse transform of (a source + mean + std · output + Σ_Z x_Z r_Z), with the base model's
own prediction of a like property as ``source`` where it has one: what is learned is the difference
between the two, which is smaller and simpler than the value (Δ-learning, Ramakrishnan et al.,
JCTC 11, 2087 (2015)). The slope a is 1 but for corrections (:mod:`matxfer.transfer.correction`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from matxfer.data.properties import Property
from matxfer.nn.ensemble import (
    POOLED_PARTS,
    ReadoutEnsemble,
    normalised_layers,
    readout_inputs,
)
from matxfer.nn.feature_readout import FeatureReadout
from matxfer.nn.scaling import TargetScaler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.nn.head import PropertyHead


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a head says of B crystals.

    Attributes
    ----------
    fitted
        Mean over the members on the fitted scale, (B,).
    outputs
        Normalised outputs of the members, (M, B).
    hidden
        Their last hidden layers, (M, B, H), if they have any.
    """

    fitted: NDArray[np.float64]
    outputs: Tensor
    hidden: Tensor | None


class PluginHead(nn.Module):
    """Readout of one property from several layers.

    Parameters
    ----------
    prop
        The property predicted.
    layers
        Which states of the network are read: 0 is the embedding, k what layer k - 1 returns.
    readout
        What maps the joined layers to outputs.
    source, slope
        Property of the base model whose prediction is added, if any, and how many times it is.
    """

    def __init__(
        self,
        prop: Property,
        layers: Sequence[int],
        readout: ReadoutEnsemble | FeatureReadout,
        source: str | None = None,
        slope: float = 1.0,
    ) -> None:
        super().__init__()
        self.prop, self.layers = prop, tuple(layers)
        self.source, self.slope = source, slope
        self.readout = readout
        self.scaler = TargetScaler(prop.transform)

    def check_width(self, node_dim: int) -> None:
        """Check that the readout is as wide as the layers that it names are together.

        Raises
        ------
        ValueError
            If there are more or fewer.
        """
        if isinstance(self.readout, ReadoutEnsemble):
            found, each = self.readout.layer_dim, node_dim
        else:
            parts = POOLED_PARTS[self.readout.kind] or (1,)
            found, each = len(self.readout.centre), len(parts) * node_dim
        if found != len(self.layers) * each:
            raise ValueError(
                f"the head names {len(self.layers):,} layers of width {each:,}, but reads {found:,}"
            )

    def inputs(self, nodes: Sequence[Tensor], graphs: GraphLike) -> Tensor:
        """Return what the readout reads, from the node features (N, F) of its layers."""
        kind: str = self.readout.kind
        return readout_inputs(kind, normalised_layers(nodes), graphs)

    def forward(self, inputs: Tensor, graphs: GraphLike) -> Tensor:
        """Return the normalised outputs of all members, (M, B)."""
        output: Tensor = self.readout(inputs, graphs)
        return output

    def evaluate(
        self, nodes: Sequence[Tensor], graphs: GraphLike, source: Tensor | None = None
    ) -> Evaluation:
        """Predict, and keep what the spread of the prediction is made of.

        Parameters
        ----------
        nodes
            Node features (N, F) of :attr:`layers`, in that order.
        source
            The base model's prediction of :attr:`source` on its fitted scale, (B,).
        """
        inputs, hidden = self.inputs(nodes, graphs), None
        if isinstance(self.readout, ReadoutEnsemble):
            hidden = self.readout.hidden(inputs, graphs)
            outputs = self.readout.output(hidden)
        else:
            outputs = self.readout(inputs, graphs)
        offset = self.scaler.offset(graphs)
        if self.source is not None:
            assert source is not None, f"the head starts from the base's {self.source}"
            offset = offset + self.slope * source
        fitted = (offset + self.scaler.std * outputs).detach().double().mean(0)
        return Evaluation(fitted.cpu().numpy(), outputs, hidden)

    def values(
        self, nodes: Sequence[Tensor], graphs: GraphLike, source: Tensor | None = None
    ) -> NDArray[np.float64]:
        """Return values in the property's unit, shape (B,); see :meth:`evaluate`."""
        return self.scaler.to_unit(self.evaluate(nodes, graphs, source).fitted)

    @property
    def is_mean_over_atoms(self) -> bool:
        """Whether the value, less the source prediction, is a mean of contributions per atom."""
        return self.readout.kind == "atomwise" and self.prop.transform == "identity"

    def per_node(self, nodes: Sequence[Tensor], graphs: GraphLike) -> Tensor:
        """Return contributions whose weighted mean is the value less the source prediction, (N,).

        Raises
        ------
        ValueError
            If the readout is not a mean over atoms, or the transform is not linear.
        """
        if not self.is_mean_over_atoms:
            raise ValueError(f"{self.prop.name} is not a mean over atoms")
        assert isinstance(self.readout, ReadoutEnsemble)
        own = self.readout.per_node(normalised_layers(nodes))
        return self.scaler.per_node(own, graphs.z)

    def to_json(self) -> dict[str, Any]:
        """Return what is needed to build the head again, as JSON."""
        return {
            "property": self.prop.to_json(),
            "layers": list(self.layers),
            "source": self.source,
            "readout": self.readout.to_json(),
            **({"slope": self.slope} if self.slope != 1 else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PluginHead:
        """Build the head that :meth:`to_json` described."""
        options = data["readout"]
        make = FeatureReadout if "method" in options else ReadoutEnsemble
        prop = Property.from_json(data["property"])
        slope = float(data.get("slope", 1.0))
        return cls(prop, data["layers"], make(**options), data["source"], slope)


def like_source(prop: Property, heads: Mapping[str, PropertyHead]) -> str | None:
    """Return the source property that a new one can start from: the same, or a like energy."""
    for name, head in heads.items():
        if head.prop.transform != prop.transform:
            continue
        if name == prop.name or (prop.per_atom_energy and head.prop.per_atom_energy):
            return name
    return None


def source_outputs(
    heads: Mapping[str, PropertyHead], node: Tensor, graphs: GraphLike
) -> dict[str, Tensor]:
    """Return every source prediction on its fitted scale, (B,), from last-layer features."""
    with torch.no_grad():
        return {name: head.fitted(node, graphs) for name, head in heads.items()}
