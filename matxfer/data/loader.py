"""Batches of packed graphs with their targets for training loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphBatch
    from matxfer.data.packed import PackedGraphs


@dataclass(slots=True, eq=False)
class LabelledBatch:
    """Graphs and their normalised targets (B, T); NaN where a graph has no value."""

    graphs: GraphBatch
    targets: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledBatch:
        """Return the batch on another device."""
        return LabelledBatch(
            self.graphs.to(device, non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
        )


class LabelledGraphs(Dataset[LabelledBatch]):
    """Rows of a graph pack with targets; a list of indices is fetched as one gather.

    Parameters
    ----------
    graphs
        The pack.
    rows
        Which graphs of the pack belong to the set, shape (n,).
    targets
        Normalised targets of all graphs of the pack, shape (G, T).
    """

    def __init__(
        self, graphs: PackedGraphs, rows: NDArray[np.int64], targets: NDArray[np.float32]
    ) -> None:
        self.graphs, self.rows = graphs, rows
        self.targets = torch.from_numpy(targets)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> LabelledBatch:
        """Gather a batch (the hook that PyTorch's fetcher calls with a list of indices)."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        return LabelledBatch(self.graphs.batch(rows), self.targets[torch.from_numpy(rows)])


def _as_it_is(batch: Any) -> Any:
    return batch


def shuffled_loader(
    dataset: LabelledGraphs, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> DataLoader[LabelledBatch]:
    """Return a loader whose order depends on nothing but seed and epoch.

    Lightning tells the sampler the epoch, so a resumed run sees the same batches as one that was
    never interrupted, and each of several processes its own share.
    """
    sampler: DistributedSampler[LabelledBatch] = DistributedSampler(
        dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed
    )
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=_as_it_is)


def ordered_loader(
    dataset: LabelledGraphs, batch_size: int, rank: int = 0, world_size: int = 1
) -> DataLoader[LabelledBatch]:
    """Return a loader in the order of the rows; each process takes every n-th."""
    sampler = range(rank, len(dataset), world_size)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=_as_it_is)


def edge_budget_batches(
    graphs: PackedGraphs,
    rows: NDArray[np.int64],
    max_edges: int = 16_000,
    max_graphs: int = 256,
) -> Iterator[NDArray[np.int64]]:
    """Cut rows into batches of bounded work, in order; a graph above the budget goes alone.

    About 16,000 edges keep the tensors of a batch at a few MB, in a CPU's cache.
    """
    edges = graphs.edges_per_graph[rows]
    start = total = 0
    for k, count in enumerate(edges):
        if k > start and (total + count > max_edges or k - start >= max_graphs):
            yield rows[start:k]
            start, total = k, 0
        total += int(count)
    if start < len(rows):
        yield rows[start:]
