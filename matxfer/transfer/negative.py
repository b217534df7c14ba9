"""Negative transfer: whether a plugin is better than what needs no pretrained weights at all.

Looked at are the validation rows alone. The rivals are kernel ridge regression on the composition
and on a network of the same shape with random weights (:mod:`matxfer.transfer.baselines`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.transfer.activations import Activations
from matxfer.transfer.baselines import composition_features, untrained
from matxfer.transfer.features import GAUSSIAN_PROCESS_ROWS, fit_features
from matxfer.transfer.strategies import run_strategy

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.strategies import Trial
    from matxfer.transfer.task import Task


def checked(
    task: Task,
    config: FinetuneConfig,
    trials: list[Trial],
    on_trial: Callable[[Trial], None] | None = None,
) -> tuple[Trial, list[Trial], dict[str, Any]]:
    """Compare the best trial with what no pretraining gives; where that is better, try scratch.

    A network from random weights is tried where no option speaks against it: a frozen depth, layers
    or a retention that were asked for. What is best on the validation rows is kept.

    Returns
    -------
    trial, trials, facts
        The best trial, all of them, and ``facts``: ``negative``, the validation errors
        ``transferred``, ``untrained``, ``composition`` and, if it was tried, ``scratch``, and a
        ``message``.
    """
    best = min(trials, key=lambda trial: trial.error)
    small = _without_test_rows(task, config.seed)
    rivals = {
        "composition": composition_error(small),
        "untrained": untrained_error(small, config),
    }
    name = min(rivals, key=lambda rival: rivals[rival])
    negative = not best.error < rivals[name]
    facts: dict[str, Any] = {"negative": negative, "transferred": best.error, **rivals}
    told = {"composition": "the composition alone", "untrained": "the same network untrained"}
    facts["message"] = (
        f"validation MAE {best.error:.4g} of the best plugin of {task.base.name}, "
        f"{rivals[name]:.4g} of kernel ridge regression on {told[name]}"
    )
    free = config.freeze is None and config.layers is None and config.retain == "none"
    if negative and free:
        scratch = run_strategy(task, replace(config, strategy="scratch"))
        if on_trial is not None:
            on_trial(scratch)
        trials = [*trials, scratch]
        facts["scratch"] = scratch.error
        facts["message"] += f", {scratch.error:.4g} of the same network trained from scratch"
        best = min(trials, key=lambda trial: trial.error)
    return best, trials, facts


def untrained_error(task: Task, config: FinetuneConfig) -> float:
    """Return the validation error of kernel ridge regression on a network of random weights."""
    network = untrained(task.base)
    same = replace(task, base=network, activations=Activations(network, task.graphs), _axes={})
    simple = replace(config, strategy="features", features="kernel_ridge", layers=None)
    return run_strategy(same, simple).error


def composition_error(task: Task, part: str = "val") -> float:
    """Return the error of kernel ridge regression on the composition in a part of the rows."""
    scaler, features = task.scaler(None), torch.from_numpy(composition_features(task.graphs))
    targets = task.targets(scaler, None).astype(np.float64)
    train, val = task.parts["train"], task.parts["val"]
    readout = fit_features(
        "kernel_ridge", features.float(), targets, train, val, weights=task.weights
    )
    output = readout(features.float(), None).mean(0).double().numpy()
    zero = scaler.normalised_fitted(np.zeros(len(output)), task.graphs)
    values = scaler.to_unit((output - zero) * float(scaler.std))
    rows = task.parts[part]
    return task.mean(np.abs(values - task.values)[rows], rows)


def _without_test_rows(task: Task, seed: int) -> Task:
    """Return a task of the validation rows and of no more training rows than take seconds."""
    train, val = task.parts["train"], task.parts["val"]
    if len(train) > GAUSSIAN_PROCESS_ROWS:
        rng = np.random.default_rng(seed)
        train = np.sort(rng.choice(train, GAUSSIAN_PROCESS_ROWS, replace=False))
    rows = np.concatenate([train, val])
    parts: dict[str, NDArray[np.int64]] = {
        "train": np.arange(len(train)),
        "val": np.arange(len(train), len(rows)),
        "test": np.zeros(0, dtype=np.int64),
    }
    graphs = task.graphs.select(rows)
    return replace(
        task,
        graphs=graphs,
        activations=Activations(task.base, graphs),
        values=task.values[rows],
        parts=parts,
        weights=task.weights_of(rows),
        _axes={},
    )
