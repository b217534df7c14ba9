"""An ASE calculator: energy, forces and stress of a potential, properties of a base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.errors import OptionError
from matxfer.forcefield import ForceField, load_members
from matxfer.graph import build_graph
from matxfer.model import find_model, is_potential
from matxfer.potential.model import Potential
from matxfer.potential.plugin import PotentialPlugin, is_potential_plugin
from matxfer.transfer.bases import with_base
from matxfer.transfer.plugin import Plugin, column_names, predict_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ase import Atoms
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.graph import GraphArrays
    from matxfer.model import Model
    from matxfer.nn.head import PropertyHead
    from matxfer.nn.plugin_head import PluginHead

    AnyPlugin = str | Path | Plugin | PotentialPlugin

#: Appended to a property's name for its contributions per atom.
PER_ATOM = "_contributions"


#: What a potential answers, and an ensemble of potentials besides.
MECHANICAL = ("energy", "free_energy", "forces", "stress", "energies")
DISAGREEMENT = ("forces_std", "uncertainty")


class MatxferCalculator(Calculator):
    """Energies, forces, stresses and properties through ``atoms.calc``.

    Of a potential or plugins of one: ``energy``, ``free_energy``, ``forces``, ``energies`` (shares
    of the atoms) and, in a periodic cell, ``stress`` (ASE's units, order and sign: eV/Å³, xx, yy,
    zz, yz, xz, xy, negative for a compressed cell). Several plugins of a potential are an ensemble:
    its answers are means, ``forces_std`` (n_atoms,) is the spread of each atom's force between
    them in eV/Å and ``uncertainty`` the largest of these; :class:`matxfer.dynamics.UncertaintyStop`
    ends a run by it.

    Of a model of properties and its plugins: ``atoms.calc.get_property("band_gap_ev", atoms)``,
    the columns of a prediction by name, and for every property that is a mean over atoms
    ``NAME_contributions``, shape (n_atoms,): the parts whose mean is the property (in its unit).

    Both go together, and each is computed only when it is asked for. ``implemented_properties``
    lists all of them. A structure unlike the training data is told by a
    :class:`matxfer.forcefield.DomainWarning`, once per kind.

    Parameters
    ----------
    model
        A potential or a base model of properties, its name or its folder; ``None``: that of the
        plugins, without any ``mp-base``.
    plugins, plugin
        Plugins or their folders, several or one; those of properties all of one base model, those
        of potentials all of one potential.
    potential
        The potential, where ``model`` is one of properties.
    skin_angstrom, device, dtype
        See :class:`matxfer.forcefield.ForceField`; a precision of ``"float64"`` is for the
        potential. Predictions of properties run where their model is.

    Raises
    ------
    FormatError
        If a model or plugin cannot be read, or a plugin belongs to another model.
    CrystalError
        From ``get_property``, for atoms that are no usable structure.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from matxfer import MatxferCalculator
    >>> atoms = bulk("Si")
    >>> atoms.calc = MatxferCalculator("mp-potential")
    >>> atoms.get_forces().shape, atoms.get_stress().shape
    ((2, 3), (6,))
    >>> atoms.calc = MatxferCalculator("mp-small", plugin="bulk-plugin")  # properties, no forces
    >>> bool(atoms.calc.get_property("bulk_modulus_gpa", atoms) > 0)
    True
    """

    def __init__(
        self,
        model: str | Path | Model | None = None,
        plugins: Iterable[AnyPlugin] = (),
        *,
        plugin: AnyPlugin | Iterable[AnyPlugin] | None = None,
        potential: str | Path | Potential | None = None,
        skin_angstrom: float = 0.5,
        device: str | torch.device | None = None,
        dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = [*_as_list(plugins), *_as_list(plugin)]
        mechanical = [p for p in given if _is_mechanical(p)]
        if model is not None and _is_mechanical_model(model):
            if potential is not None:
                raise OptionError("model is a potential already; give one potential")
            model, potential = None, cast("str | Path | Potential", model)
        self.forcefield: ForceField | None = None
        if potential is not None or mechanical:
            members = load_members(potential, cast("list[Any]", mechanical))
            self.forcefield = ForceField(
                members, skin_angstrom=skin_angstrom, device=device, dtype=dtype
            )
        others = cast("list[str | Path | Plugin]", [p for p in given if not _is_mechanical(p)])
        self.model: Model | None = None
        self.plugins: list[Plugin] = []
        self._heads: dict[str, PropertyHead | PluginHead] = {}
        if model is not None or others or self.forcefield is None:
            self.model, self.plugins = with_base(others, model)
            heads: list[Any] = [*self.model.heads.values(), *(p.head for p in self.plugins)]
            names = [*self.model.heads, *column_names(self.model, self.plugins)]
            self._heads = dict(zip(names, heads, strict=True))
        summed = [f"{n}{PER_ATOM}" for n, h in self._heads.items() if self._is_mean(h)]
        answers = [] if self.forcefield is None else list(MECHANICAL)
        if self.forcefield is not None and self.forcefield.is_ensemble:
            answers += DISAGREEMENT
        self.implemented_properties = [*answers, *self._heads, *summed]

    def _is_mean(self, head: PropertyHead | PluginHead) -> bool:
        """Whether a value is a mean over atoms, and so is the prediction that it starts from."""
        source = getattr(head, "source", None)
        assert self.model is not None
        return head.is_mean_over_atoms and (
            source is None or self.model.heads[source].is_mean_over_atoms
        )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Iterable[str] = (),
        system_changes: list[str] = all_changes,
    ) -> None:
        """Answer what was asked for: of a potential and of a model each all that it says at once.

        (Contributions of the atoms only where they are asked for by name.)
        """
        super().calculate(atoms, properties, system_changes)
        atoms = cast("Atoms", self.atoms)
        for name in properties:
            if name not in self.implemented_properties:
                raise PropertyNotImplementedError(
                    f"{name!r} is not predicted; there are {self.implemented_properties}"
                )
        asked = set(properties)
        of_forces = asked & {*MECHANICAL, *DISAGREEMENT}
        if self.forcefield is not None and (of_forces or not asked):
            self._respond(self.forcefield, atoms)
            if "stress" in asked and "stress" not in self.results:
                raise PropertyNotImplementedError("stress needs a periodic cell of three vectors")
        if self.model is not None and (asked - of_forces or not asked):
            self._predict(self.model, atoms, properties)

    def _respond(self, forcefield: ForceField, atoms: Atoms) -> None:
        answer = forcefield.respond(atoms)
        self.results |= {
            "energy": answer.energy_ev,
            "free_energy": answer.energy_ev,
            "energies": answer.energies_ev,
            "forces": answer.forces_ev_per_a,
        }
        if atoms.pbc.any() and atoms.cell.rank == 3:
            stress = full_3x3_to_voigt_6_stress(answer.virial_ev / atoms.get_volume())
            self.results["stress"] = stress
        if answer.forces_std_ev_per_a is not None:
            self.results["forces_std"] = answer.forces_std_ev_per_a
            self.results["uncertainty"] = float(answer.forces_std_ev_per_a.max())

    def _predict(self, model: Model, atoms: Atoms, properties: Iterable[str]) -> None:
        crystal = Crystal.from_ase(atoms)
        crystal.check_elements(model.elements)
        graph = build_graph(crystal, model.backbone.graph_options)
        batch = PackedGraphs.pack([graph]).batch(np.array([0])).to(model.device)
        with torch.inference_mode():
            values = predict_all(model, self.plugins, batch)
            self.results |= {n: float(v[0]) for n, v in zip(self._heads, values, strict=True)}
            for name in properties:
                if name.endswith(PER_ATOM):
                    self.results[name] = self._contributions(name, graph, batch)

    def _contributions(
        self, name: str, graph: GraphArrays, batch: GraphBatch
    ) -> NDArray[np.float64]:
        """Spread the contributions of the nodes over the atoms that they stand for."""
        column = name.removesuffix(PER_ATOM)
        assert self.model is not None
        index = list(self._heads).index(column) - len(self.model.heads)
        if index < 0:
            per_node = self._of_base(column, batch)
        else:
            head = self.plugins[index].head
            per_node = head.per_node(self.plugins[index].nodes(batch), batch)
            if head.source is not None:  # a like energy, so a mean over atoms as well
                per_node = per_node + head.slope * self._of_base(head.source, batch)
        return np.asarray(per_node.double().cpu().numpy()[graph.node_of_site])

    def _of_base(self, name: str, batch: GraphBatch) -> Tensor:
        assert self.model is not None
        return self.model.heads[name].per_node(self.model.backbone(batch).node, batch)


def _as_list(given: AnyPlugin | Iterable[AnyPlugin] | None) -> list[AnyPlugin]:
    if given is None:
        return []
    single = isinstance(given, str | Path | Plugin | PotentialPlugin)
    return [cast("AnyPlugin", given)] if single else list(cast("Iterable[AnyPlugin]", given))


def _is_mechanical(plugin: AnyPlugin) -> bool:
    """Say whether a plugin is one of a potential."""
    if isinstance(plugin, str | Path):
        return is_potential_plugin(plugin)
    return isinstance(plugin, PotentialPlugin)


def _is_mechanical_model(model: str | Path | Model) -> bool:
    if isinstance(model, str | Path):
        return is_potential(find_model(model)[1])
    return isinstance(model, Potential)
