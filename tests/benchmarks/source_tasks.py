"""What the frozen layers of several source models are worth on the small tasks.

The first K layers stay frozen; mean and maximum of the node features over the atoms are the
fingerprint of a crystal, and a kernel ridge regression (Gaussian kernel, closed form) learns the
target from it. Width of the kernel and ridge are chosen on the validation rows of each split, and
so is the depth K of the last column; test rows are read for the choice made. Give models that have
not seen the materials of the tasks.

    python tests/benchmarks/source_tasks.py --models base=runs/study/base mp-base-strict
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.benchmark.tasks import TASKS, target_of
from matxfer.data.loader import edge_budget_batches
from matxfer.data.properties import apply_transform, invert_transform, property_of
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import load_model
from matxfer.nn.readout import pool
from matxfer.readers import load_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the kernel, in units of the root of the number of features
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)


def fingerprints(model, graphs) -> list[NDArray[np.float64]]:
    """Return the pooled features after 0 … L layers, each (G, 2F)."""
    depths: list[list[NDArray[np.float64]]] = [[] for _ in range(model.backbone.n_layers + 1)]
    backbone = model.backbone
    for rows in edge_budget_batches(graphs, np.arange(len(graphs))):
        batch = graphs.batch(rows)
        with torch.no_grad():
            features = backbone.embed(batch)
            for k, kept in enumerate(depths):
                kept.append(pool(features.node, batch).double().numpy())
                if k < backbone.n_layers:
                    features = backbone.run(batch, features, k, k + 1)
    return [np.concatenate(kept) for kept in depths]


def kernel_ridge(x, y, train, val):
    """Return (validation error, prediction of all rows) of the best width and ridge."""
    mean, std = x[train].mean(0), x[train].std(0)
    x = (x - mean)[:, std > 1e-9] / std[std > 1e-9]
    square = (x * x).sum(1)
    distance = square[:, None] + square[train] - 2 * x @ x[train].T
    centre = np.median(y[train])
    best = (np.inf, np.zeros(len(y)))
    for width in WIDTHS:
        kernel = np.exp(-distance.clip(min=0) / (2 * width**2 * x.shape[1]))
        value, vector = np.linalg.eigh(kernel[train])
        projected = vector.T @ (y[train] - centre)
        for ridge in RIDGES:
            told = kernel @ (vector @ (projected / (value + ridge * len(train)))) + centre
            error = np.abs(told - y)[val].mean()
            if error < best[0]:
                best = (error, told)
    return best


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "source_tasks")
    parser.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER or NAME; first: 1")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {m.split("=")[0]: load_model(m.split("=")[-1]) for m in arguments.models}
    depths = range(max(m.backbone.n_layers for m in models.values()) + 1)
    test: dict[tuple[str, str, int | str], list[float]] = {}
    val: dict[tuple[str, str, int], list[float]] = {}
    for task in arguments.tasks:
        path = arguments.data / "small_tasks" / f"{task}.parquet"
        frame = load_table(path)
        target = target_of(frame.columns)
        table = read_property_table(frame, [target], source=str(path))
        transform = property_of(target).transform
        truth = table.values[target]
        y = apply_transform(transform, truth)
        for name, model in models.items():
            store = graph_store(table.crystals, model.backbone.graph_options)
            known = np.isfinite(y) & (store.graphs.nodes_per_graph > 0)
            layers = fingerprints(model, store.graphs)
            for split, (depth, x) in product(arguments.splits, enumerate(layers)):
                part = frame[f"split_{split}"].to_numpy()
                rows = {p: np.flatnonzero(known & (part == p)) for p in ("train", "val", "test")}
                _, told = kernel_ridge(x, y, rows["train"], rows["val"])
                error = np.abs(invert_transform(transform, told) - truth)
                val.setdefault((task, name, depth), []).append(error[rows["val"]].mean())
                test.setdefault((task, name, depth), []).append(error[rows["test"]].mean())
            for k, _ in enumerate(arguments.splits):
                chosen = min(range(len(layers)), key=lambda d: val[task, name, d][k])
                test.setdefault((task, name, "chosen"), []).append(test[task, name, chosen][k])
            print(task, name, *(f"{np.mean(test[task, name, d]):.4g}" for d in depths), flush=True)
    columns = ["task", "model", *(f"K = {d}" for d in depths), "K chosen on val"]
    rows = [
        [task, name, *(spread(test.get((task, name, d))) for d in (*depths, "chosen"))]
        for task, name in product(arguments.tasks, models)
    ]
    first = next(iter(models))
    ratios = [
        [name, *(relative(test, arguments.tasks, name, first, d) for d in (*depths, "chosen"))]
        for name in models
    ]
    write_tables(
        arguments.output,
        "Frozen layers of several source models on the small tasks",
        facts(arguments.threads, kernel=f"widths {WIDTHS}, ridges {RIDGES}"),
        [
            Table(
                f"Error over that of {first}, geometric mean over the tasks", columns[1:], ratios
            ),
            Table("Test MAE, mean ± spread over the splits", columns, rows),
        ],
    )


def spread(errors: list[float] | None) -> str:
    """Return mean ± standard deviation."""
    if not errors:
        return "–"
    deviation = statistics.stdev(errors) if len(errors) > 1 else float("nan")
    return f"{statistics.mean(errors):.4g} ± {deviation:.2g}"


def relative(test, tasks, name, first, depth) -> str:
    """Return the geometric mean over the tasks of a model's error over the first model's."""
    if any((task, name, depth) not in test for task in tasks):
        return "–"
    logs = [
        np.log(np.mean(test[task, name, depth]) / np.mean(test[task, first, depth]))
        for task in tasks
    ]
    return f"{np.exp(np.mean(logs)):.3f}"


if __name__ == "__main__":
    main()
