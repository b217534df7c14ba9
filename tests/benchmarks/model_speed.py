"""Speed and accuracy of the shipped models side by side, from ready graphs.

All models predict all their properties for the same validation rows of mp_formation_energy, whose
batches are made beforehand, in turns; speeds are medians over the turns. The errors are those that
the models' cards give for their test rows.

    python tests/benchmarks/model_speed.py --data ../shared/data --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.data.loader import edge_budget_batches
from matxfer.data.store import graph_store
from matxfer.model import WEIGHTS_FILE, load_model
from matxfer.readers import crystals_of_table, load_table
from matxfer.runtime import keep_large_blocks, use_threads

if TYPE_CHECKING:
    from pathlib import Path

    from matxfer.data.batch import GraphBatch
    from matxfer.graph import GraphOptions
    from matxfer.model import Model


def load_batches(
    folder: Path, n: int, seed: int, options: GraphOptions
) -> tuple[list[GraphBatch], int, int]:
    """Return the batches of n validation rows, how many structures they hold and how many edges."""
    frame = load_table(folder / "mp_formation_energy.parquet")
    frame = frame[frame["split"] == "val"]
    frame = frame.sample(min(n, len(frame)), random_state=seed).reset_index(drop=True)
    entries = crystals_of_table(frame, "mp_formation_energy")
    crystals = [entry.crystal for entry in entries if entry.crystal is not None]
    graphs = graph_store(crystals, options).graphs
    rows = np.flatnonzero(graphs.nodes_per_graph > 0)
    batches = [graphs.batch(index) for index in edge_budget_batches(graphs, rows)]
    return batches, len(rows), int(graphs.edges_per_graph[rows].sum())


def predict(model: Model, batches: list[GraphBatch]) -> float:
    """Predict all batches; return the seconds it took."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model.predict_graphs(batch)
    return time.perf_counter() - start


def errors_of(model: Model) -> dict[str, str]:
    """Return the mean absolute test error of each property in the card, by property and unit."""
    measured = {name: parts["test"] for name, parts in model.card["figures"].items()}
    return {f"{name}, test error": f"{m['mae']:.4g} {m['unit']}" for name, m in measured.items()}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "model_speed")
    parser.add_argument(
        "--models", nargs="+", default=["mp-base", "mp-small"], help="names or folders"
    )
    parser.add_argument("-n", type=int, default=1000, help="structures")
    parser.add_argument("--turns", type=int, default=9, help="timed turns of each model")
    return parser.parse_args()


def main() -> None:
    """Measure and write the result."""
    args = parse_arguments()
    keep_large_blocks()
    use_threads(args.threads)
    models = [load_model(name) for name in args.models]
    options = models[0].backbone.graph_options
    if any(model.backbone.graph_options != options for model in models):
        raise SystemExit("the models work on graphs of different kinds")
    batches, structures, edges = load_batches(args.data, args.n, args.seed, options)
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(args.turns + 1):
        for k in range(len(models))[:: 1 if turn % 2 else -1]:
            seconds[k].append(predict(models[k], batches))
    seconds = [taken[1:] for taken in seconds]  # the first turn warms up
    errors = [errors_of(model) for model in models]
    names = list(dict.fromkeys(name for each in errors for name in each))
    columns = ("weights", "file, MB", "structures/s", "edges/s", f"times {args.models[0]}", *names)
    table = Table("Speed, and the test errors of the cards", ("model", *columns))
    for name, model, taken, error in zip(args.models, models, seconds, errors, strict=True):
        median = statistics.median(taken)
        assert model.folder is not None
        table.rows.append(
            (
                name,
                f"{sum(p.numel() for p in model.parameters()):,}",
                f"{(model.folder / WEIGHTS_FILE).stat().st_size / 1e6:.2f}",
                f"{structures / median:,.0f}",
                f"{edges / median:,.0f}",
                f"{statistics.median(a / b for a, b in zip(seconds[0], taken, strict=True)):.2f}",
                *(error.get(column, "–") for column in names),
            )
        )
    known = facts(
        args.threads,
        rows=f"{structures:,} validation rows of mp_formation_energy, {edges:,} edges in "
        f"{len(batches)} batches made beforehand, float32, every property of a model",
        turns=f"{args.turns} of each model",
    )
    write_tables(args.output, "Speed and accuracy of the shipped models", known, [table])


if __name__ == "__main__":
    main()
