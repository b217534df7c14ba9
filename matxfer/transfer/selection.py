"""Source selection: which of several models is the best base for a target, in seconds.

Nothing is trained. The frozen features of each model after each layer are put into kernel ridge
regression, whose leave-one-out errors come in closed form (:mod:`matxfer.transfer.affinity`); the
same is done with the composition alone and with a network of random weights of the same shape.
A model that is not better than these would be a negative transfer. Training rows alone are looked
at: validation and test rows are not even read into a graph.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matxfer.data.copies import materials
from matxfer.data.store import graph_store
from matxfer.data.table import PropertyTable, read_property_table
from matxfer.errors import OptionError
from matxfer.model import Model, available_models, find_model, is_potential, load_model
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.activations import Activations
from matxfer.transfer.baselines import composition_features, untrained
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.ranking import Ranking, Source, ranked
from matxfer.transfer.scoring import score_features, score_layers
from matxfer.transfer.task import FEWEST_ROWS, make_task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.transfer.task import Task

#: The name that stands for the best of several models.
AUTO = "auto"
#: At most so many training rows are looked at: the cost grows with their cube.
MOST_ROWS = 500
#: A model that knows the elements of fewer than this share of the rows is no candidate.
_SHARE = 0.5


def rank_sources(
    table: str | Path | pd.DataFrame | PropertyTable,
    target: str,
    models: Iterable[str | Path | Model] | None = None,
    *,
    split_column: str | None = None,
    structure_column: str | None = None,
    transform: str | None = None,
    difference: bool = True,
    most_rows: int = MOST_ROWS,
    seed: int = 0,
    on_graphs: Callable[[int], None] | None = None,
    on_source: Callable[[Source], None] | None = None,
) -> Ranking:
    """Rank models as bases for a target, against what no pretraining gives.

    Parameters
    ----------
    table, target, split_column, structure_column, transform, difference, seed, on_graphs
        As in :func:`matxfer.transfer.finetune.finetune`, which splits alike.
    models
        Models, their names or folders, or folders that hold several; ``None``: those shipped.
    most_rows
        At most so many training rows, drawn at random, are looked at.
    on_source
        Called with each model and baseline as it is measured.

    Returns
    -------
    Ranking
        The best first; ``best`` is ``None`` where no model is of use.

    Raises
    ------
    TableError
        If the table, a column or a usable row is missing.
    FormatError
        If there is no such model, or it is damaged.
    OptionError
        If no model is a candidate.

    Examples
    --------
    >>> import matxfer
    >>> ranking = matxfer.rank_sources(
    ...     "solids.parquet", "bulk_modulus_gpa", ["mp-small"], split_column="split"
    ... )
    >>> [source.name for source in ranking.sources], ranking.target
    (['mp-small'], 'bulk_modulus_gpa')
    """
    keep_large_blocks()
    started = time.monotonic()
    if most_rows < FEWEST_ROWS:
        raise OptionError(f"most_rows is {most_rows}, but at least {FEWEST_ROWS} are needed")
    bases, left_out = candidates(models)
    if isinstance(table, PropertyTable):
        data = table
    else:
        data = read_property_table(
            table, [target], split_column=split_column, structure_column=structure_column, seed=seed
        )
    rows, known = training_rows(data, target, most_rows, seed)
    config = FinetuneConfig(
        transform=None if transform == "auto" else transform, difference=difference
    )
    group = materials(rows.crystals)
    contest = _Contest(rows, group, target, config, on_graphs, on_source)
    for name, base in bases.items():
        if reason := contest.enter(name, base):
            left_out[name] = reason
    if not contest.sources:
        told = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise OptionError(f"no model is left to choose among for {target!r} ({told})")
    sources, baselines = ranked(contest.sources, list(contest.baselines.values()), group)
    return Ranking(
        table=Path(data.source).name,
        target=target,
        unit=contest.unit,
        rows=len(rows),
        of_rows=known,
        sources=sources,
        baselines=baselines,
        left_out=left_out,
        seconds=round(time.monotonic() - started, 3),
    )


def choose_source(
    data: PropertyTable,
    target: str,
    models: Iterable[str | Path | Model] | None,
    config: FinetuneConfig,
    *,
    on_graphs: Callable[[int], None] | None = None,
    on_source: Callable[[Source], None] | None = None,
) -> tuple[Model, FinetuneConfig, Ranking]:
    """Return the best model for a target, how to train on it, and the ranking.

    Where negative transfer is expected of all, the strategy ``auto`` becomes ``scratch``: of the
    model nothing but its shape is used.

    Raises
    ------
    OptionError
        If no model is of use and options ask for its layers, or none is to be used at all.
    """
    if config.strategy == "scratch":
        raise OptionError(
            "from scratch nothing is transferred, so there is no model to choose; name one whose "
            "shape the network should have"
        )
    ranking = rank_sources(
        data,
        target,
        models,
        transform=config.transform,
        difference=config.difference,
        seed=config.seed,
        on_graphs=on_graphs,
        on_source=on_source,
    )
    first = ranking.sources[0]
    assert first.model is not None, "a model, not a baseline"
    if ranking.best is None:
        if config.strategy != "auto" or config.freeze is not None or config.retain != "none":
            told = "; ".join(f"{name}: {why}" for name, why in ranking.refused.items())
            raise OptionError(
                f"negative transfer is expected of every model ({told}); use the strategy scratch, "
                "give other models, or name one to use it all the same"
            )
        config = replace(config, strategy="scratch")
    return first.model, config, ranking


def candidates(
    models: Iterable[str | Path | Model] | None,
) -> tuple[dict[str, Model], dict[str, str]]:
    """Return the models to choose among by name, and why others are none.

    Raises
    ------
    FormatError
        If there is no such model, or it is damaged.
    """
    found: dict[str, Model] = {}
    left_out: dict[str, str] = {}
    for given in available_models() if models is None else _unfolded(models):
        if not isinstance(given, Model):
            card = find_model(given)[1]
            if is_potential(card):
                left_out[str(given)] = "a potential, whose plugins learn energies and forces"
                continue
        base = given if isinstance(given, Model) else load_model(given)
        own = base.name if isinstance(given, Model) else str(given)
        name = base.name if base.name not in found else own
        if same := [n for n, m in found.items() if m.checksum and m.checksum == base.checksum]:
            left_out.setdefault(own, f"the same weights as {same[0]}")
            continue
        found[name] = base
    return found, left_out


def _unfolded(models: Iterable[str | Path | Model]) -> list[str | Path | Model]:
    """Put the models of a folder in the folder's place."""
    given = [models] if isinstance(models, str | Path | Model) else list(models)
    if not given:
        raise OptionError("no model was given to choose among; leave models out for those shipped")
    found: list[str | Path | Model] = []
    for each in given:
        within = []
        if not isinstance(each, Model) and not (Path(each) / "card.json").is_file():
            within = sorted(card.parent for card in Path(each).glob("*/card.json"))
        found += within or [each]
    return found


