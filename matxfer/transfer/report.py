"""What is known of a finished plugin: errors, spread and intervals, what became of the source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.data.loader import edge_budget_batches
from matxfer.metrics import regression_metrics
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.transfer.uncertainty import Uncertainty, crystal_features

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.retention import SourceData
    from matxfer.transfer.task import Task


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """A plugin's predictions for n rows.

    Attributes
    ----------
    values
        In the property's unit, (n,).
    fitted
        On the fitted scale, mean over the members, (n,).
    hidden
        Last hidden layers of the readouts, (M, n, H), if it has any.
    features
        What the out-of-domain score compares, (n, D).
    columns
        Spread, bounds and score, once calibrated.
    variance
        Members' and Laplace variance, once calibrated.
    """

    values: NDArray[np.float64]
    fitted: NDArray[np.float64]
    hidden: Tensor | None
    features: Tensor
    columns: list[NDArray[np.float64]]
    variance: NDArray[np.float64]


def outputs_of(task: Task, plugin: Plugin, rows: NDArray[np.int64]) -> Outputs:
    """Run a plugin over rows of its task, starting from the kept activations."""
    head = plugin.head
    parts: list[tuple[Any, ...]] = []
    with torch.no_grad():
        for index in edge_budget_batches(task.graphs, rows):
            nodes, graphs = _nodes(task, plugin, index)
            inputs = head.inputs(nodes, graphs)
            offset = task.offset(head.source)
            known = None if offset is None else torch.from_numpy(offset[index]).float()
            fitted = head.fitted(inputs, graphs, known).double()
            hidden = None
            if isinstance(head.readout, ReadoutEnsemble):
                hidden = head.readout.hidden(inputs, graphs)
            found: tuple[Any, ...] = ()
            variance = np.zeros(len(index))
            if plugin.uncertainty is not None:
                found = plugin.uncertainty.of(head, nodes, inputs, fitted, graphs)
                variance = plugin.uncertainty.variance(head, inputs, graphs)
            features = crystal_features(nodes, graphs)
            parts.append((fitted.mean(0).numpy(), hidden, features, variance, *found))
    if not parts:
        empty = np.zeros(0)
        return Outputs(empty, empty, None, torch.zeros(0, 0), [], empty)
    means, hiddens, crystals, variances, *columns = zip(*parts, strict=True)
    flat = np.concatenate(means)
    return Outputs(
        head.scaler.to_unit(flat),
        flat,
        None if hiddens[0] is None else torch.cat(hiddens, dim=1),
        torch.cat(crystals),
        [np.concatenate(column) for column in columns],
        np.concatenate(variances),
    )


def _nodes(task: Task, plugin: Plugin, index: NDArray[np.int64]) -> tuple[list[Tensor], GraphBatch]:
    """Return the node features that the head reads, and the batch they belong to."""
    kept, layers = task.activations, plugin.head.layers
    frozen = plugin.depth > 0 and max(layers) <= plugin.depth
    graphs = task.graphs.batch(index, with_edges=not frozen)
    if plugin.depth == 0:
        return plugin.nodes(graphs), graphs
    rows = kept.node_rows(index)
    below = {k: kept.node(k)[rows] for k in layers if k <= plugin.depth}
    if frozen:
        return [below[k] for k in layers], graphs
    return plugin.nodes(graphs, kept.prefix(index, plugin.depth), below), graphs


def calibrated(task: Task, plugin: Plugin) -> Uncertainty:
    """Fit a plugin's uncertainty on the training rows, calibrate it on the validation rows."""
    train, val = task.parts["train"], task.parts["val"]
    std = float(plugin.head.scaler.std)
    own = outputs_of(task, plugin, train)
    targets = task.targets(plugin.head.scaler, plugin.head.source)
    graphs = task.graphs.batch(np.arange(len(task.graphs)), with_edges=False)
    source = task.offset(plugin.head.source)
    offset = plugin.head.scaler.offset(graphs).double().numpy() + (0 if source is None else source)
    held = outputs_of(task, plugin, val)
    residual = (held.fitted - offset[val]) / std - targets[val]
    elements = np.unique(task.graphs.select(train).numbers).tolist()
    noise = float(np.sqrt(np.mean(residual**2)))
    found = Uncertainty.fit(own.hidden, noise, own.features, elements)
    plugin.uncertainty = found
    found.calibrate(residual, outputs_of(task, plugin, val).variance)
    return found


