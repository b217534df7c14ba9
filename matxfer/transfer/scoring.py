"""Scores of a task's frozen features, layer by layer, without training and in the target's unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.data.properties import apply_transform
from matxfer.nn.feature_readout import FeatureReadout
from matxfer.transfer import affinity
from matxfer.transfer.features import principal_axes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.transfer.task import Task

    Floats = NDArray[np.float64]

#: What is computed: leave-one-out errors in the target's unit, and scores.
ERRORS = ("kernel_ridge", "ridge", "neighbours")
SCORES = ("alignment", "log_evidence")
#: The one that models are ranked by (``tests/benchmarks/source_selection.py``).
DEFAULT_SCORE = "kernel_ridge"


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """How well features explain a target.

    Attributes
    ----------
    layers
        Which the best features by :data:`DEFAULT_SCORE` are of; empty for those of no network.
    errors
        Their absolute leave-one-out errors, in the target's unit; NaN in rows without one, (G,).
    scores
        The best of each kind over the layers: the smallest error, the largest score.
    by_layers
        All of them, by layers such as ``"2"`` or ``"0,1,2,3"``.
    """

    layers: tuple[int, ...]
    errors: Floats
    scores: dict[str, float]
    by_layers: dict[str, dict[str, float]]


def score_layers(task: Task, source: str | None, group: NDArray[np.int64]) -> Scored:
    """Score the features after each layer of a task's base, and of all layers side by side.

    Parameters
    ----------
    source
        Property of the base whose prediction is the start, as in :meth:`Task.source`.
    group
        Number of the material of each row, (G,); materials are left out whole.
    """
    every = tuple(range(task.base.backbone.n_layers + 1))
    sets = {
        layers: task.inputs(FeatureReadout.kind, layers)
        for layers in [*((k,) for k in every), every]
    }
    return _score(sets, task, source, group)


def score_features(features: Floats, task: Task, group: NDArray[np.int64]) -> Scored:
    """Score features (G, D) that are of no network."""
    return _score({(): torch.from_numpy(features)}, task, None, group)


def _score(
    sets: Mapping[tuple[int, ...], Tensor],
    task: Task,
    source: str | None,
    group: NDArray[np.int64],
) -> Scored:
    rows, scaler = task.parts["train"], task.scaler(source)
    y = task.targets(scaler, source)[rows].astype(np.float64)
    size = float(scaler.std)
    fitted = apply_transform(task.prop.transform, task.values[rows])
    group = group[rows]

    def in_unit(residuals: Floats) -> Floats:
        return np.asarray(np.abs(scaler.to_unit(fitted - size * residuals) - task.values[rows]))

    best: tuple[int, ...] = ()
    errors, by_layers = np.zeros(0), {}
    for layers, inputs in sets.items():
        centre, project = principal_axes(inputs, rows)
        x = (inputs[torch.from_numpy(rows)].double().numpy() - centre) @ project
        own = in_unit(affinity.kernel_ridge_residuals(x, y, group))
        by_layers[_named(layers)] = {
            "kernel_ridge": float(own.mean()),
            "ridge": float(in_unit(affinity.ridge_residuals(x, y, group)).mean()),
            "neighbours": float(
                in_unit(affinity.nearest_neighbour_residuals(x, y, groups=group)).mean()
            ),
            "alignment": affinity.target_alignment(x @ x.T, y),
            # A density of the values, not of the scaled ones, which differ from source to source.
            "log_evidence": affinity.log_evidence(x, y) - float(np.log(size)),
        }
        if not len(errors) or own.mean() < errors.mean():
            best, errors = layers, own
    scores = {name: min(e[name] for e in by_layers.values()) for name in ERRORS}
    scores |= {name: max(e[name] for e in by_layers.values()) for name in SCORES}
    whole = np.full(len(task.values), np.nan)
    whole[rows] = errors
    return Scored(best, whole, scores, by_layers)


def _named(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
