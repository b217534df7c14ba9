"""Whether remedies for a domain gap help on real pairs of tables, and how often.

Each pair is measured as ``matxfer shift SOURCE TARGET --target COLUMN --try-remedies`` does, with
several seeds: other samples, other halves, other trainings. Every source from the Materials Project
is of rows that the base was not fitted to. Remedies of *trained* models are measured on bases that
have not learnt the quantity: what they know of it they have from the source's rows. Results so far
are kept in --raw, one line each, and not computed again.

    python tests/benchmarks/remedies.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from _remedy_tables import outcomes, tables
from _table import add_common_arguments, facts, write_tables
from shift_known_answers import ENERGY, GAP, SOURCE, by_size, chemistry, gaps, random_halves

from matxfer.domain import density_ratio
from matxfer.domain.remedies import Remedy, compared, try_remedies
from matxfer.domain.sample import HELD_OUT, Collection, read_collection
from matxfer.model import load_model
from matxfer.runtime import use_threads
from matxfer.transfer.features import fit_features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Larger cells are left out: training layers on them takes most of the time.
MAX_SITES = 24
PLANTED = ("planted: a line on a parabola", "planted: no overlap")
EXPERIMENT, HEAT = "expt_formation_enthalpy_ev_per_atom", "heat_of_formation_ref_ev"


@dataclass(frozen=True, slots=True)
class Pair:
    """A source, a target, its column and that of the source; the name says which gap there is."""

    name: str
    tables: Callable[[Path, int], tuple[Collection, Collection]]
    column: str
    source_column: str

    @property
    def untaught(self) -> str:
        """The base that has not learnt the quantity."""
        return "source-energy" if "gap" in self.column else "source-gap"


def table(path: Path, *columns: str) -> Collection:
    """Return the small cells of a table."""
    frame = pd.read_parquet(path)
    if "n_sites" in frame:
        frame = frame[frame["n_sites"] <= MAX_SITES]
    return replace(read_collection(frame.reset_index(drop=True), columns), name=path.stem)


@cache
def held_out(data: Path) -> Collection:
    """Return what no base was fitted to: the rows that are held out in pretraining."""
    frame = pd.read_parquet(data / f"{SOURCE}.parquet")
    frame = frame[frame["split"].isin(HELD_OUT) & (frame["n_sites"] <= MAX_SITES)]
    return replace(read_collection(frame.reset_index(drop=True), [ENERGY, GAP]), name=SOURCE)


def to(name: str, column: str) -> Callable[[Path, int], tuple[Collection, Collection]]:
    """Return what reads held-out rows of the Materials Project, and another table."""

    def read(data: Path, seed: int) -> tuple[Collection, Collection]:
        return held_out(data), table(data / f"{name}.parquet", column)

    return read


def carbon(data: Path, seed: int) -> tuple[Collection, Collection]:
    """Return carbon structures with energies above the lowest, which is close to graphite's."""
    found = table(data / "carbon_24.parquet", "energy_ev_per_atom")
    energies = found.values["energy_ev_per_atom"]
    return held_out(data), replace(found, values={ENERGY: energies - energies.min()})


def fidelity(other: str) -> Callable[[Path, int], tuple[Collection, Collection]]:
    """Return what reads structures with a PBE gap and another one, twice."""

    def read(data: Path, seed: int) -> tuple[Collection, Collection]:
        frame = gaps(data, other)
        frame = frame[frame["n_sites"] <= MAX_SITES].reset_index(drop=True)
        both = read_collection(frame, ["band_gap_pbe_ev", other])
        return both, both

    return read


PAIRS = (
    Pair("MP → WBM (both)", to("wbm_formation_energy", ENERGY), ENERGY, ENERGY),
    Pair("MP → JARVIS 2D (both)", to("small_tasks/jarvis_2d_eform", ENERGY), ENERGY, ENERGY),
    Pair("oxides → intermetallics (covariate)", lambda d, _: chemistry(held_out(d), 0),
         ENERGY, ENERGY),
    Pair("small → large cells (covariate)", lambda d, _: by_size(held_out(d)), ENERGY, ENERGY),
    Pair("PBE → HSE gap (concept)", fidelity("band_gap_hse_ev"), "band_gap_hse_ev",
         "band_gap_pbe_ev"),
    Pair("PBE → GLLB-SC gap (concept)", fidelity("band_gap_gllbsc_ev"), "band_gap_gllbsc_ev",
         "band_gap_pbe_ev"),
    Pair("MP → experiment (both)", to("small_tasks/expt_eform", EXPERIMENT), EXPERIMENT, ENERGY),
    Pair("MP → carbon (both)", carbon, ENERGY, ENERGY),
    Pair("MP → perovskites, heat (both)", to("castelli_perovskites", HEAT), HEAT, ENERGY),
    Pair("MP → sesquioxides, gap (both)", to("nomad2018_transparent_conductors", GAP), GAP, GAP),
    Pair("null: random halves", lambda d, s: random_halves(held_out(d), s), ENERGY, ENERGY),
)  # fmt: skip


