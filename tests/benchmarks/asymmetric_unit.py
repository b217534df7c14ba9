"""Graphs of the full cell against graphs of the asymmetric unit: size, time, and the same values.

Random crystals of several tables are turned into both kinds of graph by turns, and one model runs
on both by turns, so that whatever else the machine does hits both alike; times are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import Table, add_common_arguments, facts, random_crystals, write_tables

from matxfer.crystal import CrystalError
from matxfer.data.loader import edge_budget_batches
from matxfer.data.packed import PackedGraphs
from matxfer.graph import build_graph
from matxfer.metrics import predict_rows
from matxfer.model import DEFAULT_MODEL, load_model
from matxfer.runtime import keep_large_blocks, use_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import Crystal
    from matxfer.graph import GraphOptions
    from matxfer.model import Model

TABLES = ("mp_formation_energy", "mp_elasticity", "small_tasks/mp_phonons")
KINDS = ("full", "asymmetric")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The graphs of the same crystals, kind by kind, and the seconds it took to build them."""

    graphs: dict[str, PackedGraphs]
    build_s: dict[str, float]


def build_both(crystals: Sequence[Crystal], options: GraphOptions, repeats: int) -> Pair:
    """Build both graphs of each crystal by turns; leave out crystals that give none."""
    wanted = {kind: replace(options, symmetry=kind == "asymmetric") for kind in KINDS}
    graphs: dict[str, list] = {kind: [] for kind in KINDS}
    seconds = dict.fromkeys(KINDS, 0.0)
    for k, crystal in enumerate(crystals):
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        built = {}
        try:
            for r in range(repeats + (k == 0)):  # the first call of all imports libraries
                for kind in KINDS if (k + r) % 2 else KINDS[::-1]:
                    start = time.perf_counter()
                    built[kind] = build_graph(crystal, wanted[kind])
                    times[kind].append(time.perf_counter() - start)
        except CrystalError:
            continue
        for kind in KINDS:
            graphs[kind].append(built[kind])
            seconds[kind] += statistics.median(times[kind][-repeats:])
    return Pair({kind: PackedGraphs.pack(graphs[kind]) for kind in KINDS}, seconds)


def time_models(
    model: Model, pair: Pair, batches: dict[str, list[NDArray[np.int64]]], repeats: int
) -> tuple[dict[str, float], float]:
    """Return the median seconds of a pass over all crystals by kind, and the ratio of speeds.

    The ratio is the median over the repeats of the ratio within a repeat.
    """
    passes: dict[str, list[float]] = {kind: [] for kind in KINDS}
    ready = {k: [pair.graphs[k].batch(index) for index in batches[k]] for k in KINDS}
    with torch.inference_mode():
        for r in range(repeats + 1):  # the first is a warm-up
            spent = dict.fromkeys(KINDS, 0.0)
            for step in range(max(len(b) for b in ready.values())):
                for kind in KINDS if (step + r) % 2 else KINDS[::-1]:
                    if step >= len(ready[kind]):
                        continue
                    start = time.perf_counter()
                    model.predict_graphs(ready[kind][step])
                    spent[kind] += time.perf_counter() - start
            for kind in KINDS:
                passes[kind] += [spent[kind]] if r else []
    ratio = statistics.median(f / a for f, a in zip(*passes.values(), strict=True))
    return {kind: statistics.median(passes[kind]) for kind in KINDS}, ratio


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "asymmetric_unit")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or folder of a model")
    parser.add_argument("--tables", nargs="+", default=TABLES, help="tables, without the suffix")
    parser.add_argument("-n", type=int, default=1000, help="crystals per table")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of the model")
    parser.add_argument("--build-repeats", type=int, default=3, help="timed builds of a graph")
    return parser.parse_args()


def main() -> None:
    """Measure all tables and write the result."""
    args = parse_arguments()
    use_threads(args.threads)
    keep_large_blocks()
    model = load_model(args.model)
    sizes = Table(
        "Size of the graphs, sums over the crystals",
        ("table", "crystals", "atoms", "nodes", "ratio", "edges, full", "edges, asym.", "ratio"),
    )
    times = Table(
        "Time in ms per crystal",
        (
            "table",
            "building, full",
            "building, asym.",
            "model, full",
            "model, asym.",
            "model faster by",
            "in batches of its own",
            "building and model faster by",
        ),
    )
    deviations = Table(
        "Difference of predictions, asymmetric unit against full cell",
        ("table", "property", "unit", "largest", "median", "spread of predictions"),
    )
    for name in args.tables:
        crystals = random_crystals(args.data / f"{name}.parquet", args.n, args.seed)
        pair = build_both(crystals, model.backbone.graph_options, args.build_repeats)
        full, asymmetric = (pair.graphs[kind] for kind in KINDS)
        rows = np.arange(len(full))
        n = len(rows)
        own = {kind: list(edge_budget_batches(pair.graphs[kind], rows)) for kind in KINDS}
        same_s, same = time_models(model, pair, dict.fromkeys(KINDS, own["full"]), args.repeats)
        own_s, natural = time_models(model, pair, own, args.repeats)
        nodes = [int(g.nodes_per_graph.sum()) for g in (full, asymmetric)]
        edges = [int(g.edges_per_graph.sum()) for g in (full, asymmetric)]
        sizes.rows.append(
            (
                name,
                n,
                f"{nodes[0]:,}",
                f"{nodes[1]:,}",
                f"{nodes[0] / nodes[1]:.2f}",
                f"{edges[0]:,}",
                f"{edges[1]:,}",
                f"{edges[0] / edges[1]:.2f}",
            )
        )
        whole = {kind: pair.build_s[kind] + own_s[kind] for kind in KINDS}
        times.rows.append(
            (
                name,
                *(f"{pair.build_s[kind] / n * 1e3:.2f}" for kind in KINDS),
                *(f"{same_s[kind] / n * 1e3:.2f}" for kind in KINDS),
                f"{same:.2f}×",
                f"{natural:.2f}×",
                f"{whole['full'] / whole['asymmetric']:.2f}×",
            )
        )
        predicted = {kind: predict_rows(model, pair.graphs[kind], rows) for kind in KINDS}
        for prop, head in model.heads.items():
            difference = np.abs(predicted["asymmetric"][prop] - predicted["full"][prop])
            deviations.rows.append(
                (
                    name,
                    prop,
                    head.prop.unit,
                    f"{difference.max():.1e}",
                    f"{np.median(difference):.1e}",
                    f"{predicted['full'][prop].std():.2g}",
                )
            )
    known = facts(
        args.threads,
        model=f"{model.name}, {sum(p.numel() for p in model.parameters()):,} parameters",
        graphs=f"cutoff {model.backbone.graph_options.cutoff_angstrom:g} Å, symmetry within "
        f"{model.backbone.graph_options.symprec_angstrom:g} Å",
        crystals="drawn at random, those that give no graph left out",
        batches="the same crystals in each batch, cut by the edges of the full cells; in batches "
        "of its own: cut by its own edges, as predictions do",
    )
    title = "Asymmetric unit against full cell"
    write_tables(args.output, title, known, [sizes, times, deviations])


if __name__ == "__main__":
    main()
