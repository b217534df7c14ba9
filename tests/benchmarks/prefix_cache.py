"""What an epoch of fine-tuning costs: prefix cached, prefix recomputed, everything trained.

For every frozen depth K the same batches are trained with the features of the frozen layers read
from the cache and with the frozen layers run again, by turns; times are medians over epochs. The
first epoch of a cached run pays for filling the cache, which has a column of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import DEFAULT_MODEL, load_model
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.activations import Activations
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.freezing import parameter_groups
from matxfer.transfer.plugin import Plugin
from matxfer.transfer.rows import PluginBatch, PluginRows
from matxfer.transfer.task import make_task
from matxfer.transfer.training import FinetuneModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from matxfer.transfer.task import Task

BATCH_SIZE = 32


def epoch(
    module: FinetuneModule,
    optimizer: torch.optim.Optimizer,
    fetch: Callable[[NDArray[np.int64]], PluginBatch],
    rows: NDArray[np.int64],
) -> float:
    """Train on all rows once; return the seconds it took."""
    start = time.perf_counter()
    for first in range(0, len(rows), BATCH_SIZE):
        loss = module.training_step(fetch(rows[first : first + BATCH_SIZE]), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def measure(task: Task, depth: int, epochs: int, folder: Path) -> tuple[float, ...]:
    """Return seconds: computing what is kept, an epoch with it, an epoch without it."""
    config = FinetuneConfig(strategy="finetune", freeze=depth)
    layers = task.layers(config)
    source = task.source(config)
    readout = ReadoutEnsemble(task.readout_kind(config), task.base.backbone.node_dim * len(layers))
    plugin = Plugin(task.base, depth, task.head(layers, readout, source, task.scaler(source)))
    rates = {"learning_rate": 1e-4, "head_learning_rate": 1e-4, "layer_decay": 1.0}
    groups = parameter_groups(plugin.backbone, plugin.head, depth, **rates, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups)
    module = FinetuneModule(plugin, config)
    targets = task.targets(plugin.head.scaler, plugin.head.source)
    rows = np.concatenate([task.parts[part] for part in ("train", "val", "test")])

    start = time.perf_counter()
    kept = replace(task, activations=Activations(task.base, task.graphs, folder))
    inputs = kept.inputs(readout.kind, layers) if plugin.runs_no_layer else None
    data = PluginRows(kept, plugin, rows, targets, inputs)
    data.batch(rows[:1])
    fill = time.perf_counter() - start

    def recomputed(index: NDArray[np.int64]) -> PluginBatch:
        graphs, known = task.graphs.batch(index), torch.from_numpy(targets[index])
        if depth == 0:
            return PluginBatch(graphs, known)
        backbone = task.base.backbone
        with torch.no_grad():
            state = backbone.embed(graphs)
            below = {0: state.node}
            for k, later in enumerate(backbone.states(graphs, state, 0, depth), 1):
                state, below[k] = later, later.node
        return PluginBatch(graphs, known, None, state, below)

    seconds: dict[str, list[float]] = {"cached": [], "recomputed": []}
    for k in range(epochs + 1):
        for name, fetch in (("cached", data.batch), ("recomputed", recomputed)):
            taken = epoch(module, optimizer, fetch, rows)
            if k > 0:  # the first round warms up
                seconds[name].append(taken)
    return fill, *(statistics.median(times) for times in seconds.values())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "prefix_cache")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--table", default="small_tasks/jarvis_2d_eform")
    parser.add_argument("--target", default="formation_energy_ev_per_atom")
    arguments = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    table = read_property_table(arguments.data / f"{arguments.table}.parquet", [arguments.target])
    graphs = graph_store(table.crystals, model.backbone.graph_options).graphs
    task = make_task(model, table, arguments.target, graphs, Activations(model, graphs), None)
    rows = []
    full = None
    for depth in range(model.backbone.n_layers + 1):
        with tempfile.TemporaryDirectory() as folder:
            fill, cached, again = measure(task, depth, arguments.epochs, Path(folder))
        full = full or again
        rows.append(
            [
                depth,
                "–" if depth == 0 else f"{fill:.2f}",
                f"{cached:.3f}",
                f"{again:.3f}",
                f"{cached / again:.2f}",
                f"{cached / full:.3f}",
            ]
        )
    columns = [
        "frozen layers",
        "fill the cache, s",
        "epoch with it, s",
        "epoch without it, s",
        "with / without",
        "with / nothing frozen",
    ]
    edges = int(graphs.edge_offset[-1])
    write_tables(
        arguments.output,
        "Fine-tuning epochs and the prefix cache",
        facts(arguments.threads, table=arguments.table, crystals=len(graphs), edges=edges),
        [Table("Seconds per epoch", columns, rows)],
    )


if __name__ == "__main__":
    main()
