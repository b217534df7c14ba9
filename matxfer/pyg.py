"""Crystals as PyTorch Geometric graphs, for those who bring their own PyG models and loaders.

Nothing else in the package needs PyTorch Geometric: it takes seconds to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from matxfer.graph import GraphArrays, GraphOptions, build_graph
from matxfer.html import Markup, card, facts, tag

if TYPE_CHECKING:
    from matxfer.crystal import Crystal
    from matxfer.data.packed import PackedGraphs


class CrystalGraph(Data):
    """A crystal as a PyG ``Data``: n nodes, one per symmetry orbit, and E directed edges.

    Single graphs and batches of PyG's ``DataLoader`` go through PyG models and through matxfer's
    networks alike (they satisfy :class:`matxfer.data.batch.GraphLike`). Differences of ``pos`` are
    not the bonds, which may lead to a periodic image: use ``edge_vector``. Pooling over the nodes
    is pooling over the atoms only if each node is weighted by its ``multiplicity``; graphs with
    one node per atom come from ``GraphOptions(symmetry=False)``.

    Attributes
    ----------
    z : (n,) int64
        Atomic numbers.
    pos : (n, 3) float32
        Position in Å of the atom that represents the node.
    cell : (1, 3, 3) float32
        Cell vectors as rows, in Å; (B, 3, 3) in a batch.
    multiplicity : (n,) float32
        Atoms of the input cell that the node stands for.
    edge_index : (2, E) int64
        Sender (row 0) and receiver (row 1), sorted by receiver.
    edge_vector : (E, 3) float32
        From the receiver to the sender's periodic image, in Å.
    edge_weight : (E,) float32
        Distance in Å.
    edge_attr : (E, 1) float32
        The same distance, as an edge feature.
    node_of_site : (n_sites,) int64
        Node that stands for each atom of the input cell, numbered through in a batch. Graphs
        from a :class:`~matxfer.data.packed.PackedGraphs`, which does not keep it, are without.
    y : (1,) float32
        Target, if one was given; (B,) in a batch.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from matxfer import Crystal, CrystalGraph
    >>> graph = CrystalGraph.from_crystal(Crystal.from_ase(bulk("NaCl", "rocksalt", 5.64)), y=-2.1)
    >>> graph.z.tolist(), graph.multiplicity.tolist()
    ([11, 17], [1.0, 1.0])
    >>> round(float(graph.edge_weight.min()), 2)
    2.82
    >>> from torch_geometric.loader import DataLoader
    >>> next(iter(DataLoader([graph, graph], batch_size=2))).num_graphs
    2
    """

    z: Tensor
    pos: Tensor
    cell: Tensor
    multiplicity: Tensor
    edge_index: Tensor
    edge_vector: Tensor
    edge_weight: Tensor
    edge_attr: Tensor
    node_of_site: Tensor

    @property
    def batch(self) -> Tensor:
        """Graph of each node, (n,) int64: zeros unless PyG's batching has set it."""
        if "batch" in self._store:
            batch: Tensor = self._store["batch"]
            return batch
        return self.z.new_zeros(self.z.shape)

    @batch.setter
    def batch(self, batch: Tensor) -> None:
        self._store.batch = batch

    @property
    def num_graphs(self) -> int:
        """Number of graphs: one, until PyG's ``Batch`` counts its own."""
        return 1

    def __inc__(self, key: str, value: object, *args: object, **kwargs: object) -> int:
        """Return by how much batching raises an attribute's entries per graph that went before.

        (PyG recognises indices by their name; joining along the first dimension is its default.)
        """
        if key == "node_of_site":
            return int(self.num_nodes)
        return int(super().__inc__(key, value, *args, **kwargs))

    def _repr_html_(self) -> str:
        from ase.data import chemical_symbols

        atoms: dict[int, float] = {}
        for z, count in zip(self.z.tolist(), self.multiplicity.tolist(), strict=True):
            atoms[z] = atoms.get(z, 0.0) + count
        distance = self.edge_weight
        spread = None
        if len(distance):
            spread = f"{float(distance.min()):.3f} to {float(distance.max()):.3f} Å"
        about = {
            "graphs": self.num_graphs,
            "atoms": round(sum(atoms.values())),
            "nodes, one per symmetry orbit": len(self.z),
            "edges": int(self.edge_index.shape[1]),
            "edges per node": len(distance) / max(len(self.z), 1),
            "distances": spread,
            "composition": ", ".join(
                f"{chemical_symbols[z]} {n:g}" for z, n in sorted(atoms.items())
            ),
            "target": float(self.y[0]) if self.num_graphs == 1 and "y" in self else None,
        }
        return card("CrystalGraph", facts(about), _histogram(distance))

    @classmethod
    def from_crystal(
        cls, crystal: Crystal, options: GraphOptions | None = None, y: float | None = None
    ) -> CrystalGraph:
        """Build the graph of a crystal.

        Parameters
        ----------
        crystal
            The structure.
        options
            How to build it; for one of our networks its ``graph_options``. Default: those of
            :class:`~matxfer.graph.GraphOptions`.
        y
            Target, if any.

        Raises
        ------
        CrystalError
            If two atoms overlap, or the neighbourhood could not be searched.
        """
        return cls.from_arrays(build_graph(crystal, options or GraphOptions()), y)

    @classmethod
    def from_arrays(cls, arrays: GraphArrays, y: float | None = None) -> CrystalGraph:
        """Copy the arrays of one graph into tensors."""
        # Copies, since a pack's arrays may be memory-mapped and read-only.
        vector = torch.from_numpy(np.array(arrays.edge_vector_angstrom, dtype=np.float32))
        distance = torch.linalg.vector_norm(vector, dim=1)
        graph = cls(
            z=torch.from_numpy(arrays.numbers.astype(np.int64)),
            pos=torch.from_numpy(np.array(arrays.position_angstrom, dtype=np.float32)),
            cell=torch.from_numpy(np.array(arrays.cell_angstrom, dtype=np.float32)[None]),
            multiplicity=torch.from_numpy(arrays.multiplicity.astype(np.float32)),
            edge_index=torch.from_numpy(arrays.edge_index.astype(np.int64)),
            edge_vector=vector,
            edge_weight=distance,
            edge_attr=distance[:, None],
            node_of_site=torch.from_numpy(arrays.node_of_site.astype(np.int64)),
        )
        if y is not None:
            graph.y = torch.tensor([y], dtype=torch.float32)
        return graph

    @classmethod
    def from_packed(cls, graphs: PackedGraphs, k: int, y: float | None = None) -> CrystalGraph:
        """Copy the k-th graph of a pack; it has no ``node_of_site``, see the class.

        Raises
        ------
        IndexError
            If there is no k-th graph.
        ValueError
            If its row gave no graph.
        """
        if not 0 <= k < len(graphs):
            raise IndexError(f"graph {k} of a pack of {len(graphs)}")
        nodes = slice(int(graphs.node_offset[k]), int(graphs.node_offset[k + 1]))
        edges = slice(int(graphs.edge_offset[k]), int(graphs.edge_offset[k + 1]))
        if nodes.start == nodes.stop:
            raise ValueError(f"row {k} gave no graph; the store's errors say why, leave it out")
        arrays = GraphArrays(
            numbers=graphs.numbers[nodes],
            multiplicity=graphs.multiplicity[nodes],
            position_angstrom=graphs.position_angstrom[nodes],
            cell_angstrom=graphs.cell_angstrom[k],
            edge_index=np.stack([graphs.sender[edges], graphs.receiver[edges]]),
            edge_vector_angstrom=graphs.edge_vector_angstrom[edges],
            node_of_site=np.zeros(0, np.int32),
        )
        graph = cls.from_arrays(arrays, y)
        del graph.node_of_site
        return graph


def _histogram(distance: Tensor) -> Markup | None:
    """Return a small drawing of how many edges there are of each length."""
    if not len(distance):
        return None
    count, edges = np.histogram(distance.numpy(), bins=40, range=(0.0, float(distance.max()) or 1))
    width, height = 320, 60
    bars = (
        tag(
            "rect",
            tag("title", f"{edges[k]:.2f} to {edges[k + 1]:.2f} Å: {n} edges"),
            x=f"{8 * k}",
            y=f"{height - height * n / count.max():.1f}",
            width="7",
            height=f"{height * n / count.max():.1f}",
            fill="#0072B2",
        )
        for k, n in enumerate(count)
        if n
    )
    words = tag(
        "text", f"edges by length, 0 to {edges[-1]:.2f} Å", x="0", y=f"{height + 14}",
        font_size="11", fill="currentColor",
    )  # fmt: skip
    box = f"0 0 {width} {height + 20}"
    return tag("svg", *bars, words, viewBox=box, width=width, height=height + 20, role="img")
