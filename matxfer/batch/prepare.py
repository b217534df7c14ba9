"""From the entries of a unit to rows and graphs; what cannot be used says why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from matxfer.crystal import Crystal, CrystalError
from matxfer.data.packed import PackedGraphs
from matxfer.errors import ErrorKind
from matxfer.graph import GraphArrays, GraphOptions, build_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matxfer.readers import Entry

#: Bytes of the key that stands for a structure.
KEY_BYTES = 16
#: Atoms of the largest cell; its edge features are a few GB in the network.
MAX_ATOMS = 10_000
#: Neighbours of all atoms together, as many as the network can hold in about 2 GB.
MAX_EDGES = 1_000_000


@dataclass(slots=True)
class Rows:
    """Columns of the rows of a unit, one item per row in each."""

    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    formulas: list[str | None] = field(default_factory=list)
    n_sites: list[int | None] = field(default_factory=list)
    kinds: list[str | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, entry: Entry) -> None:
        """Append the row of an entry."""
        crystal = entry.crystal
        self.ids.append(entry.id)
        self.sources.append(entry.source)
        self.frames.append(entry.frame)
        self.formulas.append(crystal.formula if crystal else None)
        self.n_sites.append(crystal.n_sites if crystal else None)
        self.kinds.append(None)
        self.errors.append(None)
        if entry.error is not None:
            self.fail(len(self) - 1, entry.error)

    def fail(self, row: int, error: CrystalError) -> None:
        """Say why a row has no prediction; its other columns say where it stands."""
        self.kinds[row] = str(error.kind)
        self.errors[row] = str(CrystalError(error.reason, error.remedy))


@dataclass(frozen=True, slots=True)
class Preparation:
    """What it takes to make graphs for a model.

    Parameters
    ----------
    options, elements
        Graph options and known elements of the model.
    structure_column
        Column of structures of a table.
    max_atoms
        Largest number of atoms of a cell.
    """

    options: GraphOptions
    elements: frozenset[int]
    structure_column: str | None = None
    max_atoms: int = MAX_ATOMS

    def key(self, entry: Entry) -> bytes | None:
        """Return what tells an entry's structure from others, None for an error."""
        return entry.crystal.content_key()[:KEY_BYTES] if entry.crystal else None

    def graph(self, crystal: Crystal) -> GraphArrays:
        """Build the graph of a crystal.

        Raises
        ------
        CrystalError
            If the crystal cannot be used with the model.
        """
        crystal.check_elements(self.elements)
        if crystal.n_sites > self.max_atoms:
            raise CrystalError(
                f"the cell has {crystal.n_sites} atoms, more than {self.max_atoms}",
                "use a smaller cell, or raise max_atoms (--max-atoms) if there is the memory",
                kind=ErrorKind.TOO_LARGE,
            )
        self._check_neighbours(crystal)
        return build_graph(crystal, self.options)

    def _check_neighbours(self, crystal: Crystal) -> None:
        """Estimate the neighbours before they are searched: a collapsed cell has no end of them."""
        sphere = 4 / 3 * np.pi * self.options.cutoff_angstrom**3
        expected = crystal.n_sites**2 * sphere / crystal.volume_angstrom3
        if all(crystal.pbc) and expected > MAX_EDGES * max(self.max_atoms / MAX_ATOMS, 1):
            raise CrystalError(
                f"the atoms have about {expected / crystal.n_sites:.0f} neighbours each, "
                f"{expected:.2g} in all, more than {MAX_EDGES:.0e}",
                "check the cell vectors, or use a smaller cell",
                kind=ErrorKind.TOO_LARGE,
            )

    def graphs(
        self,
        entries: Sequence[Entry],
        rows: Rows,
        chosen: Sequence[int],
        broken: Mapping[int, CrystalError],
        on_build: Callable[[int], None],
    ) -> tuple[list[int], PackedGraphs]:
        """Build the graphs of chosen entries; return which there are, and the pack of them.

        What fails is said in ``rows``.
        """
        made: list[int] = []
        graphs: list[GraphArrays | None] = []
        for k in chosen:
            crystal = entries[k].crystal
            if crystal is None:
                continue
            on_build(k)
            try:
                if k in broken:
                    raise broken[k]
                graphs.append(self.graph(crystal))
                made.append(k)
            except CrystalError as error:
                rows.fail(k, error)
        return made, PackedGraphs.pack(graphs)
