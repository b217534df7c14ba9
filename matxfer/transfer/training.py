"""The training loop of a plugin: batches from kept activations, loss, rates, early stopping."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch
from lightning.pytorch import callbacks
from torch.utils.data import DataLoader, Dataset

from matxfer.data.batch import GraphBatch
from matxfer.nn.backbone import Features
from matxfer.runtime import quiet_lightning
from matxfer.transfer.freezing import parameter_groups, trainable_blocks
from matxfer.transfer.retention import source_head_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.retention import Retention
    from matxfer.transfer.task import Task

#: Largest gradient norm of a layer or of the readout.
CLIP_NORM = 1.0
#: Passes at most, of a readout on frozen layers and of layers.
READOUT_EPOCHS, LAYER_EPOCHS = 100, 40


@dataclass(slots=True, eq=False)
class PluginBatch:
    """What one step needs.

    Attributes
    ----------
    graphs
        B graphs; without their edges where no layer is run.
    targets
        Normalised, (B,).
    inputs
        Of the readout, where no layer is run.
    prefix, below
        Features after the frozen layers, and node features of those that the head reads.
    before
        What the source heads said under the base's weights, (T, B), if it is needed.
    """

    graphs: GraphBatch
    targets: Tensor
    inputs: Tensor | None = None
    prefix: Features | None = None
    below: dict[int, Tensor] | None = None
    before: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PluginBatch:
        """Return the batch on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor | GraphBatch):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, Features):
                return Features(moved(value.node), moved(value.edge))
            if isinstance(value, dict):
                return {k: moved(v) for k, v in value.items()}
            return value

        return PluginBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})


class PluginRows(Dataset[PluginBatch]):
    """Rows of a task; a list of indices is fetched as one gather.

    Parameters
    ----------
    task, plugin
        Where the features come from, and which the plugin needs.
    rows
        Rows of the task, (n,).
    targets
        Normalised targets of all rows, (G,).
    inputs
        What the readout reads of all rows, where the plugin runs no layer.
    before
        Whether batches say what the source heads said.
    """

    def __init__(
        self,
        task: Task,
        plugin: Plugin,
        rows: NDArray[np.int64],
        targets: NDArray[np.float32],
        inputs: Tensor | None = None,
        *,
        before: bool = False,
    ) -> None:
        self.task, self.plugin, self.rows = task, plugin, rows
        self.targets = torch.from_numpy(targets)
        self.inputs, self.before = inputs, before

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> PluginBatch:
        """Gather a batch (the hook that PyTorch's fetcher calls with a list of indices)."""
        return self.batch(self.rows[np.asarray(indices, dtype=np.int64)])

    def batch(self, rows: NDArray[np.int64]) -> PluginBatch:
        """Gather the batch of these rows of the task."""
        task, plugin, targets = self.task, self.plugin, self.targets[torch.from_numpy(rows)]
        if self.inputs is not None:
            if plugin.head.readout.kind == "atomwise":
                graphs = task.graphs.batch(rows, with_edges=False)
                inputs = self.inputs[task.activations.node_rows(rows)]
                return PluginBatch(graphs, targets, inputs)
            return PluginBatch(_nothing(len(rows)), targets, self.inputs[torch.from_numpy(rows)])
        graphs = task.graphs.batch(rows)
        prefix, below = task.activations.start(rows, plugin.depth, plugin.head.layers)
        before = None
        if self.before:
            last = task.activations.node(task.base.backbone.n_layers)
            with torch.no_grad():
                node = last[task.activations.node_rows(rows)]
                before = source_head_outputs(task.base, node, graphs)
        return PluginBatch(graphs, targets, None, prefix, below, before)


def _nothing(n: int) -> GraphBatch:
    empty = torch.zeros(0, dtype=torch.long)
    edges = torch.zeros(2, 0, dtype=torch.long)
    return GraphBatch(empty, torch.zeros(0), edges, torch.zeros(0, 3), empty, n)


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
        self.best = float("inf")
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self.averaged: dict[str, Tensor] = {}
        self._errors: list[Tensor] = []

    def outputs(self, batch: PluginBatch) -> Tensor:
        """Return the normalised outputs of all members, (M, B)."""
        inputs = batch.inputs
        if inputs is None:
            nodes = self.plugin.nodes(batch.graphs, batch.prefix, batch.below)
            inputs = self.head.inputs(nodes, batch.graphs)
        out: Tensor = self.head(inputs, batch.graphs)
        return out

    def training_step(self, batch: PluginBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        loss = (self.outputs(batch) - batch.targets).abs().mean()
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
            self._errors.append((self.outputs(batch).mean(0) - batch.targets).abs())

    def on_validation_epoch_end(self) -> None:
        """Keep the weights of the best epoch in memory: they are small."""
        error = torch.cat(self._errors).mean()
        self._errors = []
        self.log("val_error", error, prog_bar=True)
        if not self.best_state or float(error) < self.best:
            self.best, self.best_epoch = float(error), self.current_epoch
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
            head_learning_rate=config.head_learning_rate,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
        optimizer = torch.optim.AdamW(groups)
        total = max(int(self.trainer.estimated_stepping_batches), 2)
        warmup = max(int(total * config.warmup_fraction), 1)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total - warmup, 1)),
            ],
            milestones=[warmup],
        )
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


@dataclass(frozen=True, slots=True)
class Fit:
    """How a training went: the epoch of the best validation error, seconds per epoch."""

    best_epoch: int
    seconds_per_epoch: float


def train_plugin(
    task: Task,
    plugin: Plugin,
    targets: NDArray[np.float32],
    config: FinetuneConfig,
    retention: Retention | None = None,
) -> Fit:
    """Train a plugin and put the weights of its best epoch in place."""
    distills = retention is not None and retention.distills
    loaders = []
    inputs = None
    if plugin.runs_no_layer and not distills:  # the same in every epoch
        inputs = task.inputs(plugin.head.readout.kind, plugin.head.layers)
    for part, size, shuffle in (("train", config.batch_size, True), ("val", 128, False)):
        before = distills and part == "train"
        rows = PluginRows(task, plugin, task.parts[part], targets, inputs, before=before)
        order = torch.Generator().manual_seed(config.seed)
        loaders.append(
            DataLoader(rows, size, shuffle=shuffle, generator=order, collate_fn=_as_it_is)
        )
    module = FinetuneModule(plugin, config, retention)
    alone = plugin.depth == task.base.backbone.n_layers
    hooks: list[L.Callback] = [callbacks.EarlyStopping("val_error", patience=config.patience)]
    if config.unfreeze_every and not alone:
        hooks.append(GradualUnfreezing(config.unfreeze_every))
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=config.epochs or (READOUT_EPOCHS if alone else LAYER_EPOCHS),
            callbacks=hooks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            accelerator="cpu" if task.base.device.type == "cpu" else "auto",
            devices=1,
        )
        started = time.monotonic()
        trainer.fit(module, loaders[0], loaders[1])
    seconds = (time.monotonic() - started) / max(trainer.current_epoch, 1)
    module.cpu().restore_best()
    plugin.eval()
    return Fit(module.best_epoch, seconds)


def _as_it_is(batch: Any) -> Any:
    return batch
