"""A pretraining run from its configuration to the written model, on Lightning."""

from __future__ import annotations

import inspect
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks, loggers
from lightning.pytorch.utilities import rank_zero_only

from matxfer.checkpoint import SafetensorsCheckpointIO
from matxfer.data.properties import apply_transform, property_of
from matxfer.data.table import TableError
from matxfer.errors import OptionError
from matxfer.fisher import concentration, fisher_diagonal, total_fisher
from matxfer.metrics import predict_rows, regression_metrics
from matxfer.model import Model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.registry import MissingPackageError, build_backbone
from matxfer.pretraining.callbacks import (
    FiniteLoss,
    LearningCurves,
    MovableCheckpoint,
    RunRecord,
)
from matxfer.pretraining.config import EDGE_GATED, ConfigError
from matxfer.pretraining.invariance import domain_invariance
from matxfer.pretraining.lock import only_run_in
from matxfer.pretraining.module import PretrainModule, SourceModule
from matxfer.pretraining.resume import (
    check_identity,
    config_identity,
    data_identity,
    is_finished,
    last_checkpoint,
    recorded,
)
from matxfer.pretraining.sources import SourceData, load_sources
from matxfer.provenance import provenance
from matxfer.runtime import keep_large_blocks, quiet_lightning
from matxfer.terminal import person_looks

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from matxfer.nn.backbone import BackboneModule
    from matxfer.pretraining.config import PretrainConfig

#: Keys of ``trainer`` that a configuration cannot set, and why.
_SET_HERE = {
    "max_epochs": "write 'epochs' in training",
    **dict.fromkeys(
        (*("callbacks", "plugins", "use_distributed_sampler", "enable_checkpointing"),
         *("fast_dev_run", "barebones", "overfit_batches", "model_registry")),
        "checkpoints and batches are matxfer's",
    ),
}  # fmt: skip
_REFUSALS = (TypeError, ValueError, AttributeError, ImportError, MisconfigurationException)


def build_network(config: PretrainConfig) -> BackboneModule:
    """Build the network with random weights.

    Raises
    ------
    OptionError
        If it does not take the options, or teaches no vectors although a source asks for them.
    """
    shape = asdict(config.network)
    kind, options = shape.pop("kind"), shape.pop("options")
    shape.pop("readouts")
    options = shape if kind == EDGE_GATED else options
    try:
        network = build_backbone({"kind": kind, **options, "graph": config.graph.to_json()})
    except MissingPackageError:
        raise
    except (TypeError, ValueError) as error:
        raise OptionError(f"network of kind {kind!r} with {options}: {error}") from error
    if not network.edge_dim and any(source.needs_full_cell for source in config.sources):
        raise OptionError(
            f"network of kind {kind!r} has no features of edges, of which forces and displacements "
            "are made; leave out the sources with forces or denoise_angstrom"
        )
    return network


