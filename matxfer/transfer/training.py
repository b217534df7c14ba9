"""The training loop of a plugin: batches from the prefix cache, loss, rates, early stopping."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch
from lightning.pytorch import callbacks

from matxfer.data.loader import LabelledBatch, LabelledGraphs, ordered_loader, shuffled_loader
from matxfer.runtime import quiet_lightning
from matxfer.transfer.freezing import parameter_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.nn.backbone import Features
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.ewc import EWCPenalty
    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.prefix import PrefixCache


#: Largest gradient norm of a layer or of the readout.
CLIP_NORM = 1.0


@dataclass(slots=True, eq=False)
class PrefixBatch:
    """A labelled batch with its features after the frozen layers (``None`` for K = 0)."""

    labelled: LabelledBatch
    prefix: Features | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PrefixBatch:
        """Return the batch on another device."""
        prefix = self.prefix
        if prefix is not None:
            node, edge = prefix.node, prefix.edge
            prefix = type(prefix)(
                node.to(device, non_blocking=non_blocking),
                edge.to(device, non_blocking=non_blocking),
            )
        return PrefixBatch(self.labelled.to(device, non_blocking), prefix)


class PrefixedGraphs(LabelledGraphs):
    """Labelled graphs whose batches start from the prefix cache."""

    def __init__(
        self, cache: PrefixCache, rows: NDArray[np.int64], targets: NDArray[np.float32]
    ) -> None:
        super().__init__(cache.graphs, rows, targets)
        self.cache = cache

    def __getitems__(self, indices: list[int]) -> PrefixBatch:  # type: ignore[override]
        """Gather a batch and its cached features."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        graphs, prefix = self.cache.batch(rows)
        return PrefixBatch(self.label(graphs, rows), prefix)


class FinetuneModule(L.LightningModule):
    """Mean absolute error of the normalised target, plus the penalty that retains the source.

    Parameters
    ----------
    plugin
        What is trained.
    config
        See :class:`FinetuneConfig`.
    penalty
        Added to the loss, if any.
    """

    def __init__(
        self, plugin: Plugin, config: FinetuneConfig, penalty: EWCPenalty | None = None
    ) -> None:
        super().__init__()
        self.plugin, self.config = plugin, config
        # Registered here so that Lightning moves and trains them; the plugin is no module.
        self.backbone, self.head, self.penalty = plugin.backbone, plugin.head, penalty
        self.best = float("inf")
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self._errors: list[Tensor] = []

    def _output(self, batch: PrefixBatch) -> Tensor:
        graphs = batch.labelled.graphs
        output: Tensor = self.head(self.plugin.features(graphs, batch.prefix).node, graphs)
        return output

    def training_step(self, batch: PrefixBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        loss = (self._output(batch) - batch.labelled.targets[:, 0]).abs().mean()
        return loss if self.penalty is None else loss + self.penalty()

    def validation_step(self, batch: PrefixBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Collect absolute errors."""
        self._errors.append((self._output(batch) - batch.labelled.targets[:, 0]).abs())

    def on_validation_epoch_end(self) -> None:
        """Keep the weights of the best epoch in memory: they are small."""
        error = torch.cat(self._errors).mean()
        self._errors = []
        self.log("val_error", error, prog_bar=True)
        if float(error) < self.best:
            self.best, self.best_epoch = float(error), self.current_epoch
            trained = {**_named(self.backbone, "backbone."), **_named(self.head, "head.")}
            self.best_state = {name: p.detach().clone() for name, p in trained.items()}

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
        """AdamW with a rate per layer; short warm-up, then a cosine to zero."""
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
        warmup = max(total // 50, 1)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup),
            ],
            milestones=[warmup],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _named(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{n}": p for n, p in module.named_parameters() if p.requires_grad}


def train_plugin(
    module: FinetuneModule,
    cache: PrefixCache,
    rows: dict[str, NDArray[np.int64]],
    targets: NDArray[np.float32],
) -> float:
    """Train, restore the best epoch and return the seconds that an epoch took."""
    config = module.config
    train = shuffled_loader(
        PrefixedGraphs(cache, rows["train"], targets), config.batch_size, config.seed
    )
    val = ordered_loader(PrefixedGraphs(cache, rows["val"], targets), 128)
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=config.epochs,
            callbacks=[callbacks.EarlyStopping("val_error", patience=config.patience)],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            accelerator="cpu" if module.plugin.base.device.type == "cpu" else "auto",
            devices=1,
        )
        started = time.monotonic()
        trainer.fit(module, train, val)
    seconds = (time.monotonic() - started) / max(trainer.current_epoch, 1)
    module.cpu().restore_best()
    return seconds
