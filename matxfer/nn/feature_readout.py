"""Simple models on fingerprints, in a form that predicts without the library that fitted them.

scikit-learn keeps its models as pickles, which we never load; what a linear model, a kernel
machine or a forest predicts with are a few arrays, and those travel as safetensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from matxfer.data.batch import GraphLike


class FeatureReadout(nn.Module):
    """A fingerprint, projected on its principal components, into a simple model.

    Parameters
    ----------
    method
        ``"linear"``: x·w + b; ``"kernel"``: Σ_i α_i exp(-γ |x - x_i|²) + b; ``"forest"``: trees.
    shapes
        Shape of each array of the method, by name (see :data:`ARRAYS`), and of the projection.
    """

    #: Arrays of each method; ``centre`` (D,) and ``project`` (D, d) belong to all.
    ARRAYS: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": ("weight", "bias"),
        "kernel": ("points", "dual", "gamma", "bias"),
        "forest": ("feature", "threshold", "left", "right", "value"),
    }
    kind = "statistics"
    centre: Tensor
    project: Tensor
    weight: Tensor
    bias: Tensor
    points: Tensor
    dual: Tensor
    gamma: Tensor
    feature: Tensor
    threshold: Tensor
    left: Tensor
    right: Tensor
    value: Tensor

    def __init__(self, method: str, shapes: dict[str, list[int]]) -> None:
        super().__init__()
        self.method = method
        for name in ("centre", "project", *self.ARRAYS[method]):
            whole = name in ("feature", "left", "right")
            dtype = torch.int32 if whole else torch.float32
            self.register_buffer(name, torch.zeros(shapes[name], dtype=dtype))

    @classmethod
    def of_arrays(cls, method: str, arrays: dict[str, Tensor]) -> FeatureReadout:
        """Build a readout around arrays."""
        readout = cls(method, {name: list(array.shape) for name, array in arrays.items()})
        readout.load_state_dict(arrays)
        return readout

    def components(self, inputs: Tensor) -> Tensor:
        """Map fingerprints (B, D) to scaled principal components (B, d)."""
        components: Tensor = (inputs - self.centre) @ self.project
        return components

    def forward(self, inputs: Tensor, graphs: GraphLike) -> Tensor:  # noqa: ARG002
        """Map fingerprints (B, D) to outputs (1, B), or (trees, B) of a forest."""
        x = self.components(inputs)
        if self.method == "linear":
            return (x @ self.weight + self.bias)[None]
        if self.method == "kernel":
            squared = torch.cdist(x, self.points, compute_mode="donot_use_mm_for_euclid_dist") ** 2
            return (torch.exp(-self.gamma * squared) @ self.dual + self.bias)[None]
        return self._trees(x)

    def _trees(self, x: Tensor) -> Tensor:
        """Walk all trees at once; a leaf is its own child."""
        tree = torch.arange(len(self.feature))[:, None]  # (T, 1)
        row = torch.arange(len(x))[None]  # (1, B)
        node = torch.zeros(len(tree), len(x), dtype=torch.long)
        while True:
            left = x[row, self.feature[tree, node].long()] <= self.threshold[tree, node]
            below = torch.where(left, self.left[tree, node], self.right[tree, node]).long()
            if torch.equal(below, node):
                value: Tensor = self.value[tree, node]
                return value
            node = below

    def to_json(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        shapes = {name: list(array.shape) for name, array in self.state_dict().items()}
        return {"method": self.method, "shapes": shapes}
