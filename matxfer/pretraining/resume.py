"""Resuming a run: what a checkpoint says of its run, and whether that is the run to go on with."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from matxfer.checkpoint import SafetensorsCheckpointIO
from matxfer.pretraining.callbacks import RunRecord, TrainingError

if TYPE_CHECKING:
    from pathlib import Path

    from matxfer.pretraining.config import PretrainConfig
    from matxfer.pretraining.sources import SourceData

#: Keys of ``trainer`` that may differ between the pieces of a run. Devices count as the number of
#: processes, which share a batch.
_SHAPES_NOTHING = (
    *("accelerator", "devices", "num_nodes", "strategy", "logger", "log_every_n_steps"),
    *("enable_progress_bar", "enable_model_summary", "default_root_dir", "profiler", "max_time"),
    *("benchmark", "deterministic", "detect_anomaly", "inference_mode", "num_sanity_val_steps"),
)


def last_checkpoint(run_folder: Path) -> dict[str, Any] | None:
    """Read the checkpoint of a run folder to resume from; None, said aloud, if there is none.

    Raises
    ------
    TrainingError
        If only one of the two files is there.
    FormatError
        If the checkpoint is damaged.
    """
    last, best = run_folder / "last.ckpt", run_folder / "best.ckpt"
    if not last.exists():
        warnings.warn(f"{last}: no checkpoint to resume from; starting anew", stacklevel=4)
        return None
    checkpoint = SafetensorsCheckpointIO().load_checkpoint(last)
    had_best = any(state.get("best_k_models") for state in checkpoint["callbacks"].values())
    if had_best and not best.exists():
        raise TrainingError(
            f"{best}: there is no such file, and {last.name} alone does not hold the best epoch; "
            "copy both, or start anew without --resume"
        )
    return checkpoint


def config_identity(config: PretrainConfig) -> dict[str, Any]:
    """Return what of a configuration shapes the weights, as flat JSON: ``training.epochs``: 20."""
    tree = asdict(config)
    for key in ("folder", "card", "name"):
        tree.pop(key)
    tree["training"].pop("fisher_samples")
    # A part that is always there, so that it is missed where only one of two runs has it.
    if (invariant := tree.pop("invariant")) is not None:
        tree["training"]["invariant"] = {k: v for k, v in invariant.items() if k != "table"}
    for source in [*tree["sources"], *tree["exclude"]]:
        source.pop("table")  # what counts is in the file, not where it lies
    trainer = {"precision": "32-true", **config.trainer}
    tree["trainer"] = {k: v for k, v in trainer.items() if k not in _SHAPES_NOTHING}
    return _flat(tree)


def data_identity(data: SourceData) -> dict[str, Any]:
    """Return what of the tables shapes the weights, as flat JSON: ``tables.0.sha256``: …."""
    keys = ("sha256", "rows", "excluded")
    return _flat({"tables": [{k: t[k] for k in keys if k in t} for t in data.tables]})


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    def flat(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict | list) or not value:
            return {place: value}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{place}.{key}").items()}

    # Through JSON, since that is what it is compared with; YAML also knows dates.
    plain = json.loads(json.dumps(tree, default=str))
    return {k.removeprefix("."): v for k, v in flat(plain, "").items()}


def recorded(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what :class:`RunRecord` kept in a checkpoint.

    Raises
    ------
    TrainingError
        If the checkpoint does not say what its run was told to do.
    """
    record: dict[str, Any] | None = checkpoint.get("callbacks", {}).get(RunRecord.__qualname__)
    if record is None:
        raise TrainingError(
            f"{path}: does not say which configuration it belongs to (an earlier version of "
            "matxfer wrote it); start anew without --resume"
        )
    return record


def check_identity(checkpoint: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """Refuse to resume a run from a checkpoint of a run that was told something else.

    Only the parts that ``identity`` speaks of are compared (``training`` of ``training.epochs``),
    so that the configuration can be checked before its tables are read.

    Raises
    ------
    TrainingError
        Naming the keys that differ.
    """
    parts = {key.split(".")[0] for key in identity}
    stored = recorded(checkpoint, path)["identity"]
    known = {key: value for key, value in stored.items() if key.split(".")[0] in parts}
    nothing = "nothing"
    differ = [
        f"{key} = {known.get(key, nothing)!r}, the configuration now says "
        f"{identity.get(key, nothing)!r}"
        for key in sorted({*known, *identity})
        if known.get(key, nothing) != identity.get(key, nothing)
    ]
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise TrainingError(
            f"{path}: its run had {'; '.join(differ[:3])}{more}; set it back, or start anew "
            "without --resume"
        )


def is_finished(checkpoint: dict[str, Any], epochs: int) -> bool:
    """Return whether the run of a checkpoint went through its epochs or was stopped early."""
    if checkpoint["epoch"] + 1 >= epochs:
        return True
    return any(
        state["wait_count"] >= state["patience"]
        for key, state in checkpoint["callbacks"].items()
        if key.startswith("EarlyStopping")
    )
