"""Target scaling: reference energies per element, mean and spread; travels with the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.data.batch import GraphLike, node_weights
from matxfer.data.properties import apply_transform, invert_transform
from matxfer.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs
    from matxfer.data.properties import Property

#: Weight of the pull of reference energies to zero, in units of one structure: it settles
#: elements that few structures hold and combinations that always occur together.
REFERENCE_RIDGE = 1e-3
#: The same where the values are differences from a prediction that knows the elements already.
DIFFERENCE_RIDGE = 0.3


def composition(graphs: PackedGraphs) -> NDArray[np.float64]:
    """Return the atomic fractions of each graph, shape (G, 119); zero rows for empty graphs."""
    row = np.repeat(np.arange(len(graphs)), graphs.nodes_per_graph)
    table = np.zeros((len(graphs), MAX_ATOMIC_NUMBER + 1))
    np.add.at(table, (row, graphs.numbers), graphs.multiplicity)
    total = table.sum(axis=1, keepdims=True)
    return np.asarray(table / np.maximum(total, 1))


class TargetScaler(nn.Module):
    """Affine map between the network's output and a property's fitted scale.

    fitted = mean + std · output + Σ_Z x_Z r_Z, with atomic fractions x and, for energies per
    atom, references r from a ridge fit to the training targets (robust where the composition
    alone does not determine them); value = inverse transform of fitted.

    Parameters
    ----------
    transform
        See :class:`matxfer.data.properties.Property`.
    """

    mean: Tensor
    std: Tensor
    reference: Tensor

    def __init__(self, transform: str = "identity") -> None:
        super().__init__()
        self.transform = transform
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("reference", torch.zeros(MAX_ATOMIC_NUMBER + 1))

    @classmethod
    def fit(
        cls,
        prop: Property,
        values: NDArray[np.float64],
        graphs: PackedGraphs,
        source: NDArray[np.float64] | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> TargetScaler:
        """Fit to training values in the property's unit; NaN values are left out.

        With ``source``, predictions (G,) on the fitted scale, the differences from them are fitted;
        ``weights`` (G,) say how much each value counts.

        Raises
        ------
        ValueError
            If no value can be used.
        """
        scaler = cls(prop.transform)
        fitted = apply_transform(prop.transform, np.asarray(values, dtype=np.float64))
        if source is not None:
            fitted = fitted - source
        known = np.isfinite(fitted)
        if not known.any():
            raise OptionError(f"{prop.name}: no training value is usable; check the column")
        y = fitted[known]
        w = np.ones(len(y)) if weights is None else weights[known]
        if prop.per_atom_energy:
            x = composition(graphs)[known]
            present = x.any(axis=0)
            x = x[:, present]
            ridge = REFERENCE_RIDGE if source is None else DIFFERENCE_RIDGE
            weighed = x * w[:, None]
            gram = weighed.T @ x + ridge * np.eye(x.shape[1])
            reference = np.linalg.solve(gram, weighed.T @ (y - np.average(y, weights=w)))
            scaler.reference[torch.from_numpy(present)] = torch.from_numpy(reference).float()
            y = y - x @ reference
        mean = float(np.average(y, weights=w))
        scaler.mean.fill_(mean)
        scaler.std.fill_(max(float(np.average((y - mean) ** 2, weights=w)) ** 0.5, 1e-8))
        return scaler

    def offset(self, graphs: GraphLike) -> Tensor:
        """Return mean + Σ_Z x_Z r_Z of each graph, shape (B,), on the fitted scale."""
        total = self.mean.repeat(graphs.num_graphs)
        return total.index_add(0, graphs.batch, self.reference[graphs.z] * node_weights(graphs))

    def fitted(self, output: Tensor, graphs: GraphLike) -> Tensor:
        """Map network output (B,) to the fitted scale."""
        return self.offset(graphs) + self.std * output

    def per_node(self, output: Tensor, z: Tensor) -> Tensor:
        """Map outputs of nodes (N,) to contributions whose weighted mean is the fitted value."""
        each: Tensor = self.mean + self.std * output + self.reference[z]
        return each

    def normalised(
        self,
        values: NDArray[np.float64],
        graphs: PackedGraphs,
        source: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float32]:
        """Map values in their unit (G,) to network targets; NaN where there is no usable value."""
        fitted = apply_transform(self.transform, np.asarray(values, dtype=np.float64))
        return self.normalised_fitted(fitted if source is None else fitted - source, graphs)

    def normalised_fitted(
        self, fitted: NDArray[np.float64], graphs: PackedGraphs
    ) -> NDArray[np.float32]:
        """Map the fitted scale (G,) to network outputs."""
        fitted = fitted - composition(graphs) @ self.reference.double().cpu().numpy()
        scaled = (fitted - float(self.mean)) / float(self.std)
        return np.asarray(scaled, dtype=np.float32)

    def to_unit(self, fitted: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map the fitted scale to values in the property's unit."""
        return invert_transform(self.transform, fitted)
