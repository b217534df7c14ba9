"""Fine-tuning: a small table of one property → a plugin, with its figures and its retention."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.copies import copies_of
from matxfer.data.store import graph_store
from matxfer.data.table import PropertyTable, open_table, read_property_table
from matxfer.errors import OptionError
from matxfer.files import sha256
from matxfer.fisher import concentration, total_fisher
from matxfer.model import DEFAULT_MODEL, Model, load_model
from matxfer.notebook import told_in_notebook
from matxfer.provenance import provenance
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.activations import Activations
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.freezing import check_depth
from matxfer.transfer.negative import checked
from matxfer.transfer.report import (
    KEPT_ROWS,
    calibrated,
    figures_of,
    kept_predictions,
    predicted_parts,
    retention_of,
)
from matxfer.transfer.retention import SourceData
from matxfer.transfer.row_weights import weighed
from matxfer.transfer.selection import AUTO, choose_source
from matxfer.transfer.strategies import Trial, choose, run_strategy
from matxfer.transfer.task import FEWEST_ROWS, Task, make_task
from matxfer.transfer.transforms import choose_transform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.crystal import Crystal
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.ranking import Source
    from matxfer.transfer.row_weights import Weigh


@told_in_notebook("on_trial", "strategies tried")
@told_in_notebook("on_graphs", "building graphs")
def finetune(
    table: str | Path | pd.DataFrame | PropertyTable,
    target: str,
    output: str | Path | None = None,
    *,
    model: str | Path | Model = DEFAULT_MODEL,
    models: Iterable[str | Path | Model] | None = None,
    split_column: str | None = None,
    structure_column: str | None = None,
    source_data: str | Path | pd.DataFrame | None = None,
    keep_predictions: int = KEPT_ROWS,
    weigh: Weigh | None = None,
    invariant_for: str | Path | pd.DataFrame | Sequence[Crystal] | None = None,
    config: FinetuneConfig | None = None,
    on_graphs: Callable[[int], None] | None = None,
    on_source: Callable[[Source], None] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    **options: Any,
) -> Plugin:
    """Fine-tune a plugin for one property of a table.

    Parameters
    ----------
    table
        Parquet or CSV table of structures, or a data frame (see :mod:`matxfer.readers`); or a
        table that has been read and split already.
    target
        Column of values; its name says the unit.
    output
        Folder of the plugin; ``None``: the plugin is returned but not written.
    model
        Base model, its name or its folder; ``"auto"``: the best of ``models`` by
        :func:`matxfer.transfer.selection.rank_sources`, which looks at training rows alone.
        Where none is of use the network is trained from scratch.
    models
        To choose among with ``"auto"``; ``None``: those shipped.
    split_column
        Column with ``train``, ``val`` and ``test``; without one, a seeded random split.
    structure_column
        Column of structures, where the table has an unusual one.
    source_data
        Table of source structures: rehearsed by ``replay``; where it has columns of source
        properties, their errors before and after are reported.
    keep_predictions
        At most so many validation and test rows are kept in the plugin with their ids, formulas,
        values and predictions, for its report and figures; 0: none, where values are secret.
    weigh
        Says how much each row counts, such as :func:`matxfer.domain.weights_for`: rows that
        resemble the structures to be predicted count more (:mod:`matxfer.transfer.row_weights`).
    invariant_for
        Table, or crystals, of structures to be predicted, for the option ``invariant``.
    config, **options
        :class:`FinetuneConfig`, or its fields one by one.
    on_graphs
        Called with the number of graphs built since the last call.
    on_source, on_trial
        Called with each model that ``"auto"`` ranks, and with each :class:`Trial` of the strategy
        ``auto``.

    Returns
    -------
    Plugin
        With ``meta["figures"]`` (val and test errors), ``meta["retention"]``, and what ``auto``
        tried: ``meta["trials"]`` of the strategy, ``meta["transform_trials"]`` of the transform,
        ``meta["sources"]`` of the model; ``meta["weights"]`` says how even weights are. After the
        strategy ``auto`` ``meta["transfer"]`` says whether transfer was ``negative``: no better
        than what needs no pretrained weights.

    Raises
    ------
    TableError
        If the table, a column or a usable row is missing.
    ValueError
        If an option is out of range, or weights are too uneven to be used.

    Examples
    --------
    ``solids.parquet`` holds elemental solids with their bulk moduli and a column ``split``:

    >>> import matxfer
    >>> plugin = matxfer.finetune(
    ...     "solids.parquet", "bulk_modulus_gpa", "my-plugin", model="mp-small",
    ...     split_column="split", strategy="features", features="ridge",
    ... )
    >>> plugin
    Plugin('my-plugin': bulk_modulus_gpa on 'mp-small', 3 of 3 layers frozen)
    >>> plugin.meta["figures"]["test"]["n"]
    6

    The last layer of the network, held to what its old properties need (EWC):

    >>> held = matxfer.finetune(
    ...     "solids.parquet", "bulk_modulus_gpa", model="mp-small", freeze=2, retain="ewc", epochs=1
    ... )
    >>> sorted(held.meta["retention"]["drift"])[:2]
    ['band_gap_ev', 'bulk_modulus_vrh_gpa']
    """
    keep_large_blocks()
    started = time.monotonic()
    if keep_predictions < 0:
        raise OptionError(f"keep_predictions is {keep_predictions}, but must be 0 or more")
    config = replace(config or FinetuneConfig(), **options)
    config = replace(config, strategy=config.implied_strategy())
    if isinstance(table, PropertyTable):
        data = table
    else:
        data = read_property_table(
            table,
            [target],
            split_column=split_column,
            structure_column=structure_column,
            seed=config.seed,
        )
    base, config, told = _base(data, target, model, models, config, on_graphs, on_source)
    if config.freeze is not None:
        check_depth(base.backbone, config.freeze)
    store = graph_store(data.crystals, base.backbone.graph_options, on_progress=on_graphs)
    activations = Activations(base, store.graphs)
    task = make_task(base, data, target, store.graphs, activations, config.transform)
    facts = _data_facts(data, split_column, task)
    task = replace(task, candidates=_candidates(invariant_for, config, base, on_graphs))
    task, told["weights"] = weighed(task, weigh)
    if config.transform == "auto":
        task, told["transform_trials"] = choose_transform(task, config)
        config = replace(config, transform=task.prop.transform)
    source = None if source_data is None else read_source_data(source_data, base, on_graphs)
    if output is not None:  # better now than after the training
        Path(output).mkdir(parents=True, exist_ok=True)

    if config.strategy == "auto":
        trial, tried = _best_of_all(task, config, source, on_trial)
        told |= tried
    else:
        trial = run_strategy(task, config, source)
    plugin = trial.plugin
    calibrated(task, plugin)
    found = predicted_parts(task, plugin)
    told["predictions"] = kept_predictions(task, found, data.crystals, keep_predictions)
    plugin.meta = {
        "config": asdict(trial.config),
        "chosen": trial.label,
        "figures": figures_of(task, plugin, found),
        **trial.facts,
        "retention": retention_of(task, plugin, source),
        "elements": task.elements,
        "data": facts,
        **provenance(time.monotonic() - started),
        **{name: known for name, known in told.items() if known},
    }
    if "ewc" in trial.config.retain and plugin.depth < base.backbone.n_layers:
        plugin.meta["fisher"] = concentration(total_fisher(base.fisher()))
    if output is not None:
        plugin.save(output)
    return plugin


def _base(
    data: PropertyTable,
    target: str,
    model: str | Path | Model,
    models: Iterable[str | Path | Model] | None,
    config: FinetuneConfig,
    on_graphs: Callable[[int], None] | None,
    on_source: Callable[[Source], None] | None,
) -> tuple[Model, FinetuneConfig, dict[str, Any]]:
    """Return the base model, the configuration for it, and what is told of the choice."""
    if model == AUTO:
        base, config, ranking = choose_source(
            data, target, models, config, on_graphs=on_graphs, on_source=on_source
        )
        return base, config, {"sources": ranking.to_json()}
    if models is not None:
        raise OptionError(f"models to choose among go with model={AUTO!r}, but it is {model!r}")
    return model if isinstance(model, Model) else load_model(model), config, {}


def _best_of_all(
    task: Task,
    config: FinetuneConfig,
    source: SourceData | None,
    on_trial: Callable[[Trial], None] | None,
) -> tuple[Trial, dict[str, Any]]:
    """Try the strategies; return the best trial, and what is told of all and of the transfer."""
    _, trials = choose(task, config, source, on_trial)
    best, trials, transfer = checked(task, config, trials, on_trial)
    return best, {"transfer": transfer, "trials": [_told(each) for each in trials]}


def _data_facts(data: PropertyTable, split_column: str | None, task: Task) -> dict[str, Any]:
    path = Path(data.source)
    return {
        "table": path.name,
        "sha256": sha256(path) if path.is_file() else None,
        "split_column": split_column,
        "rows": {part: len(rows) for part, rows in task.parts.items()},
        "rows_excluded": task.excluded,
        "values": {p: _range(task.values[rows]) for p, rows in task.parts.items() if len(rows)},
        **copies_of(data.source, data.crystals, task.values, task.parts),
    }


def _told(trial: Trial) -> dict[str, Any]:
    """Return what is kept of a trial."""
    kept = {"tried": trial.label, "val_mae": trial.error}
    return kept | {k: trial.facts[k] for k in ("seconds", "history") if k in trial.facts}


def _range(values: NDArray[np.float64]) -> dict[str, float]:
    """Return what the values of a part span."""
    low, middle, high = np.quantile(values, (0.0, 0.5, 1.0))
    return {"min": float(low), "median": float(middle), "max": float(high)}


def _candidates(
    given: str | Path | pd.DataFrame | Sequence[Crystal] | None,
    config: FinetuneConfig,
    base: Model,
    on_graphs: Callable[[int], None] | None,
) -> SourceData | None:
    """Return the structures that features shall resemble; refuse where they cannot."""
    if config.invariant == "none":
        if given is not None:
            raise OptionError("structures for invariant features need a method: grl, coral or mmd")
        return None
    if given is None:
        raise OptionError(
            f"{config.invariant} needs structures to be predicted (--invariant-for, or "
            "invariant_for=…): features shall resemble theirs"
        )
    frozen = config.strategy == "finetune" and config.freeze == base.backbone.n_layers
    if frozen or config.strategy in ("features", "correction"):
        raise OptionError(
            f"{config.invariant} changes features of layers that are trained, but here all are "
            "frozen; free some (--freeze K with a smaller K) or leave it out"
        )
    found = read_source_data(given, base, on_graphs)
    usable = (found.graphs.nodes_per_graph > 0) & ~found.graphs.has_elements_outside(base.elements)
    if usable.sum() < FEWEST_ROWS:
        raise OptionError(
            f"{config.invariant} needs at least {FEWEST_ROWS} usable structures to be predicted, "
            f"but there are {int(usable.sum())} of {len(usable)}"
        )
    return found


def read_source_data(
    table: str | Path | pd.DataFrame | Sequence[Crystal],
    base: Model,
    on_graphs: Callable[[int], None] | None,
) -> SourceData:
    """Read a table of structures with the source properties that it knows."""
    from matxfer.data.table import crystals_or_errors
    from matxfer.readers import crystals_of_table

    if isinstance(table, Sequence) and not isinstance(table, str):
        graphs = graph_store(table, base.backbone.graph_options, on_progress=on_graphs).graphs
        return SourceData(graphs, Activations(base, graphs), {})
    frame, name = open_table(table)
    known = [target for target in base.heads if target in frame.columns]
    if known:
        data = read_property_table(frame, known, source=name)
        crystals, values = data.crystals, data.values
    else:
        crystals, values = crystals_or_errors(crystals_of_table(frame, name)), {}
    graphs = graph_store(crystals, base.backbone.graph_options, on_progress=on_graphs).graphs
    return SourceData(graphs, Activations(base, graphs), values)
