"""Neighbours of moving atoms: a list with a skin, searched anew only when it may miss a pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.crystal import MIN_DISTANCE_ANGSTROM, Crystal, overlap_error
from matxfer.data.batch import GraphBatch
from matxfer.neighbors import neighbor_list
from matxfer.options import NOT_NEGATIVE, POSITIVE, check_ranges

if TYPE_CHECKING:
    from ase import Atoms
    from numpy.typing import NDArray
    from torch import Tensor

_RANGES = {"cutoff_angstrom": POSITIVE, "skin_angstrom": NOT_NEGATIVE}


class SkinList:
    """Graphs of one structure after another, mostly from one search (Verlet, Phys. Rev. 159, 98).

    The pairs within cutoff R and skin s are kept with their periodic shifts, and the vectors of
    those within R are computed anew each time, in double precision. Let the cell have changed from
    h₀ to h = h₀ F since the search, and the atoms from r₀ to r₀ F + u. A pair that was not kept,
    at least R + s apart, is now at least σ(R + s) - 2 max|u| apart, with the least singular value
    σ of F. As long as that is R or more, none is missing; in a fixed cell this is the usual rule
    that no atom has moved by more than s/2.

    Parameters
    ----------
    cutoff_angstrom, skin_angstrom
        R and s in Å.
    dtype, device
        Of the graphs.

    Attributes
    ----------
    searches
        How often neighbours were searched.

    Raises
    ------
    OptionError
        If R or s is out of its range.
    """

    def __init__(
        self,
        cutoff_angstrom: float,
        skin_angstrom: float = 0.5,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.cutoff_angstrom, self.skin_angstrom = cutoff_angstrom, skin_angstrom
        check_ranges(self, _RANGES, "neighbour list")
        self.dtype, self.device = dtype, torch.device(device)
        self.searches = 0
        self._numbers: NDArray[np.int64] | None = None

    def graphs(self, atoms: Atoms) -> GraphBatch:
        """Return the graph of a structure as a batch of one, a node per atom.

        Raises
        ------
        CrystalError
            For atoms that are no usable structure: none at all, positions or a cell that are not
            finite, two atoms closer than 0.5 Å.
        """
        positions = np.asarray(atoms.positions, dtype=np.float64)
        cell = np.asarray(atoms.cell.complete(), dtype=np.float64)
        if not self._holds(atoms, positions, cell):
            self._search(atoms, positions, cell)
        elif not np.array_equal(cell, self._shift_cell):
            self._set_cell(cell)
        place = torch.from_numpy(positions).to(self.device)
        vector = place.index_select(0, self._sender)
        vector = vector.sub_(place.index_select(0, self._receiver)).add_(self._shift)
        square = torch.linalg.vecdot(vector, vector)
        if len(square) and float(square.min()) < MIN_DISTANCE_ANGSTROM**2:
            raise overlap_error(
                Crystal.from_ase(atoms),
                self._receiver.cpu().numpy(),
                self._sender.cpu().numpy(),
                square.sqrt().cpu().numpy(),
            )
        near = (square < self.cutoff_angstrom**2).nonzero().squeeze(1)
        return GraphBatch(
            z=self._z,
            multiplicity=self._ones,
            edge_index=self._pairs.index_select(1, near),
            edge_vector=vector.index_select(0, near).to(self.dtype),
            batch=self._batch,
            num_graphs=1,
        )

    def _holds(
        self, atoms: Atoms, positions: NDArray[np.float64], cell: NDArray[np.float64]
    ) -> bool:
        """Say whether the kept pairs hold all that are within the cutoff now."""
        if (
            self._numbers is None
            or not np.array_equal(atoms.numbers, self._numbers)
            or tuple(atoms.pbc) != self._pbc
        ):
            return False
        reach, placed = self.cutoff_angstrom + self.skin_angstrom, self._positions
        if not np.array_equal(cell, self._cell):
            if not np.isfinite(cell).all():
                return False  # the search says what is wrong
            strain = np.linalg.solve(self._cell, cell)
            placed = placed @ strain
            reach *= float(np.linalg.svd(strain, compute_uv=False)[-1])
        moved = positions - placed
        farthest = float(np.einsum("na,na->n", moved, moved).max()) ** 0.5
        return bool(reach - 2 * farthest >= self.cutoff_angstrom)  # NaN: no

    def _search(
        self, atoms: Atoms, positions: NDArray[np.float64], cell: NDArray[np.float64]
    ) -> None:
        self._numbers = None  # nothing holds if the search fails
        crystal = Crystal.from_ase(atoms)
        receiver, sender, vector, _ = neighbor_list(
            crystal, self.cutoff_angstrom + self.skin_angstrom
        )
        self.searches += 1
        # What the vector is longer than the difference of positions is whole cell vectors.
        outside = vector - (positions[sender] - positions[receiver])
        shift = np.rint(outside @ np.linalg.inv(cell))
        self._pairs = torch.from_numpy(np.stack([sender, receiver])).to(self.device)
        self._sender, self._receiver = self._pairs.unbind(0)
        self._whole = torch.from_numpy(shift).to(self.device)
        self._set_cell(cell)
        self._z = torch.from_numpy(crystal.numbers.copy()).to(self.device)
        self._ones = torch.ones(len(crystal), dtype=self.dtype, device=self.device)
        self._batch = torch.zeros(len(crystal), dtype=torch.int64, device=self.device)
        self._cell, self._positions = cell.copy(), positions.copy()
        self._pbc = tuple(atoms.pbc)
        self._numbers = crystal.numbers

    def _set_cell(self, cell: NDArray[np.float64]) -> None:
        self._shift_cell = cell.copy()
        self._shift: Tensor = self._whole @ torch.from_numpy(self._shift_cell).to(self.device)
