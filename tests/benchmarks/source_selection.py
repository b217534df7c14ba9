"""Models ranked without training against what readouts on their frozen layers then reach.

For each small task the models are ranked on the training rows of a split
(``matxfer.rank_sources``), and readouts are trained on the frozen layers of each, reading all of
them: what the ranking should foretell. ``permuted`` is the first model with the weights of each
tensor in random order, ``untrained`` a random network of that shape; ``composition`` has kernel
ridge regression in the place of readouts, ``scratch`` is the network of the smallest model trained
from random weights. Results so far are kept in --raw, one line each, and not computed again.

    python tests/benchmarks/source_selection.py --models mp-base-strict mp-small FOLDER
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.benchmark.tasks import TASKS, target_of
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import Model, load_model
from matxfer.readers import load_table
from matxfer.runtime import use_threads
from matxfer.transfer.activations import Activations
from matxfer.transfer.baselines import untrained
from matxfer.transfer.finetune import finetune
from matxfer.transfer.negative import composition_error
from matxfer.transfer.scoring import ERRORS, SCORES
from matxfer.transfer.selection import rank_sources
from matxfer.transfer.task import make_task

#: What is no model of its own.
CONTROLS = ("permuted", "untrained", "composition")


def permuted(model: Model) -> Model:
    """Return a copy with the weights of each tensor of the backbone in random order."""
    other = copy.deepcopy(model)
    order = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in other.backbone.parameters():
            mixed = torch.randperm(weights.numel(), generator=order)
            weights.copy_(weights.flatten()[mixed].view_as(weights))
    other.card = {**model.card, "name": "permuted", "sha256": f"permuted {model.checksum}"}
    return other


def models(arguments: argparse.Namespace) -> dict[str, Model]:
    """Return the models and the permuted one by name."""
    given = [load_model(name) for name in arguments.models]
    return {model.name: model for model in [*given, permuted(given[0])]}


def ranking(path: Path, split: int, known: dict[str, Model]) -> dict[str, Any]:
    """Return the ranking of all models, and the processor time that it took."""
    target, started = target_of(load_table(path).columns), time.process_time()
    found = rank_sources(path, target, known.values(), split_column=f"split_{split}")
    return found.to_json() | {"cpu_seconds": time.process_time() - started}


def reached(path: Path, split: int, name: str, known: dict[str, Model]) -> dict[str, float]:
    """Return validation and test error of what is trained on a model."""
    target, column = target_of(load_table(path).columns), f"split_{split}"
    first, smallest = next(iter(known.values())), min(known.values(), key=size_of)
    started = time.process_time()
    if name == "composition":
        figures = composition_errors(path, target, column, first)
    else:
        if name == "scratch":
            base, options = smallest, {"strategy": "scratch"}
        else:
            base = untrained(first) if name == "untrained" else known[name]
            options = {"strategy": "finetune", "freeze": base.backbone.n_layers}
        plugin = finetune(path, target, model=base, split_column=column, **options)
        figures = {part: plugin.meta["figures"][part]["mae"] for part in ("val", "test")}
    return figures | {"cpu_seconds": time.process_time() - started}


def size_of(model: Model) -> int:
    """Return the number of weights of a model."""
    return sum(weights.numel() for weights in model.parameters())


def composition_errors(path: Path, target: str, column: str, base: Model) -> dict[str, float]:
    """Return the errors of kernel ridge regression on the composition."""
    data = read_property_table(path, [target], split_column=column)
    graphs = graph_store(data.crystals, base.backbone.graph_options).graphs
    task = make_task(base, data, target, graphs, Activations(base, graphs), None)
    return {part: composition_error(task, part) for part in ("val", "test")}


def results(raw: Path) -> list[dict[str, Any]]:
    """Return what was measured so far."""
    return [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is not in the raw file yet."""
    known = models(arguments)
    for task, split in product(arguments.tasks, arguments.splits):
        path = arguments.data / "small_tasks" / f"{task}.parquet"
        key = {"task": task, "split": split}
        for name in dict.fromkeys([*known, *CONTROLS, *(["scratch"] * arguments.scratch)]):
            each = key | {"model": name}
            if not any(each.items() <= r.items() for r in results(arguments.raw)):
                append(arguments.raw, each | reached(path, split, name, known))
        each = key | {"ranked": sorted(known)}
        if not any(each.items() <= r.items() for r in results(arguments.raw)):
            append(arguments.raw, each | ranking(path, split, known))


def append(raw: Path, record: dict[str, Any]) -> None:
    """Keep a record."""
    with raw.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print({k: record.get(k) for k in ("task", "model", "val", "test", "cpu_seconds")}, flush=True)


def tables(arguments: argparse.Namespace) -> list[Table]:
    """Return how well each score foretells, what the verdicts are worth, and all errors."""
    names = sorted(models(arguments))
    controls = [c for c in (*CONTROLS, *(["scratch"] * arguments.scratch)) if c not in names]
    cases = list(product(arguments.tasks, arguments.splits))
    records = results(arguments.raw)
    error = {
        (r["task"], r["split"], r["model"]): r for r in records if "model" in r and "test" in r
    }
    ranked = {(r["task"], r["split"]): r for r in records if r.get("ranked") == names}
    return [
        score_table(names, cases, error, ranked),
        *verdict_tables(names, controls, cases, error, ranked),
        error_table(names, controls, cases, error, ranked),
    ]


