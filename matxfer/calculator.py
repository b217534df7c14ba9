"""An ASE calculator for the properties of a base model and its plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.graph import build_graph
from matxfer.transfer.bases import with_base
from matxfer.transfer.plugin import column_names, predict_all

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ase import Atoms
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.graph import GraphArrays
    from matxfer.model import Model
    from matxfer.nn.head import PropertyHead
    from matxfer.nn.plugin_head import PluginHead
    from matxfer.transfer.plugin import Plugin

#: Appended to a property's name for its contributions per atom.
PER_ATOM = "_contributions"


class MatxferCalculator(Calculator):
    """Properties through ``atoms.calc``: ``atoms.calc.get_property("band_gap_ev", atoms)``.

    ``implemented_properties`` lists the columns of the base model and of the plugins, and for
    every property that is a mean over atoms ``NAME_contributions``, shape (n_atoms,): the parts
    whose mean is the property (in its unit). Forces and stresses are not among them.

    Parameters
    ----------
    model
        Base model, its name or its folder; ``None``: that of the plugins, without any ``mp-base``.
    plugins
        Plugins or their folders, all of one base model.

    Raises
    ------
    CrystalError
        From ``get_property``, for atoms that are no usable structure.
    """

    def __init__(
        self,
        model: str | Path | Model | None = None,
        plugins: Iterable[str | Path | Plugin] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model, self.plugins = with_base(plugins, model)
        heads: list[Any] = [*self.model.heads.values(), *(plugin.head for plugin in self.plugins)]
        names = [*self.model.heads, *column_names(self.model, self.plugins)]
        self._heads: dict[str, PropertyHead | PluginHead] = dict(zip(names, heads, strict=True))
        summed = [f"{n}{PER_ATOM}" for n, h in self._heads.items() if self._is_mean(h)]
        self.implemented_properties = [*names, *summed]

    def _is_mean(self, head: PropertyHead | PluginHead) -> bool:
        """Whether a value is a mean over atoms, and so is the prediction that it starts from."""
        source = getattr(head, "source", None)
        return head.is_mean_over_atoms and (
            source is None or self.model.heads[source].is_mean_over_atoms
        )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Iterable[str] = (),
        system_changes: list[str] = all_changes,
    ) -> None:
        """Predict every property, and contributions per atom where they are asked for."""
        super().calculate(atoms, properties, system_changes)
        atoms = cast("Atoms", self.atoms)
        for name in properties:
            if name not in self.implemented_properties:
                raise PropertyNotImplementedError(
                    f"{name!r} is not predicted; there are {self.implemented_properties}"
                )
        crystal = Crystal.from_ase(atoms)
        crystal.check_elements(self.model.elements)
        graph = build_graph(crystal, self.model.backbone.graph_options)
        batch = PackedGraphs.pack([graph]).batch(np.array([0])).to(self.model.device)
        with torch.inference_mode():
            values = predict_all(self.model, self.plugins, batch)
            self.results |= {n: float(v[0]) for n, v in zip(self._heads, values, strict=True)}
            for name in properties:
                if name.endswith(PER_ATOM):
                    self.results[name] = self._contributions(name, graph, batch)

    def _contributions(
        self, name: str, graph: GraphArrays, batch: GraphBatch
    ) -> NDArray[np.float64]:
        """Spread the contributions of the nodes over the atoms that they stand for."""
        column = name.removesuffix(PER_ATOM)
        index = list(self._heads).index(column) - len(self.model.heads)
        if index < 0:
            per_node = self._of_base(column, batch)
        else:
            head = self.plugins[index].head
            per_node = head.per_node(self.plugins[index].nodes(batch), batch)
            if head.source is not None:  # a like energy, so a mean over atoms as well
                per_node = per_node + self._of_base(head.source, batch)
        return np.asarray(per_node.double().cpu().numpy()[graph.node_of_site])

    def _of_base(self, name: str, batch: GraphBatch) -> Tensor:
        return self.model.heads[name].per_node(self.model.backbone(batch).node, batch)
