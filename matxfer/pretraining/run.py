"""A pretraining run from its configuration to the written model, on Lightning."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks, loggers

from matxfer.checkpoint import SafetensorsCheckpointIO
from matxfer.data.properties import property_of
from matxfer.data.table import TableError
from matxfer.fisher import concentration, fisher_diagonal, total_fisher
from matxfer.metrics import predict_rows, regression_metrics
from matxfer.model import Model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.pretraining.callbacks import (
    FiniteLoss,
    LearningCurves,
    RunRecord,
    check_identity,
)
from matxfer.pretraining.config import ConfigError
from matxfer.pretraining.module import PretrainModule, SourceModule
from matxfer.pretraining.sources import SourceData, load_sources
from matxfer.provenance import provenance
from matxfer.runtime import keep_large_blocks, quiet_lightning

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from matxfer.pretraining.config import PretrainConfig


def build_model(config: PretrainConfig, data: SourceData) -> Model:
    """Build the network with scalers and references fitted to the training rows."""
    train = data.rows("train", labelled=True)
    if not len(train):
        raise TableError("no training row is usable; check the split columns")
    shape = asdict(config.network)
    readouts = shape.pop("readouts")
    network = EdgeGatedNetwork(**shape, graph_options=config.graph)
    graphs = data.graphs.select(train)
    model = Model(network, [], np.unique(graphs.numbers).tolist())
    for name, values in data.values.items():
        _check_column(name, values[train], data.tables)
        prop = property_of(name)
        readout = readouts.get(name, default_readout(prop))
        head = PropertyHead(prop, network.node_dim, readout, network.node_dim)
        head.scaler = type(head.scaler).fit(prop, values[train], graphs)
        model.heads[name] = head
    return model


def _check_column(name: str, values: NDArray[np.float64], tables: list[dict[str, Any]]) -> None:
    """Refuse a column that nothing can be learnt from."""
    table = ", ".join(t["table"] for t in tables if name in t["targets"])
    known = values[np.isfinite(values)]
    if not len(known):
        raise TableError(
            f"{table}: column {name!r} has no value in the {len(values):,} training rows; fill it "
            "or remove it from targets"
        )
    if np.ptp(known) == 0:
        raise TableError(
            f"{table}: every value of column {name!r} in the training rows is {known[0]:g} "
            f"({len(known):,} values); nothing can be learnt from it, remove it from targets"
        )


def run_identity(config: PretrainConfig, data: SourceData) -> dict[str, Any]:
    """Return what shapes the weights of a run, as flat JSON: ``{"training.epochs": 20, …}``."""
    tree = asdict(config)
    for key in ("folder", "card", "name", "trainer"):
        tree.pop(key)
    tree["training"].pop("fisher_samples")
    tree["precision"] = config.trainer.get("precision", "32-true")
    tree["tables"] = {t["table"]: t["sha256"] for t in data.tables}

    def flat(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict | list) or not value:
            return {place: value}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{place}.{key}").items()}

    return {k.removeprefix("."): v for k, v in flat(tree, "").items()}


def pretrain(
    config: PretrainConfig,
    output: str | Path,
    *,
    run_folder: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Model:
    """Train a model and write it with its card and Fisher information.

    Parameters
    ----------
    config
        What to do.
    output
        Folder of the finished model.
    run_folder
        Where checkpoints and logs go; default ``runs/NAME``.
    resume
        Go on from the last checkpoint in ``run_folder``, exactly as if never interrupted.
    on_progress
        Called with the number of graphs built since the last call.

    Returns
    -------
    Model
        The model of the best validation loss.
    """
    keep_large_blocks()
    started = time.monotonic()
    run_folder = Path(run_folder) if run_folder else Path("runs") / config.name
    L.seed_everything(config.seed, verbose=False)
    data = load_sources(config, on_progress)
    model = build_model(config, data)
    module = PretrainModule(model, config)
    source = SourceModule(data, model, config.training.batch_size, config.seed)
    last, best = run_folder / "last.ckpt", run_folder / "best.ckpt"
    record = RunRecord(run_identity(config, data))
    if resume and last.exists():
        check_identity(SafetensorsCheckpointIO().load_checkpoint(last), record.identity, last)
    elif resume:
        warnings.warn(f"{last}: no checkpoint to resume from; starting anew", stacklevel=2)
    else:
        # Only our own files: the user may have named a folder that holds other things too.
        for old in (last, best):
            old.unlink(missing_ok=True)
    keep = callbacks.ModelCheckpoint(
        run_folder,
        filename="best",
        monitor="val_loss",
        save_last=True,
        enable_version_counter=False,
    )
    with quiet_lightning():
        trainer = _trainer(config, run_folder, [record, keep])
        trainer.fit(module, source, ckpt_path=str(last) if resume and last.exists() else None)
    if trainer.is_global_zero:
        weights = SafetensorsCheckpointIO().load_checkpoint(best)["state_dict"]
        model.load_state_dict(PretrainModule.final_weights(weights))
        model.card |= {"training_seconds": record.seconds, "training_device": record.device}
        _finish(model.cpu().eval(), config, data, Path(output), time.monotonic() - started)
    trainer.strategy.barrier()
    return model


def _trainer(
    config: PretrainConfig, run_folder: Path, watchers: list[callbacks.Callback]
) -> L.Trainer:
    extra = [FiniteLoss(run_folder), LearningCurves(run_folder), *watchers]
    if config.training.patience is not None:
        extra.append(callbacks.EarlyStopping("val_loss", patience=config.training.patience))
    options = {
        "enable_progress_bar": sys.stderr.isatty(),
        "enable_model_summary": False,
        "log_every_n_steps": 50,
        "gradient_clip_val": config.training.clip_norm,
        **config.trainer,
    }
    name = options.pop("logger", "CSVLogger")
    if isinstance(name, str) and not hasattr(loggers, name):
        raise ConfigError(
            f"'logger' in trainer is {name!r}, which lightning.pytorch.loggers does not have"
        )
    logger = getattr(loggers, name)(save_dir=run_folder) if isinstance(name, str) else name
    try:
        return L.Trainer(
            max_epochs=config.training.epochs,
            callbacks=extra,
            logger=logger,
            plugins=[SafetensorsCheckpointIO()],
            use_distributed_sampler=False,  # ours already knows its rank
            **options,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(
            f"lightning.Trainer refuses 'trainer' {config.trainer}: {error}"
        ) from error


def _finish(
    model: Model, config: PretrainConfig, data: SourceData, output: Path, seconds: float
) -> None:
    """Measure the model on val and test, compute its Fisher information and write both."""
    figures: dict[str, dict[str, Any]] = {}
    noise = {}
    for part in ("val", "test"):
        rows = data.rows(part)
        predicted = predict_rows(model, data.graphs, rows)
        for name, head in model.heads.items():
            truth = data.values[name][rows]
            measured = regression_metrics(truth, predicted[name], head.prop)
            figures.setdefault(name, {})[part] = measured
            if part == "val":
                residual = head.scaler.normalised(predicted[name], data.graphs.select(rows))
                residual = residual - head.scaler.normalised(truth, data.graphs.select(rows))
                noise[name] = float(np.nanstd(residual)) if np.isfinite(residual).any() else 1.0
    fisher = None
    train = data.rows("train", labelled=True)
    if config.training.fisher_samples:
        rng = np.random.default_rng(config.seed)
        size = min(config.training.fisher_samples, len(train))
        sample = np.sort(rng.choice(train, size, replace=False))
        fisher = fisher_diagonal(model, data.graphs, sample, noise)
        model.card["fisher"] = {
            "samples": size,
            "source_size": len(train),
            "noise_normalised": noise,
            "concentration": concentration(total_fisher(fisher)),
        }
    model.card |= {
        "data": data.tables,
        "rows_without_graph": len(data.errors),
        "figures": figures,
        "training": asdict(config.training),
        "trainer": {k: v for k, v in config.trainer.items() if k != "logger"},
        "seed": config.seed,
        **config.card,
        **provenance(seconds),
    }
    model.save(output, fisher)
