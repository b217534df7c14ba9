"""A potential: E = Σ_i (r_Z + f(h_i)) + repulsion; forces and stress are its derivatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from matxfer.data.properties import Property
from matxfer.files import FormatError, read_tensors
from matxfer.graph import GraphOptions
from matxfer.model import (
    WEIGHTS_FILE,
    Model,
    build_network,
    check_weights,
    disagreeing,
    find_model,
    is_potential,
)
from matxfer.nn.head import PropertyHead
from matxfer.nn.registry import build_backbone
from matxfer.nn.repulsion import Repulsion

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.nn.backbone import BackboneModule

DEFAULT_POTENTIAL = "mp-potential"
#: What a potential predicts of a structure, its unit at the end of each name.
ENERGY = Property("energy_ev_per_atom", "eV/atom", per_atom_energy=True)
FORCES, STRESS = "forces_ev_per_a", "stress_ev_per_a3"


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What a potential says of a batch of N atoms in B cells.

    Attributes
    ----------
    energies_ev
        Share of each atom in the energy, (N,); they add up to the energy of the cell.
    energy_ev
        Energy of each cell, (B,).
    forces_ev_per_a
        -∂E/∂r, (N, 3).
    virial_ev
        ∂E/∂ε with a strain ε of cell and positions, (B, 3, 3), symmetric; the stress is this over
        the volume, negative for a compressed cell as in ASE.
    """

    energies_ev: Tensor
    energy_ev: Tensor
    forces_ev_per_a: Tensor
    virial_ev: Tensor


class Potential(Model):
    """A model whose one head is an energy per atom, on graphs of every atom of the cell.

    Parameters
    ----------
    backbone
        The network; its graphs have one node per atom.
    head
        Energy per atom, a mean over atoms.
    repulsion
        Short-range repulsion added to it, or None.
    elements, card
        See :class:`matxfer.model.Model`.
    """

    def __init__(
        self,
        backbone: BackboneModule,
        head: PropertyHead,
        repulsion: Repulsion | None,
        elements: Iterable[int] = (),
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, [head], elements, card)
        if backbone.graph_options.symmetry:
            raise ValueError("forces belong to every atom: the graphs must not use symmetry")
        self.repulsion = repulsion
        self.card["potential"] = {"repulsion": repulsion is not None}

    @property
    def head(self) -> PropertyHead:
        """The energy per atom."""
        return self.heads[ENERGY.name]

    def energies(self, graphs: GraphBatch) -> Tensor:
        """Return the share of each atom in the energy of its cell, in eV, shape (N,)."""
        energies = self.head.per_node(self.backbone(graphs).node, graphs)
        return energies if self.repulsion is None else energies + self.repulsion(graphs)

    def respond(
        self, graphs: GraphBatch, *, forces: bool = True, create_graph: bool = False
    ) -> Response:
        """Return energies and their derivatives.

        With g_e = ∂E/∂r_e for the vector r_e = r_j - r_i of every edge, the force on an atom is
        Σ g over the edges that it receives less Σ g over those that it sends, and the virial is
        Σ r_e ⊗ g_e: it holds for any periodic images, and forces add up to zero.

        Parameters
        ----------
        graphs
            The atoms, of any floating type that the weights have too.
        forces
            Whether to differentiate; without, forces and virial are zeros.
        create_graph
            Whether the derivatives will be differentiated in turn, as a loss on forces is.
        """
        with torch.enable_grad() if forces else torch.no_grad():
            vector = graphs.edge_vector.detach().requires_grad_(forces)
            energies = self.energies(replace(graphs, edge_vector=vector))
            energy = energies.new_zeros(graphs.num_graphs).index_add(0, graphs.batch, energies)
            force = energies.new_zeros(len(graphs.z), 3)
            virial = energies.new_zeros(graphs.num_graphs, 3, 3)
            if forces and len(vector):
                (slope,) = torch.autograd.grad(
                    energy.sum(), vector, create_graph=create_graph, materialize_grads=True
                )
                sender, receiver = graphs.edge_index[0], graphs.edge_index[1]
                force = force.index_add(0, receiver, slope).index_add(0, sender, -slope)
                outer = vector[:, :, None] * slope[:, None, :]
                virial = virial.index_add(0, graphs.batch[receiver], outer)
                virial = 0.5 * (virial + virial.transpose(1, 2))
        if not create_graph:
            energies, energy = energies.detach(), energy.detach()
            force, virial = force.detach(), virial.detach()
        return Response(energies, energy, force, virial)

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.parameters())
        return f"Potential({self.name!r}; {size:,} parameters)"


def potential_from(
    model: Model | None,
    config: dict[str, Any],
    hidden_dim: int = 64,
    *,
    readout: str = "atomwise",
    repulsion: bool = True,
) -> Potential:
    """Return an untrained potential on the layers of a model, or on random ones.

    Parameters
    ----------
    model
        Where the layers come from; None: random ones.
    config
        Architecture, see :meth:`matxfer.nn.backbone.BackboneModule.config`.
    hidden_dim, readout
        Width of the energy's hidden layer and kind of its readout.
    repulsion
        Whether a short-range repulsion is added.
    """
    from ase.data import covalent_radii

    backbone = build_backbone(config)
    options = backbone.graph_options
    backbone.graph_options = GraphOptions(
        options.cutoff_angstrom, symmetry=False, symprec_angstrom=options.symprec_angstrom
    )
    if model is not None:
        backbone.load_state_dict(model.backbone.state_dict())
    head = PropertyHead(ENERGY, backbone.node_dim, readout, hidden_dim)
    elements = model.elements if model is not None else ()
    wall = Repulsion([float(r) for r in covalent_radii]) if repulsion else None
    return Potential(backbone, head, wall, elements)


def load_potential(name_or_path: str | Path = DEFAULT_POTENTIAL) -> Potential:
    """Load a potential by the name of a shipped one or by the path of its folder.

    Raises
    ------
    FormatError
        If there is none, or its files are damaged or of another version.
    """
    folder, card = find_model(name_or_path)
    if not is_potential(card):
        raise FormatError(f"{folder}: is a model of properties, not a potential")
    check_weights(folder, card)
    weights = read_tensors(folder / WEIGHTS_FILE)
    with disagreeing(folder):
        backbone, heads = build_network(card, weights)
        wall = Repulsion() if card["potential"]["repulsion"] else None
        potential = Potential(backbone, heads[0], wall, card["elements"], card)
        potential.load_state_dict(weights)
    potential.folder = folder
    return potential.eval().requires_grad_(False)