def training_rows(
    data: PropertyTable, target: str, most_rows: int, seed: int
) -> tuple[PropertyTable, int]:
    """Return training rows with a value as a table of their own, and how many there are in all."""
    values = data.values[target]
    rows = np.flatnonzero((data.split == "train") & np.isfinite(values))
    known = len(rows)
    if known > most_rows:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most_rows, replace=False))
    chosen = PropertyTable(
        data.source, [data.crystals[k] for k in rows], {target: values[rows]}, data.split[rows]
    )
    return chosen, known


@dataclass(slots=True, eq=False)
class _Contest:
    """The rows that all models are measured on, and what was measured so far."""

    data: PropertyTable
    group: NDArray[np.int64]
    target: str
    config: FinetuneConfig
    on_graphs: Callable[[int], None] | None
    on_source: Callable[[Source], None] | None
    sources: list[Source] = field(default_factory=list)
    baselines: dict[str, Source] = field(default_factory=dict)
    unit: str = ""
    shapes: dict[str, str] = field(default_factory=dict)

    def enter(self, name: str, base: Model) -> str:
        """Measure a model and its baselines; return why it is no candidate, if it is none."""
        started = time.monotonic()
        options = base.backbone.graph_options
        graphs = graph_store(self.data.crystals, options, on_progress=self.on_graphs).graphs
        readable = graphs.nodes_per_graph > 0
        known = int((readable & ~graphs.has_elements_outside(base.elements)).sum())
        if known < _SHARE * readable.sum():
            return f"knows the elements of {known} of {readable.sum()} rows only"
        task = self._task(base, graphs)
        self.unit = task.prop.unit
        found = score_layers(task, task.source(self.config), self.group)
        source = self._told(Source(name, found, base), started)
        self.sources.append(replace(source, rivals=self._rivals(name, task)))
        return ""

    def _task(self, base: Model, graphs: PackedGraphs) -> Task:
        return make_task(
            base,
            self.data,
            self.target,
            graphs,
            Activations(base, graphs),
            self.config.transform,
            {"train": FEWEST_ROWS},
        )

    def _rivals(self, name: str, task: Task) -> tuple[str, ...]:
        """Return the baselines of a model, measured where they are not yet."""
        composition = "composition"
        if composition not in self.baselines:
            started = time.monotonic()
            found = score_features(composition_features(task.graphs), task, self.group)
            self.baselines[composition] = self._told(Source(composition, found, None), started)
        shape = json.dumps(task.base.backbone.config(), sort_keys=True)
        if shape not in self.shapes:
            started, network = time.monotonic(), untrained(task.base)
            own = f"untrained, shape of {name}"
            kept = Activations(network, task.graphs)
            same = replace(task, base=network, activations=kept, _axes={})
            found = score_layers(same, None, self.group)
            self.baselines[own] = self._told(Source(own, found, network), started)
            self.shapes[shape] = own
        return composition, self.shapes[shape]

    def _told(self, source: Source, started: float) -> Source:
        source = replace(source, seconds=round(time.monotonic() - started, 3))
        if self.on_source is not None:
            self.on_source(source)
        return source
