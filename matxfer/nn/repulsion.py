"""Short-range repulsion between nuclei, so that atoms cannot fall into each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.nn.layers import polynomial_envelope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from matxfer.data.batch import GraphLike

#: e²/(4πε₀) in eV Å (CODATA 2018).
COULOMB_EV_ANGSTROM = 14.399645478
#: Length over which a nucleus is screened, a = 0.8854 a₀ / (Z₁^0.23 + Z₂^0.23), a₀ in Å.
_SCREENING_ANGSTROM = 0.8854 * 0.529177210903
_POWER = 0.23
_WEIGHTS = (0.18175, 0.50986, 0.28022, 0.02817)
_DECAYS = (3.19980, 0.94229, 0.40290, 0.20162)


class Repulsion(nn.Module):
    """Universal screened Coulomb repulsion of Ziegler, Biersack and Littmark (1985), switched off.

    E_ij = e²/(4πε₀) Z_i Z_j / r φ(r/a) u(r/(R_i + R_j)) with the covalent radii R and the envelope
    u of :func:`matxfer.nn.layers.polynomial_envelope`: twice continuously differentiable, and zero
    where the covalent spheres no longer overlap. It has nothing to learn.

    Parameters
    ----------
    radii_angstrom
        Covalent radius of each element, by atomic number; they travel with the weights.
    """

    radii_angstrom: Tensor

    def __init__(self, radii_angstrom: Sequence[float] | None = None) -> None:
        super().__init__()
        radii = torch.zeros(MAX_ATOMIC_NUMBER + 1)
        if radii_angstrom is not None:
            known = torch.tensor(radii_angstrom)[: len(radii)]
            radii[: len(known)] = known
        self.register_buffer("radii_angstrom", radii)

    def forward(self, graphs: GraphLike) -> Tensor:
        """Return the repulsion that each atom feels, half of each pair's, in eV, shape (N,)."""
        sender, receiver = graphs.edge_index[0], graphs.edge_index[1]
        energy = graphs.edge_vector.new_zeros(len(graphs.z))
        reach = self.radii_angstrom[graphs.z].to(energy)
        reach = reach[sender] + reach[receiver]
        # Nearly all pairs are too far apart to feel anything.
        with torch.no_grad():
            near = (graphs.edge_vector.square().sum(1) < reach.square()).nonzero().squeeze(1)
        if not len(near):
            return energy
        sender, receiver, reach = sender[near], receiver[near], reach[near]
        r = torch.linalg.vector_norm(graphs.edge_vector[near], dim=1)
        z = graphs.z.to(energy)
        screening = z.pow(_POWER)
        x = r * (screening[sender] + screening[receiver]) / _SCREENING_ANGSTROM
        screened = sum(w * torch.exp(-d * x) for w, d in zip(_WEIGHTS, _DECAYS, strict=True))
        pair = COULOMB_EV_ANGSTROM * z[sender] * z[receiver] / r * screened
        pair = pair * polynomial_envelope(r / reach, 1.0)
        return energy.index_add(0, receiver, 0.5 * pair)
