"""What an epoch of fine-tuning costs: prefix cached, prefix recomputed, everything trained.

For every frozen depth K the same batches are trained with the features of the frozen layers read
from the cache and with the frozen layers run again, by turns; times are medians over epochs. The
first epoch of a cached run pays for filling the cache, which has a column of its own. CHGNet, if
it is installed, trains the network on its last features with everything else frozen and run again,
on some of the same crystals.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.benchmark.tasks import target_of
from matxfer.crystal import Crystal
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import DEFAULT_MODEL, load_model
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.readers import load_table
from matxfer.runtime import keep_large_blocks, use_threads
from matxfer.transfer.activations import Activations
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.freezing import parameter_groups
from matxfer.transfer.plugin import Plugin
from matxfer.transfer.rows import PluginBatch, PluginRows
from matxfer.transfer.task import make_task
from matxfer.transfer.training import FinetuneModule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from matxfer.transfer.task import Task

TABLES = ("small_tasks/mp_phonons", "small_tasks/mp_elastic_anisotropy")
BATCH_SIZE = FinetuneConfig().batch_size
#: Crystals of a CHGNet batch, which then holds about as many edges as one of ours.
CHGNET_BATCH = 16


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
    width = task.base.backbone.node_dim * len(layers)
    readout = ReadoutEnsemble(task.readout_kind(config), width, config.hidden_dim, config.members)
    plugin = Plugin(task.base, depth, task.head(layers, readout, source, task.scaler(source)))
    rates = {"learning_rate": 1e-4, "head_learning_rate": 1e-4, "layer_decay": 1.0}
    groups = parameter_groups(plugin.backbone, plugin.head, depth, **rates, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, fused=True)
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


def chgnet_epoch(crystals: Sequence[Crystal], epochs: int) -> float | None:
    """Return seconds per crystal of CHGNet with its layers frozen; ``None`` if it is missing."""
    try:
        from chgnet.graph import CrystalGraphConverter
        from chgnet.model import CHGNet
    except ImportError:
        return None
    convert = CrystalGraphConverter(atom_graph_cutoff=6, bond_graph_cutoff=3)
    graphs = [convert(crystal.to_pymatgen()) for crystal in crystals]
    net = CHGNet().requires_grad_(False)
    net.mlp.requires_grad_(True)
    optimizer = torch.optim.AdamW(net.mlp.parameters(), fused=True)
    taken = []
    for _ in range(epochs + 1):
        start = time.perf_counter()
        for first in range(0, len(graphs), CHGNET_BATCH):
            loss = net(graphs[first : first + CHGNET_BATCH], task="e")["e"].abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / len(graphs)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "prefix_cache")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--tables", nargs="+", default=TABLES)
    parser.add_argument("--chgnet", type=int, default=96, help="crystals for CHGNet; 0: none")
    arguments = parser.parse_args()
    keep_large_blocks()
    use_threads(arguments.threads)
    model = load_model(arguments.model)
    tables = []
    for name in arguments.tables:
        path = arguments.data / f"{name}.parquet"
        target = target_of(load_table(path).columns)
        table = read_property_table(path, [target])
        graphs = graph_store(table.crystals, model.backbone.graph_options).graphs
        task = make_task(model, table, target, graphs, Activations(model, graphs), None)
        tables.append(depths(name, task, table.crystals, arguments))
    write_tables(
        arguments.output,
        "Fine-tuning epochs and the prefix cache",
        facts(
            arguments.threads,
            model=f"{model.name}, {sum(p.numel() for p in model.parameters()):,} parameters",
            epoch=f"every row of a table once, {BATCH_SIZE} in a batch, AdamW, no validation",
            CHGNet=f"random weights, energy only, {CHGNET_BATCH} in a batch, ready graphs",
        ),
        tables,
    )


def depths(name: str, task: Task, crystals: Sequence[Any], arguments: argparse.Namespace) -> Table:
    """Return the table of all frozen depths on one task."""
    rows: list[Sequence[object]] = []
    full = None
    for depth in range(task.base.backbone.n_layers + 1):
        with tempfile.TemporaryDirectory() as folder:
            fill, cached, again = measure(task, depth, arguments.epochs, Path(folder))
        full = full or again
        kept = "–" if depth == 0 else f"{fill:.2f}"
        ratios = (f"{again / cached:.1f}", f"{cached / full:.3f}")
        rows.append((depth, kept, f"{cached:.3f}", f"{again:.3f}", *ratios))
    if arguments.chgnet:
        usable = [c for c in crystals if isinstance(c, Crystal)][: arguments.chgnet]
        each = chgnet_epoch(usable, 1)
        if each is not None:
            whole = each * len(task.graphs)
            rows.append(("CHGNet, all", "–", "–", f"{whole:.1f}", f"{whole / cached:.0f}", "–"))
    edges = int(task.graphs.edge_offset[-1])
    columns = ("frozen layers", "fill the cache, s", "epoch with it, s", "epoch without it, s")
    columns += ("times cheaper", "of nothing frozen")
    heading = f"{name}: {len(task.graphs):,} crystals, {edges:,} edges"
    return Table(heading, columns, rows)


if __name__ == "__main__":
    main()