def build_model(config: PretrainConfig, data: SourceData) -> Model:
    """Build the network with scalers and references fitted to the training rows."""
    train = data.rows("train", labelled=True)
    if not len(train):
        raise TableError("no training row is usable; check the split columns")
    if not len(data.rows("val")):
        raise TableError(
            "no validation row is usable, and the best epoch is chosen by them; check the split "
            "columns"
        )
    readouts = config.network.readouts
    network = build_network(config)
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
    transform = property_of(name).transform
    if not np.isfinite(apply_transform(transform, known)).any():
        raise TableError(
            f"{table}: no value of column {name!r} in the training rows can be learnt on its scale "
            f"({transform}): the largest of {len(known):,} is {known.max():g}; correct the column "
            "or remove it from targets"
        )
    if np.ptp(known) == 0:
        raise TableError(
            f"{table}: every value of column {name!r} in the training rows is {known[0]:g} "
            f"({len(known):,} values); nothing can be learnt from it, remove it from targets"
        )


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

    Raises
    ------
    TrainingError
        If another run is at work in the run folder, the run diverges, or cannot be resumed.
    """
    run_folder = Path(run_folder) if run_folder else Path("runs") / config.name
    # The processes of one run share its folder, and the first one holds it for all of them.
    alone = only_run_in(run_folder) if not getattr(rank_zero_only, "rank", 0) else nullcontext()
    with alone:
        return _pretrain(config, Path(output), run_folder, resume, on_progress)


def _pretrain(
    config: PretrainConfig,
    output: Path,
    run_folder: Path,
    resume: bool,
    on_progress: Callable[[int], None] | None,
) -> Model:
    keep_large_blocks()
    started = time.monotonic()
    last, best = run_folder / "last.ckpt", run_folder / "best.ckpt"
    record = RunRecord(config_identity(config))
    checkpoint = last_checkpoint(run_folder) if resume else None
    if checkpoint is not None:
        check_identity(checkpoint, record.identity, last)  # before graphs are built for nothing
    L.seed_everything(config.seed, verbose=False)
    data = load_sources(config, on_progress)
    model = build_model(config, data)
    record.identity |= data_identity(data)
    module = PretrainModule(model, config)
    source = SourceModule(data, model, config.training.batch_size, config.seed)
    invariance = domain_invariance(config, on_progress)
    if invariance is not None:
        model.card["invariant"] = invariance[1]
        record.identity |= {"invariant_table.sha256": invariance[1]["sha256"]}
    with quiet_lightning():
        trainer = _trainer(config, run_folder, record, invariance and invariance[0])
    record.identity["processes"] = trainer.world_size
    # Only our own files: the user may have named a folder that holds other things too.
    leftovers = [run_folder / f".{file.name}.part" for file in (last, best)]
    if checkpoint is None:
        curves = [run_folder / f"learning_curves.{kind}" for kind in ("csv", "png")]
        leftovers += [last, best, *curves]
    for old in leftovers:
        old.unlink(missing_ok=True)
    if checkpoint is not None and is_finished(checkpoint, config.training.epochs):
        check_identity(checkpoint, data_identity(data), last)
        record.load_state_dict(recorded(checkpoint, last))
    else:
        if checkpoint is not None:
            check_identity(checkpoint, record.identity, last)
        with quiet_lightning():
            trainer.fit(module, source, ckpt_path=None if checkpoint is None else str(last))
    if trainer.is_global_zero:
        weights = SafetensorsCheckpointIO().load_checkpoint(best)["state_dict"]
        model.load_state_dict(PretrainModule.final_weights(weights))
        model.card["training_seconds"] = round(record.seconds, 3)
        model.card["training_device"] = record.device
        _finish(model.cpu().eval(), config, data, output, time.monotonic() - started)
    trainer.strategy.barrier()
    return model


def _trainer(
    config: PretrainConfig,
    run_folder: Path,
    record: RunRecord,
    invariance: callbacks.Callback | None,
) -> L.Trainer:
    # The guard comes first: what is not finite shall neither be drawn nor kept.
    extra: list[callbacks.Callback] = [FiniteLoss(run_folder), LearningCurves(run_folder), record]
    if invariance is not None:
        extra.append(invariance)
    if config.training.patience is not None:
        extra.append(callbacks.EarlyStopping("val_loss", patience=config.training.patience))
    # The last one after the best one, whose loss it knows. Lightning's own save_last writes only
    # with a new best one, and all epochs after that would be lost.
    extra += [MovableCheckpoint(run_folder, "best", "val_loss")]
    extra += [MovableCheckpoint(run_folder, "last")]
    options = {
        "enable_progress_bar": person_looks(),
        "enable_model_summary": False,
        "log_every_n_steps": 50,
        "gradient_clip_val": config.training.clip_norm,
        **_checked_trainer_keys(config.trainer),
    }
    logger = _logger(options.pop("logger", "CSVLogger"), run_folder)
    try:
        return L.Trainer(
            max_epochs=config.training.epochs,
            callbacks=extra,
            logger=logger,
            plugins=[SafetensorsCheckpointIO()],
            use_distributed_sampler=False,  # ours already knows its rank
            **options,
        )
    except _REFUSALS as error:
        raise ConfigError(f"{_refused(config.trainer)} in trainer: {error}") from error


def _checked_trainer_keys(trainer: dict[str, Any]) -> dict[str, Any]:
    known = sorted(set(inspect.signature(L.Trainer).parameters) - set(_SET_HERE))
    for key in trainer:
        if key in _SET_HERE:
            raise ConfigError(f"{key!r} in trainer cannot be set: {_SET_HERE[key]}")
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in trainer; known are {known}")
    return trainer


def _refused(trainer: dict[str, Any]) -> str:
    """Name the keys that Lightning does not take, by trying each alone."""
    refused = []
    for key, value in trainer.items():
        try:
            if key != "logger":
                L.Trainer(**{"logger": False, "enable_checkpointing": False, key: value})
        except _REFUSALS:
            refused.append(key)
    # Each may be right and only their combination wrong.
    return ", ".join(f"{key!r}: {trainer[key]!r}" for key in refused or trainer)


def _logger(name: Any, run_folder: Path) -> Any:
    """Return the logger of a name, or what else Lightning takes for one."""
    if not isinstance(name, str):
        return name
    known = [n for n in loggers.__all__ if n != "Logger"]
    if name not in known:
        raise ConfigError(f"'logger' in trainer is {name!r}; known are {known}")
    try:
        return getattr(loggers, name)(save_dir=run_folder)
    except (TypeError, ImportError) as error:
        raise ConfigError(f"'logger' in trainer is {name!r}: {error}") from error


def _noise(
    model: Model,
    data: SourceData,
    rows: NDArray[np.int64],
    predicted: dict[str, NDArray[np.float64]],
) -> dict[str, float]:
    """Return the spread of each property's residuals on the scale of the network's output."""
    graphs = data.graphs.select(rows)
    noise = {}
    for name, head in model.heads.items():
        residual = head.scaler.normalised(predicted[name], graphs)
        residual = residual - head.scaler.normalised(data.values[name][rows], graphs)
        noise[name] = float(np.nanstd(residual)) if np.isfinite(residual).any() else 1.0
    return noise


def _finish(
    model: Model, config: PretrainConfig, data: SourceData, output: Path, seconds: float
) -> None:
    """Measure the model on val and test, compute its Fisher information and write both."""
    figures: dict[str, dict[str, Any]] = {}
    noise: dict[str, float] = {}
    for part in ("val", "test"):
        rows = data.rows(part)
        predicted = predict_rows(model, data.graphs, rows)
        for name, head in model.heads.items():
            truth = data.values[name][rows]
            measured = regression_metrics(truth, predicted[name], head.prop)
            figures.setdefault(name, {})[part] = measured
        if part == "val":
            noise = _noise(model, data, rows, predicted)
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
    if data.forces_ev_per_a is not None:
        model.card["force_scale_ev_per_a"] = data.force_scale_ev_per_a
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
