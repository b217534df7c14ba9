"""Fine-tuning against training from scratch on the small tasks, over their published splits.

Scratch is the same network, readout, loss and early stopping, started from random weights with
one learning rate for all layers. The best epoch is chosen on validation rows; test rows are read
once per split. Materials of these tasks also occur in the pretraining data, with other labels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.data.properties import unit_of
from matxfer.model import DEFAULT_MODEL, Model, load_model
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.readers import load_table
from matxfer.transfer.finetune import finetune

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

STRUCTURE = {"material_id", "formula", "n_sites", "lattice", "numbers", "frac_coords"}
SCRATCH = {"freeze": 0, "layer_decay": 1.0, "learning_rate": 1e-3}


def target_of(columns: Iterable[str]) -> str:
    """Return the target of a small task: its one column that is neither structure nor split."""
    return next(c for c in columns if c not in STRUCTURE and not c.startswith("split_"))


def untrained(model: Model, seed: int) -> Model:
    """Return a model of the same shape with random weights and no heads to start from."""
    torch.manual_seed(seed)
    network = EdgeGatedNetwork.from_config(model.backbone.config())
    card = deepcopy(model.card) | {"name": "scratch", "sha256": ""}
    return Model(network, [], model.elements, card).eval().requires_grad_(False)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "transfer")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tasks", nargs="+", default=["jarvis_2d_eform"])
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--freeze", nargs="+", type=int, default=[0, 2, 4])
    parser.add_argument("--part", choices=("val", "test"), default="test")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    rows = []
    for task in arguments.tasks:
        path: Path = arguments.data / "small_tasks" / f"{task}.parquet"
        target = target_of(load_table(path).columns)
        variants = [("scratch", SCRATCH)]
        variants += [(f"fine-tuned, {k} frozen", {"freeze": k}) for k in arguments.freeze]
        for name, options in variants:
            errors, seconds = [], []
            for split in arguments.splits:
                base = untrained(model, split) if name == "scratch" else model
                start = time.monotonic()
                plugin = finetune(
                    path,
                    target,
                    model=base,
                    split_column=f"split_{split}",
                    seed=split,
                    **options,
                )
                seconds.append(time.monotonic() - start)
                errors.append(plugin.meta["figures"][arguments.part]["mae"])
            spread = statistics.stdev(errors) if len(errors) > 1 else float("nan")
            mean = f"{statistics.mean(errors):.4g} ± {spread:.2g}"
            per_split = " ".join(f"{e:.4g}" for e in errors)
            rows.append(
                [task, unit_of(target), name, mean, per_split, f"{statistics.median(seconds):.0f}"]
            )
            print(*rows[-1], flush=True)
    columns = ["task", "unit", "model", f"{arguments.part} MAE", "by split", "seconds"]
    write_tables(
        arguments.output,
        "Fine-tuning against scratch",
        facts(arguments.threads, model=model.name, weights=model.checksum[:12]),
        [Table(f"{arguments.part} MAE over {len(arguments.splits)} splits", columns, rows)],
    )


if __name__ == "__main__":
    main()
