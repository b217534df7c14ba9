"""Frames labelled by ASE's effective-medium calculator: an oracle that needs no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from ase.build import bulk
from ase.calculators.emt import EMT

if TYPE_CHECKING:
    from ase import Atoms


def emt_frames(
    n: int, symbols: tuple[str, ...] = ("Cu", "Ni"), seed: int = 0, *, repeat: int = 1
) -> list[Atoms]:
    """Return n strained and rattled fcc cells with energy, forces and stress."""
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(n):
        atoms = bulk(symbols[k % len(symbols)], "fcc", a=3.6, cubic=True).repeat((1, 1, repeat))
        strain = np.eye(3) + rng.uniform(-0.02, 0.02, (3, 3))
        atoms.set_cell(atoms.cell @ (0.5 * (strain + strain.T)), scale_atoms=True)
        atoms.positions += rng.normal(0, 0.08, atoms.positions.shape)
        atoms.calc = EMT()
        atoms.get_forces()
        atoms.get_stress()
        frames.append(atoms)
    return frames


def table_of(frames: list[Atoms]) -> pd.DataFrame:
    """Return frames as a table of arrays in eV and Å."""
    return pd.DataFrame(
        {
            "lattice": [a.cell.array.ravel() for a in frames],
            "numbers": [a.numbers for a in frames],
            "frac_coords": [a.get_scaled_positions(wrap=False).ravel() for a in frames],
            "energy_ev": [a.get_potential_energy() for a in frames],
            "forces_ev_per_a": [a.get_forces().ravel() for a in frames],
            "stress_ev_per_a3": [a.get_stress(voigt=False).ravel() for a in frames],
        }
    )
