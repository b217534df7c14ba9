"""What the frozen layers of several source models are worth on the small tasks.

The first K layers stay frozen; mean and maximum of the node features over the atoms are the
fingerprint of a crystal, and a kernel ridge regression (Gaussian kernel, closed form) learns the
target from it. Width of the kernel and ridge are chosen on the validation rows of each split, and
so is the depth K of the last column. With ``--methods readouts`` the plugin strategy of that name
learns it, trained readouts that read layers 0 … K and no more. Give models that have not seen the
materials of the tasks. Results so far are kept in --raw, one line each, and not computed again.

    python tests/benchmarks/source_tasks.py --models base=runs/small/base mp-base-strict
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.benchmark.markdown import spread
from matxfer.benchmark.tasks import TASKS, target_of
from matxfer.data.loader import edge_budget_batches
from matxfer.data.properties import apply_transform, invert_transform, property_of
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import load_model
from matxfer.nn.readout import pool
from matxfer.readers import load_table
from matxfer.runtime import use_threads
from matxfer.transfer.finetune import finetune

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from matxfer.model import Model

WIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the kernel, in units of the root of the number of features
RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
METHODS = {"kernel_ridge": "Kernel ridge regression", "readouts": "Trained readouts"}


def results(raw: Path) -> list[dict[str, Any]]:
    """Return the runs so far."""
    return [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []


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


def ridge_errors(model: Model, path: Path, splits: list[int]) -> Iterator[dict]:
    """Yield the errors of kernel ridge regression after each layer, split by split."""
    frame = load_table(path)
    target = target_of(frame.columns)
    table = read_property_table(frame, [target], source=str(path))
    transform, truth = property_of(target).transform, table.values[target]
    y = apply_transform(transform, truth)
    store = graph_store(table.crystals, model.backbone.graph_options)
    known = np.isfinite(y) & (store.graphs.nodes_per_graph > 0)
    layers = fingerprints(model, store.graphs)
    for split, depth in product(splits, range(1, len(layers))):
        part = frame[f"split_{split}"].to_numpy()
        rows = {p: np.flatnonzero(known & (part == p)) for p in ("train", "val", "test")}
        _, told = kernel_ridge(layers[depth], y, rows["train"], rows["val"])
        error = np.abs(invert_transform(transform, told) - truth)
        figures = {p: float(error[rows[p]].mean()) for p in ("val", "test")}
        yield {"split": split, "depth": depth} | figures


def readout_errors(model: Model, path: Path, splits: list[int]) -> Iterator[dict]:
    """Yield the errors of plugins whose readouts read layers 0 … K, split by split."""
    target = target_of(load_table(path).columns)
    for split, depth in product(splits, range(1, model.backbone.n_layers + 1)):
        plugin = finetune(
            path,
            target,
            model=model,
            split_column=f"split_{split}",
            seed=split,
            strategy="finetune",
            layers=tuple(range(depth + 1)),
        )
        figures = {p: plugin.meta["figures"][p]["mae"] for p in ("val", "test")}
        yield {"split": split, "depth": depth} | figures


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is not in the raw file yet."""
    errors = {"kernel_ridge": ridge_errors, "readouts": readout_errors}
    for named, method, task in product(arguments.models, arguments.methods, arguments.tasks):
        name, _, folder = named.partition("=")
        key = {"model": name, "method": method, "task": task}
        done = {r["split"] for r in results(arguments.raw) if key.items() <= r.items()}
        if left := [split for split in arguments.splits if split not in done]:
            path = arguments.data / "small_tasks" / f"{task}.parquet"
            found = [key | r for r in errors[method](load_model(folder or name), path, left)]
            with arguments.raw.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in found)
            print(name, method, task, flush=True)


def tables(arguments: argparse.Namespace) -> list[Table]:
    """Return the errors of each method, and those of each model over those of the first one."""
    names = [named.partition("=")[0] for named in arguments.models]
    made = []
    for method in arguments.methods:
        runs = [r for r in results(arguments.raw) if r["method"] == method]
        test = errors_by_depth(runs)
        depths = [*sorted({r["depth"] for r in runs}), "chosen"]
        columns = ["model", *(f"K = {d}" if d != "chosen" else "K chosen on val" for d in depths)]
        title = METHODS[method]
        ratios = [[n, *(relative(test, arguments.tasks, n, names[0], d) for d in depths)]
                  for n in names]  # fmt: skip
        over = f"{title}: error over that of {names[0]}, geometric mean over the tasks"
        rows = [
            [task, name, *(spread(test.get((task, name, d), [])) for d in depths)]
            for task, name in product(arguments.tasks, names)
        ]
        absolute = f"{title}: test MAE, mean ± spread over the splits"
        made += [Table(over, columns, ratios), Table(absolute, ["task", *columns], rows)]
    return made


def errors_by_depth(runs: list[dict]) -> dict[tuple[str, str, int | str], list[float]]:
    """Return the test errors of (task, model, depth), and of the depth of each split's best val."""
    test: dict[tuple[str, str, int | str], list[float]] = {}
    best: dict[tuple[str, str, int], dict] = {}
    for r in runs:
        test.setdefault((r["task"], r["model"], r["depth"]), []).append(r["test"])
        key = (r["task"], r["model"], r["split"])
        if key not in best or r["val"] < best[key]["val"]:
            best[key] = r
    for (task, model, _), r in best.items():
        test.setdefault((task, model, "chosen"), []).append(r["test"])
    return test


def relative(test, tasks, name, first, depth) -> str:
    """Return the geometric mean over the tasks of a model's error over the first model's."""
    if any((task, n, depth) not in test for task in tasks for n in (name, first)):
        return "–"
    logs = [
        np.log(np.mean(test[task, name, depth]) / np.mean(test[task, first, depth]))
        for task in tasks
    ]
    return f"{np.exp(np.mean(logs)):.3f}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "source_tasks")
    parser.add_argument("--models", nargs="+", required=True, help="NAME=FOLDER or NAME; first: 1")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["kernel_ridge"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--raw", type=Path, default=Path("runs/source_tasks.jsonl"))
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    arguments.raw.parent.mkdir(parents=True, exist_ok=True)
    measure(arguments)
    write_tables(
        arguments.output,
        "Frozen layers of several source models on the small tasks",
        facts(arguments.threads, kernel=f"widths {WIDTHS}, ridges {RIDGES}"),
        tables(arguments),
    )


if __name__ == "__main__":
    main()
