"""Many graphs in a few flat arrays with offsets: one gather makes a batch, one file set keeps them.

Layout (G graphs, N nodes, S edges in all): ``node_offset`` and ``edge_offset`` (G + 1,) say where
each graph begins; the node and edge arrays are those of :class:`matxfer.graph.GraphArrays`, end to
end, with node indices local to their graph. On disk each array is one ``.npy`` file, read back
memory-mapped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.graph import GRAPH_VERSION, GraphArrays

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.data.batch import GraphBatch

_META = "meta.json"


def flat_ranges(offset: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate the ranges ``offset[k] … offset[k + 1]`` for k in ``index``."""
    length = offset[index + 1] - offset[index]
    end = np.cumsum(length)
    total = int(end[-1]) if len(end) else 0
    return np.repeat(offset[index] - (end - length), length) + np.arange(total)


@dataclass(frozen=True, slots=True, eq=False)
class PackedGraphs:
    """G graphs as flat arrays (see the module's docstring for the layout and the units)."""

    node_offset: NDArray[np.int64]
    edge_offset: NDArray[np.int64]
    numbers: NDArray[np.int16]
    multiplicity: NDArray[np.int32]
    position_angstrom: NDArray[np.float32]
    cell_angstrom: NDArray[np.float32]
    sender: NDArray[np.int32]
    receiver: NDArray[np.int32]
    edge_vector_angstrom: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.node_offset) - 1

    @property
    def nodes_per_graph(self) -> NDArray[np.int64]:
        """Number of nodes of each graph, shape (G,); zero marks a row that gave no graph."""
        return np.diff(self.node_offset)

    @property
    def edges_per_graph(self) -> NDArray[np.int64]:
        """Number of edges of each graph, shape (G,)."""
        return np.diff(self.edge_offset)

    def has_elements_outside(self, known: Collection[int]) -> NDArray[np.bool_]:
        """Say which graphs hold an element that is not among the known ones, shape (G,)."""
        row = np.repeat(np.arange(len(self)), self.nodes_per_graph)
        outside = np.zeros(len(self), dtype=bool)
        outside[row[~np.isin(self.numbers, list(known))]] = True
        return outside

    @classmethod
    def pack(cls, graphs: Sequence[GraphArrays | None]) -> PackedGraphs:
        """Pack graphs end to end; ``None`` (a row that failed) becomes a graph without nodes."""
        empty = GraphArrays(
            np.zeros(0, np.int16),
            np.zeros(0, np.int32),
            np.zeros((0, 3), np.float32),
            np.zeros((3, 3), np.float32),
            np.zeros((2, 0), np.int32),
            np.zeros((0, 3), np.float32),
            np.zeros(0, np.int32),
        )
        items = [graph if graph is not None else empty for graph in graphs]
        nodes = np.array([item.n_nodes for item in items], dtype=np.int64)
        edges = np.array([item.n_edges for item in items], dtype=np.int64)
        padded = items or [empty]
        return cls(
            node_offset=np.concatenate([[0], np.cumsum(nodes)]).astype(np.int64),
            edge_offset=np.concatenate([[0], np.cumsum(edges)]).astype(np.int64),
            numbers=np.concatenate([g.numbers for g in padded]),
            multiplicity=np.concatenate([g.multiplicity for g in padded]),
            position_angstrom=np.concatenate([g.position_angstrom for g in padded]),
            cell_angstrom=np.stack([g.cell_angstrom for g in padded])[: len(items)],
            sender=np.concatenate([g.edge_index[0] for g in padded]),
            receiver=np.concatenate([g.edge_index[1] for g in padded]),
            edge_vector_angstrom=np.concatenate([g.edge_vector_angstrom for g in padded]),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[PackedGraphs]) -> PackedGraphs:
        """Put several packs end to end."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> Any:
            return np.concatenate([getattr(part, name) for part in parts])

        def offsets(name: str) -> NDArray[np.int64]:
            counts = [np.diff(getattr(part, name)) for part in parts]
            return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)

        flat = {f.name: joined(f.name) for f in fields(cls) if not f.name.endswith("_offset")}
        return cls(node_offset=offsets("node_offset"), edge_offset=offsets("edge_offset"), **flat)

    def select(self, index: NDArray[np.int64]) -> PackedGraphs:
        """Return the graphs at ``index``, in that order, as a pack of their own."""
        nodes, edges = flat_ranges(self.node_offset, index), flat_ranges(self.edge_offset, index)
        node_offset = np.concatenate([[0], np.cumsum(self.nodes_per_graph[index])])
        edge_offset = np.concatenate([[0], np.cumsum(self.edges_per_graph[index])])
        return PackedGraphs(
            node_offset=node_offset.astype(np.int64),
            edge_offset=edge_offset.astype(np.int64),
            numbers=self.numbers[nodes],
            multiplicity=self.multiplicity[nodes],
            position_angstrom=self.position_angstrom[nodes],
            cell_angstrom=self.cell_angstrom[index],
            sender=self.sender[edges],
            receiver=self.receiver[edges],
            edge_vector_angstrom=self.edge_vector_angstrom[edges],
        )

    def batch(self, index: NDArray[np.int64], *, with_edges: bool = True) -> GraphBatch:
        """Gather the graphs at ``index`` into one batch of tensors; readouts need no edges."""
        import torch

        from matxfer.data.batch import GraphBatch

        nodes = flat_ranges(self.node_offset, index)
        edges = flat_ranges(self.edge_offset, index if with_edges else index[:0])
        n_nodes = self.nodes_per_graph[index]
        n_edges = self.edges_per_graph[index] if with_edges else np.zeros_like(n_nodes)
        shift = np.repeat(np.cumsum(n_nodes) - n_nodes, n_edges)
        edge_index = np.empty((2, len(edges)), dtype=np.int64)
        np.add(self.sender[edges], shift, out=edge_index[0])
        np.add(self.receiver[edges], shift, out=edge_index[1])
        return GraphBatch(
            z=torch.from_numpy(self.numbers[nodes].astype(np.int64)),
            multiplicity=torch.from_numpy(self.multiplicity[nodes].astype(np.float32)),
            edge_index=torch.from_numpy(edge_index),
            edge_vector=torch.from_numpy(np.ascontiguousarray(self.edge_vector_angstrom[edges])),
            batch=torch.from_numpy(np.repeat(np.arange(len(index)), n_nodes)),
            num_graphs=len(index),
        )

    # -- on disk ------------------------------------------------------------------------------
    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write the arrays and ``meta.json`` (last, so that its presence means completeness)."""
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {}
        for field in fields(self):
            array = getattr(self, field.name)
            np.save(folder / f"{field.name}.npy", array, allow_pickle=False)
            shapes[field.name] = list(array.shape)
        meta = {"graph_version": GRAPH_VERSION, "shapes": shapes, **(extra or {})}
        (folder / _META).write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path) -> tuple[PackedGraphs, dict[str, Any]]:
        """Open a saved pack memory-mapped; return it with its metadata.

        Raises
        ------
        ValueError
            If files are missing, cut short or of another version.
        """
        try:
            meta: dict[str, Any] = json.loads((folder / _META).read_text())
            arrays = {
                field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False)
                for field in fields(cls)
            }
        except (OSError, EOFError, ValueError) as error:  # EOFError: a file without a byte
            raise ValueError(f"{folder}: not a complete graph store ({error})") from error
        shapes = {name: list(array.shape) for name, array in arrays.items()}
        if meta.get("graph_version") != GRAPH_VERSION or meta.get("shapes") != shapes:
            raise ValueError(f"{folder}: the graph store is of another version or damaged")
        # Offsets are read at every batch: keep them in memory.
        arrays["node_offset"] = np.array(arrays["node_offset"])
        arrays["edge_offset"] = np.array(arrays["edge_offset"])
        return cls(**arrays), meta
