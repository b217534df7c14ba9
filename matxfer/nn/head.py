"""A property on top of a backbone: readout and scaler together, output to value in its unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from matxfer.data.properties import Property
from matxfer.nn.readout import AtomwiseReadout, make_readout
from matxfer.nn.scaling import TargetScaler

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike


class PropertyHead(nn.Module):
    """Readout and scaler of one property.

    Parameters
    ----------
    prop
        The property predicted.
    node_dim
        Width of the backbone's node features.
    readout
        Kind of readout, see :data:`matxfer.nn.readout.READOUTS`.
    hidden_dim
        Width of the readout's hidden layer.
    """

    def __init__(self, prop: Property, node_dim: int, readout: str, hidden_dim: int = 128) -> None:
        super().__init__()
        self.prop = prop
        self.hidden_dim = hidden_dim
        self.readout = make_readout(readout, node_dim, hidden_dim)
        self.scaler = TargetScaler(prop.transform)

    def forward(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Return normalised outputs (B,) from node features (N, F)."""
        output: Tensor = self.readout(node, graphs)
        return output

    def fitted(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Return predictions on the fitted scale, (B,)."""
        return self.scaler.fitted(self(node, graphs), graphs)

    def values(self, node: Tensor, graphs: GraphLike) -> NDArray[np.float64]:
        """Return values in the property's unit, shape (B,)."""
        return self.scaler.to_unit(self.fitted(node, graphs).detach().double().cpu().numpy())

    @property
    def is_mean_over_atoms(self) -> bool:
        """Whether the value is a mean of contributions per atom, on a linear scale."""
        return isinstance(self.readout, AtomwiseReadout) and self.prop.transform == "identity"

    def per_node(self, node: Tensor, graphs: GraphLike) -> Tensor:
        """Return contributions whose weighted mean over the atoms is the value, shape (N,).

        Raises
        ------
        ValueError
            If the readout is not a mean over atoms, or the transform is not linear.
        """
        if not self.is_mean_over_atoms:
            raise ValueError(f"{self.prop.name} is not a mean over atoms")
        assert isinstance(self.readout, AtomwiseReadout)
        return self.scaler.per_node(self.readout.per_node(node), graphs.z)

    def to_json(self) -> dict[str, Any]:
        """Return what is needed to build the head again, as JSON."""
        return {
            "property": self.prop.to_json(),
            "readout": self.readout.kind,
            "hidden_dim": self.hidden_dim,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], node_dim: int) -> PropertyHead:
        """Build the head that :meth:`to_json` described."""
        prop = Property.from_json(data["property"])
        return cls(prop, node_dim, data["readout"], data["hidden_dim"])


def default_readout(prop: Property) -> str:
    """Return the readout that suits a property: a mean over atoms for energies, else pooled."""
    return "atomwise" if prop.per_atom_energy else "pooled"
