"""Training a readout alone: what it reads never changes, so an epoch is a few small products.

The same loss, rates, clipping, averaging and stopping as :mod:`matxfer.transfer.training`, without
a training library around each step, which would take longer than the step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from matxfer.nn.plugin_head import PluginHead
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.rows import PluginBatch, PluginRows

#: Largest gradient norm of a layer or of the readout.
CLIP_NORM = 1.0
#: Passes at most of a readout on frozen layers.
READOUT_EPOCHS = 100
#: Rows of a validation batch.
VALIDATION_BATCH = 128


@dataclass(frozen=True, slots=True)
class Fit:
    """How a training went.

    Attributes
    ----------
    best_epoch
        The epoch of the smallest validation error, whose weights are kept; 0 is the first.
    seconds_per_epoch
        Validation included.
    history
        Mean absolute validation error after each epoch, on the fitted scale.
    train_history
        The same of the training rows, mean over the steps of each epoch and over the members.
    """

    best_epoch: int
    seconds_per_epoch: float
    history: list[float] = field(default_factory=list)
    train_history: list[float] = field(default_factory=list)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup_fraction: float
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return a schedule of all rates: up from a tenth, then down to zero as a cosine."""
    steps = max(steps, 2)
    warmup = max(int(steps * warmup_fraction), 1)

    def factor(step: int) -> float:
        if step < warmup:
            return 0.1 + 0.9 * step / warmup
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_readout(
    plugin: Plugin, train: PluginRows, val: PluginRows, config: FinetuneConfig
) -> Fit:
    """Train a plugin's readout on fixed inputs and put the weights of its best epoch in place.

    Parameters
    ----------
    plugin
        None of whose layers is trained.
    train, val
        Rows with the readout's inputs.
    config
        See :class:`~matxfer.transfer.config.FinetuneConfig`.
    """
    head = plugin.head
    parameters = list(head.readout.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.head_learning_rate, weight_decay=config.weight_decay, fused=True
    )
    epochs = config.epochs or READOUT_EPOCHS
    steps = epochs * math.ceil(len(train) / config.batch_size)
    schedule = warmup_cosine(optimizer, steps, config.warmup_fraction)
    order = torch.Generator().manual_seed(config.seed)
    held = list(_in_order(val))
    averaged: list[Tensor] = []
    best: list[Tensor] = []
    history: list[float] = []
    train_history: list[float] = []
    best_epoch = 0
    started = time.monotonic()
    for epoch in range(epochs):
        losses: list[Tensor] = []
        for index in torch.randperm(len(train), generator=order).split(config.batch_size):
            batch = train.batch(train.rows[index.numpy()])
            loss = batch.mean((_outputs(head, batch) - batch.targets).abs())
            losses.append(loss.detach())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimizer.step()
            schedule.step()
            if config.average:
                averaged = averaged or _values(parameters)
                for mean, parameter in zip(averaged, parameters, strict=True):
                    mean.lerp_(parameter.detach(), 1 - config.average)
        present = _values(parameters)
        kept = averaged or present
        _put(parameters, kept)
        with torch.no_grad():
            errors = [(_outputs(head, b).mean(0) - b.targets).abs() for b in held]
            size = sum(len(error) for error in errors)
            error = sum(len(e) * b.mean(e) for e, b in zip(errors, held, strict=True)) / size
        history.append(float(error * head.scaler.std))
        train_history.append(float(torch.stack(losses).mean() * head.scaler.std))
        if not best or history[-1] < history[best_epoch]:
            best, best_epoch = [value.clone() for value in kept], epoch
        elif epoch - best_epoch >= config.patience:
            break
        _put(parameters, present)
    _put(parameters, best)
    plugin.eval()
    seconds = (time.monotonic() - started) / len(history)
    return Fit(best_epoch, seconds, history, train_history)


def _in_order(rows: PluginRows) -> Iterator[PluginBatch]:
    for first in range(0, len(rows), VALIDATION_BATCH):
        yield rows.batch(rows.rows[first : first + VALIDATION_BATCH])


def _outputs(head: PluginHead, batch: PluginBatch) -> Tensor:
    assert batch.inputs is not None, "a readout alone has fixed inputs"
    outputs: Tensor = head(batch.inputs, batch.graphs)
    return outputs


def _values(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _put(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
