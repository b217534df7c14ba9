"""What the runs of the small tasks say together: counts, ranks, gains, retention."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matxfer.benchmark.records import Record


#: A source error that rises by no more than this is kept.
TOLERANCE = 0.05


class Results:
    """Records that bear the name of their variant, and published errors.

    Parameters
    ----------
    records
        With ``variant``; their order is that of tasks.
    published
        By task and method.
    """

    def __init__(
        self, records: Sequence[Record], published: Mapping[str, Mapping[str, float]]
    ) -> None:
        self.records = list(records)
        self.published = {t: dict(v) for t, v in published.items() if t in self.tasks}

    @property
    def tasks(self) -> list[str]:
        """Tasks that have a record."""
        return list(dict.fromkeys(r["run"]["task"] for r in self.records))

    @property
    def variants(self) -> list[str]:
        """Variants that have a record."""
        return list(dict.fromkeys(r["variant"] for r in self.records))

    @property
    def methods(self) -> list[str]:
        """Published methods that have a value for one of the tasks."""
        return list(dict.fromkeys(m for v in self.published.values() for m in v))

    def by_split(self, task: str, variant: str) -> dict[int, Record]:
        """Return the records of a task and variant by split."""
        return {
            r["run"]["split"]: r
            for r in self.records
            if r["run"]["task"] == task and r["variant"] == variant
        }

    def values(self, task: str, variant: str, what: str) -> list[float]:
        """Return a figure of all splits of a task and variant, where it is known."""
        found = (record[what] for record in self.by_split(task, variant).values())
        return [value for value in found if value is not None]

    def mean(self, task: str, variant: str, what: str = "test") -> float | None:
        """Return the mean of a figure over the splits, if there is one."""
        values = self.values(task, variant, what)
        return statistics.mean(values) if values else None


def against_scratch(results: Results, variant: str = "auto") -> dict[str, Any]:
    """Compare a variant with scratch on the splits that both have.

    Returns
    -------
    dict
        By task under ``tasks``: mean test errors, ``gain`` (1 - variant/scratch of the means) and
        splits won. Over all: tasks won (``better``), ``mean_gain``, and two-sided p of Wilcoxon's
        signed-rank test of log(variant/scratch) over tasks and over splits, and of the sign test.
    """
    from scipy.stats import binomtest

    tasks: dict[str, dict[str, Any]] = {}
    ratios: list[float] = []
    for task in results.tasks:
        ours, theirs = results.by_split(task, variant), results.by_split(task, "scratch")
        both = sorted(set(ours) & set(theirs))
        if not both:
            continue
        pairs = [(ours[s]["test"], theirs[s]["test"]) for s in both]
        mine, scratch = (statistics.mean(column) for column in zip(*pairs, strict=True))
        tasks[task] = {
            "splits": len(both),
            variant: mine,
            "scratch": scratch,
            "gain": 1 - mine / scratch,
            "better_splits": sum(a < b for a, b in pairs),
        }
        ratios += [float(np.log(a / b)) for a, b in pairs]
    by_task = [float(np.log(row[variant] / row["scratch"])) for row in tasks.values()]
    signs = [ratio < 0 for ratio in ratios if ratio]
    return {
        "tasks": tasks,
        "better": sum(row["gain"] > 0 for row in tasks.values()),
        "mean_gain": statistics.mean(row["gain"] for row in tasks.values()) if tasks else None,
        "wilcoxon_tasks": _wilcoxon(by_task),
        "wilcoxon_splits": _wilcoxon(ratios),
        "sign_splits": float(binomtest(sum(signs), len(signs)).pvalue) if signs else None,
    }


def _wilcoxon(values: list[float]) -> float | None:
    from scipy.stats import wilcoxon

    different = [value for value in values if value]
    return float(wilcoxon(different).pvalue) if len(different) > 1 else None


def against_published(results: Results, variant: str = "auto") -> dict[str, tuple[int, int]]:
    """Return, for each published method, on how many tasks a variant is better, and of how many."""
    found = {}
    for method in results.methods:
        pairs = [
            (mine, known[method])
            for task, known in results.published.items()
            if method in known and (mine := results.mean(task, variant)) is not None
        ]
        found[method] = (sum(a < b for a, b in pairs), len(pairs))
    return found


def mean_ranks(results: Results, variant: str = "auto") -> dict[str, float]:
    """Return the mean rank of each published method and of a variant, 1 being the best.

    Over the tasks where all of them have a value; equal errors share their ranks.
    """
    from scipy.stats import rankdata

    ranks = []
    for task, known in results.published.items():
        mine = results.mean(task, variant)
        if mine is not None and set(known) == set(results.methods):
            ranks.append(rankdata([*(known[m] for m in results.methods), mine]))
    if not ranks:
        return {}
    means = np.mean(ranks, axis=0)
    return dict(zip([*results.methods, variant], map(float, means), strict=True))


def retention(results: Results) -> dict[str, dict[str, Any]]:
    """Return what became of the source, for every variant that trains layers.

    Returns
    -------
    dict
        By variant: ``tasks``; ``change``, the relative change of each source property's held-out
        error, mean over splits and then over tasks; ``worst``, that of the worst task;
        ``harmless``, the tasks on which no property's rises by more than 5 %; ``target``, the mean
        over tasks of the test error relative to the same variant without EWC, on the splits that
        both have.
    """
    found = {}
    for variant in results.variants:
        if "frozen" not in variant and variant != "auto":
            continue
        by_task: list[dict[str, float]] = []
        target = []
        for task in results.tasks:
            held = results.by_split(task, variant)
            if held:
                by_task.append(mean_changes(list(held.values())))
            free = results.by_split(task, variant.removesuffix(" + EWC"))
            both = sorted(set(held) & set(free))
            if both and "EWC" in variant:
                ours, theirs = (statistics.mean(r[s]["test"] for s in both) for r in (held, free))
                target.append(ours / theirs - 1)
        names = list(dict.fromkeys(n for row in by_task for n in row))
        found[variant] = {
            "tasks": len(by_task),
            "change": {n: statistics.mean(r[n] for r in by_task if n in r) for n in names},
            "worst": {n: max(r[n] for r in by_task if n in r) for n in names},
            "harmless": sum(max(r.values(), default=0.0) <= TOLERANCE for r in by_task),
            "target": statistics.mean(target) if target else None,
        }
    return found


def mean_changes(records: Sequence[Record]) -> dict[str, float]:
    """Return the relative change of each source property's error, mean over records."""
    names = list(dict.fromkeys(n for r in records for n in r["source"]))
    changes = {
        name: [
            r["source"][name]["change"]
            for r in records
            if name in r["source"] and r["source"][name]["change"] is not None
        ]
        for name in names
    }
    return {name: statistics.mean(values) for name, values in changes.items() if values}


def summarised(results: Results) -> dict[str, Any]:
    """Return all of it as one JSON object."""
    return {
        "test_mae": {
            task: {v: mean for v in results.variants if (mean := results.mean(task, v)) is not None}
            for task in results.tasks
        },
        "against_scratch": against_scratch(results),
        "against_published": against_published(results),
        "mean_ranks": mean_ranks(results),
        "retention": retention(results),
    }
