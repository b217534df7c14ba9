"""How a plugin's weights lie in its file: matrices in 8 bits, everything else in half precision.

A matrix is kept as whole numbers c from -127 to 127 and one step s per row of its last axis (in
bfloat16, which never runs out of range); the weight is c s, exactly, and c = ±127 at the largest,
so that weights that were rounded stay as they are. Predictions move by less than a thousandth of
the spread of the target, and figures are measured after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

#: Rows that are shorter would not repay their step.
SHORTEST_ROW = 16
#: A row of smaller weights is a row of zeros: its step would be a denormal number.
TINY = 1e-35
_LARGEST, _STEP = 127, ".step"


def kept(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as a file holds them; the steps of ``name`` are ``name.step``."""
    stored: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.dim() < 2 or value.shape[-1] < SHORTEST_ROW:
            stored[name] = value.half()
            continue
        largest = value.abs().amax(-1, keepdim=True)
        step = torch.where(largest < TINY, 0.0, largest / _LARGEST).bfloat16()
        code = torch.where(step > 0, value / step.float().clamp(min=TINY / 2 / _LARGEST), 0.0)
        code = code.round().clamp(-_LARGEST, _LARGEST)
        stored[name], stored[f"{name}{_STEP}"] = code.to(torch.int8), step
    return stored


def restored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights from what a file holds, in single precision.

    Raises
    ------
    ValueError
        If the numbers of a matrix have no steps that fit, or steps no numbers.
    """
    weights = {}
    for name, value in stored.items():
        if name.endswith(_STEP):
            if name.removesuffix(_STEP) not in stored:
                raise ValueError(f"{name} has no numbers")
            continue
        if value.dtype != torch.int8:
            weights[name] = value.float() if value.dtype == torch.half else value
            continue
        step = stored.get(f"{name}{_STEP}")
        if step is None or step.shape != (*value.shape[:-1], 1):
            raise ValueError(f"{name} has no steps of its shape")
        weights[name] = value.float() * step.float()
    return weights
