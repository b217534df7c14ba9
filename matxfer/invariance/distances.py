"""Distances between features of two domains, to be made small while a network learns.

``coral``: ‖C_S - C_T‖²_F / 4d², of the covariances of d features (Sun & Saenko, ECCV 2016
Workshops). ``mmd``: the unbiased squared maximum mean discrepancy (Gretton et al., JMLR 13, 723
(2012), eq. 3), the mean over Gaussian kernels of several widths (Long et al., ICML 2015). ``grl``:
a critic learns to tell the domains, and features follow its gradient reversed (Ganin et al., JMLR
17, 59 (2016)).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("grl", "coral", "mmd")
#: Widths of the kernels of ``mmd``, in median distances.
WIDTHS = (0.5, 1.0, 2.0)
_HIDDEN = 64


def coral(source: Tensor, target: Tensor) -> Tensor:
    """Return the distance of the covariances of features (n, d) and (m, d), a scalar."""
    width = source.shape[1]
    return (_covariance(source) - _covariance(target)).square().sum() / (4 * width**2)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / max(len(x) - 1, 1)


def mmd(source: Tensor, target: Tensor) -> Tensor:
    """Return the squared discrepancy of features (n, d) and (m, d), a scalar.

    It may be slightly negative, since it is without bias. The median distance of the batch is taken
    as a constant.
    """
    both = torch.cat([source, target])
    # Not torch.cdist, whose slope is not finite where two crystals are equal.
    square = both.square().sum(1)
    squared = (square[:, None] + square - 2 * both @ both.T).clamp(min=0)
    n, m = len(source), len(target)
    upper = torch.triu_indices(n + m, n + m, 1)
    median = squared.detach()[upper[0], upper[1]].median().clamp(min=1e-12)
    total = squared.new_zeros(())
    for width in WIDTHS:
        kernel = torch.exp(-0.5 * squared / (width**2 * median))
        # The diagonal, of ones, is left out of the means within a domain.
        own = (kernel[:n, :n].sum() - n) / (n * (n - 1))
        other = (kernel[n:, n:].sum() - m) / (m * (m - 1))
        total = total + own + other - 2 * kernel[:n, n:].mean()
    return total / len(WIDTHS)


class _Reversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -λ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """Return x; what follows it pulls its source the other way, λ times as strongly."""
    reversed_: Tensor = _Reversal.apply(x, strength)
    return reversed_


class DomainCritic(nn.Module):
    """A network of one hidden layer that tells target from source features.

    Parameters
    ----------
    width
        Number d of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))

    def forward(self, source: Tensor, target: Tensor, strength: float) -> Tensor:
        """Return the cross entropy of its guesses, each domain counting alike, a scalar.

        The critic follows its gradient, the features (n, d) and (m, d) follow it reversed.
        """
        told = [self.net(reverse_gradient(x, strength))[:, 0] for x in (source, target)]
        # softplus(z) = -log(1 - σ(z)): of a source row the wrong guess.
        return nn.functional.softplus(told[0]).mean() + nn.functional.softplus(-told[1]).mean()


def ramp(progress: float) -> float:
    """Return by how much the strength is on, 0 … 1, after a part of the steps (Ganin, eq. 14)."""
    return 2 / (1 + math.exp(-10 * min(max(progress, 0.0), 1.0))) - 1
