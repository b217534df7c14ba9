"""Potentials asked about one structure again and again: neighbours kept, ensemble, warnings."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.crystal import CrystalError
from matxfer.errors import ErrorKind, OptionError
from matxfer.files import FormatError
from matxfer.options import check_choice
from matxfer.potential.model import DEFAULT_POTENTIAL, Potential, load_potential
from matxfer.potential.plugin import PotentialPlugin, load_potential_plugin
from matxfer.runtime import keep_large_blocks
from matxfer.skin import SkinList

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ase import Atoms
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphBatch

DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: Closer than this part of the sum of their covalent radii, two atoms are where nothing was
#: learned: the shortest bonds known (triple bonds, uranyl) have 0.67 of it and more.
CLOSE = 0.6


class DomainWarning(UserWarning):
    """A structure unlike those that a potential was trained on."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What potentials say of a structure of N atoms: the mean over them.

    Attributes
    ----------
    energy_ev, energies_ev
        Energy of the cell; shares of the atoms, (N,).
    forces_ev_per_a
        (N, 3).
    virial_ev
        ∂E/∂ε, (3, 3): over the volume it is the stress, negative for a compressed cell.
    forces_std_ev_per_a
        Spread of each atom's force between the potentials, sqrt(mean |F - mean F|²), (N,); None of
        a single potential.
    """

    energy_ev: float
    energies_ev: NDArray[np.float64]
    forces_ev_per_a: NDArray[np.float64]
    virial_ev: NDArray[np.float64]
    forces_std_ev_per_a: NDArray[np.float64] | None = None


class ForceField:
    """One or several potentials, ready to be asked.

    Parameters
    ----------
    members
        Potentials and plugins of potentials, all of one cutoff. They are copied.
    skin_angstrom
        Skin of the neighbour list, see :class:`matxfer.skin.SkinList`.
    device
        Where to compute; None: where the weights of the first are.
    dtype
        ``"float32"`` or ``"float64"``. Positions and vectors are in double precision before, and
        energies are added in double precision, either way.

    Raises
    ------
    OptionError
        For another precision, no potential, or potentials of different cutoffs.
    """

    def __init__(
        self,
        members: Sequence[Potential | PotentialPlugin],
        *,
        skin_angstrom: float = 0.5,
        device: str | torch.device | None = None,
        dtype: str = "float32",
    ) -> None:
        check_choice("dtype", dtype, tuple(DTYPES))
        if not members:
            raise OptionError("there is no potential; give one, or plugins of one")
        keep_large_blocks()
        self.members = list(members)
        potentials = [m.potential if isinstance(m, PotentialPlugin) else m for m in members]
        self.device = potentials[0].device if device is None else torch.device(device)
        self.dtype = DTYPES[dtype]
        # Copies: the weights of others keep their precision, and none of these is to be trained.
        self._potentials = [
            copy.deepcopy(p).to(self.device, self.dtype).eval().requires_grad_(False)
            for p in potentials
        ]
        cutoffs = {p.backbone.graph_options.cutoff_angstrom for p in potentials}
        if len(cutoffs) > 1:
            raise OptionError(f"the potentials have different cutoffs: {sorted(cutoffs)} Å")
        #: Elements that every potential knows, and those that it was trained on last.
        self.elements = frozenset.intersection(*(_elements(m) for m in members))
        self.trained_on = frozenset.intersection(*(_trained_on(m) for m in members))
        self.neighbours = SkinList(cutoffs.pop(), skin_angstrom, self.dtype, self.device)
        self._warned: set[str] = set()
        self._numbers: NDArray[np.int64] | None = None
        self._close: Tensor

    @property
    def is_ensemble(self) -> bool:
        """Whether there are several potentials, which tell how far they disagree."""
        return len(self._potentials) > 1

    def respond(self, atoms: Atoms) -> Answer:
        """Return energies and their derivatives.

        Raises
        ------
        CrystalError
            For atoms that are no usable structure, and for elements that no training has seen.
        """
        if self._numbers is None or not np.array_equal(self._numbers, atoms.numbers):
            self._meet(np.array(atoms.numbers, dtype=np.int64))
        graphs = self.neighbours.graphs(atoms)
        self._warn_of_close_pairs(graphs)
        found = [potential.respond(graphs) for potential in self._potentials]
        energies = np.stack([r.energies_ev.double().cpu().numpy() for r in found])
        forces = np.stack([r.forces_ev_per_a.double().cpu().numpy() for r in found])
        virial = np.stack([r.virial_ev[0].double().cpu().numpy() for r in found])
        if not (np.isfinite(energies).all() and np.isfinite(forces).all()):
            raise CrystalError(
                "the energy or a force is not finite", "check the positions and the cell"
            )
        mean = forces.mean(axis=0)
        spread = np.sqrt(((forces - mean) ** 2).sum(axis=2).mean(axis=0))
        return Answer(
            float(energies.sum(axis=1).mean()),
            energies.mean(axis=0),
            mean,
            virial.mean(axis=0),
            spread if self.is_ensemble else None,
        )

    # -- the training domain ------------------------------------------------------------------
    def forget_warnings(self) -> None:
        """Say again what has been said, of the next structure."""
        self._warned.clear()
        self._numbers = None

    def _meet(self, numbers: NDArray[np.int64]) -> None:
        """Look at the elements of another structure."""
        from ase.data import chemical_symbols

        present = set(numbers.tolist())
        if foreign := sorted(present - self.elements):
            if foreign[0] < 1 or foreign[-1] >= len(chemical_symbols):
                return  # no element at all: the graph says so
            names = ", ".join(chemical_symbols[z] for z in foreign)
            raise CrystalError(
                f"the potential has never seen the element(s) {names}",
                "use a potential that was trained on them, or fine-tune one",
                kind=ErrorKind.UNKNOWN_ELEMENT,
            )
        if untrained := sorted(present - self.trained_on):
            names = ", ".join(chemical_symbols[z] for z in untrained)
            self._warn(
                f"element {names}",
                f"the plugin was not trained on {names}: what it knows of them is left from the "
                "general potential, and its layers have moved since",
            )
        self._close = _close_distances(numbers, self.device, self.dtype)
        self._numbers = numbers

    def _warn_of_close_pairs(self, graphs: GraphBatch) -> None:
        if "close" in self._warned or not graphs.edge_index.shape[1]:
            return
        reach = self._close[graphs.edge_index].sum(0)
        square = torch.linalg.vecdot(graphs.edge_vector, graphs.edge_vector)
        ratio = float((square / reach.square()).min()) ** 0.5 * CLOSE
        if ratio < CLOSE:
            self._warn(
                "close",
                f"two atoms are at {ratio:.2f} of the sum of their covalent radii: nothing was "
                "learned so close, and little but the repulsion between nuclei acts there",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, DomainWarning, stacklevel=2)


def load_members(
    potential: str | Path | Potential | None,
    plugins: Sequence[str | Path | PotentialPlugin] = (),
) -> list[Potential | PotentialPlugin]:
    """Return the plugins of a potential, or the potential where there are none, loaded.

    Parameters
    ----------
    potential
        The general potential, its name or its folder; None: that of the plugins, without any
        ``mp-potential``.
    plugins
        Plugins or their folders, all of one potential: several are an ensemble.

    Raises
    ------
    FormatError
        If one cannot be read, or a plugin belongs to another potential.
    """
    base = potential if isinstance(potential, Potential | None) else load_potential(potential)
    if not plugins:
        return [base or load_potential(DEFAULT_POTENTIAL)]
    found: list[Potential | PotentialPlugin] = []
    for given in plugins:
        plugin = given if isinstance(given, PotentialPlugin) else load_potential_plugin(given, base)
        base = base or plugin.base
        known = bool(base.checksum) and plugin.base.checksum == base.checksum
        if plugin.base is not base and not known:
            raise FormatError(
                f"plugin {plugin.name!r} belongs to potential {plugin.base.name!r}, not to "
                f"{base.name!r}; give the one it was trained on, or fine-tune again"
            )
        found.append(plugin)
    return found


def _elements(member: Potential | PotentialPlugin) -> frozenset[int]:
    if isinstance(member, PotentialPlugin):
        return frozenset(member.base.elements) | _trained_on(member)
    return frozenset(member.elements)


def _trained_on(member: Potential | PotentialPlugin) -> frozenset[int]:
    """Return the elements of the last training: a plugin's own, if it tells them."""
    if isinstance(member, PotentialPlugin):
        own = member.meta.get("elements") or member.potential.elements
        return frozenset(int(z) for z in own)
    return frozenset(member.elements)


def _close_distances(
    numbers: NDArray[np.int64], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return of each atom the part of its covalent radius that adds up to a close distance."""
    from ase.data import covalent_radii

    return torch.from_numpy(CLOSE * covalent_radii[numbers]).to(device, dtype)
