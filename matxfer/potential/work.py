"""Whether energies, forces and stresses belong together: the work between similar frames.

Between two frames of one set of atoms that are not far apart the energy rises by the work

ΔE = -½ Σ_i (F_i + F_i') · Δr_i + ½ V (σ + σ') : ε

up to third order in displacements Δr and strain ε (the trapezoidal rule; exact for a harmonic
crystal). The two terms are compared with ΔE by a robust fit. A factor other than one tells of
another unit or sign, a constant pressure p in ΔE - … = p V tr ε of stresses with an offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from matxfer.crystal import Crystal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from matxfer.potential.frames import Frames

#: Farther apart than these, two frames are not compared.
MAX_DISPLACEMENT_ANGSTROM, MAX_STRAIN, MAX_ROTATION = 0.4, 0.06, 0.01
#: Frames of one set of atoms that are compared with each other, and partners of each.
_FRAMES, _PARTNERS = 100, 3
#: Fewer pairs prove nothing.
MIN_PAIRS = 8
#: Atoms that move less besides the strain are at rest: then energies tell of stresses alone.
STILL_ANGSTROM = 0.05
#: Å of displacement that are as far as a strain of one.
_STRAIN_LENGTH = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """P pairs of similar frames, in eV.

    Attributes
    ----------
    energy
        ΔE, (P,).
    forces, stress
        Work of the forces and, zero where unknown, of the stresses, (P,).
    expansion
        V tr ε in Å³, (P,).
    n_atoms, volume, displacement
        Of each pair; the last is that of the atom that moved farthest besides the strain, (P,).
    """

    energy: NDArray[np.float64]
    forces: NDArray[np.float64]
    stress: NDArray[np.float64]
    expansion: NDArray[np.float64]
    n_atoms: NDArray[np.float64]
    volume: NDArray[np.float64]
    displacement: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.energy)


@dataclass(frozen=True, slots=True)
class Work:
    """What the fit ΔE = a W_forces + b W_stress + p V tr ε found; None where it cannot tell.

    Attributes
    ----------
    forces, stress
        The factors a and b, one where the units are eV, eV/Å and eV/Å³.
    pressure_ev_per_a3
        p, what the stresses lack on the diagonal.
    pairs
        Number of pairs.
    """

    forces: float | None
    stress: float | None
    pressure_ev_per_a3: float | None
    pairs: int


def pairs_of(frames: Frames, rows: NDArray[np.int64], seed: int = 0) -> Pairs:
    """Find pairs of similar frames among some rows."""
    alike: dict[bytes, list[int]] = {}
    for row in rows.tolist():
        crystal = frames.crystals[row]
        known = np.isfinite(frames.energy_ev[row]) and frames.forces_ev_per_a[row] is not None
        if isinstance(crystal, Crystal) and known and all(crystal.pbc):
            alike.setdefault(crystal.numbers.tobytes(), []).append(row)
    rng = np.random.default_rng(seed)
    found = [np.zeros((0, 7))]
    for same in alike.values():
        if len(same) > 1:
            found += _of_one_set(frames, rng.permutation(same)[:_FRAMES])
    return Pairs(*np.concatenate(found).T)


def _of_one_set(frames: Frames, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    """Yield the pairs that each frame makes with the closest of those after it, (p, 7)."""
    crystals = [c for row in rows if isinstance(c := frames.crystals[row], Crystal)]
    frac = np.stack([c.frac_coords for c in crystals])
    cell = np.stack([c.lattice for c in crystals])
    energy, stress = frames.energy_ev[rows], frames.stress_ev_per_a3[rows]
    forces = np.stack([np.asarray(frames.forces_ev_per_a[row]) for row in rows])
    for i in range(len(rows) - 1):
        step = frac[i + 1 :] - frac[i]
        step -= np.rint(step)
        step -= step.mean(axis=1, keepdims=True)
        # The cell of the second frame is L' = L (1 + G); of the mean cell the strain is
        # (1 + G/2)⁻¹ G.
        gradient = np.linalg.solve(cell[i], cell[i + 1 :] - cell[i])
        near = np.abs(gradient).max((1, 2)) < MAX_STRAIN
        near[near] = np.linalg.norm(step[near] @ cell[i], axis=2).max(1) < MAX_DISPLACEMENT_ANGSTROM
        chosen = np.flatnonzero(near)
        gradient = np.linalg.solve(np.eye(3) + 0.5 * gradient[chosen], gradient[chosen])
        strain = 0.5 * (gradient + gradient.transpose(0, 2, 1))
        moved = step[chosen] @ (0.5 * (cell[i + 1 + chosen] + cell[i]))
        distance = np.linalg.norm(moved, axis=2).max(1)
        distance += _STRAIN_LENGTH * np.abs(strain).max((1, 2))
        distance[np.abs(gradient - strain).max((1, 2)) > MAX_ROTATION] = np.inf
        best = np.argsort(distance)[: min(_PARTNERS, int(np.isfinite(distance).sum()))]
        j, moved, strain = i + 1 + chosen[best], moved[best], strain[best]
        volume = np.abs(np.linalg.det(0.5 * (cell[j] + cell[i])))
        by_forces = -0.5 * ((forces[i] + forces[j]) * moved).sum((1, 2))
        by_stress = 0.5 * volume * ((stress[i] + stress[j]) * strain).sum((1, 2))
        expansion = volume * np.trace(strain, axis1=1, axis2=2)
        n_atoms = np.full(len(j), float(frac.shape[1]))
        far = np.linalg.norm(moved, axis=2).max(1)
        work = (energy[j] - energy[i], by_forces, np.nan_to_num(by_stress), expansion)
        yield np.stack([*work, n_atoms, volume, far], axis=1)


def compare(pairs: Pairs) -> Work:
    """Fit the work to the energies; factors that matter little or are uncertain are None."""
    columns = np.stack([pairs.forces, pairs.stress], axis=1)
    used = [k for k in (0, 1) if _size(columns[:, k]) > 1e-9]
    size = _size(pairs.energy)
    told: list[float | None] = [None, None]
    if len(pairs) < MIN_PAIRS or not used or not size:
        return Work(None, None, None, len(pairs))
    factors, doubts, rest = _robust(columns[:, used], pairs.energy)
    for k, factor, doubt in zip(used, factors, doubts, strict=True):
        # It has to explain a good part of the energies, and be certain.
        counts = abs(factor) * _size(columns[:, k]) > 0.2 * size
        if counts and rest < 0.35 * size and 10 * doubt < abs(factor):
            told[k] = float(factor)
    return Work(told[0], told[1], _pressure(pairs), len(pairs))


def _pressure(pairs: Pairs) -> float | None:
    """Return what stresses lack on the diagonal, from strained copies of cells at rest."""
    rest = (pairs.displacement < STILL_ANGSTROM) & (np.abs(pairs.expansion) > 1e-9)
    rest &= pairs.stress != 0
    if rest.sum() < MIN_PAIRS:
        return None
    energy = (pairs.energy - pairs.forces)[rest]
    columns = np.stack([pairs.stress, pairs.expansion], axis=1)[rest]
    factors, doubts, left = _robust(columns, energy)
    _, _, without = _robust(columns[:, :1], energy)
    fits = left < 0.1 * _size(energy) and 0.8 < factors[0] < 1.25
    return (
        float(factors[1])
        if fits and left < 0.5 * without and 10 * doubts[1] < abs(factors[1])
        else None
    )


def _size(values: NDArray[np.float64]) -> float:
    """Return the mean magnitude, which outliers hardly move."""
    return float(np.abs(values).mean()) if len(values) else 0.0


def _robust(
    columns: NDArray[np.float64], target: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Fit with least absolute deviations: factors, their standard errors, mean deviation left."""
    scale = np.maximum(np.abs(columns).mean(0), 1e-300)
    x = columns / scale
    weight = np.ones(len(target))
    factors = np.zeros(x.shape[1])
    for _ in range(30):
        weighted = x * weight[:, None]
        gram = weighted.T @ x + 1e-9 * np.eye(x.shape[1])
        factors = np.linalg.solve(gram, weighted.T @ target)
        left = np.abs(target - x @ factors)
        weight = 1 / np.maximum(left, 1e-3 * left.mean() + 1e-12)
        weight /= weight.mean()
    rest = float(left.mean())
    spread = np.sqrt(np.diag(np.linalg.pinv(x.T @ x))) * rest * 1.5
    return factors / scale, spread / scale, rest
