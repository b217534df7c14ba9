"""Frames as packed graphs with their energies, forces and stresses; batches for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.crystal import CrystalError
from matxfer.data.loader import budget_batches
from matxfer.data.packed import PackedGraphs, flat_ranges
from matxfer.graph import GraphOptions, build_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.potential.frames import Frames


@dataclass(slots=True, eq=False)
class FrameBatch:
    """B frames with N atoms: graphs, and what the calculation said; NaN where it said nothing.

    Attributes
    ----------
    graphs
        The graphs.
    n_atoms
        Atoms of each, (B,).
    volume_angstrom3
        Volume of each cell, (B,).
    energy_ev, forces_ev_per_a, stress_ev_per_a3
        (B,), (N, 3) and (B, 3, 3).
    """

    graphs: GraphBatch
    n_atoms: Tensor
    volume_angstrom3: Tensor
    energy_ev: Tensor
    forces_ev_per_a: Tensor
    stress_ev_per_a3: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FrameBatch:
        """Return the batch on another device."""
        names = ("n_atoms", "volume_angstrom3", "energy_ev", "forces_ev_per_a", "stress_ev_per_a3")
        moved = {n: getattr(self, n).to(device, non_blocking=non_blocking) for n in names}
        return FrameBatch(self.graphs.to(device, non_blocking), **moved)


@dataclass(frozen=True, slots=True, eq=False)
class PackedFrames:
    """G frames whose graphs could be built, and why the others could not.

    Attributes
    ----------
    graphs
        One node per atom, without nodes where a frame cannot be used.
    energy_ev, forces_ev_per_a, stress_ev_per_a3, volume_angstrom3
        (G,), (N, 3), (G, 3, 3) and (G,), NaN where unknown.
    split
        (G,); frames that cannot be used are ``failed``.
    errors
        Reason by number of the frame.
    """

    graphs: PackedGraphs
    energy_ev: NDArray[np.float64]
    forces_ev_per_a: NDArray[np.float32]
    stress_ev_per_a3: NDArray[np.float32]
    volume_angstrom3: NDArray[np.float32]
    split: NDArray[np.str_]
    errors: dict[int, str]

    def __len__(self) -> int:
        return len(self.graphs)

    @classmethod
    def build(
        cls,
        frames: Frames,
        cutoff_angstrom: float,
        on_progress: Callable[[int], None] | None = None,
    ) -> PackedFrames:
        """Build the graphs of frames."""
        options = GraphOptions(cutoff_angstrom, symmetry=False)
        graphs, forces, errors = [], [], {}
        split = frames.split.copy()
        volume = np.full(len(frames), np.nan, dtype=np.float32)
        for row, crystal in enumerate(frames.crystals):
            graph = None
            try:
                if isinstance(crystal, CrystalError):
                    raise crystal
                graph = build_graph(crystal, options)
            except CrystalError as error:
                errors[row] = str(error)
                split[row] = "failed"
            graphs.append(graph)
            if graph is not None:
                assert not isinstance(crystal, CrystalError)
                volume[row] = crystal.volume_angstrom3
                told = frames.forces_ev_per_a[row]
                forces.append(np.full((graph.n_nodes, 3), np.nan) if told is None else told)
            if on_progress is not None:
                on_progress(1)
        flat = np.concatenate(forces) if forces else np.zeros((0, 3))
        return cls(
            PackedGraphs.pack(graphs),
            frames.energy_ev,
            flat.astype(np.float32),
            frames.stress_ev_per_a3.astype(np.float32),
            volume,
            split,
            errors,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[PackedFrames]) -> PackedFrames:
        """Put several end to end."""
        first = np.cumsum([0, *(len(part) for part in parts)])

        def joined(name: str) -> Any:
            return np.concatenate([getattr(part, name) for part in parts])

        return cls(
            graphs=PackedGraphs.concatenate([part.graphs for part in parts]),
            energy_ev=joined("energy_ev"),
            forces_ev_per_a=joined("forces_ev_per_a"),
            stress_ev_per_a3=joined("stress_ev_per_a3"),
            volume_angstrom3=joined("volume_angstrom3"),
            split=joined("split"),
            errors={
                int(start) + row: reason
                for start, part in zip(first, parts, strict=False)
                for row, reason in part.errors.items()
            },
        )

    def rows(self, part: str) -> NDArray[np.int64]:
        """Return the frames of a part of the split."""
        return np.flatnonzero(self.split == part)

    @property
    def energy_ev_per_atom(self) -> NDArray[np.float64]:
        """Energy per atom, (G,)."""
        return self.energy_ev / np.maximum(self.graphs.nodes_per_graph, 1)

    def batch(self, index: NDArray[np.int64]) -> FrameBatch:
        """Gather frames into a batch."""
        nodes = flat_ranges(self.graphs.node_offset, index)

        def tensor(array: NDArray[np.float32] | NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(np.asarray(array, dtype=np.float32))

        return FrameBatch(
            self.graphs.batch(index),
            tensor(self.graphs.nodes_per_graph[index].astype(np.float32)),
            tensor(self.volume_angstrom3[index]),
            tensor(self.energy_ev[index]),
            tensor(self.forces_ev_per_a[nodes]),
            tensor(self.stress_ev_per_a3[index]),
        )

    def batches(
        self, rows: NDArray[np.int64], max_edges: int, max_frames: int = 256
    ) -> Iterator[NDArray[np.int64]]:
        """Cut rows into batches of bounded work, in order."""
        return budget_batches(self.graphs.edges_per_graph[rows], rows, max_edges, max_frames)
