"""Predictions over many packed graphs, and how good they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.data.loader import edge_budget_batches
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
    parts: list[dict[str, NDArray[np.float64]]] = []
    with torch.inference_mode():
        for index in edge_budget_batches(graphs, rows):
            parts.append(model.predict_graphs(graphs.batch(index)))  # noqa: PERF401
    return {name: np.concatenate([np.zeros(0), *(p[name] for p in parts)]) for name in model.heads}


def regression_metrics(
    truth: NDArray[np.float64], predicted: NDArray[np.float64], prop: Property
) -> dict[str, Any]:
    """Return ``mae``, ``rmse``, ``r2``, ``n`` and ``unit`` over the rows where both are known.

    For properties fitted on a logarithmic scale ``mae_<scale>`` is added, the error that the
    literature quotes for moduli.
    """
    known = np.isfinite(truth) & np.isfinite(predicted)
    y, f = truth[known], predicted[known]
    n = len(y)
    if n == 0:
        return {"mae": None, "rmse": None, "r2": None, "n": 0, "unit": prop.unit}
    error = f - y
    spread = float(np.sum((y - y.mean()) ** 2))
    result: dict[str, Any] = {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "r2": 1 - float(np.sum(error**2)) / spread if spread > 0 else None,
        "n": n,
        "unit": prop.unit,
    }
    if prop.transform.startswith("log"):
        scaled = apply_transform(prop.transform, f) - apply_transform(prop.transform, y)
        result[f"mae_{prop.transform}"] = float(np.nanmean(np.abs(scaled)))
    return result
