"""Matbench v0.1, phonons: transfer, its base, and the same network from scratch, all five folds.

``matxfer benchmark matbench`` plays one of these and writes the submission; here they stand side by
side. A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from _table import Table, add_common_arguments, facts, write_tables

from matxfer.benchmark.markdown import spread
from matxfer.benchmark.matbench import N_FOLDS, TASKS, read_task
from matxfer.benchmark.matbench_play import play, run_of
from matxfer.benchmark.matbench_report import published_in
from matxfer.benchmark.records import Records, complete
from matxfer.model import load_model
from matxfer.runtime import use_threads

#: What is played: name, base, options, plugins per fold.
VARIANTS = (
    ("auto", "mp-base-strict", {}, 1),
    ("auto, mean of three plugins", "mp-base-strict", {}, 3),
    ("auto, the base has seen the materials", "mp-base", {}, 1),
    ("kernel ridge on fingerprints", "mp-base-strict", {"strategy": "features"}, 1),
    ("the same network from scratch", "mp-base-strict", {"strategy": "scratch"}, 1),
)
_SHOWN = ("JMP-L", "MEGNet", "ALIGNN", "coGN", "MODNet", "CGCNN")


def main() -> None:
    """Play the folds that are not there yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "matbench")
    parser.add_argument("--runs", type=Path, default=Path("runs/matbench.jsonl"))
    options = parser.parse_args()
    use_threads(options.threads)
    data = read_task(TASKS["phonons"], options.data)
    records, bases = Records(options.runs), {}
    table = Table(
        "matbench_phonons, mean absolute error in 1/cm",
        ("what", "base", *(f"fold {k}" for k in range(N_FOLDS)), "mean", "RMSE"),
        note="1,265 materials. In every fold all choices are made on a tenth of the training rows. "
        "`mp-base-strict` was pretrained without these materials; `mp-base` knows them, with other "
        "labels.",
    )
    for name, model, chosen, repeats in VARIANTS:
        base = bases.setdefault(model, load_model(model))
        wanted = [run_of(base, data, fold, chosen, repeats) for fold in range(N_FOLDS)]
        found = complete(
            records,
            wanted,
            lambda run, base=base: play(base, data, run),
            lambda r, name=name: print(name, r["run"]["fold"], r["scores"]["mae"], flush=True),
        )
        errors = [record["scores"]["mae"] for record in found]
        table.rows.append((
            name, model, *(f"{error:.1f}" for error in errors), spread(errors),
            f"{statistics.mean(r['scores']['rmse'] for r in found):.1f}",
        ))  # fmt: skip
    known = published_in(options.data).get("phonons", {})
    others = Table(
        "Published",
        ("method", "MAE, 1/cm"),
        note="From `published_results.json`, the five-fold means of the leaderboard.",
    )
    others.rows += [(method, known[method]) for method in _SHOWN if method in known]
    others.rows.append(("a constant", f"{data.task.spread:.1f}"))
    write_tables(options.output, "Matbench v0.1", facts(options.threads), [table, others])


if __name__ == "__main__":
    main()
