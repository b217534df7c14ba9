"""Rows of a task as a plugin reads them: batches from kept activations."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from matxfer.data.batch import GraphBatch
from matxfer.nn.backbone import Features
from matxfer.transfer.retention import source_head_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.transfer.plugin import Plugin
    from matxfer.transfer.task import Task


@dataclass(slots=True, eq=False)
class PluginBatch:
    """What one step needs.

    Attributes
    ----------
    graphs
        B graphs; without their edges where no layer is run.
    targets
        Normalised, (B,).
    inputs
        Of the readout, where no layer is run.
    prefix, below
        Features after the frozen layers, and node features of those that the head reads.
    before
        What the source heads said under the base's weights, (T, B), if it is needed.
    weights
        How much each crystal counts, (B,), where they do not count alike.
    """

    graphs: GraphBatch
    targets: Tensor
    inputs: Tensor | None = None
    prefix: Features | None = None
    below: dict[int, Tensor] | None = None
    before: Tensor | None = None
    weights: Tensor | None = None

    def mean(self, error: Tensor) -> Tensor:
        """Return the mean of errors (…, B), each crystal counted by its weight."""
        return (error if self.weights is None else error * self.weights).mean()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PluginBatch:
        """Return the batch on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor | GraphBatch | Features):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {k: moved(v) for k, v in value.items()}
            return value

        return PluginBatch(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})


class PluginRows(Dataset[PluginBatch]):
    """Rows of a task; a list of indices is fetched as one gather.

    Parameters
    ----------
    task, plugin
        Where the features come from, and which the plugin needs.
    rows
        Rows of the task, (n,).
    targets
        Normalised targets of all rows, (G,).
    inputs
        What the readout reads of all rows, where the plugin runs no layer.
    before
        Whether batches say what the source heads said.
    """

    def __init__(
        self,
        task: Task,
        plugin: Plugin,
        rows: NDArray[np.int64],
        targets: NDArray[np.float32],
        inputs: Tensor | None = None,
        *,
        before: bool = False,
    ) -> None:
        self.task, self.plugin, self.rows = task, plugin, rows
        self.targets = torch.from_numpy(targets)
        self.inputs, self.before = inputs, before

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> PluginBatch:
        """Gather a batch (the hook that PyTorch's fetcher calls with a list of indices)."""
        return self.batch(self.rows[np.asarray(indices, dtype=np.int64)])

    def batch(self, rows: NDArray[np.int64]) -> PluginBatch:
        """Gather the batch of these rows of the task."""
        task, plugin, targets = self.task, self.plugin, self.targets[torch.from_numpy(rows)]
        own = task.weights_of(rows)
        weights = None if own is None else torch.from_numpy(own).float()
        if self.inputs is not None:
            if plugin.head.readout.kind == "atomwise":
                graphs = task.graphs.batch(rows, with_edges=False)
                inputs = self.inputs[task.activations.node_rows(rows)]
                return PluginBatch(graphs, targets, inputs, weights=weights)
            inputs = self.inputs[torch.from_numpy(rows)]
            return PluginBatch(_nothing(len(rows)), targets, inputs, weights=weights)
        graphs = task.graphs.batch(rows)
        prefix, below = task.activations.start(rows, plugin.depth, plugin.head.layers)
        before = None
        if self.before:
            last = task.activations.node(task.base.backbone.n_layers)
            with torch.no_grad():
                node = last[task.activations.node_rows(rows)]
                before = source_head_outputs(task.base, node, graphs)
        return PluginBatch(graphs, targets, None, prefix, below, before, weights)


def _nothing(n: int) -> GraphBatch:
    empty = torch.zeros(0, dtype=torch.long)
    edges = torch.zeros(2, 0, dtype=torch.long)
    return GraphBatch(empty, torch.zeros(0), edges, torch.zeros(0, 3), empty, n)
