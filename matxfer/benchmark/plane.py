"""The plane of target error against source error: ways to retain the source, by their strength.

Every way starts from the same unconstrained fine-tuning (nothing frozen, λ = 0). Forgetting is
measured on source rows that neither the pretraining nor a rehearsal has seen.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from matxfer.benchmark.markdown import Table
from matxfer.benchmark.summary import TOLERANCE, mean_changes
from matxfer.benchmark.transfer import frozen, retained
from matxfer.plot.retention import retention_plane
from matxfer.plot.style import panels, save

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matxfer.benchmark.bench import Bench
    from matxfer.benchmark.records import Record

TITLE = "Target error against source error"
TASKS = ("jarvis_2d_eform", "mp_phonons")
#: λ of each way, besides 0; of freezing: the number of frozen layers, all of them.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "ewc": (0.01, 0.1, 1.0, 10.0, 100.0),
    "l2sp": (0.01, 0.1, 1.0, 10.0, 100.0),
    "replay": (0.1, 1.0, 10.0),
    "ewc+replay": (0.1, 1.0, 10.0),
}
FREEZING = "freezing"
METHODS = (*STRENGTHS, FREEZING)
#: A target error within this of the unconstrained one costs nothing.
TARGET_TOLERANCE = 0.02


def settings(
    last: int, methods: Sequence[str], strengths: Mapping[str, Sequence[float]]
) -> list[tuple[str, float, dict[str, Any]]]:
    """Return (way, λ or frozen layers, options); the first of each way is unconstrained."""
    found: list[tuple[str, float, dict[str, Any]]] = []
    for method in methods:
        found.append((method, 0, frozen(0)))
        if method == FREEZING:
            found += [(method, depth, frozen(depth)) for depth in range(1, last + 1)]
        else:
            found += [(method, s, retained(method, s)) for s in strengths[method] if s]
    return found


def runs(
    bench: Bench,
    tasks: Sequence[str],
    methods: Sequence[str],
    splits: Sequence[int],
    strengths: Mapping[str, Sequence[float]] = STRENGTHS,
) -> list[dict[str, Any]]:
    """Return the runs, task by task, each once."""
    found: list[dict[str, Any]] = []
    for task in tasks:
        for split in splits:
            for _, _, options in settings(bench.last, methods, strengths):
                run = bench.run(task, split, options)
                if run not in found:
                    found.append(run)
    return found


def rows(
    bench: Bench,
    records: Sequence[Record],
    tasks: Sequence[str],
    methods: Sequence[str],
    splits: Sequence[int],
    strengths: Mapping[str, Sequence[float]] = STRENGTHS,
) -> list[dict[str, Any]]:
    """Return the points of the plane: one row per task, way and strength, mean over the splits.

    ``source_change`` is the relative change of the source properties' held-out errors, mean over
    the properties, ``source_change_worst`` that of the worst, ``change_<property>`` that of each.
    """
    found = []
    for task in tasks:
        for method, strength, options in settings(bench.last, methods, strengths):
            wanted = [bench.run(task, split, options) for split in splits]
            mine = [r for r in records if r["run"] in wanted]
            if not mine:
                continue
            changes = mean_changes(mine)
            found.append(
                {
                    "task": task,
                    "unit": bench.data.task(task).unit,
                    "method": method,
                    "strength": strength,
                    "splits": len(mine),
                    "val_mae": statistics.mean(r["val"] for r in mine),
                    "test_mae": statistics.mean(r["test"] for r in mine),
                    "source_change": statistics.mean(changes.values()),
                    "source_change_worst": max(changes.values()),
                    "seconds": statistics.mean(r["seconds"] for r in mine),
                    **{f"change_{name}": change for name, change in changes.items()},
                }
            )
    return found


def best(rows: Sequence[dict[str, Any]], task: str, method: str) -> dict[str, Any]:
    """Return the best settings of a way, chosen on validation rows.

    Returns
    -------
    dict
        ``kept``: the point that forgets least among those whose validation error is within 2 % of
        the unconstrained one; ``fitted``: the smallest validation error among those that raise no
        source error by more than 5 %, if there are any; ``free``: the unconstrained point.
    """
    mine = [row for row in rows if (row["task"], row["method"]) == (task, method)]
    free = next(row for row in mine if row["strength"] == 0)
    cheap = [r for r in mine if r["val_mae"] <= free["val_mae"] * (1 + TARGET_TOLERANCE)]
    harmless = [r for r in mine if r["source_change_worst"] <= TOLERANCE]
    return {
        "free": free,
        "kept": min(cheap, key=lambda r: r["source_change"]),
        "fitted": min(harmless, key=lambda r: r["val_mae"]) if harmless else None,
    }


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Return the points, and the best of every way."""
    names = [key for key in (rows[0] if rows else {}) if key.startswith("change_")]
    points = Table(
        "Points of the plane",
        (
            *("task", "way", "λ or frozen", "splits", "test MAE", "val MAE", "source error"),
            *(name.removeprefix("change_") for name in names),
            "seconds",
        ),
        note="Source errors: relative change on held-out source rows, mean over the properties, "
        "then each. λ = 0 is the same unconstrained fine-tuning, nothing frozen, for all ways. "
        "Seconds of replay include what the base makes of the rehearsed rows.",
    )
    for row in rows:
        changes = [f"{row[name]:+.1%}" for name in ("source_change", *names)]
        cells = (f"{row['test_mae']:.4g}", f"{row['val_mae']:.4g}", *changes)
        first = (row["task"], row["method"], f"{row['strength']:g}", row["splits"])
        points.rows.append((*first, *cells, f"{row['seconds']:.3g}"))
    found = Table(
        "The best of every way, chosen on the validation rows",
        ("task", "way", "kept: λ", "source error", "test error", "fitted: λ", "test error"),
        note=f"kept: forgets least with a validation error within {TARGET_TOLERANCE:.0%} of the "
        f"unconstrained one. fitted: smallest validation error with no source error more than "
        f"{TOLERANCE:.0%} up. Source errors: mean over the properties (worst). Test errors "
        "relative to the unconstrained one.",
    )
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        chosen = best(rows, task, method)
        free, kept, fitted = chosen["free"]["test_mae"], chosen["kept"], chosen["fitted"]
        source = f"{kept['source_change']:+.1%} ({kept['source_change_worst']:+.1%})"
        cells = (f"{kept['strength']:g}", source)
        more = ("–", "–")
        if fitted is not None:
            more = (f"{fitted['strength']:g}", f"{fitted['test_mae'] / free - 1:+.1%}")
        found.rows.append((task, method, *cells, f"{kept['test_mae'] / free - 1:+.1%}", *more))
    return [table for table in (found, points) if table.rows]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the plane, a panel per task; return whether matplotlib is there to do it."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    made = panels(max(len(tasks), 1))
    if made is None:
        return False
    figure, axes = made
    for k, (axis, task) in enumerate(zip(axes, tasks, strict=False)):
        mine = [row for row in rows if row["task"] == task]
        retention_plane(
            [row["source_change"] for row in mine],
            [row["test_mae"] for row in mine],
            groups=[row["method"] for row in mine],
            strengths=[_mark(row["method"], row["strength"]) for row in mine],
            unit=mine[0]["unit"],
            tolerance=TOLERANCE,
            title=task,
            legend=k == 0,
            ax=axis,
        )
    save(figure, path)
    return True


def _mark(method: str, strength: float) -> float | str:
    """Return what is written beside a point: λ, or the number of frozen layers."""
    return f"K={strength:g}" if method == FREEZING and strength else strength
