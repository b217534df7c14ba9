"""A pretraining run from its configuration to the written model, on Lightning."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
from lightning.pytorch import callbacks, loggers

from matxfer.checkpoint import SafetensorsCheckpointIO
from matxfer.data.properties import property_of
from matxfer.data.table import TableError
from matxfer.fisher import concentration, fisher_diagonal, total_fisher
from matxfer.metrics import predict_rows, regression_metrics
from matxfer.model import Model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.pretraining.module import PretrainModule, SourceModule
from matxfer.pretraining.sources import SourceData, load_sources
from matxfer.provenance import provenance
from matxfer.runtime import keep_large_blocks, quiet_lightning

if TYPE_CHECKING:
    from collections.abc import Callable

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
        prop = property_of(name)
        readout = readouts.get(name, default_readout(prop))
        head = PropertyHead(prop, network.node_dim, readout, network.node_dim)
        head.scaler = type(head.scaler).fit(prop, values[train], graphs)
        model.heads[name] = head
    return model


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
    last = run_folder / "last.ckpt"
    if not resume:
        # Only our own files: the user may have named a folder that holds other things too.
        for old in (last, run_folder / "best.ckpt"):
            old.unlink(missing_ok=True)
    keep = callbacks.ModelCheckpoint(
        run_folder,
        filename="best",
        monitor="val_loss",
        save_last=True,
        enable_version_counter=False,
    )
    with quiet_lightning():
        trainer = _trainer(config, run_folder, keep)
        trainer.fit(module, source, ckpt_path=str(last) if resume and last.exists() else None)
    if trainer.is_global_zero:
        best = SafetensorsCheckpointIO().load_checkpoint(keep.best_model_path)
        model.load_state_dict(PretrainModule.final_weights(best["state_dict"]))
        _finish(model.cpu().eval(), config, data, Path(output), time.monotonic() - started)
    trainer.strategy.barrier()
    return model


def _trainer(
    config: PretrainConfig, run_folder: Path, keep: callbacks.ModelCheckpoint
) -> L.Trainer:
    extra: list[callbacks.Callback] = [keep]
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
    logger = getattr(loggers, name)(save_dir=run_folder) if isinstance(name, str) else name
    return L.Trainer(
        max_epochs=config.training.epochs,
        callbacks=extra,
        logger=logger,
        plugins=[SafetensorsCheckpointIO()],
        use_distributed_sampler=False,  # ours already knows its rank
        **options,
    )


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
