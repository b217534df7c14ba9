"""Fisher information of the models of other packages, shipped with matxfer for EWC.

Of a model of properties, for its energy per atom: the mean over crystals drawn from a table of the
Materials Project. Of a potential, for its energies and forces: the same crystals with every atom
moved at random by 0.05 Å along each axis, since at rest most forces are zero by symmetry whatever
the weights. No labels are needed: what is squared are gradients of the output.

σ is that of Gaussian errors of the published mean errors. As the number of source samples counts
that of the materials in training, not that of the frames: those of one relaxation are nearly the
same.

    python tests/benchmarks/backbone_fisher.py chgnet chgnet-potential --samples 500
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from _table import random_crystals

from matxfer.backbones import chgnet_model, sevennet_model
from matxfer.crystal import Crystal
from matxfer.data.store import pack_chunk
from matxfer.files import write_json, write_tensors
from matxfer.fisher import concentration, fisher_diagonal, total_fisher
from matxfer.potential.fisher import potential_fisher
from matxfer.potential.model import ENERGY
from matxfer.runtime import use_threads

if TYPE_CHECKING:
    from types import ModuleType

DISPLACEMENT_ANGSTROM = 0.05


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what was published with them."""

    module: ModuleType
    package: str
    materials: int
    energy_mae_ev_per_atom: float
    forces_mae_ev_per_a: float


SOURCES = {
    "chgnet": Source(chgnet_model, "chgnet", int(0.9 * 145_923), 0.029, 0.068),
    "sevennet": Source(sevennet_model, "sevenn", 145_923, 0.011, 0.040),
}


def sigma(mae: float) -> float:
    """Return the spread of Gaussian errors of a mean absolute error."""
    return mae * math.sqrt(math.pi / 2)


def displaced(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """Return a crystal with every atom moved at random."""
    atoms = crystal.to_ase()
    atoms.positions += rng.normal(0, DISPLACEMENT_ANGSTROM, atoms.positions.shape)
    return Crystal.from_ase(atoms)


def measure(name: str, table: Path, samples: int, seed: int) -> None:
    """Measure one model, and write the two files beside the code."""
    family, _, potential = name.partition("-")
    source = SOURCES[family]
    place = find_spec(source.package).submodule_search_locations[0]
    (weights,) = Path(place).glob(source.module.WEIGHTS)
    model = source.module.model_of(weights, as_potential=bool(potential))
    crystals = random_crystals(table, samples, seed)
    if potential:
        rng = np.random.default_rng(seed)
        crystals = [displaced(crystal, rng) for crystal in crystals]
    graphs, _ = pack_chunk(crystals, model.backbone.graph_options)
    known = ~graphs.has_elements_outside(model.elements)
    rows = np.flatnonzero(known & (graphs.nodes_per_graph > 0))
    facts: dict[str, object]
    if potential:
        noise = {
            "energy": sigma(source.energy_mae_ev_per_atom),
            "forces": sigma(source.forces_mae_ev_per_a),
        }
        fisher = total_fisher(potential_fisher(model, graphs, rows, noise, seed))
        shares = concentration(fisher)
        file, part = source.module.POTENTIAL_FISHER, "potential"
        facts = {"samples": len(rows), "noise": noise, "n_source": source.materials}
    else:
        noise = {ENERGY.name: sigma(source.energy_mae_ev_per_atom)}
        fisher = fisher_diagonal(model, graphs, rows, noise)
        shares = concentration(total_fisher(fisher))
        file, part = source.module.FISHER, "card"
        facts = {"samples": len(rows), "source_size": source.materials, "noise_normalised": noise}
    write_tensors(file, {key: value.to(torch.bfloat16) for key, value in fisher.items()})
    card = json.loads(source.module.CARD.read_text(encoding="utf-8"))
    card[part]["fisher"] = facts | {"concentration": shares}
    write_json(source.module.CARD, card)
    top = {key: shares[key] for key in ("trace", "top_0.1_percent")}
    print(file.name, f"{file.stat().st_size:,} bytes", facts, top)


def main() -> None:
    """Measure the models named."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name + end for name in SOURCES for end in ("", "-potential")]
    parser.add_argument("models", nargs="+", choices=names)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    use_threads(1)
    table = arguments.data / "mp_formation_energy.parquet"
    for name in arguments.models:
        measure(name, table, arguments.samples, arguments.seed)


if __name__ == "__main__":
    main()
