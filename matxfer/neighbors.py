"""Periodic neighbour list: a thin face over vesin (all images, any cell shape, mixed pbc)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.crystal import Crystal


def neighbor_list(
    crystal: Crystal, cutoff_angstrom: float
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
    search = NeighborList(cutoff=cutoff_angstrom, full_list=True, sorted=True, n_threads=1)
    receiver, sender, vector, distance = search.compute(
        crystal.cart_coords, crystal.lattice, np.array(crystal.pbc), "ijDd"
    )
    return receiver.astype(np.int64), sender.astype(np.int64), vector, distance
