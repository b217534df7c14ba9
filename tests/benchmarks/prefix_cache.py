"""What an epoch of fine-tuning costs: prefix cached, prefix recomputed, everything trained.

For every frozen depth K the same batches are trained with the features of the frozen layers read
from the cache and with the frozen layers run again, by turns; times are medians over epochs. The
first epoch of a cached run pays for filling the cache, which has a column of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import DEFAULT_MODEL, load_model
from matxfer.nn.head import PropertyHead
from matxfer.runtime import keep_large_blocks
from matxfer.transfer.freezing import parameter_groups
from matxfer.transfer.plugin import Plugin
from matxfer.transfer.prefix import PrefixCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from matxfer.data.batch import GraphBatch
    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model
    from matxfer.nn.backbone import Features

BATCH_SIZE = 32


def epoch(
    plugin: Plugin,
    optimizer: torch.optim.Optimizer,
    fetch: Callable[[NDArray[np.int64]], tuple[GraphBatch, Features | None]],
    rows: NDArray[np.int64],
) -> float:
    """Train on all rows once; return the seconds it took."""
    start = time.perf_counter()
    for first in range(0, len(rows), BATCH_SIZE):
        graphs, prefix = fetch(rows[first : first + BATCH_SIZE])
        output = plugin.head(plugin.features(graphs, prefix).node, graphs)
        optimizer.zero_grad()
        output.square().mean().backward()
        optimizer.step()
    return time.perf_counter() - start


def measure(model: Model, graphs: PackedGraphs, depth: int, epochs: int) -> tuple[float, ...]:
    """Return seconds: filling the cache, an epoch with it, an epoch without it."""
    backbone = model.backbone
    head = PropertyHead(next(iter(model.heads.values())).prop, backbone.node_dim, "atomwise")
    plugin = Plugin(model, depth, head)
    groups = parameter_groups(
        plugin.backbone,
        head,
        depth,
        learning_rate=1e-4,
        head_learning_rate=1e-4,
        layer_decay=1.0,
        weight_decay=0.0,
    )
    optimizer = torch.optim.AdamW(groups)
    start = time.perf_counter()
    cache = PrefixCache(backbone, graphs, depth)
    fill = time.perf_counter() - start

    def recomputed(rows: NDArray[np.int64]) -> tuple[GraphBatch, Features | None]:
        batch = graphs.batch(rows)
        if depth == 0:
            return batch, None
        with torch.no_grad():
            return batch, backbone.run(batch, backbone.embed(batch), 0, depth)

    rows = np.flatnonzero(graphs.nodes_per_graph > 0)
    seconds: dict[str, list[float]] = {"cached": [], "recomputed": []}
    for k in range(epochs + 1):
        for name, fetch in (("cached", cache.batch), ("recomputed", recomputed)):
            taken = epoch(plugin, optimizer, fetch, rows)
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
    rows = []
    full = None
    for depth in range(model.backbone.n_layers + 1):
        fill, cached, again = measure(model, graphs, depth, arguments.epochs)
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
