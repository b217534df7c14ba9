"""What is known of a finished plugin: errors, spread and intervals, what became of the source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.crystal import Crystal
from matxfer.data.loader import edge_budget_batches
from matxfer.metrics import regression_metrics
from matxfer.transfer.uncertainty import Uncertainty, crystal_features

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.crystal import CrystalError
    from matxfer.data.batch import GraphBatch
    from matxfer.nn.plugin_head import Evaluation
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.retention import SourceData
    from matxfer.transfer.task import Task


#: So many rows of each part a plugin keeps for its report, unless told otherwise.
KEPT_ROWS = 1000


def evaluations(
    task: Task, plugin: Plugin, rows: NDArray[np.int64]
) -> Iterator[tuple[Evaluation, list[Tensor], GraphBatch]]:
    """Run a plugin over rows of its task, starting from the kept activations, batch by batch."""
    head, kept = plugin.head, task.activations
    offset = task.offset(head.source)
    with torch.no_grad():
        for index in edge_budget_batches(task.graphs, rows):
            graphs = task.graphs.batch(index, with_edges=not plugin.runs_no_layer)
            if plugin.runs_no_layer:
                nodes = [kept.node(k)[kept.node_rows(index)] for k in head.layers]
            else:
                nodes = plugin.nodes(graphs, *kept.start(index, plugin.depth, head.layers))
            known = None if offset is None else torch.from_numpy(offset[index]).float()
            yield head.evaluate(nodes, graphs, known), nodes, graphs


def predicted(task: Task, plugin: Plugin, rows: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    """Return a plugin's values for rows and, once calibrated, spread, bounds and score, (n,)."""
    parts = [plugin.described(*found) for found in evaluations(task, plugin, rows)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)] or [np.zeros(0)]


def normalised_residuals(
    task: Task, plugin: Plugin, found: Iterable[Evaluation], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return by how much the evaluations of rows miss the targets, in units of their spread."""
    outputs = torch.cat([each.outputs for each in found], dim=1).double().mean(0).numpy()
    head = plugin.head
    targets = task.targets(head.scaler, head.source, head.slope)[rows]
    residual: NDArray[np.float64] = outputs - targets
    return residual


def calibrated(task: Task, plugin: Plugin) -> Uncertainty:
    """Fit a plugin's uncertainty on the training rows, calibrate it on the validation rows."""
    train, val = task.parts["train"], task.parts["val"]
    held = [found for found, _, _ in evaluations(task, plugin, val)]
    residual = normalised_residuals(task, plugin, held, val)
    hidden, features = [], []
    for found, nodes, graphs in evaluations(task, plugin, train):
        if found.hidden is not None:
            hidden.append(found.hidden)
        features.append(crystal_features(nodes, graphs))
    plugin.uncertainty = Uncertainty.fit(
        torch.cat(hidden, dim=1) if hidden else None,
        float(np.sqrt(task.mean(residual**2, val))),
        torch.cat(features),
        task.elements,
    )
    variance = np.concatenate([plugin.uncertainty.variance(found) for found in held])
    plugin.uncertainty.calibrate(residual, variance, task.weights_of(val))
    return plugin.uncertainty


def predicted_parts(task: Task, plugin: Plugin) -> dict[str, list[NDArray[np.float64]]]:
    """Return what :func:`predicted` says of the validation and of the test rows."""
    return {part: predicted(task, plugin, task.parts[part]) for part in ("val", "test")}


def figures_of(
    task: Task, plugin: Plugin, found: dict[str, list[NDArray[np.float64]]] | None = None
) -> dict[str, Any]:
    """Return the errors on the validation and test rows, beside those of a constant.

    Where rows have weights, ``weighted`` are the same errors with them.
    """
    figures = {}
    constant = np.median(task.values[task.parts["train"]])
    for part, (values, *columns) in (found or predicted_parts(task, plugin)).items():
        rows = task.parts[part]
        truth = task.values[rows]
        figures[part] = regression_metrics(truth, values, plugin.head.prop)
        if not len(rows):
            continue
        if (weights := task.weights_of(rows)) is not None:
            figures[part]["weighted"] = regression_metrics(truth, values, plugin.head.prop, weights)
        figures[part]["mae_of_a_constant"] = float(np.abs(truth - constant).mean())
        if plugin.uncertainty is not None:
            spread, low, high, score = columns
            figures[part]["coverage_level"] = plugin.uncertainty.level
            # Intervals without an end hold everything, which says nothing.
            ends = np.isfinite(plugin.uncertainty.quantile)
            inside = float(((truth >= low) & (truth <= high)).mean())
            figures[part]["coverage"] = inside if ends else None
            error = np.abs(values - truth)
            figures[part]["rank_correlation_of_error_and_ood"] = _rank_correlation(error, score)
            figures[part]["rank_correlation_of_error_and_std"] = _rank_correlation(error, spread)
    return figures


def kept_predictions(
    task: Task,
    found: dict[str, list[NDArray[np.float64]]],
    crystals: Sequence[Crystal | CrystalError],
    most: int,
) -> dict[str, Any]:
    """Return what a plugin keeps of its validation and test rows, so that figures can be drawn.

    Parameters
    ----------
    found
        See :func:`predicted_parts`.
    crystals
        Those of the task.
    most
        At most so many rows of each part, drawn at random.

    Returns
    -------
    dict
        Part → ``rows`` (how many there are) and columns: ``id``, ``formula``, ``truth``,
        ``predicted`` and, of a calibrated plugin, ``std``, ``lower``, ``upper`` and ``ood``.
    """
    kept: dict[str, Any] = {}
    for part, columns in found.items():
        rows = task.parts[part]
        drawn = rows_to_keep(len(rows), most)
        if not len(drawn):
            continue
        named = [(int(row), crystals[row]) for row in rows[drawn]]
        values = dict(zip(_KEPT, columns, strict=False)) | {"truth": task.values[rows]}
        kept[part] = {
            "rows": len(rows),
            "id": [c.id or f"row {k}" for k, c in named if isinstance(c, Crystal)],
            "formula": [c.formula for _, c in named if isinstance(c, Crystal)],
            **{name: short(values[name][drawn]) for name in ("truth", *_KEPT) if name in values},
        }
    return kept


#: Columns of :func:`predicted`.
_KEPT = ("predicted", "std", "lower", "upper", "ood")


def rows_to_keep(n: int, most: int) -> NDArray[np.int64]:
    """Return at most so many of n rows, sorted, drawn at random where there are more."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def short(values: NDArray[np.float64]) -> list[float | None]:
    """Return values with six digits, enough for figures; JSON has no infinity."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


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
        report["source_error"] = source_errors(plugin, source)
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
            prefix, _ = kept.start(index, plugin.depth)
            yield index, base.predict_features(plugin.features(graphs, prefix), graphs)


def source_errors(plugin: Plugin, source: SourceData) -> dict[str, Any]:
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
