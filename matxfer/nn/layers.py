"""The pieces of the built-in backbone: radial and angular basis, envelope, convolution."""

from __future__ import annotations

import math
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


def angular_basis(unit: Tensor) -> Tensor:
    """Return the l = 1 and l = 2 angular functions of unit vectors (E, 3), shape (E, 8).

    Scaled so that summing a(u) a(v) over the three or the five components gives the Legendre
    polynomials P_1(u·v) and P_2(u·v): the square of a sum over neighbours is a sum over pairs of
    neighbours of a function of their angle, at the cost of a sum over neighbours.
    """
    x, y, z = unit.unbind(1)
    root = math.sqrt(3.0)
    second = (
        root * x * y,
        root * y * z,
        0.5 * (3 * z * z - 1),
        root * x * z,
        0.5 * root * (x * x - y * y),
    )
    return torch.stack((x, y, z, *second), dim=1)


class AngularTerms(nn.Module):
    """Three-body terms centred on the receiving atom, without a list of triplets.

    With the angular functions Y of :func:`angular_basis` and A channels::

        a_ij = w_ij (U e_ij) * (V h_j)
        S_i  = Σ_j a_ij ⊗ Y(r_ij / d_ij) / sqrt(1 + Σ_j w_ij)       (8, A) per atom
        n_i  = [|S_i|² over l = 1, over l = 2]                     Σ_jk a_ij a_ik P_l(cos θ_jik)
        b_ij = [S_i · Y(r_ij / d_ij) for l = 1, for l = 2]         Σ_k a_ik P_l(cos θ_jik)

    The density trick of atomic cluster expansions (Drautz, PRB 99, 014104 (2019)). Centred on the
    receiver they need the receiver's own neighbours only, which is what an asymmetric-unit graph
    has of every node.

    Parameters
    ----------
    node_dim, edge_dim, angular_dim
        Widths F and D of the features, number A of channels.
    """

    def __init__(self, node_dim: int, edge_dim: int, angular_dim: int) -> None:
        super().__init__()
        self.angular_dim = angular_dim
        self.edge = nn.Linear(edge_dim, angular_dim, bias=False)
        self.sender = nn.Linear(node_dim, angular_dim)

    def forward(
        self,
        normed: Tensor,  # (N, F)
        edge: Tensor,  # (E, D)
        edge_index: Tensor,  # (2, E)
        envelope: Tensor,  # (E, 1)
        degree: Tensor,  # (N, 1)
        angular: Tensor,  # (E, 8)
    ) -> tuple[Tensor, Tensor]:
        """Return the invariants of the atoms, (N, 2A), and of the edges, (E, 2A)."""
        sender, receiver = edge_index[0], edge_index[1]
        weight = self.edge(edge) * self.sender(normed).index_select(0, sender) * envelope
        angular = angular.to(weight.dtype)
        outer = (angular[:, :, None] * weight[:, None, :]).flatten(1)  # (E, 8A)
        moment = outer.new_zeros(normed.shape[0], outer.shape[1]).index_add(0, receiver, outer)
        moment = (moment * torch.rsqrt(1 + degree)).unflatten(1, (8, self.angular_dim))
        node_terms = _by_degree(moment * moment)
        edge_terms = _by_degree(moment.index_select(0, receiver) * angular[:, :, None])
        return node_terms, edge_terms


def _by_degree(components: Tensor) -> Tensor:
    """Sum (n, 8, A) over the three components of l = 1 and the five of l = 2, to (n, 2A)."""
    # Written out: a reduction over so short an axis takes three times as long.
    x = components.unbind(1)
    return torch.cat([x[0] + x[1] + x[2], x[3] + x[4] + x[5] + x[6] + x[7]], dim=1)


class EdgeGatedLayer(nn.Module):
    """One step of message passing in which edges carry features of their own.

    With receiver i, neighbour j, envelope w and Σ over the neighbours of i::

        [g_ij, c_ij] = A h_i + B h_j + C e_ij (+ T b_ij)
        m_ij  = sigmoid(g_ij) * silu(c_ij)
        e'_ij = e_ij + m_ij
        a_i   = Σ_j w_ij m_ij / sqrt(1 + Σ_j w_ij)
        h'_i  = h_i + MLP([LayerNorm(h_i), a_i (, n_i)])

    The product with [h_i, h_j, e_ij] of CGCNN (Xie & Grossman, PRL 120, 145301 (2018)) is split
    into node and edge parts, so only the small edge part costs a matrix product per edge; the
    edge update follows MEGNet (Chen et al., Chem. Mater. 31, 3564 (2019)); b_ij and n_i are the
    three-body terms of :class:`AngularTerms`. Nothing in it looks at other graphs of the batch
    (no batch norm), so features do not depend on the company.

    Parameters
    ----------
    node_dim, edge_dim
        Widths F and D of node and edge features.
    angular_dim
        Channels of the three-body terms; 0: none.
    """

    def __init__(self, node_dim: int, edge_dim: int, angular_dim: int = 0) -> None:
        super().__init__()
        self.receiver = nn.Linear(node_dim, 2 * edge_dim)
        self.sender = nn.Linear(node_dim, 2 * edge_dim, bias=False)
        self.edge = nn.Linear(edge_dim, 2 * edge_dim, bias=False)
        self.norm = nn.LayerNorm(node_dim)
        self.angular: AngularTerms | None = None
        if angular_dim:
            self.angular = AngularTerms(node_dim, edge_dim, angular_dim)
            self.triplet = nn.Linear(2 * angular_dim, 2 * edge_dim, bias=False)
        width = node_dim + edge_dim + 2 * angular_dim
        self.update = nn.Sequential(
            nn.Linear(width, node_dim), nn.SiLU(), nn.Linear(node_dim, node_dim)
        )

    def forward(
        self,
        node: Tensor,  # (N, F)
        edge: Tensor,  # (E, D)
        edge_index: Tensor,  # (2, E) sender, receiver
        envelope: Tensor,  # (E, 1)
        degree: Tensor,  # (N, 1) sum of the envelope over the neighbours
        angular: Tensor | None = None,  # (E, 8), needed with three-body terms
    ) -> tuple[Tensor, Tensor]:
        """Return the updated node (N, F) and edge (E, D) features."""
        sender, receiver = edge_index[0], edge_index[1]
        normed = self.norm(node)  # (N, F)
        mixed = self.edge(edge)  # (E, 2D)
        mixed = mixed + self.receiver(normed).index_select(0, receiver)
        mixed = mixed + self.sender(normed).index_select(0, sender)
        terms = []
        if self.angular is not None:
            assert angular is not None, "three-body terms need the directions of the edges"
            node_terms, edge_terms = self.angular(
                normed, edge, edge_index, envelope, degree, angular
            )
            mixed = mixed + self.triplet(edge_terms)
            terms.append(node_terms)
        gate, core = mixed.chunk(2, dim=1)  # (E, D) each
        message = torch.sigmoid(gate) * nn.functional.silu(core)  # (E, D)
        weighted = message * envelope
        summed = weighted.new_zeros(node.shape[0], weighted.shape[1])
        summed = summed.index_add(0, receiver, weighted)  # (N, D)
        summed = summed * torch.rsqrt(1 + degree)
        node = node + self.update(torch.cat([normed, summed, *terms], dim=1))
        return node, edge + message
