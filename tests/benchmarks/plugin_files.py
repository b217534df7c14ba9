"""Plugin files: how large, how long to load once the base is there, the same after a round trip.

For each strategy a plugin is trained on a small task, written, and read back several times; the
predictions for the test rows before writing and after reading are compared bit by bit. Size and
time of loading do not depend on how long was trained, so a few passes do. CPU time is what an idle
machine would take.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.benchmark.tasks import target_of
from matxfer.data.loader import edge_budget_batches
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import load_model
from matxfer.readers import load_table
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import Plugin, load_plugin, predict_columns

if TYPE_CHECKING:
    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model

#: The targets of the project.
MOST_MB, MOST_MS = 2.0, 50.0
STRATEGIES: dict[str, dict[str, Any]] = {
    "auto": {},
    "readouts on frozen layers": {"strategy": "finetune"},
    "readouts, extrema": {"strategy": "finetune", "readout": "extrema"},
    "kernel ridge": {"features": "kernel_ridge"},
    "forest": {"features": "forest"},
    "2 frozen, EWC": {"freeze": 2, "retain": "ewc"},
    "nothing frozen": {"freeze": 0},
    "nothing frozen, extrema": {"freeze": 0, "readout": "extrema"},
}


def predicted(model: Model, plugin: Plugin, graphs: PackedGraphs, rows: np.ndarray) -> np.ndarray:
    """Return all columns that the plugin adds for the rows, bounds and score too."""
    parts = []
    with torch.inference_mode():
        for index in edge_budget_batches(graphs, rows):
            columns = predict_columns(model, [plugin], graphs.batch(index))
            parts.append(np.stack(list(columns.values())))
    return np.concatenate(parts, axis=1)


def milliseconds_to_load(
    folder: Path, model: Model, repeats: int
) -> tuple[list[float], list[float]]:
    """Return wall and CPU times of loading, after a first time that fills the file cache."""
    wall, used = [], []
    for _ in range(repeats + 1):
        start, start_used = time.perf_counter(), time.process_time()
        load_plugin(folder, model)
        wall.append(1e3 * (time.perf_counter() - start))
        used.append(1e3 * (time.process_time() - start_used))
    return wall[1:], used[1:]


def main() -> None:
    """Run the benchmark and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "plugin_files")
    parser.add_argument("--model", default="mp-base-strict")
    parser.add_argument("--task", default="mp_phonons")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    path = arguments.data / "small_tasks" / f"{arguments.task}.parquet"
    target = target_of(load_table(path).columns)
    data = read_property_table(path, [target], split_column="split_0")
    graphs = graph_store(data.crystals, model.backbone.graph_options).graphs
    rows = np.flatnonzero(data.split == "test")
    table = Table(
        f"{arguments.task}, {int((data.split == 'train').sum())} training rows",
        ("plugin", "size, MB", "of it layers", "load, ms (median, range)", "CPU, ms", "same bits"),
    )
    for name, options in STRATEGIES.items():
        with tempfile.TemporaryDirectory() as folder:
            plugin = finetune(
                path,
                target,
                folder,
                model=model,
                split_column="split_0",
                epochs=arguments.epochs,
                **options,
            )
            before = predicted(model, plugin, graphs, rows)
            again = load_plugin(folder, model)
            after = predicted(model, again, graphs, rows)
            size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
            layers = sum(v.nbytes for v in plugin.delta.values()) / 1e6
            times, used = milliseconds_to_load(Path(folder), model, arguments.repeats)
        print(name, plugin.meta["chosen"], size, flush=True)
        table.rows.append(
            (
                name,
                f"{size:.2f}",
                f"{layers:.2f}",
                f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})",
                f"{statistics.median(used):.1f}",
                "yes" if np.array_equal(before, after) else "NO",
            )
        )
    write_tables(
        arguments.output,
        "Plugin files",
        facts(
            arguments.threads,
            model=f"{model.name}, loaded before",
            targets=f"at most {MOST_MB:g} MB, less than {MOST_MS:g} ms",
            training=f"{arguments.epochs} passes",
        ),
        [table],
    )


if __name__ == "__main__":
    main()
