"""What a base model makes of a pack of graphs, computed once and kept: by layer, on disk.

A fine-tuning never changes the frozen layers, so their features are the same in every epoch, for
every split, strategy, ensemble member and frozen depth. They lie in one folder per weights and
structures, as memory-mapped arrays; the least recently used folders go when there are too many.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.data.loader import edge_budget_batches
from matxfer.data.packed import flat_ranges
from matxfer.data.store import cache_folder
from matxfer.nn.backbone import Features
from matxfer.nn.ensemble import normalised_layers, readout_inputs
from matxfer.nn.plugin_head import source_outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs
    from matxfer.model import Model

#: Version of the layout of a folder of activations.
LAYOUT = 1
#: Folders of activations together may hold so many bytes; ``$MATXFER_ACTIVATIONS_GB`` overrides.
LIMIT_BYTES = 4 << 30


class Activations:
    """Node and edge features of every layer of a frozen model, and its predictions.

    Parameters
    ----------
    model
        Its weights must not change while this lives.
    graphs
        The pack.
    folder
        Where folders of activations are kept; ``None``: in the cache of matxfer.
    limit_bytes
        Largest sum of all folders; above it old ones go, and what alone exceeds it is kept in a
        temporary file for as long as this lives.
    """

    def __init__(
        self,
        model: Model,
        graphs: PackedGraphs,
        folder: Path | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self.model, self.graphs = model, graphs
        self.limit_bytes = _limit() if limit_bytes is None else limit_bytes
        self._root = folder or cache_folder() / "activations"
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._arrays: dict[str, Tensor] = {}
        counts = model.backbone.extra_rows_per_graph(graphs)
        self._extra_offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # Weights that were never written have no checksum to be known by.
        self._name = _key(model, graphs) if model.checksum else ""

    def node(self, layer: int) -> Tensor:
        """Return the node features after ``layer`` layers (0: the embedding), (N, F)."""
        return self._array(f"node_{layer}")

    def edge(self, layer: int) -> Tensor:
        """Return the edge features after ``layer`` layers, (E, D)."""
        return self._array(f"edge_{layer}")

    def extra_features(self, layer: int) -> Tensor | None:
        """Return what else the layers hand on after ``layer`` layers, (T, A), if anything."""
        return self._array(f"extra_{layer}") if self.model.backbone.extra_dim else None

    def source(self, name: str) -> NDArray[np.float64]:
        """Return a source prediction on its fitted scale, (G,)."""
        return self._array("source")[:, list(self.model.heads).index(name)].double().numpy()

    def inputs(self, kind: str, layers: Iterable[int]) -> Tensor:
        """Return what a kind of readout reads of some layers of all graphs.

        See :func:`matxfer.nn.ensemble.readout_inputs`; ``"statistics"`` gives fingerprints (G, D).
        """
        graphs = self.graphs.batch(np.arange(len(self.graphs)), with_edges=False)
        nodes = [self.node(k) for k in layers]
        with torch.no_grad():
            return readout_inputs(kind, normalised_layers(nodes), graphs)

    def prefix(self, index: NDArray[np.int64], depth: int) -> Features:
        """Return the features after ``depth`` layers of some graphs of the pack, side by side."""
        nodes, edges = self.node_rows(index), flat_ranges(self.graphs.edge_offset, index)
        features = Features(self.node(depth)[nodes], self.edge(depth)[torch.from_numpy(edges)])
        if (extra := self.extra_features(depth)) is not None:
            rows = flat_ranges(self._extra_offset, index)
            features.extra = extra[torch.from_numpy(rows)]
        return features

    def start(
        self, index: NDArray[np.int64], depth: int, layers: Iterable[int] = ()
    ) -> tuple[Features | None, dict[int, Tensor]]:
        """Return where a plugin of frozen depth K starts, and the frozen layers that it reads.

        That is the prefix after K layers and the node features of ``layers`` up to K, or nothing
        for K = 0, where the embedding is the plugin's own.
        """
        if depth == 0:
            return None, {}
        rows = self.node_rows(index)
        below = {k: self.node(k)[rows] for k in layers if k < depth}
        return self.prefix(index, depth), below

    def node_rows(self, index: NDArray[np.int64]) -> Tensor:
        """Return which rows of the node arrays belong to some graphs of the pack."""
        return torch.from_numpy(flat_ranges(self.graphs.node_offset, index))

    # -- keeping ------------------------------------------------------------------------------
    def _array(self, name: str) -> Tensor:
        if name not in self._arrays:
            folder = self._folder()
            if not (folder / f"{name}.npy").exists():
                self._compute(folder, name)
            array = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            self._arrays[name] = torch.from_numpy(array)
        return self._arrays[name]

    def _folder(self) -> Path:
        if self._own is not None:
            return Path(self._own.name)
        # All node arrays and one array of edges are the usual need.
        backbone = self.model.backbone
        width = backbone.node_dim * (backbone.n_layers + 1)
        need = 4 * int(self.graphs.node_offset[-1]) * width
        need += 4 * int(self.graphs.edge_offset[-1]) * backbone.edge_dim
        need += 4 * int(self._extra_offset[-1]) * backbone.extra_dim
        folder = self._root / self._name
        try:
            if self._name and need <= self.limit_bytes:
                folder.mkdir(parents=True, exist_ok=True)
                os.utime(folder)
                _forget_old(self._root, folder, self.limit_bytes - need)
                return folder
        except OSError:
            pass  # no place to keep them: a temporary one serves as well
        self._own = tempfile.TemporaryDirectory(prefix="matxfer-activations-")
        return Path(self._own.name)

    def _compute(self, folder: Path, name: str) -> None:
        """Run the network over the pack; write the array asked for, and all nodes in one go."""
        backbone, graphs = self.model.backbone, self.graphs
        n_nodes, n_edges = int(graphs.node_offset[-1]), int(graphs.edge_offset[-1])
        wanted = {f"node_{k}": (n_nodes, backbone.node_dim) for k in range(backbone.n_layers + 1)}
        wanted["source"] = (len(graphs), len(self.model.heads))
        if name.startswith("edge_"):
            wanted = {name: (n_edges, backbone.edge_dim)}
        if name.startswith("extra_"):
            wanted = {name: (int(self._extra_offset[-1]), backbone.extra_dim)}
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as part:
            files = {
                n: np.lib.format.open_memmap(Path(part) / n, "w+", np.float32, shape=shape)
                for n, shape in wanted.items()
                if 0 not in shape
            }
            with torch.inference_mode():
                for index in edge_budget_batches(graphs, np.arange(len(graphs))):
                    self._write(index, files)
            for n, shape in wanted.items():
                if n in files:
                    files[n].flush()
                else:  # an empty array cannot be mapped
                    with (Path(part) / n).open("wb") as empty:
                        np.save(empty, np.zeros(shape, np.float32))
                (Path(part) / n).replace(folder / f"{n}.npy")

    def _write(self, index: NDArray[np.int64], files: Mapping[str, NDArray[np.float32]]) -> None:
        """Write what the network makes of a batch; batches follow the order of the pack."""
        backbone, graphs = self.model.backbone, self.graphs
        begin, end = index[0], index[-1] + 1
        nodes = slice(graphs.node_offset[begin], graphs.node_offset[end])
        edges = slice(graphs.edge_offset[begin], graphs.edge_offset[end])
        extra_rows = slice(self._extra_offset[begin], self._extra_offset[end])
        batch = graphs.batch(index)
        # Nothing is run above the highest layer asked for.
        highest = (backbone.n_layers if n == "source" else int(n.split("_")[1]) for n in files)
        first = backbone.embed(batch)
        later = backbone.states(batch, first, 0, max(highest, default=0))
        for layer, state in enumerate(chain([first], later)):
            if f"node_{layer}" in files:
                files[f"node_{layer}"][nodes] = state.node.numpy()
            if f"edge_{layer}" in files:
                files[f"edge_{layer}"][edges] = state.edge.numpy()
            if f"extra_{layer}" in files:
                assert state.extra is not None
                files[f"extra_{layer}"][extra_rows] = state.extra.numpy()
        if "source" in files:
            outputs = source_outputs(self.model.heads, state.node, batch)
            files["source"][begin:end] = torch.stack(list(outputs.values()), dim=1).numpy()


def _limit() -> int:
    given = os.environ.get("MATXFER_ACTIVATIONS_GB")
    return int(float(given) * 2**30) if given else LIMIT_BYTES


def _key(model: Model, graphs: PackedGraphs) -> str:
    digest = hashlib.blake2b(f"{LAYOUT} {model.checksum}".encode(), digest_size=16)
    for field in fields(graphs):
        digest.update(np.ascontiguousarray(getattr(graphs, field.name)).data)
    return digest.hexdigest()


def _forget_old(root: Path, keep: Path, limit_bytes: int) -> None:
    """Remove the least recently used folders until the others fit the limit."""
    others = [f for f in root.iterdir() if f.is_dir() and f != keep]
    sizes = {f: sum(p.stat().st_size for p in f.glob("*.npy")) for f in others}
    for folder in sorted(others, key=lambda f: f.stat().st_mtime):
        if sum(sizes.values()) <= limit_bytes:
            return
        del sizes[folder]
        # A process that has it mapped keeps what it sees.
        shutil.rmtree(folder, ignore_errors=True)
