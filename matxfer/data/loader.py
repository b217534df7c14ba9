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
    from matxfer.data.resident import ResidentGraphs


@dataclass(slots=True, eq=False)
class LabelledBatch:
    """Graphs with what a training step needs to know of each.

    Attributes
    ----------
    graphs
        B graphs.
    targets
        Normalised targets (B, T); NaN where a graph has no value.
    weight
        Weight of each graph in the loss, (B,).
    noise_angstrom
        Spread of the displacements that a denoising step applies to each graph, (B,); 0: none.
    """

    graphs: GraphBatch
    targets: Tensor
    weight: Tensor
    noise_angstrom: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledBatch:
        """Return the batch on another device."""
        return LabelledBatch(
            self.graphs.to(device, non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.weight.to(device, non_blocking=non_blocking),
            self.noise_angstrom.to(device, non_blocking=non_blocking),
        )


class LabelledGraphs(Dataset[LabelledBatch]):
    """Rows of a graph pack with targets; a list of indices is fetched as one gather.

    Parameters
    ----------
    graphs
        The pack, on disk, in memory or on a device.
    rows
        Which graphs of the pack belong to the set, shape (n,).
    targets
        Normalised targets of all graphs of the pack, shape (G, T).
    weight, noise_angstrom
        See :class:`LabelledBatch`, for all graphs of the pack, shape (G,); default ones and zeros.
    """

    def __init__(
        self,
        graphs: PackedGraphs | ResidentGraphs,
        rows: NDArray[np.int64],
        targets: NDArray[np.float32],
        weight: NDArray[np.float32] | None = None,
        noise_angstrom: NDArray[np.float32] | None = None,
    ) -> None:
        self.graphs, self.rows = graphs, rows
        self.targets = torch.from_numpy(targets)
        n = len(targets)
        self.weight = torch.ones(n) if weight is None else torch.from_numpy(weight)
        self.noise_angstrom = (
            torch.zeros(n) if noise_angstrom is None else torch.from_numpy(noise_angstrom)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> LabelledBatch:
        """Gather a batch (the hook that PyTorch's fetcher calls with a list of indices)."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        return self.label(self.graphs.batch(rows), rows)

    def label(self, graphs: GraphBatch, rows: NDArray[np.int64]) -> LabelledBatch:
        """Join a batch made of these rows of the pack with what is known of them."""
        index = torch.from_numpy(rows)
        return LabelledBatch(
            graphs,
            self.targets[index],
            self.weight[index],
            self.noise_angstrom[index],
        )


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
    return budget_batches(graphs.edges_per_graph[rows], rows, max_edges, max_graphs)


def budget_batches(
    weight: NDArray[np.int64], rows: NDArray[np.int64], max_weight: int, max_graphs: int
) -> Iterator[NDArray[np.int64]]:
    """Cut rows into batches whose weights, shape (n,), sum to a bound at most, in order."""
    start = total = 0
    for k, count in enumerate(weight):
        if k > start and (total + count > max_weight or k - start >= max_graphs):
            yield rows[start:k]
            start, total = k, 0
        total += int(count)
    if start < len(rows):
        yield rows[start:]
