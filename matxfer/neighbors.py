"""Periodic neighbour list: a thin face over vesin (all images, any cell shape, mixed pbc)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_BINS = 5e4


class Periodic(Protocol):
    """What a search needs to know of a structure, such as a ``Crystal``, of n atoms."""

    @property
    def lattice(self) -> NDArray[np.float64]:
        """Cell vectors as rows, (3, 3) Å."""

    @property
    def cart_coords(self) -> NDArray[np.float64]:
        """Positions, (n, 3) Å."""

    @property
    def pbc(self) -> tuple[bool, bool, bool]:
        """Which axes are periodic."""


def neighbor_list(
    crystal: Periodic, cutoff_angstrom: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return every ordered pair of atoms closer than the cutoff, all periodic images included.

    Parameters
    ----------
    crystal
        The structure, n atoms.
    cutoff_angstrom
        Radius in Å; pairs exactly at the cutoff are left out.

    Returns
    -------
    receiver : (E,) int64
        Index i of the central atom, ascending.
    sender : (E,) int64
        Index j of the neighbour.
    vector_angstrom : (E, 3) float64
        r_j + shift - r_i, in Å.
    distance_angstrom : (E,) float64
        Its length, in Å.
    """
    from vesin import NeighborList

    # One thread: many short calls, often from several worker processes at once.
    positions = crystal.cart_coords
    periodic = np.array(crystal.pbc)
    radius = _radius(positions, crystal.lattice, periodic, cutoff_angstrom)
    search = NeighborList(cutoff=radius, full_list=True, sorted=True, n_threads=1)
    receiver, sender, vector, distance = search.compute(
        positions, crystal.lattice, periodic, "ijDd"
    )
    if radius > cutoff_angstrom:
        near = distance < cutoff_angstrom
        receiver, sender, vector = receiver[near], sender[near], vector[near]
        distance = distance[near]
    return receiver.astype(np.int64), sender.astype(np.int64), vector, distance


def _radius(
    positions: NDArray[np.float64],
    lattice: NDArray[np.float64],
    periodic: NDArray[np.bool_],
    cutoff_angstrom: float,
) -> float:
    """Return the radius to search within: larger than the cutoff in a vast box.

    vesin (0.6) sorts the atoms into bins no smaller than the cutoff. Where these would be more than
    10⁵ it takes fewer, in proportion, and of a flat box none along the short axis: it divides by
    zero, which ends the process.
    """
    longest = max(float(np.linalg.norm(lattice, axis=1).max()), float(np.ptp(positions, 0).max()))
    if longest < _MAX_BINS ** (1 / 3) * cutoff_angstrom:
        return cutoff_angstrom
    inverse = np.linalg.inv(lattice)
    # Along periodic axes the atoms are wrapped into the cell; the box holds all along the others.
    spread = np.where(periodic, 1.0, np.maximum(np.ptp(positions @ inverse, axis=0), 1.0))
    size = spread / np.linalg.norm(inverse, axis=0)
    while np.prod(np.maximum(size / cutoff_angstrom, 1.0)) > _MAX_BINS:
        cutoff_angstrom *= 1.25
    return cutoff_angstrom
