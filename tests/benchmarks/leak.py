"""Materials of the small tasks and of the elasticity test rows in the source tables' train rows.

Before and after `exclude:` (see matxfer/pretraining/exclusion.py) of all of them together. Counts
by composition are over pymatgen's reduced formulas, so they check the exclusion's own key.
Structure matches (pymatgen's StructureMatcher, defaults) are looked for among rows of equal
formula for some materials of each task; and blindly, whatever the formula, among rows of as many
atoms and a similar volume for a few. `--matches 2000` takes all up to `--max-sites`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from _table import Table, add_common_arguments, facts, write_tables
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core.composition import Composition
from pymatgen.core.periodic_table import Element

from matxfer.crystal import Crystal, CrystalError
from matxfer.pretraining.exclusion import ExcludeConfig, read_exclusions
from matxfer.readers import crystals_of_table, load_table

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray
    from pymatgen.core.structure import Structure

ELASTICITY = "mp_elasticity"
SOURCES = ("mp_formation_energy", ELASTICITY, "mp_structures_unlabeled")
SYMBOLS = {z: Element.from_Z(z).symbol for z in range(1, 119)}
MATCHER = StructureMatcher()


def formula_of(crystal: Crystal) -> str:
    """Return pymatgen's reduced formula."""
    numbers, counts = np.unique(crystal.numbers, return_counts=True)
    symbols = (SYMBOLS[z] for z in numbers.tolist())
    return Composition(dict(zip(symbols, counts.tolist(), strict=True))).reduced_formula


