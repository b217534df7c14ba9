"""Gaps whose kind is known: what ``matxfer shift`` says of them, and how often it says too much.

Run from the root of the repository::

    python tests/benchmarks/shift_known_answers.py --data ../shared/data --threads 1

Halves of one table: drawn at random 100 times; each half is compared with the other. Pairs of
tables: the expected answer stands beside the one given, right or wrong.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _table import Table, add_common_arguments, facts, write_tables

from matxfer.domain import concept
from matxfer.domain.concept import Values
from matxfer.domain.covariate import covariate_shift
from matxfer.domain.diagnosis import diagnose
from matxfer.domain.kinds import unseen_elements
from matxfer.domain.sample import Collection, draw, make_sample, read_collection
from matxfer.model import Model, load_model
from matxfer.runtime import use_threads

if TYPE_CHECKING:
    from pathlib import Path

ENERGY, GAP = "formation_energy_ev_per_atom", "band_gap_ev"
SOURCE = "mp_formation_energy"
HALVES = (SOURCE, "castelli_perovskites", "carbon_24")
#: Name, target table, target column, expected covariate and concept shift, and what the kinds are
#: to name.
PAIRS: tuple[tuple[str, str, str | None, bool, bool | None, str], ...] = (
    ("WBM", "wbm_formation_energy", ENERGY, True, True, "composition"),
    ("carbon", "carbon_24", None, True, None, "elements"),
    ("sesquioxides", "nomad2018_transparent_conductors", None, True, None, "cell_size"),
    ("monolayers", "mc2d_monolayers", None, True, None, "vacuum"),
    ("perovskites", "castelli_perovskites", None, True, None, "prototype"),
)


def halves(model: Model, table: Collection, draws: int, pool: int, seed: int) -> dict[str, Any]:
    """Count how often a shift is seen between random halves of a table."""
    sample = make_sample(model, table, draw(np.arange(len(table)), pool, seed), (0, 2, 4))
    false, areas = 0, []
    for k in range(draws):
        order = np.random.default_rng(seed + k).permutation(len(sample))
        one, other = (sample.take(np.sort(part)) for part in np.array_split(order, 2))
        unseen = unseen_elements(one.compositions, other.compositions)
        found = covariate_shift(one, other, unseen, seed=k)
        false += found.shift
        areas.append(found.auc)
    return {"false": false, "draws": draws, "n": len(sample) // 2, "auc": max(areas)}


def concept_halves(model: Model, table: Collection, draws: int, seed: int) -> dict[str, Any]:
    """Count how often other rules are seen between random halves of held-out rows."""
    rows = np.flatnonzero(np.isin(table.split, ("val", "test")) & np.isfinite(table.values[ENERGY]))
    sample = make_sample(model, table, draw(rows, 1000, seed), (model.backbone.n_layers,))
    value, guess = table.values[ENERGY][sample.index], sample.predicted[ENERGY]
    false = 0
    for k in range(draws):
        order = np.random.default_rng(seed + k).permutation(len(sample))
        one, other = (
            Values([sample.crystals[i] for i in part], [sample.compositions[i] for i in part],
                   value[part], guess[part])
            for part in np.array_split(order, 2)
        )  # fmt: skip
        found = concept.residuals(
            other, one.known(), None, "held-out rows", (ENERGY, ENERGY, "eV/atom"),
            within=np.ones(len(other), bool), seed=k,
        )  # fmt: skip
        false += bool(found.shift)
    return {"false": false, "draws": draws, "n": len(sample) // 2}


def part_of(table: Collection, rows: np.ndarray, name: str) -> Collection:
    """Return some rows of a collection."""
    return replace(
        table,
        name=name,
        crystals=[table.crystals[k] for k in rows],
        values={c: v[rows] for c, v in table.values.items()},
        split=table.split[rows],
        compositions=[table.compositions[k] for k in rows],
    )


def chemistry(table: Collection, seed: int) -> tuple[Collection, Collection]:
    """Return oxides and intermetallics of a table."""
    from matxfer.domain.structures import chemical_class

    rows = draw(np.arange(len(table)), 12000, seed)
    kinds = np.array([chemical_class(np.unique(table.crystals[k].numbers)) for k in rows])
    oxides, alloys = rows[kinds == "oxides"], rows[kinds == "intermetallics"]
    return part_of(table, oxides, "oxides"), part_of(table, alloys, "intermetallics")


def random_halves(table: Collection, seed: int) -> tuple[Collection, Collection]:
    """Return two random halves of a table."""
    order = np.random.default_rng(seed).permutation(len(table))
    one, other = (part_of(table, np.sort(part), "half") for part in np.array_split(order, 2))
    return one, other


def by_size(table: Collection) -> tuple[Collection, Collection]:
    """Return small cells, and held-out rows of large cells, of a table."""
    size = np.array([crystal.n_sites for crystal in table.crystals])
    small = np.flatnonzero(size <= 8)
    large = np.flatnonzero((size >= 16) & np.isin(table.split, ("val", "test")))
    return part_of(table, small, "at most 8 atoms"), part_of(table, large, "at least 16 atoms")


def gaps(data: Path, other: str) -> pd.DataFrame:
    """Return the structures that have a PBE gap and another one."""
    frame = pd.read_parquet(data / "mp_band_gap_multifidelity.parquet")
    return frame[frame["band_gap_pbe_ev"].notna() & frame[other].notna()].reset_index(drop=True)


def told(value: bool | None) -> str:
    """Return an answer as a word."""
    return {True: "yes", False: "no", None: "–"}[value]


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "shift_known_answers")
    parser.add_argument("--model", default="mp-base")
    parser.add_argument("--sample", type=int, default=600, help="structures of each table")
    parser.add_argument("--draws", type=int, default=100, help="random halves of each table")
    parser.add_argument("--pool", type=int, default=600, help="structures that halves are made of")
    args = parser.parse_args()
    use_threads(args.threads)
    begin = time.perf_counter()
    model = load_model(args.model)
    source = read_collection(args.data / f"{SOURCE}.parquet", [ENERGY, GAP])

    pairs = Table(
        "Pairs of tables",
        ("source → target", "covariate: expected", "found", "AUC", "concept: expected", "found",
         "right", "what it says"),
        note=f"Source {SOURCE} where none is named. Classifier AUC: the largest of three layers. A "
        "dash: no column of values was named, so concept shift is not asked for. Words and "
        "thresholds of the kinds were settled while looking at WBM, carbon, sesquioxides, "
        "monolayers and perovskites (the kind of formula was added for the last); the other pairs "
        "were right when first asked.",
    )  # fmt: skip

    def compare(
        name: str, one: Any, other: Any, wanted: tuple[Any, Any, str], **options: Any
    ) -> None:
        begun = time.perf_counter()
        found = diagnose(one, other, model=model, sample=args.sample, seed=args.seed, **options)
        kinds = {kind.name for kind in found.covariate.kinds}
        kinds |= {effect.name for effect in found.concept.effects if effect.matters}
        rules = found.concept.shift
        right = (found.covariate.shift, rules) == wanted[:2] and (
            not wanted[2] or wanted[2] in kinds
        )
        pairs.rows.append(
            (name, told(wanted[0]), told(found.covariate.shift), f"{found.covariate.auc:.3f}",
             told(wanted[1]), told(rules), "yes" if right else "NO", found.verdict)
        )  # fmt: skip
        print(json.dumps([name, right, found.verdict]), f"{time.perf_counter() - begun:.1f} s",
              flush=True)  # fmt: skip

    for other in ("band_gap_hse_ev", "band_gap_gllbsc_ev"):
        frame = gaps(args.data, other)
        options = {"column": other, "source_column": "band_gap_pbe_ev"}
        compare(f"PBE gaps → {other}", frame, frame, (False, True, "offset"), **options)
    frame = gaps(args.data, "band_gap_hse_ev")
    same = {"column": "band_gap_pbe_ev", "source_column": "band_gap_pbe_ev"}
    compare("PBE gaps → the same PBE gaps", frame, frame, (False, False, ""), **same)
    one, other = random_halves(source, args.seed)
    compare("one half → the other half", one, other, (False, False, ""), column=ENERGY)
    for name, table, column, *wanted in PAIRS:
        goal = args.data / f"{table}.parquet"
        compare(f"→ {name} ({table})", source, goal, tuple(wanted), column=column)
    oxides, alloys = chemistry(source, args.seed)
    compare("oxides → intermetallics", oxides, alloys, (True, None, "class"))
    small, large = by_size(source)
    compare("small cells → large cells", small, large, (True, False, "cell_size"), column=ENERGY)

    alarms = Table(
        "Random halves of one table",
        ("table", "test", "structures in each half", "false alarms", "of draws", "largest AUC"),
    )
    for name in HALVES:
        table = source if name == SOURCE else read_collection(args.data / f"{name}.parquet")
        result = halves(model, table, args.draws, args.pool, args.seed)
        alarms.rows.append(
            (name, "covariate shift", result["n"], result["false"], result["draws"],
             f"{result['auc']:.3f}")
        )  # fmt: skip
        print(name, result, f"{time.perf_counter() - begin:.0f} s", flush=True)
    result = concept_halves(model, source, args.draws, args.seed)
    row = (SOURCE, "concept shift (energy)", result["n"], result["false"], result["draws"], "–")
    alarms.rows.append(row)
    seconds = f"{time.perf_counter() - begin:.0f}"
    about = facts(args.threads, model=model.name, structures_of_each=args.sample, seconds=seconds)
    write_tables(args.output, "Gaps whose kind is known", about, [alarms, pairs])


if __name__ == "__main__":
    main()
