"""Our backbones and those of other packages as frozen layers under the same readouts.

Every layer stays frozen and the plugin strategies do the rest, the same for each: ``readouts``
(four small networks on the features of all layers), ``kernel ridge`` (on their fingerprints) and
``auto`` over all that keeps the layers frozen. Choices are made on validation rows. Each model and
task begins with an empty cache; graphs and frozen layers are computed and timed first, and then
found by all runs. Seconds are those of the processor, which a busy machine does not stretch.

    python tests/benchmarks/backbones.py --threads 1
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import torch
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.benchmark.markdown import spread
from matxfer.benchmark.tasks import DataFolder
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.model import load_model
from matxfer.transfer.activations import Activations
from matxfer.transfer.finetune import finetune

MODELS = ("mp-base-strict", "mp-base", "chgnet", "sevennet")
TASKS = ("mp_phonons", "jarvis_2d_exfoliation")


def strategies(n_layers: int) -> dict[str, dict[str, object]]:
    """Return the options of each strategy with all layers frozen."""
    return {
        "readouts": {"strategy": "finetune", "freeze": n_layers},
        "kernel ridge": {"strategy": "features", "features": "kernel_ridge"},
        "auto, all frozen": {"strategy": "auto", "freeze": n_layers},
    }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "backbones")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--splits", type=int, nargs="+", default=list(range(5)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = DataFolder(arguments.data)

    # Loaded before the cache is replaced: those of other packages are converted into it.
    models = [load_model(name) for name in arguments.models]
    names = list(strategies(1))
    errors = Table("Test MAE, mean ± spread over the splits", ["task", "unit", "model", *names])
    cost = Table(
        "Processor seconds on one thread",
        ["task", "structures", "model", "graphs", "frozen layers", "ms each", *names],
        note="Graphs and frozen layers once per table, and both together per structure; the "
        "strategies per split, mean, once these are kept.",
    )
    for name in arguments.tasks:
        task = data.task(name)
        for model in models:
            found: dict[str, list[float]] = {}
            seconds: dict[str, list[float]] = {}
            with tempfile.TemporaryDirectory() as folder:
                os.environ["MATXFER_CACHE"] = folder
                crystals = read_property_table(task.path, [task.target]).crystals
                clock = [time.process_time()]
                graphs = graph_store(crystals, model.backbone.graph_options, workers=0).graphs
                clock.append(time.process_time())
                Activations(model, graphs).node(model.backbone.n_layers)
                clock.append(time.process_time())
                for split in arguments.splits:
                    for label, options in strategies(model.backbone.n_layers).items():
                        started = time.process_time()
                        plugin = finetune(
                            task.path, task.target, model=model, seed=split,
                            split_column=f"split_{split}", **options,
                        )  # fmt: skip
                        seconds.setdefault(label, []).append(time.process_time() - started)
                        found.setdefault(label, []).append(plugin.meta["figures"]["test"]["mae"])
                        print(name, model.name, split, label, found[label][-1], seconds[label][-1])
            means = [statistics.mean(seconds[label]) for label in names]
            n = len(task.frame)
            made, run = clock[1] - clock[0], clock[2] - clock[1]
            values = (spread(found[label]) for label in names)
            errors.rows.append([name, task.unit, model.name, *values])
            cost.rows.append(
                [name, n, model.name, f"{made:.1f}", f"{run:.1f}", f"{1e3 * (made + run) / n:.1f}",
                 *(f"{mean:.1f}" for mean in means)]
            )  # fmt: skip
    write_tables(
        arguments.output,
        "Our backbones and those of other packages as frozen layers",
        facts(
            arguments.threads,
            splits=len(arguments.splits),
            what_they_have_seen="`mp-base-strict` no material of the tasks; `mp-base` many of "
            "them, with other labels; CHGNet and SevenNet-0 most of the Materials Project "
            "(energies, forces, stresses along relaxations, CHGNet magnetic moments too), so "
            "nearly all of mp_phonons and the bulk parents of the 2D materials, with other labels "
            "too",
            sizes=", ".join(
                f"{m.name} {sum(p.numel() for p in m.parameters()):,} parameters" for m in models
            ),
        ),
        [errors, cost],
    )


if __name__ == "__main__":
    main()
