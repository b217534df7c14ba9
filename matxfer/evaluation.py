"""How good are predictions on a table: errors of the base model or of a plugin, on a split."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.data.loader import edge_budget_batches
from matxfer.data.properties import unit_of
from matxfer.data.store import graph_store
from matxfer.data.table import TableError, open_table, read_property_table, require_column
from matxfer.metrics import regression_metrics
from matxfer.notebook import told_in_notebook
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.bases import with_base
from matxfer.transfer.plugin import predict_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.data.properties import Property
    from matxfer.model import Model
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.row_weights import Weigh


@told_in_notebook("on_graphs", "building graphs")
def evaluate(
    table: str | Path | pd.DataFrame,
    target: str,
    plugin: str | Path | Plugin | None = None,
    *,
    model: str | Path | Model | None = None,
    split_column: str | None = None,
    split: str = "test",
    where: Mapping[str, str] | None = None,
    structure_column: str | None = None,
    weigh: Weigh | None = None,
    on_graphs: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Compare predictions with a column of a table.

    Parameters
    ----------
    table
        Parquet or CSV table, or a data frame.
    target
        Column of true values.
    plugin
        Plugin that predicts it; without one, the base model's own head.
    model
        Base model; ``None``: that of the plugin, without one ``mp-base``.
    split_column, split
        Look at the rows whose ``split_column`` says ``split``; without a column, at all rows.
    where
        Column → value: look at the rows that have them, besides.
    structure_column, on_graphs
        As in :func:`matxfer.transfer.finetune.finetune`.
    weigh
        Says how much each row counts, such as :func:`matxfer.domain.weights_for`.

    Returns
    -------
    dict
        ``mae``, ``rmse``, ``r2``, ``n``, ``unit``; ``mae_log10`` and the like for properties on a
        logarithmic scale; ``excluded``: reason → number of rows that could not be compared;
        ``weighted``: the same figures with weights and what is known of these.

    Warns
    -----
    UserWarning
        If a plugin predicts another property than the target, in the same unit, or weights are too
        uneven to be used.

    Raises
    ------
    TableError
        If the table or a column is missing, no row is left, nothing predicts the target, or the
        plugin predicts in another unit: values are never converted in silence.

    Examples
    --------
    ``solids.parquet`` holds elemental solids with their bulk moduli and a column ``split``:

    >>> import matxfer
    >>> figures = matxfer.evaluate(
    ...     "solids.parquet", "bulk_modulus_gpa", "bulk-plugin", split_column="split"
    ... )
    >>> figures["n"], figures["unit"], figures["excluded"]
    (6, 'GPa', {})
    >>> figures["mae"] < 100
    True
    """
    keep_large_blocks()
    base, plugins = with_base([] if plugin is None else [plugin], model)
    adapted = plugins[0] if plugins else None
    prop = _property(base, adapted, target)
    frame, source = open_table(table)
    frame = _restrict(frame, source, {**({split_column: split} if split_column else {})})
    frame = _restrict(frame, source, dict(where or {}))
    data = read_property_table(frame, [target], source=source, structure_column=structure_column)
    store = graph_store(data.crystals, base.backbone.graph_options, on_progress=on_graphs)
    foreign = store.graphs.has_elements_outside(base.elements)
    usable = (store.graphs.nodes_per_graph > 0) & ~foreign
    predicted = np.full(len(data), np.nan)
    rows = np.flatnonzero(usable)
    predicted[rows] = _predict(base, adapted, target, store.graphs, rows)
    truth = data.values[target]
    result = regression_metrics(truth, predicted, prop)
    excluded = {
        "unreadable structure": int((store.graphs.nodes_per_graph == 0).sum()),
        "element unknown to the model": int(foreign.sum()),
        "no value": int((usable & ~np.isfinite(truth)).sum()),
    }
    if weigh is not None:
        result["weighted"] = _weighted(weigh, base, store.graphs, truth, predicted, prop)
    return {**result, "excluded": {k: v for k, v in excluded.items() if v}}


def _weighted(
    weigh: Weigh,
    base: Model,
    graphs: PackedGraphs,
    truth: NDArray[np.float64],
    predicted: NDArray[np.float64],
    prop: Property,
) -> dict[str, Any]:
    rows = np.flatnonzero(np.isfinite(truth) & np.isfinite(predicted))
    weights, facts = weigh(base, graphs, rows)
    if not facts.get("usable", True):
        warnings.warn(str(facts.get("words", "the weights are too uneven")), stacklevel=3)
    return {**regression_metrics(truth[rows], predicted[rows], prop, weights), "weights": facts}


def _property(base: Model, plugin: Plugin | None, target: str) -> Any:
    if plugin is None:
        if target not in base.heads:
            raise TableError(
                f"model {base.name!r} does not predict {target!r}, but {list(base.heads)}; "
                "give a plugin with --plugin, or train one with matxfer finetune"
            )
        return base.heads[target].prop
    prop = plugin.head.prop
    if target == prop.name:
        return prop
    theirs, ours = unit_of(target) or "no unit", prop.unit or "no unit"
    if theirs != ours:
        raise TableError(
            f"plugin {plugin.name!r} predicts {prop.name!r} in {ours!r}, which cannot be compared "
            f"with column {target!r} in {theirs!r}; convert the values to {ours!r} and name the "
            "column accordingly (a name ends in its unit)"
        )
    warnings.warn(
        f"column {target!r} is compared with predictions of {prop.name!r}: the unit is the same",
        stacklevel=3,
    )
    return prop


def _restrict(frame: pd.DataFrame, source: str, conditions: dict[str, str]) -> pd.DataFrame:
    for column, value in conditions.items():
        words = require_column(frame, column, source).astype(str)
        kept = frame[words == value]
        if not len(kept):
            found = sorted(set(words))[:6]
            raise TableError(f"{source}: no row has {column} = {value!r}; it holds {found}")
        frame = kept
    return frame


def _predict(
    base: Model,
    plugin: Plugin | None,
    target: str,
    graphs: PackedGraphs,
    rows: NDArray[np.int64],
) -> NDArray[np.float64]:
    column = len(base.heads) if plugin is not None else list(base.heads).index(target)
    parts = [np.zeros(0)]
    with torch.inference_mode():
        for index in edge_budget_batches(graphs, rows):
            batch = graphs.batch(index)
            parts.append(predict_all(base, [plugin] if plugin else [], batch)[column])
    return np.concatenate(parts)
