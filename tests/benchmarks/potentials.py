"""Force plugins on mlearn, Li-Al and Nb-Mo-Ta-W: test errors, a tenth of the frames, forgetting.

Variants: ``general`` (nothing trained), ``full``, ``full-ewc`` and ``full-ewc-stiff`` (all training
frames, layers free or held by EWC with λ = 0.02 or 0.2), ``full-stress`` (stresses weigh ten times
as much), ``tenth`` and ``tenth-scratch`` (a tenth, from the general potential or from random
weights). A tenth of what a variant may see is held out of training to choose the epoch; the test
frames are looked at once, after it. What is there in ``--runs`` is not computed again; several
processes may share it. The stresses of Cu and Ni are corrected as the card of the data says.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from _table import RESULTS, Table, add_common_arguments, facts, write_tables

from matxfer.potential.errors import measure
from matxfer.potential.fit import finetune_potential, retention
from matxfer.potential.frames import Frames, read_frames
from matxfer.potential.model import DEFAULT_POTENTIAL, load_potential
from matxfer.potential.packed import PackedFrames
from matxfer.potential.references import shift_references
from matxfer.runtime import use_threads

ELEMENTS = ("Cu", "Ge", "Li", "Mo", "Ni", "Si")
#: Other tasks, and their tables.
ALLOYS = {"LiAl": "lial_ef.parquet", "NbMoTaW": "nbmotaw_efs.parquet"}
TASKS = (*ELEMENTS, *ALLOYS)
#: What their published stresses lack on the diagonal, eV/Å³ (see the card of the data).
STRESS_OFFSET = {"Cu": -0.0152, "Ni": -0.0178}
VARIANTS: dict[str, dict[str, Any]] = {
    "general": {},
    "full": {},
    "full-ewc": {"retain": "ewc", "strength": 0.02},
    "full-ewc-stiff": {"retain": "ewc", "strength": 0.2},
    "full-stress": {"stress_weight": 30.0},
    "tenth": {},
    "tenth-scratch": {"strategy": "scratch"},
}
MAE = "forces_mae_ev_per_a"


def frames_of(data: Path, task: str, fraction: float, seed: int) -> Frames:
    """Return the frames of a task, a share of the training frames in use."""
    path = data / ALLOYS.get(task, "mlearn_efs.parquet")
    where = None if task in ALLOYS else {"formula": [task]}
    frames = read_frames(path, split_column="split", where=where, seed=seed)
    frames.stress_ev_per_a3[:] += STRESS_OFFSET.get(task, 0.0) * np.eye(3)
    seen = np.flatnonzero(np.isin(frames.split, ("train", "val")))
    chosen = np.random.default_rng(seed).permutation(seen)
    chosen = chosen[: round(fraction * len(seen))]
    frames.split[seen] = "unused"
    n_val = max(round(0.1 * len(chosen)), 2)
    frames.split[chosen[n_val:]], frames.split[chosen[:n_val]] = "train", "val"
    return frames


def run(args: argparse.Namespace, element: str, variant: str) -> dict[str, Any]:
    """Train one plugin."""
    tenth = variant.startswith("tenth")
    frames = frames_of(args.data, element, 0.1 if tenth else 1, args.seed)
    options: dict[str, Any] = dict(VARIANTS[variant], seed=args.seed)
    options["epochs"] = args.tenth_epochs if tenth else args.epochs
    started = time.monotonic()
    if variant == "general":
        packed = PackedFrames.build(frames, args.cutoff)
        start = copy.deepcopy(args.potential)
        shift_references(start, packed)
        return {
            "element": element,
            "variant": variant,
            "seed": args.seed,
            "test": measure(start, packed, "test"),
            "seconds": time.monotonic() - started,
        }
    plugin = finetune_potential(frames, potential=args.potential, **options)
    record: dict[str, Any] = {
        "element": element,
        "variant": variant,
        "seed": args.seed,
        "rows": plugin.meta["data"]["rows"],
        "options": options,
        "best_epoch": plugin.meta["best_epoch"],
        "validation": plugin.meta["validation"],
        "test": plugin.meta["test"],
        "seconds": time.monotonic() - started,
    }
    if variant.startswith("full"):
        record["retention"] = retention(plugin, args.general)
    if args.plugins is not None and variant.startswith("full"):
        plugin.save(args.plugins / f"{element}-{variant}")
    return record


def records(path: Path) -> list[dict[str, Any]]:
    """Return what has been measured."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tables(args: argparse.Namespace) -> list[Table]:
    """Return the tables of all that has been measured with this seed."""
    found = {(r["element"], r["variant"]): r for r in records(args.runs) if r["seed"] == args.seed}
    published = json.loads(args.published.read_text())["mlearn_forces"]["tasks"]
    forces = Table(
        "Mean absolute error of forces on the test frames, eV/Å",
        ("element", "best published", *VARIANTS, "tenth / scratch"),
    )
    for element in TASKS:
        told = min(published.get(element, {}).items(), key=lambda item: item[1], default=None)
        row = [element, f"{told[1]:.4f} ({told[0]})" if told else ""]
        errors = {v: found[element, v]["test"][MAE] for v in VARIANTS if (element, v) in found}
        row += [f"{errors[v]:.4f}" if v in errors else "" for v in VARIANTS]
        both = {"tenth", "tenth-scratch"} <= set(errors)
        row.append(f"{errors['tenth'] / errors['tenth-scratch']:.2f}" if both else "")
        forces.rows.append(tuple(row))
    others = Table(
        "Energies (meV/atom) and stresses (GPa) on the test frames, time",
        ("element", "variant", "frames", "energy", "stress", "s"),
    )
    kept = Table(
        "The general potential on its own test frames, its head on a plugin's layers: forces eV/Å, "
        "energies meV/atom, stress GPa",
        ("element", "variant", "forces", "change", "energy", "change", "stress", "change"),
    )
    for (element, variant), record in sorted(found.items()):
        test, rows = record["test"], record.get("rows", {"train": 0, "val": 0})
        energy = f"{1e3 * test['energy_mae_ev_per_atom']:.1f}"
        stress = test.get("stress_mae_ev_per_a3")
        untold = record.get("options", {}).get("stress_weight") == 0
        told = "" if untold or stress is None else f"{160.21766 * stress:.2f}"
        others.rows.append((element, variant, str(rows["train"] + rows["val"]), energy,
                            told, f"{record['seconds']:.0f}"))  # fmt: skip
        if "retention" in record:
            row = [element, variant]
            for name, factor in ((MAE, 1), ("energy_mae_ev_per_atom", 1e3),
                                 ("stress_mae_ev_per_a3", 160.21766)):  # fmt: skip
                before, after = (record["retention"][k][name] for k in ("before", "after"))
                row += [f"{factor * after:.3f}", f"{100 * (after / before - 1):+.1f} %"]
            kept.rows.append(tuple(row))
    return [forces, others, kept]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_common_arguments(parser, "potentials")
    parser.add_argument("--elements", nargs="+", default=list(ELEMENTS), choices=TASKS)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=[*VARIANTS])
    parser.add_argument("--potential", default=DEFAULT_POTENTIAL, help="name or folder")
    parser.add_argument("--epochs", type=int, default=60, help="with all frames")
    parser.add_argument("--tenth-epochs", type=int, default=300, help="with a tenth")
    parser.add_argument("--runs", type=Path, default=RESULTS / "potentials.jsonl")
    parser.add_argument("--plugins", type=Path, help="folder for the plugins, kept")
    parser.add_argument("--published", type=Path, default=Path("../shared/published_results.json"))
    return parser.parse_args()


def main() -> None:
    """Train what is missing and write the tables."""
    args = parse_arguments()
    use_threads(args.threads)
    args.potential = load_potential(args.potential)
    card = args.potential.card
    general = read_frames(
        args.data / "mattersim_benchmark_efs.parquet", seed=card["configuration"]["seed"]
    )
    args.cutoff = args.potential.backbone.graph_options.cutoff_angstrom
    args.general = PackedFrames.build(general, args.cutoff)
    args.runs.parent.mkdir(parents=True, exist_ok=True)
    for element in args.elements:
        for variant in args.variants:
            done = {(r["element"], r["variant"], r["seed"]) for r in records(args.runs)}
            if (element, variant, args.seed) in done:
                continue
            record = run(args, element, variant)
            with args.runs.open("a") as file:  # one short write: whole beside other processes'
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            print(element, variant, record["test"][MAE], f"{record['seconds']:.0f} s", flush=True)
    more = facts(args.threads, potential=args.potential.name)
    write_tables(args.output, "Force plugins on mlearn", more, tables(args))


if __name__ == "__main__":
    main()
