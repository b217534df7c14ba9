"""The training step of pretraining, its validation, its optimiser and its loaders."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from matxfer.data.batch import node_weights
from matxfer.data.loader import LabelledGraphs, ordered_loader, shuffled_loader
from matxfer.data.resident import ResidentGraphs
from matxfer.nn.readout import VectorReadout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.utils.data import DataLoader

    from matxfer.data.batch import GraphBatch, GraphLike
    from matxfer.data.loader import LabelledBatch
    from matxfer.model import Model
    from matxfer.nn.backbone import Features
    from matxfer.pretraining.config import PretrainConfig
    from matxfer.pretraining.sources import SourceData


#: Share of the steps in which the rate of a trapezoid falls.
_FALLING = 0.2


def elementwise_loss(kind: str, error: Tensor) -> Tensor:
    """Return the loss of each error (any shape, in units of the targets' spread)."""
    if kind == "mse":
        return error.square()
    if kind == "huber":
        return nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=0.1)
    return error.abs()


class PretrainModule(L.LightningModule):
    """Loss of the normalised outputs, summed over the properties with their weights.

    Rows with noise add a denoising loss: their atoms are displaced, and a vector readout that
    lives only here tells the displacements from the edge features of the last layer. Another one
    tells the forces of the rows that have them. What is validated is the average of the weights if
    one is kept.

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
        self.seed = config.seed
        weights = [config.training.task_weights.get(name, 1.0) for name in model.heads]
        self.register_buffer("task_weights", torch.tensor(weights), persistent=False)
        self._sums: Tensor | None = None
        self.last_losses = torch.zeros(len(model.heads))  # of the last step, one per property
        self.last_nodes = torch.zeros(0, 0)  # of the last step's batch, last layer, (N, F)
        self.denoiser: VectorReadout | None = None
        if any(source.denoise_angstrom for source in config.sources):
            self.denoiser = VectorReadout(model.backbone.edge_dim, model.backbone.edge_dim)
        self.force_readout: VectorReadout | None = None
        if any(source.forces for source in config.sources):
            self.force_readout = VectorReadout(model.backbone.edge_dim, model.backbone.edge_dim)
        self.average: AveragedModel | None = None
        if config.training.ema_decay:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(config.training.ema_decay)
            )
            self.average.requires_grad_(False)

    @staticmethod
    def final_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's weights from a checkpoint's: the averaged ones if there are any."""
        averaged = "average.module."
        prefix = averaged if any(key.startswith(averaged) for key in state) else "model."
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    def _outputs(self, model: Model, graphs: GraphLike, node: Tensor) -> Tensor:
        return torch.stack([head(node, graphs) for head in model.heads.values()], 1)

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        graphs, displacement = batch.graphs, None
        if self.denoiser is not None:
            graphs, displacement = self._displaced(batch, batch_idx)
        features = self.model.backbone(graphs)
        self.last_nodes = features.node
        outputs = self._outputs(self.model, graphs, features.node).float()
        known = batch.targets.isfinite() * batch.weight[:, None]
        error = elementwise_loss(self.training_config.loss, outputs - batch.targets.nan_to_num())
        per_task = (error * known).sum(0) / known.sum(0).clamp(min=1)
        self.last_losses = per_task.detach()
        loss = (per_task * self.task_weights).sum()
        size = len(batch.targets)
        if displacement is not None:
            noise = self._denoising_loss(batch, graphs, features, displacement)
            loss = loss + self.training_config.denoise_weight * noise
            self.log("train_denoise", noise, on_step=False, on_epoch=True, batch_size=size)
        if batch.forces is not None:
            forces = self._force_loss(batch.forces, graphs, features)
            loss = loss + self.training_config.force_weight * forces
            self.log("train_forces", forces, on_step=False, on_epoch=True, batch_size=size)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def _displaced(self, batch: LabelledBatch, batch_idx: int) -> tuple[GraphBatch, Tensor]:
        """Return the graphs with displaced atoms, and the displacements (N, 3) in Å."""
        graphs = batch.graphs
        # Noise that depends on nothing but seed, epoch, step and rank: a resumed run sees the same.
        generator = torch.Generator(device=graphs.z.device)
        place = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        generator.manual_seed(abs(hash(place)))
        shift = torch.randn(len(graphs.z), 3, generator=generator, device=graphs.z.device)
        shift = shift * batch.noise_angstrom[graphs.batch][:, None]
        # A displacement of all atoms together cannot be seen, so none is asked for.
        mean = shift.new_zeros(graphs.num_graphs, 3).index_add(
            0, graphs.batch, shift * node_weights(graphs)[:, None]
        )
        shift = shift - mean[graphs.batch]
        sender, receiver = graphs.edge_index[0], graphs.edge_index[1]
        moved = graphs.edge_vector + shift[sender] - shift[receiver]
        return replace(graphs, edge_vector=moved), shift

    def _denoising_loss(
        self, batch: LabelledBatch, graphs: GraphBatch, features: Features, displacement: Tensor
    ) -> Tensor:
        assert self.denoiser is not None
        cutoff = self.model.backbone.graph_options.cutoff_angstrom
        told = self.denoiser(features.edge, graphs, cutoff).float()
        sigma = batch.noise_angstrom[graphs.batch][:, None]  # (N, 1)
        wanted = displacement / sigma.clamp(min=1e-6)
        error = elementwise_loss(self.training_config.loss, told - wanted) * (sigma > 0)
        return error.sum() / (3 * (sigma > 0).sum()).clamp(min=1)

    def _force_loss(self, forces: Tensor, graphs: GraphBatch, features: Features) -> Tensor:
        """Return the loss of the forces (N, 3) in units of their spread, NaN where unknown."""
        assert self.force_readout is not None
        cutoff = self.model.backbone.graph_options.cutoff_angstrom
        told = self.force_readout(features.edge, graphs, cutoff).float()
        known = forces.isfinite()
        error = elementwise_loss(self.training_config.loss, told - forces.nan_to_num()) * known
        return error.sum() / known.sum().clamp(min=1)

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the average towards the new weights."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    def on_validation_epoch_start(self) -> None:
        """Start the sums of the epoch."""
        self._sums = torch.zeros(2, len(self.model.heads), device=self.device)

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Add up absolute errors, in full precision whatever the training precision."""
        model = self.model if self.average is None else cast("Model", self.average.module)
        with torch.autocast(self.device.type, enabled=False):
            node = model.backbone(batch.graphs).node
            outputs = self._outputs(model, batch.graphs, node)
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
        """AdamW; linear warm-up, then down to zero at the last step of the run."""
        options = self.training_config
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        warmup = max(int(options.warmup_fraction * total), 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if options.schedule == "trapezoid":
                return max(min((total - step) / max(_FALLING * total, 1), 1), 0)
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
        self.forces: NDArray[np.float32] | None = None
        if data.forces_ev_per_a is not None:
            self.forces = data.forces_ev_per_a / np.float32(data.force_scale_ev_per_a)
        self._resident: ResidentGraphs | None = None

    def _dataset(self, part: str) -> LabelledGraphs:
        data = self.data
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if self._resident is None and ResidentGraphs.fits(data.graphs, device):
            self._resident = ResidentGraphs(data.graphs, device)
        graphs = data.graphs if self._resident is None else self._resident
        return LabelledGraphs(
            graphs, data.rows(part), self.targets, data.weight, data.noise_angstrom, self.forces
        )

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[LabelledBatch]:
        """Return shuffled training batches."""
        return shuffled_loader(self._dataset("train"), self.batch_size, self.seed, *self._place())

    def val_dataloader(self) -> DataLoader[LabelledBatch]:
        """Return validation batches in order."""
        return ordered_loader(self._dataset("val"), self.batch_size, *self._place())
