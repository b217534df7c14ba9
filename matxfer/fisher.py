"""Fisher information of a model: how much each weight matters to each source property.

For regression with Gaussian noise of spread σ the Fisher information of one sample is
F = Jᵀ J / σ², with J the gradient of the scalar **output**; its diagonal is the squared gradient,
sample by sample, and needs no labels (Kunstner et al., NeurIPS 2019). Squaring a gradient that
was averaged over a batch, or that of a loss, measures something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from matxfer.data.batch import GraphBatch
    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model


def fisher_diagonal(
    model: Model,
    graphs: PackedGraphs,
    rows: NDArray[np.int64],
    noise: dict[str, float],
) -> dict[str, Tensor]:
    """Return the mean diagonal Fisher information per sample, one set of tensors per property.

    Parameters
    ----------
    model
        The model; its outputs are normalised (unit spread over the training set).
    graphs, rows
        Graphs to average over.
    noise
        For each property σ, the spread of its residuals in normalised units.

    Returns
    -------
    dict
        ``"<property>/<backbone parameter>"`` → tensor of the parameter's shape. Only backbone
        weights: the source heads are not trained by a plugin, so nothing pulls on them.
    """

    def outputs(batch: GraphBatch) -> dict[str, Tensor]:
        node = model.backbone(batch).node
        return {task: head(node, batch) for task, head in model.heads.items()}

    was_training = model.training
    model.eval()
    try:
        return output_fisher(model.backbone, outputs, graphs, rows, noise)
    finally:
        model.train(was_training)


def output_fisher(
    backbone: nn.Module,
    outputs: Callable[[GraphBatch], dict[str, Tensor]],
    graphs: PackedGraphs,
    rows: NDArray[np.int64],
    noise: dict[str, float],
) -> dict[str, Tensor]:
    """Return the same for any outputs that depend on a backbone.

    Parameters
    ----------
    backbone
        Its parameters are what the information is about.
    outputs
        Maps a batch of one graph to normalised outputs (1,), by task; differentiable.
    graphs, rows, noise
        As in :func:`fisher_diagonal`.
    """
    flags = [p.requires_grad for p in backbone.parameters()]
    named = dict(backbone.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_(True)
    total = {f"{task}/{name}": torch.zeros_like(p) for task in noise for name, p in named.items()}
    try:
        for row in rows:
            with torch.enable_grad():
                found = {t: o.sum() for t, o in outputs(graphs.batch(np.array([row]))).items()}
            _accumulate(total, found, named, noise)
    finally:
        for parameter, flag in zip(backbone.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return {name: value / max(len(rows), 1) for name, value in total.items()}


def _accumulate(
    total: dict[str, Tensor],
    outputs: dict[str, Tensor],
    named: dict[str, nn.Parameter],
    noise: dict[str, float],
) -> None:
    """Add the squared output gradients of one sample, divided by σ²."""
    last = list(outputs)[-1]
    for task, output in outputs.items():
        gradients = torch.autograd.grad(
            output, list(named.values()), retain_graph=task != last, allow_unused=True
        )
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:  # an isolated atom has no bonds to differentiate
                total[f"{task}/{name}"].add_(gradient.square() / noise[task] ** 2)


def total_fisher(per_task: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum the Fisher information over the properties, by backbone parameter."""
    total: dict[str, Tensor] = {}
    for key, value in per_task.items():
        name = key.split("/", 1)[1]
        total[name] = total[name] + value if name in total else value.clone()
    return total


def concentration(fisher: dict[str, Tensor]) -> dict[str, float]:
    """Say how unevenly the information lies: share of the trace per tensor and in the top 0.1 %.

    Look at it before choosing a strength: a penalty that a handful of weights carry leaves the
    others free.
    """
    flat = torch.cat([value.flatten() for value in fisher.values()]).double()
    trace = float(flat.sum())
    if trace == 0:
        return {"trace": 0.0}
    top = max(1, len(flat) // 1000)
    shares = {name: float(value.double().sum()) / trace for name, value in fisher.items()}
    return {"trace": trace, "top_0.1_percent": float(flat.topk(top).values.sum()) / trace, **shares}