@dataclass(slots=True)
class Materials:
    """The rows of a table, and what they are compared by."""

    name: str
    ids: list[str]
    crystals: list[Crystal | CrystalError]
    split: NDArray[np.str_]
    formulas: list[str] = field(init=False)
    n_sites: NDArray[np.int64] = field(init=False)
    #: Volume per atom in Å³.
    volume: NDArray[np.float64] = field(init=False)
    structures: dict[int, Structure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        good = [isinstance(c, Crystal) for c in self.crystals]
        pairs = list(zip(self.crystals, good, strict=True))
        self.formulas = [formula_of(c) if ok else "" for c, ok in pairs]
        self.n_sites = np.array([c.n_sites if ok else 0 for c, ok in pairs])
        volume = [c.volume_angstrom3 if ok else np.inf for c, ok in pairs]
        self.volume = np.array(volume) / np.maximum(self.n_sites, 1)

    def structure(self, row: int) -> Structure:
        """Return a row for pymatgen."""
        if row not in self.structures:
            self.structures[row] = self.crystals[row].to_pymatgen()
        return self.structures[row]


def read(path: Path, *, split_column: str | None = None, only: str | None = None) -> Materials:
    """Read a table; without a split column all rows are of train."""
    frame = load_table(path)
    if only:
        frame = frame[frame[split_column] == only]
    crystals = [entry.crystal or entry.error for entry in crystals_of_table(frame, str(path))]
    split = np.full(len(frame), "train")
    if split_column:
        split = frame[split_column].to_numpy().astype(str)
    return Materials(path.stem, frame["material_id"].astype(str).tolist(), crystals, split)


def n_found(keys: list[str], among: Iterable[str]) -> int:
    """Return how many keys occur among others."""
    others = set(among)
    return sum(key in others for key in keys)


def n_matched(task: Materials, chosen: Iterable[int], source: Materials, rows: set[int]) -> int:
    """Return how many of the chosen materials match one of the rows of equal formula."""
    by_formula: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_formula[source.formulas[row]].append(row)
    found = 0
    for k in chosen:
        # Small cells are quick to compare, so they come first.
        candidates = sorted(by_formula[task.formulas[k]], key=lambda row: source.n_sites[row])
        mine = task.structure(k)
        found += any(MATCHER.fit(mine, source.structure(row)) for row in candidates)
    return found


def blind_matches(
    task: Materials, chosen: Iterable[int], source: Materials
) -> tuple[int, set[int]]:
    """Return how many pairs were compared and the rows that match, whatever their formula."""
    train = source.split == "train"
    pairs, matches = 0, set()
    for k in chosen:
        ratio = source.volume / task.volume[k]
        alike = train & (source.n_sites == task.n_sites[k]) & (abs(ratio - 1) < 0.05)
        rows = np.flatnonzero(alike).tolist()
        pairs += len(rows)
        mine = task.structure(k)
        matches |= {row for row in rows if MATCHER.fit(mine, source.structure(row))}
    return pairs, matches


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, "leak")
    parser.add_argument("--matches", type=int, default=100, help="materials per task to match")
    parser.add_argument("--blind", type=int, default=10, help="of these, to match blindly")
    parser.add_argument("--max-sites", type=int, default=40, help="largest cells to match")
    arguments = parser.parse_args()
    data: Path = arguments.data

    paths = sorted((data / "small_tasks").glob("*.parquet"))
    configs = [ExcludeConfig(f"small_tasks/{path.name}") for path in paths]
    configs.append(ExcludeConfig(f"{ELASTICITY}.parquet", {"split": ["test"]}))
    tasks = [read(path) for path in paths]
    tasks.append(read(data / f"{ELASTICITY}.parquet", split_column="split", only="test"))
    tasks[-1].name = f"{ELASTICITY} (test)"
    start = time.monotonic()
    exclusions = read_exclusions(configs, data)
    seconds = {"reading what is excluded": time.monotonic() - start}
    alone = [read_exclusions([config], data) for config in configs]
    rng = np.random.default_rng(arguments.seed)
    drawn = []
    for task in tasks:
        small = np.flatnonzero((task.n_sites > 0) & (task.n_sites <= arguments.max_sites))
        size = min(arguments.matches, len(small))
        drawn.append(rng.choice(small, size, replace=False).tolist())

    found, costs, blind = [], [], []
    for name in SOURCES:
        labelled = name != "mp_structures_unlabeled"
        source = read(data / f"{name}.parquet", split_column="split" if labelled else None)
        start = time.monotonic()
        split, counts = exclusions.leave_out(source.split, source.ids, source.crystals)
        seconds[name] = time.monotonic() - start
        train = np.flatnonzero(source.split == "train").tolist()
        left = np.flatnonzero(split == "train").tolist()
        n_blind, n_pairs, all_matches = 0, 0, set()
        for task, own, chosen in zip(tasks, alone, drawn, strict=True):
            cells = []
            for rows in (train, left):
                by_id = n_found(task.ids, (source.ids[row] for row in rows))
                by_formula = n_found(task.formulas, (source.formulas[row] for row in rows))
                cells.append((by_id, by_formula, n_matched(task, chosen, source, set(rows))))
            of = f" of {len(chosen)}"
            arrows = [f"{x} → {y}" for x, y in zip(*cells, strict=True)]
            cost = own.leave_out(source.split, source.ids, source.crystals)[1]
            found.append([name, task.name, len(task.ids), *arrows[:2], arrows[2] + of,
                          cost["train"], cost["val"]])  # fmt: skip
            print(*found[-1], flush=True)
            pairs, matches = blind_matches(task, chosen[: arguments.blind], source)
            n_blind += min(arguments.blind, len(chosen))
            n_pairs += pairs
            all_matches |= matches
        kept = sum(split[row] == "train" for row in all_matches)
        blind.append([name, n_blind, n_pairs, f"{len(all_matches)} → {kept}"])
        share = f"{counts['train'] / len(train):.1%}"
        costs.append(
            [name, len(train), counts["train"], share, len(left), counts["val"],
             counts["by_id"], counts["by_composition"], f"{seconds[name]:.1f}"]
        )  # fmt: skip
    tables = [
        Table(
            "Materials that occur in the train rows, before → after the exclusion of all tasks; "
            "rows that each task alone costs",
            ["source table", "task", "materials", "by id", "by composition", "by structure",
             "train rows", "val rows"],
            found,
        ),
        Table(
            "What the exclusion of all tasks costs",
            ["source table", "train rows", "left out", "share", "left", "val rows left out",
             "by id", "by composition", "seconds"],
            costs,
        ),
        Table(
            "Train rows that match in structure whatever the formula, before → after",
            ["source table", "materials", "pairs compared", "rows that match"],
            blind,
        ),
    ]  # fmt: skip
    record = exclusions.to_json()
    write_tables(
        arguments.output,
        "Materials of the tasks in the source data",
        facts(
            arguments.threads,
            excluded=f"{record['ids']} ids, {record['compositions']} compositions, read in "
            f"{seconds['reading what is excluded']:.1f} s",
            by_structure=f"of materials drawn with at most {arguments.max_sites} atoms",
            blind="rows of as many atoms, volume within 5 %",
        ),
        tables,
    )


if __name__ == "__main__":
    main()
