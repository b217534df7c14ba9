"""A transfer map as Markdown tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from matxfer.benchmark.markdown import Table
from matxfer.probing.cells import SCRATCH
from matxfer.probing.intervals import NEGATIVE, Gain
from matxfer.probing.rows import by, mean_gain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matxfer.probing.transfer_map import TransferMap

    Row = dict[str, Any]

TITLE = "Transfer map"
_DASH = "–"


def tables(found: TransferMap) -> list[Table]:
    """Return all tables that there is something for."""
    made = [
        _matrix(found),
        _depths(found),
        _errors(found),
        _structure(found),
        _layers(found),
        _groups(found),
        _affinity(found),
        _curves(found),
    ]
    return [table for table in made if table.rows]


def _gain(row: Row) -> str:
    text = Gain(row["gain"], row["low"], row["high"], row["splits"]).text()
    return f"**{text} negative transfer**" if row["verdict"] == NEGATIVE else text


def _reference(found: TransferMap) -> str:
    if found.settings["against"] == SCRATCH:
        return "the same network trained on the target from scratch"
    return "the same network with random weights, read out in the same way"


def _matrix(found: TransferMap) -> Table:
    """Targets by sources, frozen depth chosen on the validation rows."""
    rows = found.chosen()
    own = found.settings["against"]
    sources = [s for s in by(rows, lambda r: r["source"]) if not s.startswith(own)]
    several = any(row["low"] is not None for row in rows)
    note = (
        f"Against {_reference(found)}; frozen depth chosen on the validation rows of each split. "
    )
    if several:
        note += (
            "Geometric mean over the splits and 95 % interval (paired t of log errors, variance "
            "corrected for splits that share rows: Nadeau & Bengio 2003), each cell alone. "
            "**Negative transfer** where the interval says so."
        )
    else:
        note += "One split tells no interval, so nothing is called negative transfer."
    table = Table("Test error less by", ("target", *sources), note=note)
    by_target = by(rows, lambda r: r["target"])
    for target, mine in by_target.items():
        cells = {row["source"]: _gain(row) for row in mine}
        table.rows.append((target, *(cells[s] for s in sources)))
    if len(by_target) > 1:
        means = by(rows, lambda r: r["source"])
        table.rows.append(
            ("all, geometric mean", *(f"{mean_gain(means[s]):+.1%}" for s in sources))
        )
    return table


def _depths(found: TransferMap) -> Table:
    most = found.settings["rows"][-1]
    rows = [r for r in found.cells if r["rows"] == most and r["depth"] is not None]
    depths = sorted({row["depth"] for row in rows})
    table = Table(
        "Test error less by, at each frozen depth K",
        ("target", "source", *(f"K = {k}" for k in depths), "K chosen in the splits"),
        note="K = 0 reads the embedding of the elements alone. ✗: negative transfer; ?: the "
        "interval holds zero.",
    )
    chosen = {(r["target"], r["source"]): r["depths"] for r in found.chosen()}
    mark = {NEGATIVE: " ✗", "unclear": " ?"}
    for (target, source), mine in by(rows, lambda r: (r["target"], r["source"])).items():
        cells = {r["depth"]: f"{r['gain']:+.1%}{mark.get(r['verdict'], '')}" for r in mine}
        row = (target, source, *(cells.get(k, _DASH) for k in depths), chosen[target, source])
        table.rows.append(row)
    return table


def _errors(found: TransferMap) -> Table:
    rows = found.chosen()
    sources = list(by(rows, lambda r: r["source"]))
    table = Table(
        "Test MAE, mean ± spread over the splits",
        ("target", "unit", "splits", "training rows", "constant", *sources),
    )
    for target, mine in by(rows, lambda r: r["target"]).items():
        cells = {row["source"]: _spread(row) for row in mine}
        first = mine[0]
        facts = (first["unit"], first["splits"], first["train_rows"])
        table.rows.append(
            (target, *facts, f"{first['constant_mae']:.4g}", *(cells[s] for s in sources))
        )
    return table


def _spread(row: Row) -> str:
    deviation = "" if row["test_std"] is None else f" ± {row['test_std']:.2g}"
    return f"{row['test_mae']:.4g}{deviation}"


def _structure(found: TransferMap) -> Table:
    table = Table(
        "What structure adds to the composition",
        ("target", "unit", "source", "composition alone", "with structure", "error less by"),
        note="Composition alone: the best on validation rows of element shares, statistics of "
        "properties of the elements, and K = 0. With structure: the best K > 0.",
    )
    for row in found.structure:
        values = (f"{row['composition_mae']:.4g}", f"{row['structure_mae']:.4g}")
        gain = Gain(row["gain"], row["low"], row["high"], 0).text()
        table.rows.append((row["target"], row["unit"], row["source"], *values, gain))
    return table


def _layers(found: TransferMap) -> Table:
    blocks = list(by(found.layers, lambda r: r["block"]))
    table = Table(
        "Share of the source's gain over random weights that comes from each block",
        ("target", "source", "block is", *blocks),
        note="Read out after the last layer. reinitialised, permuted: share that is lost; alone: "
        "share that is there with all other blocks random. Shares need not add up to one: layers "
        "build on each other. Dashes: there is no gain to share.",
    )
    for key, mine in by(found.layers, lambda r: (r["target"], r["source"], r["way"])).items():
        cells = {row["block"]: _share(row) for row in mine}
        table.rows.append((*key, *(cells.get(b, _DASH) for b in blocks)))
    return table


def _share(row: Row) -> str:
    if row["share"] is None:
        return _DASH
    interval = "" if row["low"] is None else f" [{row['low']:.0%}, {row['high']:.0%}]"
    return f"{row['share']:.0%}{interval}"


def _groups(found: TransferMap) -> Table:
    sources = list(by(found.groups, lambda r: r["source"]))
    kind = found.settings["leave_out"]
    table = Table(
        f"Test MAE on each {kind} that was left out",
        ("target", "unit", f"left out {kind}", "rows", "constant", *sources),
        note="No row of the group is trained on or chosen on. constant: median of the others.",
    )
    for (target, group), mine in by(found.groups, lambda r: (r["target"], r["group"])).items():
        cells = {row["source"]: f"{row['test_mae']:.4g}" for row in mine}
        first = mine[0]
        facts = (first["unit"], group, first["test_rows"], f"{first['constant_mae']:.4g}")
        table.rows.append((target, *facts, *(cells[s] for s in sources)))
    return table


def _affinity(found: TransferMap) -> Table:
    table = Table(
        "Affinity without training against the measured gain",
        ("target", "score", "ρ over cells", "cells", "p", "ρ over sources", "pick", "regret"),
        note="Spearman's ρ of a score of the training rows and the gain on test rows; cells: all "
        "sources, random weights and depths. pick: the source of the largest score; regret: by "
        "which share its test error is above that of the best source.",
    )
    for row in found.affinity:
        rho, p = (_two(row[name]) for name in ("rank_correlation", "of_sources"))
        chance = _DASH if row["p_value"] is None else f"{row['p_value']:.1g}"
        facts = (row["target"], row["score"], rho, row["n"], chance, p, row["pick"])
        table.rows.append((*facts, f"{row['regret']:.1%}"))
    for score, rows in by(found.affinity, lambda r: r["score"]).items():
        if len(rows) > 1:
            rho, p = (_mean(rows, name) for name in ("rank_correlation", "of_sources"))
            regret = statistics.mean(row["regret"] for row in rows)
            table.rows.append(("mean", score, rho, "", "", p, "", f"{regret:.1%}"))
    return table


def _mean(rows: Sequence[Row], name: str) -> str:
    known = [row[name] for row in rows if row[name] is not None]
    return _two(statistics.mean(known) if known else None)


def _two(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}"


def _curves(found: TransferMap) -> Table:
    if len(found.settings["rows"]) < 2:
        return Table("", ())
    rows = [row for row in found.cells if row["chosen"]]
    sizes = found.settings["rows"]
    table = Table(
        "Learning curves: test MAE by number of training rows",
        ("target", "unit", "source", *("all" if n is None else str(n) for n in sizes)),
        note="Nested parts of each split's training rows; validation and test rows are the same.",
    )
    key: Callable[[Row], Any] = lambda r: (r["target"], r["unit"], r["source"])  # noqa: E731
    for names, mine in by(rows, key).items():
        cells = {row["rows"]: _spread(row) for row in mine}
        table.rows.append((*names, *(cells[n] for n in sizes)))
    return table


def short_lines(found: TransferMap) -> Sequence[str]:
    """Return the matrix as plain lines for a terminal, one per target and source."""
    lines = []
    for target, mine in by(found.chosen(), lambda r: r["target"]).items():
        reference = mine[0]["reference_mae"]
        unit = f" {mine[0]['unit']}" if mine[0]["unit"] else ""
        lines.append(
            f"{target}: {found.settings['against']} {reference:.4g}{unit}, {mine[0]['splits']} "
            f"splits, {mine[0]['train_rows']} training rows"
        )
        for row in sorted(mine, key=lambda r: r["test_mae"]):
            if row["source"].startswith(found.settings["against"]):
                continue
            gain = Gain(row["gain"], row["low"], row["high"], row["splits"]).text()
            depth = f"K {row['depths']}" if row["depths"] else ""
            word = "" if row["verdict"] == "one split" else row["verdict"]
            line = f"  {row['source']:24s} {row['test_mae']:<9.4g} {gain:28s} {word:18s} {depth}"
            lines.append(line.rstrip())
    return lines
