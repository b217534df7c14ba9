"""A fine-tuning task: rows of a table, their graphs, what the frozen base makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from matxfer.data.properties import property_of
from matxfer.data.table import TableError
from matxfer.nn.feature_readout import FeatureReadout
from matxfer.nn.head import default_readout
from matxfer.nn.plugin_head import PluginHead, like_source
from matxfer.nn.scaling import TargetScaler
from matxfer.transfer.features import principal_axes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs
    from matxfer.data.properties import Property
    from matxfer.data.table import PropertyTable
    from matxfer.model import Model
    from matxfer.nn.ensemble import ReadoutEnsemble
    from matxfer.transfer.activations import Activations
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.features import Axes
    from matxfer.transfer.retention import SourceData

#: Fewer usable training rows than this are no basis for a model.
FEWEST_ROWS = 10
#: Fewest usable rows of the parts that training needs.
NEEDED = {"train": FEWEST_ROWS, "val": 1}


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What all strategies work on.

    Attributes
    ----------
    base, graphs, activations
        The base model, the graphs of the table's rows, and what the one makes of the other.
    prop
        The property.
    values
        In the property's unit, (G,); NaN where there is none.
    parts
        Rows of ``train``, ``val`` and ``test`` that have a graph and a value.
    excluded
        How many rows were left out for which reason.
    weights
        How much each row counts, (G,), of a mean of 1 in each part; ``None``: all alike.
    candidates
        Structures to be predicted, without values, which features are to resemble.
    """

    base: Model
    graphs: PackedGraphs
    activations: Activations
    prop: Property
    values: NDArray[np.float64]
    parts: dict[str, NDArray[np.int64]]
    excluded: dict[str, int]
    weights: NDArray[np.float64] | None = None
    candidates: SourceData | None = None
    _axes: dict[tuple[int, ...], Axes] = field(default_factory=dict)

    def weights_of(self, rows: NDArray[np.int64]) -> NDArray[np.float64] | None:
        """Return the weights of some rows, (n,), or ``None`` where all count alike."""
        return None if self.weights is None else self.weights[rows]

    def mean(self, x: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
        """Return the mean of what belongs to some rows, (n,), each counted by its weight."""
        return float(np.average(x, weights=self.weights_of(rows)))

    def layers(self, config: FinetuneConfig) -> tuple[int, ...]:
        """Return the layers that a readout reads."""
        every = tuple(range(self.base.backbone.n_layers + 1))
        if config.layers is None:
            return every
        if not config.layers or not set(config.layers) <= set(every):
            raise TableError(f"layers are {list(config.layers)}, but must be among {list(every)}")
        return tuple(sorted(set(config.layers)))

    def readout_kind(self, config: FinetuneConfig) -> str:
        """Return the kind of readout: the one asked for, else that of the property."""
        return config.readout or default_readout(self.prop)

    def source(self, config: FinetuneConfig) -> str | None:
        """Return the source property whose prediction is the start, if there is one."""
        return like_source(self.prop, self.base.heads) if config.difference else None

    def offset(self, source: str | None) -> NDArray[np.float64] | None:
        """Return the source predictions of all rows on the fitted scale, (G,)."""
        return None if source is None else self.activations.source(source)

    def head(
        self,
        layers: tuple[int, ...],
        readout: ReadoutEnsemble | FeatureReadout,
        source: str | None,
        scaler: TargetScaler,
    ) -> PluginHead:
        """Return a head with a scaler of :meth:`scaler`."""
        head = PluginHead(self.prop, layers, readout, source)
        head.scaler = scaler
        return head

    def inputs(self, kind: str, layers: tuple[int, ...]) -> Tensor:
        """Return what a kind of readout reads of the frozen layers of all rows."""
        return self.activations.inputs(kind, layers)

    def axes(self, layers: tuple[int, ...]) -> Axes:
        """Return the principal axes of the training rows' fingerprints, computed once."""
        if layers not in self._axes:
            inputs = self.inputs(FeatureReadout.kind, layers)
            self._axes[layers] = principal_axes(inputs, self.parts["train"])
        return self._axes[layers]

    @property
    def elements(self) -> list[int]:
        """Atomic numbers that occur in the training rows."""
        return [int(z) for z in np.unique(self.graphs.select(self.parts["train"]).numbers)]

    def scaler(self, source: str | None) -> TargetScaler:
        """Fit a scaler to the training rows."""
        rows, offset = self.parts["train"], self.offset(source)
        known = None if offset is None else offset[rows]
        return TargetScaler.fit(
            self.prop, self.values[rows], self.graphs.select(rows), known, self.weights_of(rows)
        )

    def targets(
        self, scaler: TargetScaler, source: str | None, slope: float = 1.0
    ) -> NDArray[np.float32]:
        """Return normalised targets of all rows, (G,); NaN where there is none."""
        offset = self.offset(source)
        known = None if offset is None else slope * offset
        return scaler.normalised(self.values, self.graphs, known)


def make_task(
    base: Model,
    data: PropertyTable,
    target: str,
    graphs: PackedGraphs,
    activations: Activations,
    transform: str | None,
    needed: Mapping[str, int] = NEEDED,
) -> Task:
    """Sort the rows of a table: what can be used, what is left out and why.

    With the transform ``auto`` none is applied yet: :mod:`matxfer.transfer.transforms` chooses one.

    Raises
    ------
    TableError
        If too few rows can be used, or all training values are equal.
    """
    prop = property_of(target)
    if transform is not None:
        prop = replace(prop, transform="identity" if transform == "auto" else transform)
    values = data.values[target]
    foreign = graphs.has_elements_outside(base.elements)
    no_graph, no_value = graphs.nodes_per_graph == 0, ~np.isfinite(values)
    with np.errstate(invalid="ignore"):
        fitted = TargetScaler(prop.transform).normalised(values, graphs)
    # A test row outside the domain is not left out, but a wrong prediction.
    outside = ~np.isfinite(fitted) & ~no_value & (data.split != "test")
    excluded = {
        "unreadable structure": int(no_graph.sum()),
        "no value": int((no_value & ~no_graph).sum()),
        "element unknown to the model": int((foreign & ~no_value).sum()),
        "outside the transform's domain": int((outside & ~foreign & ~no_graph).sum()),
    }
    usable = ~(foreign | no_graph | no_value | outside)
    parts = {p: np.flatnonzero((data.split == p) & usable) for p in ("train", "val", "test")}
    excluded = {reason: count for reason, count in excluded.items() if count}
    for part, least in needed.items():
        if len(parts[part]) < least:
            raise TableError(
                f"{data.source}: {len(parts[part])} usable row(s) in {part!r}, but at least "
                f"{least} are needed; check the split column, the structures, the target values "
                f"and their transform{_told(excluded)}"
            )
    train = values[parts["train"]]
    if np.ptp(train) == 0:
        raise TableError(
            f"{data.source}: column {target!r} is {train[0]:g} in all training rows; there is "
            "nothing to learn from a constant"
        )
    return Task(base, graphs, activations, prop, values, parts, excluded)


def _told(excluded: dict[str, int]) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
    return f" (left out: {told})" if told else ""
