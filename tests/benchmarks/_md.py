"""Molecular dynamics of silicon with one package's ASE calculator, on the CPU.

Called by md_speed.py, a package a process: ``python _md.py chgnet REPEAT STEPS [WEIGHTS]``. Prints
the seconds of each step. Peers need not have matxfer installed.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import numpy as np
from ase import units
from ase.build import bulk
from ase.md.verlet import VelocityVerlet

TEMPERATURE_K, TIMESTEP_FS, WARM_UP = 300, 1.0, 2


def silicon(repeat: int) -> Any:
    """Return 8 n³ atoms of silicon, thermal positions and momenta the same for all packages."""
    atoms = bulk("Si", "diamond", a=5.43, cubic=True) * (repeat, repeat, repeat)
    rng = np.random.default_rng(0)
    atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
    momenta = rng.standard_normal(atoms.positions.shape)
    atoms.set_momenta(momenta * np.sqrt(28.085 * units.kB * TEMPERATURE_K))
    return atoms


def matxfer(weights: str) -> Any:
    """Ours, in single precision as the others, by name, folder, or ``untrained``."""
    from matxfer.calculator import MatxferCalculator

    if weights == "untrained":
        import torch

        from matxfer.model import load_model
        from matxfer.potential.model import potential_from

        torch.manual_seed(0)
        model = load_model("mp-small")
        return MatxferCalculator(potential=potential_from(model, model.backbone.config()))
    from pathlib import Path

    if (Path(weights) / "plugin.json").is_file():
        return MatxferCalculator(plugin=weights)
    return MatxferCalculator(potential=weights)


def chgnet(weights: str) -> Any:
    """CHGNet with its shipped weights."""
    from chgnet.model.dynamics import CHGNetCalculator
    from chgnet.model.model import CHGNet

    del weights
    return CHGNetCalculator(CHGNet.load(use_device="cpu", verbose=False), use_device="cpu")


def mace(weights: str) -> Any:
    """MACE-MP, whose weights are fetched by its package unless a file is given."""
    from mace.calculators import mace_mp

    return mace_mp(model=weights or "small", device="cpu", default_dtype="float32")


def main() -> None:
    """Run one package."""
    name, repeat, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    weights = sys.argv[4] if len(sys.argv) > 4 else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atoms = silicon(repeat)
        atoms.calc = {"matxfer": matxfer, "chgnet": chgnet, "mace": mace}[name](weights)
        dynamics = VelocityVerlet(atoms, TIMESTEP_FS * units.fs)
        dynamics.run(WARM_UP)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            dynamics.run(1)
            seconds.append(time.perf_counter() - start)
    if not np.isfinite(atoms.get_potential_energy()):
        raise SystemExit("the energy is not finite")
    print(*seconds)


if __name__ == "__main__":
    main()
