"""Elastic weight consolidation: a rubber band on every weight, as stiff as the source needs it.

penalty = λ/2 · (N/n) Σ_k (F_k + floor) (θ_k - θ*_k)²

with F the mean Fisher information per source sample (:mod:`matxfer.fisher`), N the number of
source samples and n that of target samples: the target loss is a mean over its n samples, so
λ = 1 weighs the source posterior in full (Kirkpatrick et al., PNAS 114, 3521 (2017), eq. 3).
The floor is an L2-SP part (Li et al., ICML 2018) for weights that the Fisher sample never
touched, such as embeddings of absent elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

#: The floor, as a share of the mean Fisher information of the anchored weights.
FLOOR_SHARE = 1e-3


class EWCPenalty(nn.Module):
    """Quadratic penalty on the distance of a module's trainable weights from where they start.

    Parameters
    ----------
    module
        Its trainable parameters are anchored at their present values.
    fisher
        Mean Fisher information per source sample, by parameter name.
    strength
        λ; 1 is the full posterior of the source, 0 no penalty.
    sample_ratio
        N/n, source samples over target samples.
    floor_share
        See :data:`FLOOR_SHARE`.

    Raises
    ------
    ValueError
        If a trainable parameter has no Fisher information of its shape, or λ is negative.
    """

    def __init__(
        self,
        module: nn.Module,
        fisher: dict[str, Tensor],
        strength: float,
        sample_ratio: float,
        floor_share: float = FLOOR_SHARE,
    ) -> None:
        super().__init__()
        if strength < 0:
            raise OptionError(f"the strength λ is {strength}, but must not be negative")
        self.scale = 0.5 * strength * sample_ratio
        anchored = {name: p for name, p in module.named_parameters() if p.requires_grad}
        wrong = [n for n, p in anchored.items() if n not in fisher or fisher[n].shape != p.shape]
        if wrong:
            raise OptionError(
                f"the Fisher information does not fit the network: {wrong[0]} is missing or of "
                "another shape; use the Fisher information that was shipped with these weights"
            )
        self._parameters_of = anchored
        count = sum(p.numel() for p in anchored.values())
        mean = sum(float(fisher[n].sum()) for n in anchored) / max(count, 1)
        for k, (name, parameter) in enumerate(anchored.items()):
            stiffness = fisher[name].to(parameter) + floor_share * mean
            self.register_buffer(f"stiffness_{k}", stiffness, persistent=False)
            self.register_buffer(f"anchor_{k}", parameter.detach().clone(), persistent=False)

    def forward(self) -> Tensor:
        """Return the penalty at the module's present weights, a scalar."""
        total = torch.zeros(())
        for k, parameter in enumerate(self._parameters_of.values()):
            distance = parameter - getattr(self, f"anchor_{k}")
            total = total.to(distance) + (getattr(self, f"stiffness_{k}") * distance.square()).sum()
        return self.scale * total

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each anchored weight with the gradient of the penalty, in closed form."""
        for k, parameter in enumerate(self._parameters_of.values()):
            distance = parameter.detach() - getattr(self, f"anchor_{k}")
            yield parameter, 2 * self.scale * getattr(self, f"stiffness_{k}") * distance
