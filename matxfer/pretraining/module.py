"""The training step of pretraining, its validation, its optimiser and its loaders."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch

from matxfer.data.loader import LabelledGraphs, ordered_loader, shuffled_loader

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

    from matxfer.data.loader import LabelledBatch
    from matxfer.model import Model
    from matxfer.pretraining.config import PretrainConfig
    from matxfer.pretraining.sources import SourceData


class PretrainModule(L.LightningModule):
    """Mean absolute error of normalised outputs, summed over the properties with their weights.

    Parameters
    ----------
    model
        The network to train.
    config
        See :class:`matxfer.pretraining.config.PretrainConfig`.
    """

    task_weights: Tensor

    def __init__(self, model: Model, config: PretrainConfig) -> None:
        super().__init__()
        self.model = model
        self.training_config = config.training
        weights = [config.training.task_weights.get(name, 1.0) for name in model.heads]
        self.register_buffer("task_weights", torch.tensor(weights), persistent=False)
        self._sums: Tensor | None = None

    def _outputs(self, batch: LabelledBatch) -> Tensor:
        node = self.model.backbone(batch.graphs).node
        return torch.stack([head(node, batch.graphs) for head in self.model.heads.values()], 1)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        known = batch.targets.isfinite()
        error = (self._outputs(batch).float() - batch.targets.nan_to_num()).abs() * known
        per_task = error.sum(0) / known.sum(0).clamp(min=1)
        loss = (per_task * self.task_weights).sum()
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.targets))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the sums of the epoch."""
        self._sums = torch.zeros(2, len(self.model.heads), device=self.device)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Add up absolute errors, in full precision whatever the training precision."""
        with torch.autocast(self.device.type, enabled=False):
            outputs = self._outputs(batch)
        known = batch.targets.isfinite()
        error = (outputs - batch.targets.nan_to_num()).abs() * known
        assert self._sums is not None
        self._sums += torch.stack([error.sum(0), known.sum(0).to(error.dtype)])

    def on_validation_epoch_end(self) -> None:
        """Log the mean absolute error of each property on its fitted scale, and the loss."""
        assert self._sums is not None
        sums = cast("Tensor", self.all_gather(self._sums)).reshape(-1, *self._sums.shape).sum(0)
        mae = sums[0] / sums[1].clamp(min=1)
        for head, value in zip(self.model.heads.values(), mae, strict=True):
            scaled = value * head.scaler.std
            self.log(f"val_mae/{head.prop.name}", scaled, rank_zero_only=True)
        self.log("val_loss", (mae * self.task_weights).sum(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW; linear warm-up, then a cosine to zero over all steps of the run."""
        options = self.training_config
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = max(int(options.warmup_fraction * total), 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SourceModule(L.LightningDataModule):
    """Loaders of the source data; each process of a distributed run reads its own share."""

    def __init__(self, data: SourceData, model: Model, batch_size: int, seed: int) -> None:
        super().__init__()
        targets = [h.scaler.normalised(data.values[n], data.graphs) for n, h in model.heads.items()]
        self.targets = np.stack(targets, axis=1)
        self.data, self.batch_size, self.seed = data, batch_size, seed

    def _dataset(self, part: str) -> LabelledGraphs:
        return LabelledGraphs(self.data.graphs, self.data.rows(part), self.targets)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[LabelledBatch]:
        """Return shuffled training batches."""
        return shuffled_loader(self._dataset("train"), self.batch_size, self.seed, *self._place())

    def val_dataloader(self) -> DataLoader[LabelledBatch]:
        """Return validation batches in order."""
        return ordered_loader(self._dataset("val"), self.batch_size, *self._place())
