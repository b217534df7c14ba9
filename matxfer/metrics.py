"""Predictions over many packed graphs, and how good predictions and probabilities are."""

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


#: Bins of the expected calibration error.
_BINS = 10


def classification_metrics(
    target: NDArray[np.int64], probability: NDArray[np.float64]
) -> dict[str, Any]:
    """Return how good the probabilities of K classes are.

    Parameters
    ----------
    target
        Numbers of the true classes, (n,).
    probability
        Of each class, (n, K).

    Returns
    -------
    dict
        ``auc``, of more than two classes the mean over one against the rest, ``None`` where only
        one class occurs; ``accuracy``, and ``accuracy_of_the_commonest``: that of always saying the
        commonest of these classes; ``brier``, (p - y)² of the second of two classes, and summed
        over all of more (Brier 1950); ``log_loss`` in nats; ``calibration_error``, expected, of the
        likeliest class in ten bins (Guo et al., ICML 2017); and ``n``.

    Examples
    --------
    >>> import numpy as np
    >>> from matxfer.metrics import classification_metrics
    >>> found = classification_metrics(np.array([0, 1]), np.array([[0.9, 0.1], [0.4, 0.6]]))
    >>> found["auc"], found["accuracy"], round(found["brier"], 3)
    (1.0, 1.0, 0.085)
    """
    from sklearn.metrics import log_loss

    n, n_classes = probability.shape
    if n == 0:
        return {"auc": None, "accuracy": None, "brier": None, "log_loss": None, "n": 0}
    confidence, hit = probability.max(axis=1), probability.argmax(axis=1) == target
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(place, confidence - hit, minlength=_BINS)
    square = ((probability - np.eye(n_classes)[target]) ** 2).sum(axis=1)
    return {
        "auc": _mean_auc(target, probability),
        "accuracy": float(hit.mean()),
        "accuracy_of_the_commonest": float(np.bincount(target).max() / n),
        "brier": float(square.mean()) / (2 if n_classes == 2 else 1),
        "log_loss": float(log_loss(target, probability, labels=np.arange(n_classes))),
        "calibration_error": float(np.abs(gap).sum() / n),
        "n": n,
    }


def _mean_auc(target: NDArray[np.int64], probability: NDArray[np.float64]) -> float | None:
    from sklearn.metrics import roc_auc_score

    columns = [1] if probability.shape[1] == 2 else range(probability.shape[1])
    known = [k for k in columns if 0 < (target == k).sum() < len(target)]
    areas = [roc_auc_score(target == k, probability[:, k]) for k in known]
    return float(np.mean(areas)) if areas else None
