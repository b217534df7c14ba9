"""Training a potential: loss of energies, forces and stresses, weight average, best epoch kept."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from matxfer.potential.errors import ErrorSums, differences
from matxfer.runtime import keep_large_blocks, quiet_lightning
from matxfer.terminal import person_looks
from matxfer.transfer.freezing import parameter_groups
from matxfer.transfer.readout_training import CLIP_NORM, Fit, warmup_cosine

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.potential.config import PotentialConfig
    from matxfer.potential.model import Potential
    from matxfer.potential.packed import FrameBatch, PackedFrames

#: Of each quantity the options of its weight and of the end of its squares.
_LOSSES = {
    "energy": ("energy_weight", "energy_delta"),
    "forces": ("force_weight", "force_delta"),
    "stress": ("stress_weight", "stress_delta"),
}


class FrameSet(Dataset["FrameBatch"]):
    """Batches of bounded work, in the order of the rows.

    Parameters
    ----------
    frames
        The frames.
    rows
        Those of the set.
    max_edges
        Edges of a batch.
    """

    def __init__(self, frames: PackedFrames, rows: NDArray[np.int64], max_edges: int) -> None:
        self.frames = frames
        self._batches = list(frames.batches(rows, max_edges))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, k: int) -> FrameBatch:
        return self.frames.batch(self._batches[k])


class PotentialModule(L.LightningModule):
    """Huber loss of energies per atom, forces and stresses, and a penalty if one is given.

    Validated, and kept at its best, is the running average of the weights. The order of an epoch
    depends on seed and epoch only.
    """

    def __init__(
        self,
        potential: Potential,
        config: PotentialConfig,
        frames: PackedFrames,
        penalty: nn.Module | None = None,
        on_best: Callable[[Potential, dict[str, float]], None] | None = None,
    ) -> None:
        super().__init__()
        self.potential, self.config, self.penalty = potential, config, penalty
        self.frames, self.on_best = frames, on_best
        self.average = copy.deepcopy(potential) if config.average else None
        self.history: list[float] = []
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        self._sums = ErrorSums()
        self._steps = 0
        self._rows = frames.rows("train")
        if (limit := config.max_force_ev_per_a) is not None:
            self._rows = self._rows[largest_forces(frames)[self._rows] <= limit]

    def train_dataloader(self) -> DataLoader[FrameBatch]:
        """Return the training frames in the order of this epoch."""
        order = np.random.default_rng((self.config.seed, self.current_epoch))
        rows = order.permutation(self._rows)
        return _loader(FrameSet(self.frames, rows, self.config.max_edges))

    def val_dataloader(self) -> DataLoader[FrameBatch]:
        """Return the validation frames."""
        return _loader(FrameSet(self.frames, self.frames.rows("val"), 2 * self.config.max_edges))

    def training_step(self, batch: FrameBatch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a batch."""
        response = self.potential.respond(batch.graphs, create_graph=True)
        loss = response.energy_ev.new_zeros(())
        for name, error in differences(response, batch).items():
            weight, delta = (getattr(self.config, option) for option in _LOSSES[name])
            if weight and error.numel():
                zero = torch.zeros_like(error)
                # Divided by δ: linear errors count as they are.
                huber = nn.functional.huber_loss(error, zero, delta=delta) / delta
                loss = loss + weight * huber
        if self.penalty is not None:
            loss = loss + self.penalty()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        """Follow the weights with their running average."""
        if self.average is None:
            return
        self._steps += 1
        # Young averages forget faster, or the first weights would stay in them for long.
        decay = min(self.config.average, self._steps / (self._steps + 9))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.potential.parameters(), strict=True)
            for mean, present in pairs:
                if present.requires_grad:
                    mean.lerp_(present, 1 - decay)

    @property
    def kept(self) -> Potential:
        """What is validated and kept."""
        return self.potential if self.average is None else self.average

    def validation_step(self, batch: FrameBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Add up the errors."""
        self._sums.add(differences(self.kept.respond(batch.graphs), batch))

    def on_validation_epoch_end(self) -> None:
        """Keep the weights of the best epoch."""
        figures, self._sums = self._sums.figures(), ErrorSums()
        units = {
            "energy": "energy_mae_ev_per_atom",
            "forces": "forces_mae_ev_per_a",
            "stress": "stress_mae_ev_per_a3",
        }
        error = sum(
            getattr(self.config, weight) * figures.get(units[name], 0.0)
            for name, (weight, _) in _LOSSES.items()
        )
        self.log("val_error", error, prog_bar=True)
        self.history.append(float(error))
        if not self.best_state or error < self.history[self.best_epoch]:
            self.best_epoch = len(self.history) - 1
            self.best_state = {n: v.detach().clone() for n, v in self.kept.state_dict().items()}
            if self.on_best is not None:
                self.on_best(self.kept, {"epoch": self.best_epoch, **figures})

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,  # noqa: ARG002 - Lightning's signature
        gradient_clip_algorithm: str | None = None,  # noqa: ARG002
    ) -> None:
        """Clip each layer and the readout on its own, as fine-tuning of properties does."""
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], CLIP_NORM)

    def configure_optimizers(self) -> Any:
        """AdamW with a rate per layer; warm-up, then a cosine to zero."""
        config = self.config
        groups = parameter_groups(
            self.potential.backbone,
            self.potential.head,
            config.freeze,
            learning_rate=config.learning_rate,
            head_learning_rate=config.head_learning_rate,
            layer_decay=config.layer_decay,
            weight_decay=config.weight_decay,
        )
        optimizer = torch.optim.AdamW(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, config.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_potential(
    potential: Potential,
    frames: PackedFrames,
    config: PotentialConfig,
    penalty: nn.Module | None = None,
    on_best: Callable[[Potential, dict[str, float]], None] | None = None,
) -> Fit:
    """Train the parameters of a potential that require gradients; leave it at its best epoch.

    Parameters
    ----------
    potential
        What is trained, in place.
    frames
        Its parts ``train`` and ``val`` are used.
    config
        See there.
    penalty
        Added to the loss.
    on_best
        Called with the averaged potential and its validation errors after each best epoch.
    """
    keep_large_blocks()
    module = PotentialModule(potential, config, frames, penalty, on_best)
    potential.train()
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=config.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=person_looks(),
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            inference_mode=False,  # forces are gradients
            accelerator="auto" if torch.cuda.is_available() else "cpu",
            devices=1,
        )
        started = time.monotonic()
        trainer.fit(module)
    seconds = (time.monotonic() - started) / max(trainer.current_epoch, 1)
    module.cpu()
    potential.load_state_dict(module.best_state)
    potential.eval()
    return Fit(module.best_epoch, seconds, module.history)


def _loader(frames: FrameSet) -> DataLoader[FrameBatch]:
    return DataLoader(frames, batch_size=None, shuffle=False)


def largest_forces(frames: PackedFrames) -> NDArray[np.float64]:
    """Return the largest force on an atom of each frame, in eV/Å, (G,); zero where unknown."""
    norm = np.linalg.norm(np.nan_to_num(frames.forces_ev_per_a.astype(np.float64)), axis=1)
    largest = np.zeros(len(frames))
    owner = np.repeat(np.arange(len(frames)), frames.graphs.nodes_per_graph)
    np.maximum.at(largest, owner, norm)
    return largest
