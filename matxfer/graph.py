"""Crystal → graph arrays: the only place that knows the cutoff and the asymmetric unit.

An invariant network gives equal features to symmetry-equivalent atoms, so one node per symmetry
orbit is enough: edges run from the orbits of the neighbours to a representative of each orbit,
and pooling weighs each node by its multiplicity (Ruff et al., Digital Discovery 3, 594 (2024)).
Orbits are those of the space group of the infinite crystal, so cells, supercells and primitive
cells of one crystal give the same graph.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import (
    MIN_DISTANCE_ANGSTROM,
    MIN_VOLUME_ANGSTROM3,
    Crystal,
    CrystalError,
    overlap_error,
)
from matxfer.errors import OptionError
from matxfer.neighbors import neighbor_list
from matxfer.options import POSITIVE, check_kinds, check_ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Part of every cache key: raise it when the arrays of a graph change their meaning.
GRAPH_VERSION = 2

# moyo warns of supercells and of atoms near its tolerance, line by line; is_equitable judges both.
logging.getLogger("moyo").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class GraphOptions:
    """How a crystal becomes a graph; travels with the weights that were trained on such graphs.

    Parameters
    ----------
    cutoff_angstrom
        Radius of the neighbourhood in Å.
    symmetry
        One node per symmetry orbit (True) or per atom of the cell (False).
    symprec_angstrom
        Largest displacement in Å up to which atoms count as symmetry-equivalent. Small on
        purpose: merged atoms differ in their distances by no more than about twice this value,
        which moves a prediction by far less than its own error; noisier structures merely lose
        the speed-up.

    Examples
    --------
    >>> from matxfer import CrystalGraph, GraphOptions
    >>> from matxfer.readers import read_file
    >>> crystal = next(iter(read_file("examples/Cu.cif"))).crystal
    >>> CrystalGraph.from_crystal(crystal, GraphOptions(cutoff_angstrom=3.0)).num_edges
    12
    >>> CrystalGraph.from_crystal(crystal, GraphOptions(3.0, symmetry=False)).num_edges
    48
    """

    cutoff_angstrom: float = 5.0
    symmetry: bool = True
    symprec_angstrom: float = 1e-4

    def __post_init__(self) -> None:
        check_kinds(self, "graph")
        positive = dict.fromkeys(("cutoff_angstrom", "symprec_angstrom"), POSITIVE)
        check_ranges(self, positive, "graph")

    def to_json(self) -> dict[str, Any]:
        """Return the options as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphOptions:
        """Read the options back; unknown keys raise ``ValueError``."""
        known = {field.name for field in fields(cls)}
        if unknown := set(data) - known:
            raise OptionError(f"unknown graph options {sorted(unknown)}; known are {sorted(known)}")
        return cls(**data)


@dataclass(frozen=True, slots=True, eq=False)
class GraphArrays:
    """One graph as NumPy arrays: n nodes, E directed edges sorted by receiver.

    Attributes
    ----------
    numbers : (n,) int16
        Atomic number of each node.
    multiplicity : (n,) int32
        How many atoms of the input cell the node stands for.
    position_angstrom : (n, 3) float32
        Position of the representative atom.
    cell_angstrom : (3, 3) float32
        Cell vectors of the input cell, as rows.
    edge_index : (2, E) int32
        Sender j (row 0) and receiver i (row 1), PyG's source-to-target order.
    edge_vector_angstrom : (E, 3) float32
        From the receiver to the neighbour's periodic image.
    node_of_site : (n_sites,) int32
        Node that stands for each atom of the input cell.
    """

    numbers: NDArray[np.int16]
    multiplicity: NDArray[np.int32]
    position_angstrom: NDArray[np.float32]
    cell_angstrom: NDArray[np.float32]
    edge_index: NDArray[np.int32]
    edge_vector_angstrom: NDArray[np.float32]
    node_of_site: NDArray[np.int32]

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.numbers)

    @property
    def n_edges(self) -> int:
        """Number of directed edges."""
        return len(self.edge_vector_angstrom)


def build_graph(crystal: Crystal, options: GraphOptions) -> GraphArrays:
    """Build the graph of a crystal.

    Raises
    ------
    CrystalError
        If two atoms overlap, or the neighbourhood could not be searched.
    """
    try:
        receiver, sender, vector, distance = neighbor_list(crystal, options.cutoff_angstrom)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise CrystalError(
            f"the neighbour search failed ({error})", "check the cell vectors and coordinates"
        ) from error
    if len(distance) and distance.min() < MIN_DISTANCE_ANGSTROM:
        raise overlap_error(crystal, receiver, sender, distance)

    n = crystal.n_sites
    orbit = np.arange(n)
    if options.symmetry and n > 1:
        candidate = symmetry_orbits(crystal, options.symprec_angstrom)
        reach, tolerance = options.cutoff_angstrom, 10 * options.symprec_angstrom
        same_species = np.array_equal(crystal.numbers[candidate], crystal.numbers)
        if (
            same_species
            and is_equitable(candidate, receiver, sender, distance, reach, tolerance)
            and has_equal_angles(candidate, receiver, sender, vector, reach, tolerance)
        ):
            orbit = candidate

    representatives, node_of_site, multiplicity = np.unique(
        orbit, return_inverse=True, return_counts=True
    )
    keep = orbit[receiver] == receiver
    if not keep.all():
        receiver, sender, vector = receiver[keep], sender[keep], vector[keep]
    return GraphArrays(
        numbers=crystal.numbers[representatives].astype(np.int16),
        multiplicity=multiplicity.astype(np.int32),
        position_angstrom=crystal.cart_coords[representatives].astype(np.float32),
        cell_angstrom=crystal.lattice.astype(np.float32),
        edge_index=np.stack([node_of_site[sender], node_of_site[receiver]]).astype(np.int32),
        edge_vector_angstrom=vector.astype(np.float32),
        node_of_site=node_of_site.astype(np.int32),
    )