def planted(name: str, seed: int) -> list[Remedy]:
    """Weigh a model that cannot be right everywhere, under a known shift of one feature."""
    rng = np.random.default_rng(seed)
    middle = 1.2 if name == PLANTED[0] else 8.0
    source, target = rng.normal(0, 1, (1200, 1)), rng.normal(middle, 0.5, (1200, 1))
    y, wanted = (x[:, 0] ** 2 + rng.normal(0, 0.1, len(x)) for x in (source, target))
    weights, of = density_ratio(source, target, seed=seed), "a line trained on 1000 source rows"
    remedy = "importance weights (ridge)"
    if not weights.usable:
        why = weights.words()
        return [Remedy(remedy, "weigh", of, None, None, None, None, "refused", why)]
    inputs, goal = (torch.from_numpy(x).float() for x in (source, target))
    axes, (train, val) = (np.zeros(1), np.eye(1)), np.split(np.arange(1200), [1000])
    errors = [
        np.abs(fit_features("ridge", inputs, y, train, val, 0, axes, w)(goal, None)[0].numpy()
               - wanted)
        for w in (None, weights.values)
    ]  # fmt: skip
    return [compared(remedy, "weigh", of, (errors[0], errors[1]))]


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is not in the raw file yet, one seed after another."""
    known = results(arguments.raw)
    done = {(r["pair"], r["base"], r["seed"]) for r in known}
    for seed in arguments.seeds:
        for name in PLANTED:
            if (name, "–", seed) not in done:
                append(arguments.raw, name, "–", seed, planted(name, seed), 0.0)
        for pair in PAIRS:
            for base in (arguments.model, pair.untaught):
                if (pair.name, base, seed) in done:
                    continue
                started = time.process_time()
                source, target = pair.tables(arguments.data, seed)
                taught = base == arguments.model
                columns = (pair.column, None if taught else pair.source_column)
                found = try_remedies(
                    load_model(base), source, target, columns, sample=arguments.sample, seed=seed
                )
                tried = [r for r in found.tried if taught or not r.name.startswith("correction")]
                seconds = time.process_time() - started
                append(arguments.raw, pair.name, base, seed, tried, seconds)


def results(raw: Path) -> list[dict[str, Any]]:
    """Return what was measured so far."""
    return [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []


def append(
    raw: Path, pair: str, base: str, seed: int, tried: Sequence[Remedy], seconds: float
) -> None:
    """Keep what was tried with one seed."""
    record = {"pair": pair, "base": base, "seed": seed, "tried": [asdict(r) for r in tried]}
    with raw.open("a") as file:
        file.write(json.dumps(record | {"cpu_seconds": seconds}) + "\n")
    print(pair, base, seed, f"{seconds:.0f} s", *(r.words() for r in tried), sep="\n  ", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "remedies")
    parser.add_argument("--model", default="mp-base-strict", help="whose predictions are mended")
    parser.add_argument("--sample", type=int, default=300, help="structures of each table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--raw", type=Path, default=Path("runs/remedies.jsonl"))
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    arguments.raw.parent.mkdir(parents=True, exist_ok=True)
    measure(arguments)
    records = [r for r in results(arguments.raw) if r["seed"] in arguments.seeds]
    sentence, found = tables(outcomes(records), PLANTED, PAIRS[-1].name)
    about = facts(
        arguments.threads,
        bases=f"{arguments.model}; source-gap (energies) and source-energy (gaps)",
        structures_of_each=f"{arguments.sample}, of at most {MAX_SITES} atoms; half of those of "
        "the target are measured on",
        seeds=", ".join(map(str, arguments.seeds)),
        cpu_seconds=f"{sum(r['cpu_seconds'] for r in records):.0f}",
    )
    title = "Whether remedies for a domain gap help"
    write_tables(arguments.output, title, [f"**{sentence}**", "", *about], found)


if __name__ == "__main__":
    main()
