"""The pieces of the built-in backbone: radial basis, cutoff envelope, edge-gated convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


def polynomial_envelope(distance: Tensor, cutoff: float, p: int = 6) -> Tensor:
    """Smooth cutoff: 1 at zero distance, 0 with two vanishing derivatives at the cutoff.

    u(x) = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2), x = d / cutoff, and 0 beyond
    (Gasteiger et al., ICLR 2020, eq. 8).

    Parameters
    ----------
    distance
        Any shape, same unit as ``cutoff``.
    """
    x = (distance / cutoff).clamp(max=1.0)
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2), p * (p + 1) / 2
    return 1 - x**p * (a - x * (b - c * x))


class GaussianBasis(nn.Module):
    """Distances as Gaussians on an even grid, exp(-((d - mu_k) / width)^2 / 2).

    Parameters
    ----------
    size
        Number of Gaussians.
    cutoff_angstrom
        Position of the last one, in Å; the first sits at 0.
    """

    centres: Tensor

    def __init__(self, size: int, cutoff_angstrom: float) -> None:
        super().__init__()
        grid = torch.linspace(0.0, cutoff_angstrom, size)
        self.register_buffer("centres", grid, persistent=False)
        self.inverse_width = (size - 1) / cutoff_angstrom

    def forward(self, distance: Tensor) -> Tensor:
        """Map (E,) distances in Å to (E, size)."""
        scaled = (distance[:, None] - self.centres) * self.inverse_width
        # Far tails would be denormal numbers, on which a CPU's arithmetic is many times slower.
        return torch.exp((-0.5 * scaled * scaled).clamp(min=-46.0))


class EdgeGatedLayer(nn.Module):
    """One step of message passing in which edges carry features of their own.

    With receiver i, neighbour j, envelope w and Σ over the neighbours of i::

        [g_ij, c_ij] = A h_i + B h_j + C e_ij
        m_ij  = sigmoid(g_ij) * silu(c_ij)
        e'_ij = e_ij + m_ij
        a_i   = Σ_j w_ij m_ij / sqrt(1 + Σ_j w_ij)
        h'_i  = h_i + MLP([LayerNorm(h_i), a_i])

    The product with [h_i, h_j, e_ij] of CGCNN (Xie & Grossman, PRL 120, 145301 (2018)) is split
    into node and edge parts, so only the small edge part costs a matrix product per edge; the
    edge update follows MEGNet (Chen et al., Chem. Mater. 31, 3564 (2019)). Nothing in it looks at
    other graphs of the batch (no batch norm), so features do not depend on the company.

    Parameters
    ----------
    node_dim, edge_dim
        Widths F and D of node and edge features.
    """

    def __init__(self, node_dim: int, edge_dim: int) -> None:
        super().__init__()
        self.receiver = nn.Linear(node_dim, 2 * edge_dim)
        self.sender = nn.Linear(node_dim, 2 * edge_dim, bias=False)
        self.edge = nn.Linear(edge_dim, 2 * edge_dim, bias=False)
        self.norm = nn.LayerNorm(node_dim)
        self.update = nn.Sequential(
            nn.Linear(node_dim + edge_dim, node_dim), nn.SiLU(), nn.Linear(node_dim, node_dim)
        )

    def forward(
        self,
        node: Tensor,  # (N, F)
        edge: Tensor,  # (E, D)
        edge_index: Tensor,  # (2, E) sender, receiver
        envelope: Tensor,  # (E, 1)
        degree: Tensor,  # (N, 1) sum of the envelope over the neighbours
    ) -> tuple[Tensor, Tensor]:
        """Return the updated node (N, F) and edge (E, D) features."""
        sender, receiver = edge_index[0], edge_index[1]
        normed = self.norm(node)  # (N, F)
        mixed = self.edge(edge)  # (E, 2D)
        mixed = mixed + self.receiver(normed).index_select(0, receiver)
        mixed = mixed + self.sender(normed).index_select(0, sender)
        gate, core = mixed.chunk(2, dim=1)  # (E, D) each
        message = torch.sigmoid(gate) * nn.functional.silu(core)  # (E, D)
        weighted = message * envelope
        summed = weighted.new_zeros(node.shape[0], weighted.shape[1])
        summed = summed.index_add(0, receiver, weighted)  # (N, D)
        summed = summed * torch.rsqrt(1 + degree)
        node = node + self.update(torch.cat([normed, summed], dim=1))
        return node, edge + message
