"""Strategies of fine-tuning against training from scratch, beside published results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matxfer.benchmark import summary
from matxfer.benchmark.bench import DEFAULT_STRENGTH
from matxfer.benchmark.markdown import Table, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matxfer.benchmark.bench import Bench
    from matxfer.benchmark.records import Record

TITLE = "Fine-tuning against scratch"


def variants(last: int) -> dict[str, dict[str, Any]]:
    """Return the options of every variant, by name, for a base of ``last`` layers.

    Scratch is the same network and readout from random weights; "readouts" has all layers frozen.
    """
    found: dict[str, dict[str, Any]] = {
        "auto": {"strategy": "auto"},
        "scratch": {"strategy": "scratch"},
        "features": {"strategy": "features"},
        "readouts": frozen(last),
    }
    for depth in reversed(range(last)):
        found[f"{depth} frozen"] = frozen(depth)
        found[f"{depth} frozen + EWC"] = retained("ewc", DEFAULT_STRENGTH, depth)
    return found


def frozen(depth: int) -> dict[str, Any]:
    """Return the options of fine-tuning the layers above a depth, unconstrained."""
    return {"strategy": "finetune", "freeze": depth}


def retained(way: str, strength: float | str, depth: int = 0) -> dict[str, Any]:
    """Return the options of fine-tuning the layers above a depth while they are held."""
    return {**frozen(depth), "retain": way, "strength": strength}


def runs(
    bench: Bench, tasks: Sequence[str], names: Sequence[str], splits: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the runs of the benchmark, task by task."""
    options = variants(bench.last)
    return [bench.run(t, s, options[v]) for t in tasks for v in names for s in splits]


def named(bench: Bench, records: Sequence[Record], share: float | None = 1.0) -> list[Record]:
    """Return the records with the names of their variants, those of other runs left out.

    Parameters
    ----------
    records
        In the order of tasks.
    share
        Part of the training rows; ``None``: any.
    """
    known = {name: bench.run("", 0, o)["options"] for name, o in variants(bench.last).items()}
    found = [
        {**record, "variant": name}
        for record in records
        if share in (None, record["run"]["share"])
        for name, options in known.items()
        if options == record["run"]["options"]
    ]
    tasks, names = list(dict.fromkeys(r["run"]["task"] for r in found)), list(known)
    order = [(tasks.index(r["run"]["task"]), names.index(r["variant"])) for r in found]
    return [found[k] for k in sorted(range(len(found)), key=order.__getitem__)]


def tables(bench: Bench, records: Sequence[Record]) -> list[Table]:
    """Return errors beside published ones, the summary, retention, cost and trust."""
    results = summary.Results(named(bench, records), bench.data.published)
    found = [
        _errors(bench, results),
        *_summary(results),
        _retention(results),
        _cost(results),
        _trust(results),
        _chosen(results),
    ]
    return [table for table in found if table.rows]


def _errors(bench: Bench, results: summary.Results) -> Table:
    methods = results.methods
    table = Table(
        "Test MAE, mean ± spread over the splits",
        ("task", "unit", "splits", *results.variants, *methods),
    )
    for task in results.tasks:
        own = [spread(results.values(task, v, "test")) for v in results.variants]
        n = max(len(results.values(task, v, "test")) for v in results.variants)
        known = results.published.get(task, {})
        others = [f"{known[m]:g}" if m in known else "–" for m in methods]
        table.rows.append((task, bench.data.task(task).unit, n, *own, *others))
    return table


def _summary(results: summary.Results) -> list[Table]:
    against = Table(
        "auto against scratch",
        ("task", "splits", "scratch", "auto", "error less by", "better splits"),
        note="Splits that both have. The splits of a task share materials, so their signs are no "
        "independent trials; the tasks are nearly so.",
    )
    scratch = summary.against_scratch(results)
    for name, row in scratch["tasks"].items():
        cells = (f"{row['scratch']:.4g}", f"{row['auto']:.4g}", f"{row['gain']:.1%}")
        against.rows.append((name, row["splits"], *cells, row["better_splits"]))
    found = []
    if against.rows:
        n = len(scratch["tasks"])
        against.note += (
            f" Better on {scratch['better']} of {n} tasks, by {scratch['mean_gain']:.1%} on "
            f"average. Two-sided p: Wilcoxon over tasks {_p(scratch['wilcoxon_tasks'])}, over all "
            f"splits {_p(scratch['wilcoxon_splits'])}; sign test over all splits "
            f"{_p(scratch['sign_splits'])}."
        )
        found.append(against)
    if results.methods and "auto" in results.variants:
        table = Table("auto against published results", ("method", "better on", "of", "mean rank"))
        counts, ranks = summary.against_published(results), summary.mean_ranks(results)
        for method in results.methods:
            better, of = counts.get(method, (0, 0))
            table.rows.append((method, better, of, _number(ranks.get(method))))
        table.rows.append(("auto (ours)", "", "", _number(ranks.get("auto"))))
        table.note = "Ranks among these methods, 1 the best, on tasks where all of them are known."
        found.append(table)
    return found


def _retention(results: summary.Results) -> Table:
    kept = summary.retention(results)
    names = list(dict.fromkeys(n for row in kept.values() for n in row["change"]))
    table = Table(
        "Retention: change of the source's held-out errors, mean over tasks (worst task)",
        ("variant", "tasks", *names, "none above 5 % on", "test error against no EWC"),
        note="Were the base to share the layers that the plugin trained. Source rows of no formula "
        "that is in a small task; gap in eV, moduli on their log10 scale.",
    )
    for variant, row in kept.items():
        change = row["change"]
        cells = [
            f"{change[n]:+.1%} ({row['worst'][n]:+.1%})" if n in change else "–" for n in names
        ]
        target = "–" if row["target"] is None else f"{row['target']:+.1%}"
        table.rows.append((variant, row["tasks"], *cells, row["harmless"], target))
    return table


def _cost(results: summary.Results) -> Table:
    table = Table(
        "Seconds per plugin, mean ± spread over the splits",
        ("task", *results.variants),
        note="Wall clock of the whole fine-tuning; the first run on a task also builds its graphs "
        "and what the frozen layers make of them.",
    )
    for task in results.tasks:
        cells = [spread(results.values(task, v, "seconds")) for v in results.variants]
        table.rows.append((task, *cells))
    return table


def _trust(results: summary.Results) -> Table:
    columns = ("val MAE", "coverage of 90 %", "rank corr. of error and ood", "best epoch")
    table = Table(
        "Each variant: validation error, intervals, out-of-domain score",
        ("task", "variant", "splits", *columns),
    )
    for task in results.tasks:
        for variant in results.variants:
            n = len(results.values(task, variant, "test"))
            if n:
                what = ("val", "coverage", "ood", "best_epoch")
                cells = [spread(results.values(task, variant, w)) for w in what]
                table.rows.append((task, variant, n, *cells))
    return table


def _chosen(results: summary.Results) -> Table:
    table = Table("What auto chose", ("task", "split", "test MAE", "chosen"))
    for record in results.records:
        if record["variant"] == "auto":
            run = record["run"]
            row = (run["task"], run["split"], f"{record['test']:.4g}", record["chosen"])
            table.rows.append(row)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
