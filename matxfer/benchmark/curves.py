"""Learning curves: test error against the number of training rows, and epochs to match scratch."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from matxfer.benchmark.markdown import Table, spread
from matxfer.benchmark.transfer import named, variants
from matxfer.plot.curves import learning_curve
from matxfer.plot.style import panels, save, with_unit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matxfer.benchmark.bench import Bench
    from matxfer.benchmark.records import Record

TITLE = "Learning curves"
TASKS = ("jarvis_2d_eform", "mp_phonons", "mp_eps_electronic")
VARIANTS = ("auto", "readouts", "scratch")


def runs(
    bench: Bench,
    tasks: Sequence[str],
    names: Sequence[str],
    splits: Sequence[int],
    shares: Sequence[float],
) -> list[dict[str, Any]]:
    """Return the runs, task by task; the parts of one split's training rows are nested."""
    options = variants(bench.last)
    return [
        bench.run(task, split, options[name], share)
        for task in tasks
        for split in splits
        for name in names
        for share in sorted(set(shares))
    ]


def rows(bench: Bench, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what is drawn, one row per run; errors in the unit of the row."""
    found = []
    for record in named(bench, records, share=None):
        run, errors = record["run"], record["val_errors"]
        found.append(
            {
                "task": run["task"],
                "unit": bench.data.task(run["task"]).unit,
                "variant": record["variant"],
                "split": run["split"],
                "share": run["share"],
                "train_rows": record["rows"],
                "val_mae": record["val"],
                "test_mae": record["test"],
                "seconds": record["seconds"],
                "seconds_per_epoch": record["seconds_per_epoch"],
                "epochs": errors and len(errors),
                **_reached(record, _scratch(bench, record, records)),
            }
        )
    return found


def _scratch(bench: Bench, record: Record, records: Sequence[Record]) -> Record | None:
    """Return the run from random weights on the same rows, if there is one."""
    options = bench.run("", 0, variants(bench.last)["scratch"])["options"]
    same = {**record["run"], "options": options}
    return next((r for r in records if r["run"] == same), None)


def _reached(record: Record, scratch: Record | None) -> dict[str, Any]:
    """Return after which epoch a run was as good on validation rows as scratch at its best."""
    found: dict[str, Any] = {"epochs_to_scratch": None, "seconds_to_scratch": None}
    if scratch is None or not scratch["val_errors"] or not record["val_errors"]:
        return found
    epochs = epochs_to_reach(record["val_errors"], min(scratch["val_errors"]))
    if epochs is not None:
        found["epochs_to_scratch"] = epochs
        found["seconds_to_scratch"] = round(epochs * record["seconds_per_epoch"], 3)
    return found


def epochs_to_reach(errors: Sequence[float], goal: float) -> int | None:
    """Return the number of epochs after which an error is at most the goal, None if it never is."""
    return next((k for k, error in enumerate(errors, 1) if error <= goal), None)


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Return errors by number of rows, and what it takes to be as good as scratch."""
    shares = sorted({row["share"] for row in rows})
    errors = Table(
        "Test MAE by part of the training rows, mean ± spread over the splits",
        ("task", "unit", "variant", *(f"{share:.0%}" for share in shares), "as good as scratch at"),
        note="Nested parts of each split's training rows; validation and test rows are the same. "
        "Last column: smallest part whose mean error is at most that of scratch on all rows.",
    )
    match = Table(
        "As good on the validation rows as scratch at its best, all training rows",
        ("task", "variant", "reached", "epochs", "seconds", "epochs a run", "s an epoch"),
        note="Mean over the splits that reach it; for scratch, its own best epoch. Seconds of the "
        "epochs alone. auto: of the trial that it chose, which has no epochs if it is a simple "
        "model on fingerprints.",
    )
    for task, variant in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
        by_share = [_values(mine, share, "test_mae") for share in shares]
        goal = _values([r for r in rows if (r["task"], r["variant"]) == (task, "scratch")], 1.0)
        enough = (
            share
            for share, values in zip(shares, by_share, strict=True)
            if goal and values and statistics.mean(values) <= statistics.mean(goal)
        )
        first = next(enough, None)
        cells = (*map(spread, by_share), "–" if first is None else f"{first:.0%}")
        errors.rows.append((task, mine[0]["unit"], variant, *cells))
        whole = [row for row in mine if row["share"] == 1 and row["epochs"]]
        if whole:
            reached = [row for row in whole if row["epochs_to_scratch"]]
            match.rows.append(
                (
                    task,
                    variant,
                    f"{len(reached)} of {len(whole)}",
                    spread([row["epochs_to_scratch"] for row in reached]),
                    spread([row["seconds_to_scratch"] for row in reached]),
                    spread([row["epochs"] for row in whole]),
                    spread([row["seconds_per_epoch"] for row in whole]),
                )
            )
    return [table for table in (errors, match) if table.rows]


def _values(rows: Sequence[dict[str, Any]], share: float, what: str = "test_mae") -> list[float]:
    return [row[what] for row in rows if row["share"] == share]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the curves, a panel per task; return whether matplotlib is there to do it."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    made = panels(max(len(tasks), 1))
    if made is None:
        return False
    figure, axes = made
    for k, (axis, task) in enumerate(zip(axes, tasks, strict=False)):
        mine = [row for row in rows if row["task"] == task]
        learning_curve(
            [row["train_rows"] for row in mine],
            [row["test_mae"] for row in mine],
            groups=[row["variant"] for row in mine],
            label=with_unit("test MAE", mine[0]["unit"]),
            title=task,
            legend=k == 0,
            ax=axis,
        )
    figure.suptitle("mean and range over the splits", fontsize="small")
    save(figure, path)
    return True
