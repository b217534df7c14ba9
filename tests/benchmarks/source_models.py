"""Small models of one source task each, as alike as can be, for transfer maps.

The same network, the same number of gradient steps and, where a task has them, the same number of
materials: what differs is what was learned. Formation energies, gaps, displacements and shuffled
formation energies come from the very same crystals. No model has seen a material of the small
tasks, by id or by composition. A model has a readout: where displacements or forces teach the
layers, formation energies of the same crystals do so with a thousandth of the
weight.

    python tests/benchmarks/source_models.py --out runs/sources
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from matxfer.benchmark.tasks import TASKS
from matxfer.pretraining.config import ExcludeConfig, read_config
from matxfer.pretraining.exclusion import read_exclusions
from matxfer.pretraining.run import pretrain
from matxfer.readers import crystals_of_table
from matxfer.runtime import use_threads

MAX_SITES = 20
HELD_OUT = 0.1  # of the formulas, once for val and once for test
ANCHOR_ROWS = 600  # crystals whose energies train a readout where nothing else has one
NETWORK = {"n_layers": 4, "node_dim": 64, "edge_dim": 32, "basis_size": 32, "angular_dim": 4}
#: Source task → table and what is asked of it (see matxfer.pretraining.config.SourceConfig).
SOURCES = {
    "energy": ("mp_formation_energy", {"targets": ["formation_energy_ev_per_atom"]}),
    "gap": ("mp_formation_energy", {"targets": ["band_gap_ev"]}),
    "shuffled": ("mp_formation_energy", {"targets": ["shuffled_formation_energy_ev_per_atom"]}),
    "denoising": ("mp_formation_energy", {"denoise_angstrom": 0.1}),
    "elastic": ("mp_elasticity", {"targets": ["bulk_modulus_vrh_gpa", "shear_modulus_vrh_gpa"]}),
    "dielectric": ("mp_dielectric_large", {"targets": ["refractive_index"]}),
    "forces": (
        "mattersim_benchmark_efs",
        {"forces": "forces_ev_per_a", "max_force_ev_per_a": 10.0},
    ),
}


def draw(data: Path, table: str, rows: int, out: Path) -> Path:
    """Write the crystals that the models of a table learn from, with a split; return the file."""
    written = out / f"{table}_{rows}.parquet"
    if written.is_file():
        return written
    frame = pd.read_parquet(data / f"{table}.parquet")
    frame = frame[frame["n_sites"] <= MAX_SITES].reset_index(drop=True)
    if table == "mp_formation_energy":
        frame = frame[frame["band_gap_ev"].notna()].reset_index(drop=True)
    random = np.random.default_rng(0)
    frame = frame.iloc[random.permutation(len(frame))].reset_index(drop=True)
    excluded = read_exclusions(
        [ExcludeConfig(table=f"small_tasks/{task}.parquet") for task in TASKS], data
    )
    crystals = [entry.crystal for entry in crystals_of_table(frame, table)]
    ids = frame["material_id"].astype(str).tolist()
    frame = frame[~excluded.matches(ids, crystals)].head(rows).copy()
    formulas = random.permutation(frame["formula"].unique())
    size = int(HELD_OUT * len(formulas))
    part = dict.fromkeys(formulas[:size], "val") | dict.fromkeys(formulas[size : 2 * size], "test")
    frame["split"] = frame["formula"].map(part).fillna("train")
    if table == "mp_formation_energy":
        frame["shuffled_formation_energy_ev_per_atom"] = random.permutation(
            frame["formation_energy_ev_per_atom"]
        )
    frame.to_parquet(written)
    return written


def configuration(task: str, table: Path, rows: int, arguments: argparse.Namespace) -> dict:
    """Return the configuration of one model."""
    sources = [SOURCES[task][1] | {"table": str(table.resolve()), "split_column": "split"}]
    weights = {}
    if "targets" not in sources[0]:
        energies = draw(arguments.data, SOURCES["energy"][0], ANCHOR_ROWS, arguments.out)
        sources.append(
            SOURCES["energy"][1] | {"table": str(energies.resolve()), "split_column": "split"}
        )
        rows += int((pd.read_parquet(energies, columns=["split"])["split"] == "train").sum())
        weights = {"formation_energy_ev_per_atom": 1e-3}
    return {
        "name": f"source-{task}",
        "seed": arguments.seed,
        "sources": sources,
        "network": NETWORK,
        "training": {
            "epochs": max(1, round(arguments.steps * arguments.batch / rows)),
            "batch_size": arguments.batch,
            "learning_rate": 2e-3,
            "weight_decay": 0.01,
            "fisher_samples": 500,
            "task_weights": weights,
        },
        "trainer": {"accelerator": "cpu"},
        "card": {"licence": "CC-BY-4.0 (weights and source data)"},
    }


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the models")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--rows", type=int, default=6000, help="crystals per task at most")
    parser.add_argument("--steps", type=int, default=3000, help="gradient steps")
    parser.add_argument("--batch", type=int, default=64, help="crystals per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        folder = arguments.out / f"source-{task}"
        if (folder / "card.json").is_file():
            continue
        table = draw(arguments.data, SOURCES[task][0], arguments.rows, arguments.out)
        rows = int((pd.read_parquet(table, columns=["split"])["split"] == "train").sum())
        written = arguments.out / f"source-{task}.yaml"
        written.write_text(yaml.safe_dump(configuration(task, table, rows, arguments)))
        run_folder = arguments.out / "runs" / task
        model = pretrain(read_config(written), folder, run_folder=run_folder, resume=True)
        shutil.copy(written, folder / "config.yaml")
        print(task, model.card["figures"], flush=True)


if __name__ == "__main__":
    main()
