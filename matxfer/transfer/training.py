"""Training a plugin's layers: loss, a rate per layer, gradual unfreezing, early stopping."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch
from lightning.pytorch import callbacks
from torch.utils.data import DataLoader

from matxfer.invariance.callback import DomainInvariance, crystal_means
from matxfer.runtime import quiet_lightning
from matxfer.terminal import person_looks
from matxfer.transfer.freezing import parameter_groups, trainable_blocks
from matxfer.transfer.readout_training import (
    CLIP_NORM,
    VALIDATION_BATCH,
    Fit,
    train_readout,
    warmup_cosine,
)
from matxfer.transfer.rows import PluginBatch, PluginRows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.retention import Retention
    from matxfer.transfer.task import Task

#: Passes at most of pretrained layers, and of those under a readout that was trained before.
LAYER_EPOCHS, PROBED_EPOCHS = 40, 12
#: Share of the readout's rate once it has been trained on the frozen network.
PROBED = 0.2
_PARTS = ("train", "val")


class FinetuneModule(L.LightningModule):
    """Mean absolute error of the normalised target, plus the term that retains the source.

    Parameters
    ----------
    plugin
        What is trained.
    config
        See :class:`FinetuneConfig`.
    retention
        Added to the loss, if any.
    """

    def __init__(
        self, plugin: Plugin, config: FinetuneConfig, retention: Retention | None = None
    ) -> None:
        super().__init__()
        self.plugin, self.config, self.retention = plugin, config, retention
        # Registered here so that Lightning moves and trains them; the plugin is no module.
        self.backbone, self.head = plugin.backbone, plugin.head
        self.best_epoch = 0
        self.history: list[float] = []
        self.train_history: list[float] = []
        self.best_state: dict[str, Tensor] = {}
        self.averaged: dict[str, Tensor] = {}
        self._errors: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._seen: tuple[PluginBatch | None, list[Tensor]] = (None, [])

    def nodes(self, batch: PluginBatch) -> list[Tensor]:
        """Return the node features (N, F) of the layers read; those of the last batch are kept."""
        if self._seen[0] is not batch:
            self._seen = batch, self.plugin.nodes(batch.graphs, batch.prefix, batch.below)
        return self._seen[1]

    def outputs(self, batch: PluginBatch) -> Tensor:
        """Return the normalised outputs of all members, (M, B)."""
        inputs = batch.inputs
        if inputs is None:
            inputs = self.head.inputs(self.nodes(batch), batch.graphs)
        out: Tensor = self.head(inputs, batch.graphs)
        return out

    def training_step(self, batch: PluginBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        loss = batch.mean((self.outputs(batch) - batch.targets).abs())
        self._losses.append(loss.detach())
        if self.retention is None:
            return loss
        node = None
        if self.retention.distills:
            node = self.plugin.features(batch.graphs, batch.prefix).node
        return loss + self.retention(batch.graphs, node, batch.before)

    def on_train_batch_end(self, *_: Any) -> None:
        """Follow the weights with their running average."""
        if self.config.average:
            for name, value in self._trained().items():
                self.averaged.setdefault(name, value.detach().clone()).lerp_(
                    value.detach(), 1 - self.config.average
                )

    def validation_step(self, batch: PluginBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Collect absolute errors of the members' mean."""
        with self._averaged_weights():
            error = (self.outputs(batch).mean(0) - batch.targets).abs()
        self._errors.append(error if batch.weights is None else error * batch.weights)

    def on_validation_epoch_end(self) -> None:
        """Keep the weights of the best epoch in memory: they are small."""
        error = torch.cat(self._errors).mean()
        self._errors = []
        self.log("val_error", error, prog_bar=True)
        self.history.append(float(error * self.head.scaler.std))
        self.train_history.append(float(torch.stack(self._losses).mean() * self.head.scaler.std))
        self._losses = []
        if not self.best_state or self.history[-1] < self.history[self.best_epoch]:
            self.best_epoch = self.current_epoch
            kept = self.averaged or self._trained()
            self.best_state = {name: p.detach().clone() for name, p in kept.items()}

    def _trained(self) -> dict[str, Tensor]:
        blocks = trainable_blocks(self.backbone, self.plugin.depth)
        wanted = {id(p) for _, block in blocks for p in block.parameters()}
        wanted |= {id(p) for p in self.head.parameters()}
        return {name: p for name, p in self.named_parameters() if id(p) in wanted}

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if not self.averaged:
            yield
            return
        trained = self._trained()
        present = {name: p.detach().clone() for name, p in trained.items()}
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(self.averaged[name])
            yield
            for name, p in trained.items():
                p.copy_(present[name])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,  # noqa: ARG002 - Lightning's signature
        gradient_clip_algorithm: str | None = None,  # noqa: ARG002
    ) -> None:
        """Clip each layer and the readout on its own.

        Clipped together, a stiff penalty on the layers would shrink the readout's steps with
        them, and the readout, on which nothing pulls, would not learn.
        """
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], CLIP_NORM)

    def restore_best(self) -> None:
        """Put the weights of the best epoch back."""
        self.load_state_dict(self.best_state, strict=False)

    def configure_optimizers(self) -> Any:
        """AdamW with a rate per layer; warm-up, then a cosine to zero."""
        config = self.config
        groups = parameter_groups(
            self.backbone,
            self.head,
            self.plugin.depth,
            learning_rate=config.learning_rate,
            head_learning_rate=config.head_learning_rate * (PROBED if config.probe_first else 1.0),
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
        optimizer = torch.optim.AdamW(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, config.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class GradualUnfreezing(callbacks.BaseFinetuning):
    """Frees the layers above the frozen depth one by one, from the top (Howard & Ruder 2018).

    All of them are in the optimiser from the start, where a weight without gradient stays put, so
    the schedule of the rates is one for all.

    Parameters
    ----------
    every
        Epochs between two layers; in the first ``every`` epochs the readout is alone.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        """Freeze all layers."""
        for _, block in self._blocks(pl_module):
            self.freeze(block, train_bn=False)

    def finetune_function(
        self,
        pl_module: L.LightningModule,
        epoch: int,
        optimizer: torch.optim.Optimizer,  # noqa: ARG002 - Lightning's signature
    ) -> None:
        """Free the layer whose turn it is."""
        turn, rest = divmod(epoch, self.every)
        blocks = self._blocks(pl_module)
        if rest == 0 and 1 <= turn <= len(blocks):
            self.make_trainable(blocks[-turn][1])

    @staticmethod
    def _blocks(module: L.LightningModule) -> list[tuple[str, torch.nn.Module]]:
        assert isinstance(module, FinetuneModule)
        return trainable_blocks(module.backbone, module.plugin.depth)


def train_plugin(
    task: Task,
    plugin: Plugin,
    targets: NDArray[np.float32],
    config: FinetuneConfig,
    retention: Retention | None = None,
) -> Fit:
    """Train a plugin and put the weights of its best epoch in place.

    A readout alone is trained by :func:`~matxfer.transfer.readout_training.train_readout`.
    """
    distills = retention is not None and retention.distills
    if plugin.runs_no_layer:
        inputs = task.inputs(plugin.head.readout.kind, plugin.head.layers)
        train, val = (PluginRows(task, plugin, task.parts[p], targets, inputs) for p in _PARTS)
        return train_readout(plugin, train, val, config)
    loaders = []
    for part, size, shuffle in zip(
        _PARTS, (config.batch_size, VALIDATION_BATCH), (True, False), strict=True
    ):
        before = distills and part == "train"
        rows = PluginRows(task, plugin, task.parts[part], targets, before=before)
        order = torch.Generator().manual_seed(config.seed)
        loaders.append(
            DataLoader(rows, size, shuffle=shuffle, generator=order, collate_fn=_as_it_is)
        )
    module = FinetuneModule(plugin, config, retention)
    hooks: list[L.Callback] = [callbacks.EarlyStopping("val_error", patience=config.patience)]
    if config.invariant != "none":
        hooks.append(_invariance(task, plugin, config))
    if config.unfreeze_every:
        hooks.append(GradualUnfreezing(config.unfreeze_every))
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=config.epochs or (PROBED_EPOCHS if config.probe_first else LAYER_EPOCHS),
            callbacks=hooks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=person_looks(),
            num_sanity_val_steps=0,
            accelerator="cpu" if task.base.device.type == "cpu" else "auto",
            devices=1,
        )
        started = time.monotonic()
        trainer.fit(module, loaders[0], loaders[1])
    seconds = (time.monotonic() - started) / max(trainer.current_epoch, 1)
    module.cpu().restore_best()
    plugin.eval()
    return Fit(module.best_epoch, seconds, module.history, module.train_history)


def _invariance(task: Task, plugin: Plugin, config: FinetuneConfig) -> L.Callback:
    """Return what makes features resemble those of the task's candidates."""
    assert task.candidates is not None, "structures to resemble are given"
    graphs, kept = task.candidates.graphs, task.candidates.activations
    usable = (graphs.nodes_per_graph > 0) & ~graphs.has_elements_outside(task.base.elements)
    rows = np.flatnonzero(usable)

    def batch(step: int) -> PluginBatch:
        draw = np.random.default_rng((config.seed, step))
        index = draw.choice(rows, min(config.batch_size, len(rows)), replace=False)
        prefix, below = kept.start(index, plugin.depth, plugin.head.layers)
        return PluginBatch(graphs.batch(index), torch.zeros(0), None, prefix, below)

    def features(module: FinetuneModule, of: PluginBatch) -> Tensor:
        """Return the mean over the atoms of the highest layer read, (B, F)."""
        highest = max(zip(plugin.head.layers, module.nodes(of), strict=True), key=lambda p: p[0])
        return crystal_means(highest[1], of.graphs)

    return DomainInvariance(
        config.invariant, batch, features, config.invariant_strength, config.seed
    )


def _as_it_is(batch: Any) -> Any:
    return batch
