"""What watches over a pretraining run: finite losses, learning curves, time, and its identity."""

from __future__ import annotations

import csv
import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback

from matxfer.errors import MatxferError

if TYPE_CHECKING:
    from pathlib import Path

    import lightning as L  # noqa: N812 - its documented alias

    from matxfer.pretraining.module import PretrainModule

#: On an accelerator a look at the loss waits for the device, so only every n-th step is looked at.
STEPS_BETWEEN_LOOKS = 50


class TrainingError(MatxferError):
    """A training run that cannot go on: says where it stopped and what to change."""


class FiniteLoss(Callback):
    """Stop a run as soon as its loss is not a finite number.

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

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,  # noqa: ARG002 - Lightning's signature
        batch_idx: int,
    ) -> None:
        """Look at the loss: each step on a CPU, now and then on an accelerator."""
        loss = outputs["loss"]
        if loss.device.type != "cpu" and batch_idx % STEPS_BETWEEN_LOOKS:
            return
        if bool(loss.isfinite()):
            return
        module: PretrainModule = pl_module  # type: ignore[assignment]
        parts = dict(zip(module.model.heads, module.last_losses.tolist(), strict=True))
        names = [n for n, v in parts.items() if not torch.tensor(v).isfinite()] or list(parts)
        kept = (
            f"the epochs before are kept in {self.last}"
            if self.last.exists()
            else "no epoch had been finished"
        )
        raise TrainingError(
            f"the loss of {', '.join(names)} is {float(loss)} in epoch {trainer.current_epoch}, "
            f"step {batch_idx}; {kept}. Lower learning_rate or clip_norm, use "
            "precision: 32-true, or look for extreme values in the column"
        )


class LearningCurves(Callback):
    """Keep ``learning_curves.csv`` and ``.png`` in the run's folder, a row per epoch.

    A row is written before the epoch's checkpoint, so a killed run that is resumed loses none;
    rows after the checkpoint that it resumes from are dropped, so none comes twice.

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
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Read the rows of the epochs before, if the run was resumed."""
        self.rows = []
        if trainer.current_epoch and self.table.is_file():
            with self.table.open(encoding="utf-8", newline="") as file:
                read = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
            self.rows = [row for row in read if row["epoch"] < trainer.current_epoch]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Start the epoch's mean and its clock."""
        self._sum = torch.zeros((), device=pl_module.device)
        self._steps, self._started = 0, time.monotonic()

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
        module: PretrainModule = pl_module  # type: ignore[assignment]
        row = {
            "epoch": float(trainer.current_epoch),
            "train_loss": float(self._sum) / self._steps,
            "learning_rate": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "seconds": time.monotonic() - self._started,
        }
        for key, value in trainer.callback_metrics.items():
            if key == "val_loss":
                row[key] = float(value)
            elif key.startswith("val_mae/"):
                head = module.model.heads[key.removeprefix("val_mae/")]
                # The error is that of the fitted scale, and the name says which that is.
                scale = "" if head.prop.transform == "identity" else f"{head.prop.transform}_"
                row[f"val_mae_{scale}{head.prop.name}"] = float(value)
        self.rows = [r for r in self.rows if r["epoch"] != row["epoch"]] + [row]
        part = self.table.with_name(f".{self.table.name}.part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[-1]), restval="nan", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.table)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Draw the curves, if matplotlib is there."""
        if trainer.is_global_zero and self.rows:
            draw_learning_curves(self.rows, self.table.with_suffix(".png"))


def draw_learning_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Draw loss and errors over the epochs; without matplotlib nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = [key for key in rows[-1] if key.startswith("val_mae_")]
    figure = Figure(figsize=(3.2 * (len(names) + 1), 3), layout="constrained")
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    epochs = [row["epoch"] for row in rows]
    for key in ("train_loss", "val_loss"):
        axes[0].plot(epochs, [row.get(key, float("nan")) for row in rows], label=key)
    axes[0].legend()
    for axis, name in zip(axes[1:], names, strict=True):
        axis.plot(epochs, [row.get(name, float("nan")) for row in rows])
        axis.set_title(name, fontsize="small")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.set_yscale("log")
    figure.savefig(path, dpi=120)


class RunRecord(Callback):
    """What a checkpoint says of its run: training time, device, and what it was configured to do.

    Parameters
    ----------
    identity
        Everything that shapes the weights, as flat JSON.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.device = ""
        self._before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Training time in s over all pieces of the run; time between them does not count."""
        now = 0.0 if self._started is None else time.monotonic() - self._started
        return self._before + now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock and look at the device."""
        self._started = time.monotonic()
        device = pl_module.device
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device.type.upper()}, {torch.get_num_threads()} threads"
        )
        self.device = name if trainer.world_size == 1 else f"{trainer.world_size} × {name}"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Stop the clock."""
        self._before, self._started = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps."""
        return {"identity": self.identity, "seconds": self.seconds, "device": self.device}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self._before, self.device = state_dict["seconds"], state_dict["device"]


def check_identity(checkpoint: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """Refuse to resume a run from a checkpoint of a run that was told something else.

    Raises
    ------
    TrainingError
        Naming the first key that differs.
    """
    record = checkpoint.get("callbacks", {}).get(RunRecord.__qualname__)
    if record is None:
        return
    known = record["identity"]
    for key in sorted({*known, *identity}):
        if known.get(key) != identity.get(key):
            raise TrainingError(
                f"{path}: its run had {key} = {known.get(key)!r}, the configuration now says "
                f"{identity.get(key)!r}; set it back, or start anew without --resume"
            )
