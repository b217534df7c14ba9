"""Crystals on which backbones are tried, and changes that must not matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from matxfer.crystal import Crystal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def low_symmetry(elements: Sequence[int]) -> Crystal:
    """Return four atoms in a skew cell, no two of them alike."""
    lattice = [[3.9, 0.1, 0.0], [0.4, 4.4, -0.2], [-0.3, 0.5, 5.1]]
    places = [[0.03, 0.05, 0.02], [0.55, 0.47, 0.11], [0.09, 0.52, 0.58], [0.49, 0.02, 0.55]]
    first, second = elements[0], elements[1]
    return Crystal(lattice, [first, second, second, elements[-1]], places)


def perovskite(elements: Sequence[int], cell_angstrom: float = 3.9) -> Crystal:
    """Return five atoms, three of them alike by symmetry."""
    places = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2
    numbers = [elements[1], elements[2], *[elements[0]] * 3]
    return Crystal(cell_angstrom * np.eye(3), numbers, places)


def one_atom(element: int) -> Crystal:
    """Return a face-centred cubic crystal, whose one atom sees nothing but its own images."""
    return Crystal(1.95 * (np.ones((3, 3)) - np.eye(3)), [element], [[0, 0, 0]])


def lone_atom(element: int) -> Crystal:
    """Return an atom without neighbours."""
    return Crystal(40 * np.eye(3), [element], [[0.1, 0.2, 0.3]])


def pair(elements: Sequence[int], distance_angstrom: float) -> Crystal:
    """Return two atoms far from anything else."""
    lattice = 60 * np.eye(3)
    places = np.array([[0, 0, 0], [distance_angstrom / 60, 0, 0]])
    return Crystal(lattice, [elements[0], elements[1]], places, pbc=False)


def rotated(crystal: Crystal, seed: int = 0) -> Crystal:
    """Turn a crystal by a random proper rotation."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q *= np.sign(np.linalg.det(q))
    return Crystal(crystal.lattice @ q, crystal.numbers, crystal.frac_coords)


def moved(crystal: Crystal) -> Crystal:
    """Move all atoms by the same vector, some of them over the edge of the cell."""
    places = (crystal.frac_coords + np.array([0.31, 0.77, 0.59])) % 1
    return Crystal(crystal.lattice, crystal.numbers, places)


def permuted(crystal: Crystal, order: NDArray[np.int64]) -> Crystal:
    """List the atoms in another order."""
    return Crystal(crystal.lattice, crystal.numbers[order], crystal.frac_coords[order])


def supercell(crystal: Crystal) -> Crystal:
    """Double a cell along its first vector; the atoms of the second half come after the first."""
    half = crystal.frac_coords / np.array([2, 1, 1])
    places = np.vstack([half, half + np.array([0.5, 0, 0])])
    numbers = np.concatenate([crystal.numbers, crystal.numbers])
    return Crystal(crystal.lattice * np.array([[2], [1], [1]]), numbers, places)


def other_cell(crystal: Crystal) -> Crystal:
    """Describe the same crystal by other cell vectors."""
    change = np.array([[1, 1, 0], [0, 1, 0], [0, -1, 1]])
    places = crystal.frac_coords @ np.linalg.inv(change)
    return Crystal(change @ crystal.lattice, crystal.numbers, places)