def figures_of(task: Task, plugin: Plugin) -> dict[str, Any]:
    """Return the errors on the validation and test rows, beside those of a constant."""
    figures = {}
    constant = np.median(task.values[task.parts["train"]])
    for part in ("val", "test"):
        rows = task.parts[part]
        truth, outputs = task.values[rows], outputs_of(task, plugin, rows)
        figures[part] = regression_metrics(truth, outputs.values, plugin.head.prop)
        if not len(rows):
            continue
        figures[part]["mae_of_a_constant"] = float(np.abs(truth - constant).mean())
        if outputs.columns and plugin.uncertainty is not None:
            _, low, high, score = outputs.columns
            figures[part]["coverage"] = float(((truth >= low) & (truth <= high)).mean())
            figures[part]["coverage_level"] = plugin.uncertainty.level
            error = np.abs(outputs.values - truth)
            figures[part]["rank_correlation_of_error_and_ood"] = _rank_correlation(error, score)
            spread = outputs.columns[0]
            figures[part]["rank_correlation_of_error_and_std"] = _rank_correlation(error, spread)
    return figures


def _rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def retention_of(task: Task, plugin: Plugin, source: SourceData | None = None) -> dict[str, Any]:
    """Return what became of the source predictions, were the base to share the plugin's layers.

    On the target structures how far they moved; on source structures with labels, if there are
    any, their error before and after. A plugin keeps layers of its own, so ``predict`` never
    shows either.
    """
    rows = np.concatenate([task.parts["val"], task.parts["test"]])
    base = task.base
    moved: dict[str, list[NDArray[np.float64]]] = {name: [] for name in base.heads}
    for index, after in _source_values(plugin, task, rows):
        for name, head in base.heads.items():
            before = head.scaler.to_unit(task.activations.source(name)[index])
            moved[name].append(np.abs(after[name] - before))
    report: dict[str, Any] = {
        "measured_on": "target structures, val and test rows",
        "drift": {
            name: {
                "mean_absolute_drift": float(np.concatenate(parts).mean()) if parts else None,
                "unit": base.heads[name].prop.unit,
            }
            for name, parts in moved.items()
        },
    }
    if source is not None:
        report["source_error"] = _source_errors(plugin, source)
    return report


def _source_values(
    plugin: Plugin, data: Task | SourceData, rows: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]]:
    """Yield rows and what the source heads say of them on the plugin's layers."""
    base, kept = plugin.base, data.activations
    with torch.inference_mode():
        for index in edge_budget_batches(data.graphs, rows):
            if plugin.depth == base.backbone.n_layers:
                kept_values = {n: kept.source(n)[index] for n in base.heads}
                heads = base.heads.items()
                yield index, {n: h.scaler.to_unit(kept_values[n]) for n, h in heads}
                continue
            graphs = data.graphs.batch(index)
            prefix = kept.prefix(index, plugin.depth) if plugin.depth else None
            yield index, base.predict_features(plugin.features(graphs, prefix), graphs)


def _source_errors(plugin: Plugin, source: SourceData) -> dict[str, Any]:
    """Return the error of every labelled source property before and after, on its fitted scale."""
    rows = np.flatnonzero(source.graphs.nodes_per_graph > 0)
    after: dict[str, list[NDArray[np.float64]]] = {name: [] for name in plugin.base.heads}
    for _, values in _source_values(plugin, source, rows):
        for name, value in values.items():
            after[name].append(value)
    errors = {}
    for name, truth in source.values.items():
        head = plugin.base.heads[name]
        before = head.scaler.to_unit(source.activations.source(name)[rows])
        now = np.concatenate(after[name])
        pair = [regression_metrics(truth[rows], v, head.prop) for v in (before, now)]
        scale = f"mae_{head.prop.transform}" if f"mae_{head.prop.transform}" in pair[0] else "mae"
        was, found = (figures[scale] for figures in pair)
        change = None if not was else found / was - 1
        errors[name] = {"before": was, "after": found, "change": change, "scale": scale}
        errors[name]["n"] = pair[0]["n"]
    return errors