def symmetry_orbits(crystal: Crystal, symprec_angstrom: float) -> NDArray[np.int64]:
    """Return, for each atom, the index of the first atom of its space-group orbit.

    Falls back to one orbit per atom where there is no space group to speak of: non-periodic axes,
    a cell without volume, or a symmetry search that fails.
    """
    n = crystal.n_sites
    identity = np.arange(n)
    if not all(crystal.pbc) or crystal.volume_angstrom3 < MIN_VOLUME_ANGSTROM3:
        return identity
    import moyopy

    cell = moyopy.Cell(
        crystal.lattice.tolist(), crystal.frac_coords.tolist(), crystal.numbers.tolist()
    )
    try:
        dataset = moyopy.MoyoDataset(cell, symprec=symprec_angstrom)
    except Exception:  # noqa: BLE001 - whatever the search stumbled over, the full cell is right
        return identity
    if dataset.symprec > symprec_angstrom:
        return identity
    orbits = np.asarray(dataset.orbits, dtype=np.int64)
    # Name each orbit by its first atom whatever the library's habit.
    _, first, inverse = np.unique(orbits, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)


def is_equitable(
    orbit: NDArray[np.int64],
    receiver: NDArray[np.int64],
    sender: NDArray[np.int64],
    distance_angstrom: NDArray[np.float64],
    cutoff_angstrom: float,
    tolerance_angstrom: float,
) -> bool:
    """Check that atoms of one orbit see equal neighbourhoods, orbit by orbit and shell by shell.

    This is the condition under which message passing on the quotient graph equals message passing
    on the full one. It is checked rather than trusted, because a symmetry search works with
    tolerances and a merged pair of different atoms would be a silent error.

    Parameters
    ----------
    orbit
        First atom of each atom's orbit, shape (n,).
    receiver, sender, distance_angstrom
        Full neighbour list sorted by receiver, shape (E,).
    cutoff_angstrom
        Radius of the neighbour list.
    tolerance_angstrom
        Largest difference between the distances of matched neighbours. Pairs within it of the
        cutoff are left out: they may fall on either side, and the envelope is zero there.
    """
    n = len(orbit)
    if np.array_equal(orbit, np.arange(n)):
        return True
    inside = distance_angstrom < cutoff_angstrom - tolerance_angstrom
    receiver, sender, distance = receiver[inside], sender[inside], distance_angstrom[inside]
    order = np.lexsort((distance, orbit[sender], receiver))
    receiver, kind, distance = receiver[order], orbit[sender][order], distance[order]
    degree = np.bincount(receiver, minlength=n)
    if not np.array_equal(degree, degree[orbit]):
        return False
    start = np.concatenate([[0], np.cumsum(degree)[:-1]])
    # For each edge of an atom, the matching edge of that atom's representative.
    twin = start[orbit[receiver]] + np.arange(len(receiver)) - start[receiver]
    return bool(
        np.array_equal(kind, kind[twin])
        and (np.abs(distance - distance[twin]) <= tolerance_angstrom).all()
    )


def has_equal_angles(
    orbit: NDArray[np.int64],
    receiver: NDArray[np.int64],
    sender: NDArray[np.int64],
    vector_angstrom: NDArray[np.float64],
    cutoff_angstrom: float,
    tolerance_angstrom: float,
) -> bool:
    """Check that atoms of one orbit see their neighbours under equal angles.

    Equal shells do not imply equal angles, which the three-body terms of a network read. Compared
    are rotation invariants of the first and second moments of each neighbourhood, its neighbours
    weighted by distance and orbit so that different arrangements do not cancel.

    Parameters
    ----------
    orbit, receiver, sender, cutoff_angstrom, tolerance_angstrom
        As in :func:`is_equitable`.
    vector_angstrom
        From receiver to sender, shape (E, 3).
    """
    n = len(orbit)
    if not len(receiver) or np.array_equal(orbit, np.arange(n)):
        return True
    distance = np.sqrt(np.einsum("ea,ea->e", vector_angstrom, vector_angstrom))
    x, y, z = (vector_angstrom / distance[:, None]).T
    # Smoothly to zero at the cutoff: neighbours that rounding puts outside do not matter.
    weight = (1 - (distance / cutoff_angstrom) ** 2).clip(min=0) ** 2
    weight *= 1 + (orbit[sender] * 0.618033988749895) % 1  # irrational: every orbit another weight
    terms = weight * np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, y * z, z * x])
    start = np.flatnonzero(np.diff(receiver, prepend=-1))  # the list is sorted by receiver
    total, *first, xx, yy, zz, xy, yz, zx = np.add.reduceat(terms, start, axis=1)
    u, v, w = np.array(first) / total
    xx, yy, zz, xy, yz, zx = np.array([xx, yy, zz, xy, yz, zx]) / total
    invariants = np.zeros((n, 4))
    invariants[receiver[start]] = np.stack(
        [
            u * u + v * v + w * w,
            xx * xx + yy * yy + zz * zz + 2 * (xy * xy + yz * yz + zx * zx),
            xx * yy * zz + 2 * xy * yz * zx - xx * yz**2 - yy * zx**2 - zz * xy**2,
            u * u * xx + v * v * yy + w * w * zz + 2 * (u * v * xy + v * w * yz + w * u * zx),
        ],
        axis=1,
    )
    # A displacement by the tolerance turns a bond of 1 Å or more by as many radians at most.
    return bool((np.abs(invariants - invariants[orbit]) <= 4 * tolerance_angstrom).all())
