"""Choosing the scale on which a target is fitted: as it is, or its logarithm."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.properties import apply_transform, property_of
from matxfer.transfer.features import GAUSSIAN_PROCESS_ROWS
from matxfer.transfer.strategies import TOLERANCE, run_strategy

if TYPE_CHECKING:
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.task import Task

#: Transforms that are of one shape: of each line one is tried, the property's own if it is there.
SHAPES = (("identity", "nonnegative"), ("log", "log10"), ("log1p",))


def choose_transform(task: Task, config: FinetuneConfig) -> tuple[Task, dict[str, Any]]:
    """Return the task on the scale that suits it, and what was tried.

    Tried are those of :data:`SHAPES` whose domain holds all training and validation values, each by
    a simple model on the fingerprints of the frozen layers. Another than the property's own has to
    lower the mean absolute error on the validation rows, in the property's unit, by more than
    2 %: less is chance.

    Parameters
    ----------
    task
        Without a transform.

    Returns
    -------
    task, trials
        ``trials`` says ``chosen``, ``why``, ``tried`` (transform → validation error) and
        ``left_out`` (transform → number of values outside its domain).
    """
    own = property_of(task.prop.name).transform
    names = [own if own in shape else shape[0] for shape in SHAPES]
    rows = np.concatenate([task.parts["train"], task.parts["val"]])
    outside = {t: int(np.isnan(apply_transform(t, task.values[rows])).sum()) for t in names}
    few = len(task.parts["train"]) <= GAUSSIAN_PROCESS_ROWS
    simple = replace(config, strategy="features", features="kernel_ridge" if few else "ridge")
    tasks = {
        t: replace(task, prop=replace(task.prop, transform=t)) for t in names if not outside[t]
    }
    tried = {t: run_strategy(each, simple).error for t, each in tasks.items()}
    best = min(tried, key=lambda t: tried[t])
    plain = own if own in tried else names[0]
    chosen = best if tried[best] < tried[plain] * (1 - TOLERANCE) else plain
    errors = ", ".join(f"{t} {error:.4g}" for t, error in tried.items())
    reason = (
        f"validation MAE of {simple.simple_model} on fingerprints: {errors}"
        if len(tried) > 1
        else "the only one whose domain holds all values"
    )
    left_out = {t: count for t, count in outside.items() if count}
    facts = {"chosen": chosen, "why": reason, "tried": tried, "left_out": left_out}
    return tasks[chosen], facts
