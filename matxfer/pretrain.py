"""Pretraining on several source properties at once, with missing labels, on Lightning."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import torch
from lightning.pytorch import callbacks, loggers

from matxfer.checkpoint import SafetensorsCheckpointIO
from matxfer.data.loader import LabelledGraphs, ordered_loader, shuffled_loader
from matxfer.data.properties import property_of
from matxfer.data.store import graph_store
from matxfer.data.table import TableError, read_property_table
from matxfer.files import sha256
from matxfer.fisher import concentration, fisher_diagonal, total_fisher
from matxfer.metrics import predict_rows, regression_metrics
from matxfer.model import Model
from matxfer.nn.head import PropertyHead, default_readout
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.provenance import provenance
from matxfer.runtime import keep_large_blocks, quiet_lightning

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.utils.data import DataLoader

    from matxfer.data.loader import LabelledBatch
    from matxfer.data.packed import PackedGraphs
    from matxfer.pretrain_config import PretrainConfig


@dataclass(frozen=True, slots=True, eq=False)
class SourceData:
    """All sources side by side.

    Attributes
    ----------
    graphs
        One pack of all tables' graphs, G in all.
    values
        Property name → values in its unit, shape (G,), NaN where a table has none.
    split
        ``train``, ``val``, ``test``, or another word for rows to leave out, shape (G,).
    errors
        Rows that gave no graph, and why.
    tables
        What is recorded of each table in the card.
    """

    graphs: PackedGraphs
    values: dict[str, NDArray[np.float64]]
    split: NDArray[np.str_]
    errors: dict[int, str]
    tables: list[dict[str, Any]]

    def rows(self, part: str) -> NDArray[np.int64]:
        """Return the usable rows of a part of the split."""
        return np.flatnonzero((self.split == part) & (self.graphs.nodes_per_graph > 0))


def load_sources(
    config: PretrainConfig, on_progress: Callable[[int], None] | None = None
) -> SourceData:
    """Read every table of a configuration and open (or build) their graphs."""
    from matxfer.readers import load_table

    names = list(dict.fromkeys(t for source in config.sources for t in source.targets))
    crystals, splits, tables = [], [], []
    columns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    for source in config.sources:
        path = config.folder / source.table
        frame = load_table(path)
        table = read_property_table(
            frame,
            source.targets,
            split_column=source.split_column,
            seed=config.seed,
            source=str(path),
        )
        split = table.split
        for column, allowed in source.report_only.items():
            if column not in frame.columns:
                raise TableError(f"{path}: no column {column!r} to report on")
            outside = ~frame[column].isin(allowed).to_numpy()
            split = np.where(outside & (split != "train"), "unused", split)
        crystals += table.crystals
        splits.append(split)
        for name in names:
            columns[name].append(table.values.get(name, np.full(len(table), np.nan)))
        parts, counts = np.unique(split, return_counts=True)
        tables.append(
            {
                "table": path.name,
                "sha256": sha256(path),
                "targets": source.targets,
                "split_column": source.split_column,
                "rows": dict(zip(parts.tolist(), counts.tolist(), strict=True)),
                "report_only": source.report_only,
            }
        )
    store = graph_store(crystals, config.graph, on_progress=on_progress)
    return SourceData(
        store.graphs,
        {name: np.concatenate(parts) for name, parts in columns.items()},
        np.concatenate(splits),
        store.errors,
        tables,
    )


class PretrainModule(L.LightningModule):
    """Mean absolute error of normalised outputs, summed over the properties with their weights.

    Parameters
    ----------
    model
        The network to train.
    config
        See :class:`matxfer.pretrain_config.PretrainConfig`.
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


def build_model(config: PretrainConfig, data: SourceData) -> Model:
    """Build the network with scalers and references fitted to the training rows."""
    train = data.rows("train")
    if not len(train):
        raise TableError("no training row is usable; check the split columns")
    network = EdgeGatedNetwork(**asdict(config.network), graph_options=config.graph)
    graphs = data.graphs.select(train)
    model = Model(network, [], np.unique(graphs.numbers).tolist())
    for name, values in data.values.items():
        prop = property_of(name)
        head = PropertyHead(prop, network.node_dim, default_readout(prop), network.node_dim)
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
        weights = {k.removeprefix("model."): v for k, v in best["state_dict"].items()}
        model.load_state_dict(weights)
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
    train = data.rows("train")
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
