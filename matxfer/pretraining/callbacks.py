"""What watches over a pretraining run: finite losses, learning curves, time, and its identity."""

from __future__ import annotations

import csv
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from matxfer.errors import MatxferError
from matxfer.plot.curves import training_curve
from matxfer.plot.style import panels, save

if TYPE_CHECKING:
    import lightning as L  # noqa: N812 - its documented alias
    from torch import Tensor

    from matxfer.data.properties import Property
    from matxfer.pretraining.module import PretrainModule

#: To read a loss on an accelerator is to wait for it, so only every so many steps one is read.
STEPS_BETWEEN_LOOKS = 50
#: The first bad step of a loss that has had none.
_NEVER = 2**62
#: Drawing may take this share of the training time.
_DRAWING_SHARE = 0.05


class TrainingError(MatxferError):
    """A training run that cannot go on: says where it stopped and what to change."""


class FiniteLoss(Callback):
    """Stop a run as soon as a loss is not a finite number, before a checkpoint could hold it.

    One process on a CPU looks at each step. Elsewhere the first bad step of each property is noted
    on the device and read every :data:`STEPS_BETWEEN_LOOKS` steps and at the end of an epoch: no
    step waits for the device, and the property that was first is still known when the update that
    it spoilt has made all the others fail too.

    Parameters
    ----------
    run_folder
        Where the checkpoints of the epochs before lie.

    Raises
    ------
    TrainingError
        Naming the property, the epoch, the step and the remedy.
    """

    def __init__(self, run_folder: Path) -> None:
        self.last = run_folder / "last.ckpt"
        # First bad step of each property and of all together, and the losses there.
        self._first: Tensor | None = None
        self._values = torch.zeros(())

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Begin a new count of steps."""
        self._first = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,  # noqa: ARG002 - Lightning's signature
        batch_idx: int,
    ) -> None:
        """Note bad losses where they are, and look at the notes if it is time to."""
        module = cast("PretrainModule", pl_module)
        losses = torch.cat([module.last_losses.float(), outputs["loss"].detach().float()[None]])
        step = torch.where(losses.isfinite(), _NEVER, batch_idx)
        if self._first is None:
            self._first, self._values = step, losses
        else:
            self._values = torch.where(step < self._first, losses, self._values)
            self._first = torch.minimum(self._first, step)
        alone_on_cpu = trainer.world_size == 1 and step.device.type == "cpu"
        if alone_on_cpu or (batch_idx + 1) % STEPS_BETWEEN_LOOKS == 0:
            self._look(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the steps since the last look."""
        if not trainer.sanity_checking:
            self._look(trainer, cast("PretrainModule", pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Look at the validation loss: the last update of the epoch may have spoilt the weights."""
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.sanity_checking or loss is None or bool(loss.isfinite()):
            return
        names = [
            key.removeprefix("val_mae/")
            for key, value in trainer.callback_metrics.items()
            if key.startswith("val_mae/") and not value.isfinite()
        ]
        self._stop(
            f"the validation loss of {', '.join(names) or 'some property'} is {float(loss)} after "
            f"epoch {trainer.current_epoch}"
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look once more, for epochs without validation; checkpoints are written after this."""
        self._look(trainer, cast("PretrainModule", pl_module))

    def _look(self, trainer: L.Trainer, module: PretrainModule) -> None:
        first = self._first
        if first is None:
            return
        if trainer.world_size > 1:
            # All processes stop at the same look, or the others would wait for this one for ever.
            gathered = cast("Tensor", module.all_gather(first))
            first = gathered.reshape(-1, len(first)).amin(0)
        steps = first.tolist()
        if min(steps) == _NEVER:
            return
        names = [n for n, s in zip(module.model.heads, steps[:-1], strict=True) if s == min(steps)]
        if not names:
            vectors = {"denoising": module.denoiser, "forces": module.force_readout}
            names = [name for name, readout in vectors.items() if readout is not None]
            names = names or ["all properties together"]
        value = float(self._values[steps.index(min(steps))])
        # In another process it may have been another value, and here still a number.
        said = "not a number" if math.isfinite(value) else str(value)
        self._stop(
            f"the loss of {', '.join(names)} is {said} in epoch {trainer.current_epoch}, "
            f"step {min(steps)}"
        )

    def _stop(self, what: str) -> None:
        kept = (
            f"the epochs before are kept in {self.last}"
            if self.last.exists()
            else "no epoch had been finished"
        )
        raise TrainingError(
            f"{what}; {kept}. Lower learning_rate or clip_norm in training, say precision: 32-true "
            "in trainer, or look for extreme values in the column; then start anew without --resume"
        )


def error_column(prop: Property) -> str:
    """Return the name of a property's validation error; the name ends in its unit.

    The error is that of the scale that is fitted, so ``val_mae_log10_bulk_modulus_vrh_gpa`` is in
    decades.
    """
    linear = prop.transform in ("identity", "nonnegative")
    return f"val_mae_{prop.name}" if linear else f"val_mae_{prop.transform}_{prop.name}"


class LearningCurves(Callback):
    """Keep ``learning_curves.csv`` and ``.png`` in the run's folder, a row per epoch.

    The rows travel in the checkpoint, and the files are written from them: a run that is killed and
    resumed, here or on another machine, has each epoch once.

    Parameters
    ----------
    run_folder
        Where to write.
    """

    def __init__(self, run_folder: Path) -> None:
        self.table = run_folder / "learning_curves.csv"
        self.rows: list[dict[str, float]] = []
        self._sum = torch.zeros(())
        self._steps = 0
        self._rate = 0.0
        self._started = 0.0
        self._next_drawing = 0.0
        self._can_draw = True

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.rows = state_dict["rows"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Start the epoch's mean and its clock."""
        self._sum = torch.zeros((), device=pl_module.device)
        self._steps, self._started = 0, time.monotonic()

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Remember the rate of the step; after it the schedule shows that of the next one."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Add up the loss where it is: no step waits for the device."""
        self._sum += outputs["loss"].detach()
        self._steps += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the epoch's row."""
        if trainer.sanity_checking or not trainer.is_global_zero or not self._steps:
            return
        module = cast("PretrainModule", pl_module)
        metrics = trainer.callback_metrics
        row = {
            "epoch": float(trainer.current_epoch),
            "train_loss": float(self._sum) / self._steps,
            "val_loss": float(metrics["val_loss"]),
        }
        for name, head in module.model.heads.items():
            row[error_column(head.prop)] = float(metrics[f"val_mae/{name}"])
        row |= {"learning_rate": self._rate, "seconds": time.monotonic() - self._started}
        self.rows = [r for r in self.rows if r["epoch"] != row["epoch"]] + [row]
        self._write()
        if time.monotonic() >= self._next_drawing:
            self._draw()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Draw all epochs."""
        if trainer.is_global_zero and self.rows:
            self._write()  # once more, should the user have removed it
            self._draw()

    def _write(self) -> None:
        self.table.parent.mkdir(parents=True, exist_ok=True)
        part = self.table.with_name(f".{self.table.name}.part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[-1]))
            writer.writeheader()
            writer.writerows(row | {"epoch": int(row["epoch"])} for row in self.rows)
        part.replace(self.table)

    def _draw(self) -> None:
        if not self._can_draw:
            return
        started = time.monotonic()
        self._can_draw = draw_learning_curves(self.rows, self.table.with_suffix(".png"))
        if not self._can_draw:
            warnings.warn(
                f"matplotlib is not installed, so {self.table.with_suffix('.png').name} is not "
                f"drawn; the numbers are in {self.table}",
                stacklevel=1,  # higher up is Lightning, which is silenced
            )
        now = time.monotonic()
        self._next_drawing = now + (now - started) / _DRAWING_SHARE


def draw_learning_curves(rows: list[dict[str, float]], path: Path) -> bool:
    """Draw loss and errors over the epochs; return whether matplotlib is there to do it.

    The figure is drawn without pyplot: a notebook's or program's own backend stays as it is.
    """
    names = [key for key in rows[-1] if key.startswith("val_mae_")]
    made = panels(len(names) + 1, 3.2, 3.0)
    if made is None:
        return False
    figure, axes = made
    training_curve(rows, label="loss", ax=axes[0])
    for axis, name in zip(axes[1:], names, strict=True):
        training_curve([row[name] for row in rows], label=name, legend=False, ax=axis)
    save(figure, path)
    return True


class MovableCheckpoint(ModelCheckpoint):
    """A Lightning checkpoint at the end of an epoch, which may be moved with its folder.

    Lightning forgets the best loss so far if the folder has another name than when the checkpoint
    was written, and would take the first epoch after the resumption for the best one.

    Parameters
    ----------
    run_folder
        Where to write.
    name
        Name of the file without its end.
    monitor
        Write only if this is smaller than ever; None: after every epoch.
    """

    def __init__(self, run_folder: Path, name: str, monitor: str | None = None) -> None:
        # At the end of the epoch the row of the learning curves is there.
        super().__init__(
            run_folder,
            filename=name,
            monitor=monitor,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, its paths read as names in this folder."""
        here = Path(str(self.dirpath))
        moved = {
            key: str(here / Path(state_dict[key]).name) if state_dict[key] else ""
            for key in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        best = {str(here / Path(path).name): v for path, v in state_dict["best_k_models"].items()}
        super().load_state_dict(
            {**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath}
        )


class RunRecord(Callback):
    """What a checkpoint says of its run: training time, devices, and what it was told to do.

    Parameters
    ----------
    identity
        Everything that shapes the weights, as flat JSON.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.devices: list[str] = []
        #: Training time in s over all pieces of the run up to the last checkpoint. Neither the time
        #: between the pieces counts, nor epochs that were cut off and done again.
        self.seconds = 0.0
        self._before = 0.0
        self._started = 0.0

    @property
    def device(self) -> str:
        """What the run was trained on; several devices if it was resumed on another one."""
        return "; then ".join(self.devices)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock and look at the device."""
        self._started = time.monotonic()
        device = pl_module.device
        name = device.type.upper()
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        elif device.type == "cpu":
            name = f"CPU, {torch.get_num_threads()} threads"
        name = name if trainer.world_size == 1 else f"{trainer.world_size} × {name}"
        if name not in self.devices:
            self.devices.append(name)

    def state_dict(self) -> dict[str, Any]:
        """Read the clock and return what the checkpoint keeps."""
        self.seconds = self._before + time.monotonic() - self._started
        return {"identity": self.identity, "seconds": self.seconds, "devices": self.devices}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.seconds = self._before = state_dict["seconds"]
        self.devices = list(state_dict["devices"])