def score_table(names, cases, error, ranked) -> Table:
    """Return rank correlations and regret of the top choice of each score."""
    from scipy.stats import spearmanr

    table = Table(
        "How well a score foretells the test errors of the readouts",
        ("score", "rank correlation, mean", "lowest", "regret, mean", "largest", "best chosen"),
        note=f"Over {len(names)} models, {len(cases)} tasks. Regret: by how much the error of the "
        "model with the best score is above that of the best model. `validation` ranks by the "
        "validation errors of the readouts themselves, which need training; `matxfer sources` by "
        "the errors of kernel ridge regression on the rows that all models can read.",
    )
    for score in ("matxfer sources", *ERRORS, *SCORES, "validation"):
        correlation, regret = [], []
        for case in cases:
            test = np.array([error[(*case, n)]["test"] for n in names])
            if score == "validation":
                told = np.array([error[(*case, n)]["val"] for n in names])
            else:
                by_name = {s["name"]: _told(s, score) for s in ranked[case]["sources"]}
                told = np.array([by_name[n] for n in names]) * (-1 if score in SCORES else 1)
            correlation.append(spearmanr(told, test).statistic)
            regret.append(test[told.argmin()] / test.min() - 1)
        hits = sum(r == 0 for r in regret)
        table.rows.append(
            (score, f"{np.mean(correlation):.2f}", f"{min(correlation):.2f}",
             f"{np.mean(regret):.1%}", f"{max(regret):.1%}", f"{hits} of {len(cases)}")
        )  # fmt: skip
    return table


def _told(source: dict[str, Any], score: str) -> float:
    return source["error"] if score == "matxfer sources" else source["scores"][score]


def verdict_tables(names, against, cases, error, ranked) -> list[Table]:
    """Return what became of the models by their verdict."""
    table = Table(
        "What the verdicts are worth: readouts of the models against what needs no pretraining",
        (
            "verdict",
            "cases",
            *(f"worse than {name}" for name in against),
            *(f"error over {name}" for name in against),
        ),
        note="Test errors, the ratios as medians over the cases. `untrained`: readouts on a random "
        "network of the shape of the first model; `composition`: kernel ridge regression.",
    )
    found: dict[str, list[tuple[str, str, list[float]]]] = {}
    for case in cases:
        for source in ranked[case]["sources"]:
            test = error[(*case, source["name"])]["test"]
            ratios = [test / error[(*case, name)]["test"] for name in against]
            found.setdefault(source["verdict"], []).append((case[0], source["name"], ratios))
    for verdict, members in sorted(found.items()):
        ratios = np.array([r for _, _, r in members])
        worse = [f"{count}" for count in (ratios > 1).sum(axis=0)]
        median = [f"{ratio:.2f}" for ratio in np.median(ratios, axis=0)]
        table.rows.append((verdict, len(members), *worse, *median))
    refused = Table(
        "Refused: negative transfer expected", ("model", "refused on", "of", "those not refused")
    )
    for name in names:
        verdicts = {
            case[0]: next(s for s in ranked[case]["sources"] if s["name"] == name)["verdict"]
            for case in cases
        }
        negative = [t for t, v in verdicts.items() if v.startswith("negative")]
        others = ", ".join(f"{t} ({v})" for t, v in verdicts.items() if t not in negative)
        if negative:
            refused.rows.append((name, len(negative), len(cases), others or "–"))
    return [table, refused]


def error_table(names, controls, cases, error, ranked) -> Table:
    """Return the test errors, with the estimates of the ranking."""
    everyone = [*names, *controls]
    table = Table(
        "Test error of the readouts (estimate of the ranking)",
        ("task", *everyone, "chosen", "processor s of the ranking"),
    )
    for case in cases:
        told = {s["name"]: s["error"] for s in ranked[case]["sources"] + ranked[case]["baselines"]}
        cells = [
            f"{error[(*case, n)]['test']:.4g}" + (f" ({told[n]:.4g})" if n in told else "")
            for n in everyone
        ]
        seconds = f"{ranked[case]['cpu_seconds']:.1f}"
        table.rows.append((case[0], *cells, ranked[case]["chosen"], seconds))
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "source_selection")
    parser.add_argument("--models", nargs="+", required=True, help="names or folders")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--splits", nargs="+", type=int, default=[0])
    parser.add_argument("--scratch", action="store_true", help="train from scratch, too")
    parser.add_argument("--raw", type=Path, default=Path("runs/source_selection.jsonl"))
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    arguments.raw.parent.mkdir(parents=True, exist_ok=True)
    measure(arguments)
    write_tables(
        arguments.output,
        "Choosing a source model without training",
        facts(arguments.threads, models=", ".join(sorted(models(arguments)))),
        tables(arguments),
    )


if __name__ == "__main__":
    main()
