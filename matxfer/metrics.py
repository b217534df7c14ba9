"""Predictions over many packed graphs, and how good they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.properties import apply_transform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs
    from matxfer.data.properties import Property
    from matxfer.model import Model


def predict_rows(
    model: Model, graphs: PackedGraphs, rows: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Return every source property of the given rows, in its unit, shape (len(rows),)."""
    # Here alone: errors are also computed where nothing runs a network.
    import torch

    from matxfer.data.loader import edge_budget_batches

    parts: list[dict[str, NDArray[np.float64]]] = []
    with torch.inference_mode():
        for index in edge_budget_batches(graphs, rows):
            parts.append(model.predict_graphs(graphs.batch(index)))  # noqa: PERF401
    return {name: np.concatenate([np.zeros(0), *(p[name] for p in parts)]) for name in model.heads}


def regression_metrics(
    truth: NDArray[np.float64],
    predicted: NDArray[np.float64],
    prop: Property,
    weights: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Return ``mae``, ``rmse``, ``r2``, ``n`` and ``unit`` over the rows where both are known.

    For properties fitted on a logarithmic scale ``mae_<scale>`` is added, the error that the
    literature quotes for moduli. With ``weights`` (of any scale, (n,)) all means are weighted.
    """
    known = np.isfinite(truth) & np.isfinite(predicted)
    if weights is not None:
        known &= weights > 0
    y, f = truth[known], predicted[known]
    w = np.ones(len(y)) if weights is None else weights[known]
    n = len(y)
    if n == 0:
        return {"mae": None, "rmse": None, "r2": None, "n": 0, "unit": prop.unit}
    error = f - y
    spread = float(np.average((y - np.average(y, weights=w)) ** 2, weights=w))
    square = float(np.average(error**2, weights=w))
    result: dict[str, Any] = {
        "mae": float(np.average(np.abs(error), weights=w)),
        "rmse": float(np.sqrt(square)),
        "r2": 1 - square / spread if spread > 0 else None,
        "n": n,
        "unit": prop.unit,
    }
    if prop.transform.startswith("log"):
        scaled = apply_transform(prop.transform, f) - apply_transform(prop.transform, y)
        good = np.isfinite(scaled)
        mean = np.average(np.abs(scaled[good]), weights=w[good]) if good.any() else np.nan
        result[f"mae_{prop.transform}"] = float(mean)
    return result
