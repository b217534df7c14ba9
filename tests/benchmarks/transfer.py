"""Strategies of fine-tuning against training from scratch on the small tasks.

Five published splits; everything is chosen on validation rows, test rows are read once per split.
Scratch is the same network and readout from random weights. Results so far are kept in --raw, one
line per run, and not computed again; the table shows what is there. The strict model has seen no
material of these tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.data.properties import unit_of
from matxfer.model import Model, load_model
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.readers import load_table
from matxfer.transfer.finetune import finetune

if TYPE_CHECKING:
    from collections.abc import Iterable

STRUCTURE = {"material_id", "formula", "n_sites", "lattice", "numbers", "frac_coords"}
VARIANTS: dict[str, dict[str, Any]] = {
    "auto": {},
    "scratch": {"strategy": "scratch"},
    "features": {"strategy": "features"},
    "readouts": {"strategy": "finetune"},
    "2 frozen": {"strategy": "finetune", "freeze": 2},
    "2 frozen, EWC": {"strategy": "finetune", "freeze": 2, "retain": "ewc"},
    "nothing frozen": {"strategy": "finetune", "freeze": 0},
    "nothing frozen, EWC": {"strategy": "finetune", "freeze": 0, "retain": "ewc"},
}
PUBLISHED = ("cgcnn_scratch", "moe_18", "uma_finetuned", "jmp_ft", "moma_adapter", "moma_full")


def target_of(columns: Iterable[str]) -> str:
    """Return the target of a small task: its one column that is neither structure nor split."""
    return next(c for c in columns if c not in STRUCTURE and not c.startswith("split_"))


def untrained(model: Model, seed: int) -> Model:
    """Return a model of the same shape with random weights and no heads to start from."""
    torch.manual_seed(seed)
    network = EdgeGatedNetwork.from_config(model.backbone.config())
    card = deepcopy(model.card) | {"name": "scratch", "sha256": ""}
    return Model(network, [], model.elements, card).eval().requires_grad_(False)


def run(arguments: argparse.Namespace, raw: Path) -> None:
    """Fine-tune what is not in the raw file yet."""
    model = load_model(arguments.model)
    for task in arguments.tasks:
        path = arguments.data / "small_tasks" / f"{task}.parquet"
        target = target_of(load_table(path).columns)
        for variant in arguments.variants:
            for split in arguments.splits:
                key = {"model": model.name, "task": task, "variant": variant, "split": split}
                if any(key.items() <= done.items() for done in results(raw)):
                    continue
                start = time.monotonic()
                plugin = finetune(
                    path,
                    target,
                    model=model,
                    split_column=f"split_{split}",
                    seed=split,
                    **VARIANTS[variant],
                )
                figures = plugin.meta["figures"]
                record = {
                    **key,
                    "val": figures["val"]["mae"],
                    "test": figures["test"]["mae"],
                    "coverage": figures["test"]["coverage"],
                    "ood": figures["test"]["rank_correlation_of_error_and_ood"],
                    "seconds": round(time.monotonic() - start, 1),
                    "chosen": plugin.meta["chosen"],
                }
                with raw.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)


def results(raw: Path) -> list[dict[str, Any]]:
    """Return the runs so far."""
    return [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []


def spread(values: list[float]) -> str:
    """Return mean and spread."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}"


def tables(arguments: argparse.Namespace, runs: list[dict[str, Any]]) -> list[Table]:
    """Return the errors beside the published ones, and what else was measured."""
    with (arguments.data.parent / "published_results.json").open() as file:
        published = json.load(file)["small_tasks"]["tasks"]
    tasks = list(dict.fromkeys(r["task"] for r in runs))
    variants = [v for v in VARIANTS if any(r["variant"] == v for r in runs)]

    def of(task: str, variant: str, what: str) -> list[float]:
        mine = [r for r in runs if r["task"] == task and r["variant"] == variant]
        return [r[what] for r in mine if r[what] is not None]

    errors = Table(
        "Test MAE, mean ± spread over the splits", ("task", "unit", *variants, *PUBLISHED)
    )
    for task in tasks:
        target = target_of(load_table(arguments.data / "small_tasks" / f"{task}.parquet").columns)
        own = [spread(of(task, v, "test")) for v in variants]
        errors.rows.append(
            (task, unit_of(target), *own, *(f"{published[task][m]:g}" for m in PUBLISHED))
        )
    columns = ("splits", "val MAE", "seconds", "coverage of 90 %", "rank corr. of error and ood")
    more = Table("Each variant", ("task", "variant", *columns))
    for task in tasks:
        for variant in variants:
            values = {w: of(task, variant, w) for w in ("val", "seconds", "coverage", "ood")}
            if values["val"]:
                cells = [spread(values[w]) for w in ("val", "seconds", "coverage", "ood")]
                more.rows.append((task, variant, str(len(values["val"])), *cells))
    chosen = Table("What auto chose", ("task", "split", "test MAE", "chosen"))
    for r in (r for r in runs if r["variant"] == "auto"):
        chosen.rows.append((r["task"], r["split"], f"{r['test']:.4g}", r["chosen"]))
    return [errors, more, chosen]


def main() -> None:
    """Run the benchmark and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "transfer")
    parser.add_argument("--model", default="mp-base-strict")
    every = (
        "jarvis_2d_eform", "expt_eform", "jarvis_2d_exfoliation", "jarvis_2d_dielectric_opt",
        "mp_elastic_anisotropy", "mp_eps_electronic", "mp_phonons", "mp_poisson_ratio",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=every)
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["auto", "scratch"])
    parser.add_argument("--raw", type=Path, default=Path("runs/transfer.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.raw.parent.mkdir(parents=True, exist_ok=True)
    run(arguments, arguments.raw)
    model = load_model(arguments.model)
    runs = [r for r in results(arguments.raw) if r["model"] == model.name]
    write_tables(
        arguments.output,
        "Fine-tuning against scratch",
        facts(arguments.threads, model=model.name, weights=model.checksum[:12]),
        tables(arguments, runs),
    )


if __name__ == "__main__":
    main()
