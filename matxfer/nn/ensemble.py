"""Small ensembles of readouts that read several layers at once: the head of a plugin.

The features of each layer are normalised without learned weights, so what a frozen network feeds
into a readout can be computed once per crystal and kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from matxfer.data.batch import GraphLike, node_weights
from matxfer.errors import OptionError
from matxfer.nn.readout import pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: What each kind of readout takes from the atoms; ``None``: the atoms themselves.
POOLED_PARTS: dict[str, tuple[str, ...] | None] = {
    "atomwise": None,
    "pooled": ("mean", "highest"),
    "extrema": ("mean", "highest", "lowest"),
    "statistics": ("mean", "spread", "highest", "lowest"),
}


def normalised_layers(nodes: Sequence[Tensor]) -> Tensor:
    """Join node features of S layers, each (N, F), normalised atom by atom, to (N, S·F)."""
    return torch.cat([nn.functional.layer_norm(n, n.shape[-1:]) for n in nodes], dim=1)


def readout_inputs(kind: str, layers: Tensor, graphs: GraphLike) -> Tensor:
    """Return what a kind of readout reads: (N, S·F) for ``"atomwise"``, else (B, parts·S·F)."""
    parts = POOLED_PARTS[kind]
    return layers if parts is None else pool(layers, graphs, parts)


class ReadoutEnsemble(nn.Module):
    """M networks of one hidden layer on the same inputs, y_m = w_m · silu(W_m x + b_m) + c_m.

    ``"atomwise"`` averages the outputs over the atoms, so that energies are sums; the others work
    on statistics of the features over the atoms. The members start from different weights; what
    they disagree on is part of the uncertainty (Lakshminarayanan et al., NeurIPS 2017).

    Parameters
    ----------
    kind
        ``"atomwise"``, ``"pooled"``, ``"extrema"`` or ``"statistics"``.
    layer_dim
        Width S·F of the joined layers.
    hidden_dim, members
        Width of the hidden layer, number M of networks.

    Raises
    ------
    ValueError
        If there is no such kind.
    """

    def __init__(self, kind: str, layer_dim: int, hidden_dim: int = 64, members: int = 4) -> None:
        super().__init__()
        if kind not in POOLED_PARTS:
            raise OptionError(f"unknown readout {kind!r}; known are {sorted(POOLED_PARTS)}")
        self.kind, self.layer_dim = kind, layer_dim
        self.hidden_dim, self.members = hidden_dim, members
        width = layer_dim * len(POOLED_PARTS[kind] or (1,))
        self.inner = nn.Parameter(_uniform(members, width, hidden_dim, fan_in=width))
        self.inner_bias = nn.Parameter(torch.zeros(members, 1, hidden_dim))
        self.outer = nn.Parameter(_uniform(members, hidden_dim, 1, fan_in=hidden_dim))
        self.outer_bias = nn.Parameter(torch.zeros(members, 1, 1))

    def hidden(self, inputs: Tensor, graphs: GraphLike) -> Tensor:
        """Return the last hidden layer, (M, B, H), in which the output is linear."""
        hidden = self._activated(inputs)
        if self.kind != "atomwise":
            return hidden
        weighted = hidden * node_weights(graphs)[None, :, None].to(hidden.dtype)
        size = (self.members, graphs.num_graphs, self.hidden_dim)
        return hidden.new_zeros(size).index_add(1, graphs.batch, weighted)

    def forward(self, inputs: Tensor, graphs: GraphLike) -> Tensor:
        """Map inputs (see :func:`readout_inputs`) to the outputs of all members, (M, B)."""
        return self.output(self.hidden(inputs, graphs))

    def output(self, hidden: Tensor) -> Tensor:
        """Map hidden layers (M, B, H) to outputs (M, B)."""
        output: Tensor = (hidden @ self.outer + self.outer_bias)[..., 0]
        return output

    def per_node(self, layers: Tensor) -> Tensor:
        """Return each node's output, averaged over the members, (N,); for ``"atomwise"``."""
        return self.output(self._activated(layers)).mean(0)

    def _activated(self, inputs: Tensor) -> Tensor:
        return nn.functional.silu(inputs @ self.inner + self.inner_bias)

    def to_json(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "kind": self.kind,
            "layer_dim": self.layer_dim,
            "hidden_dim": self.hidden_dim,
            "members": self.members,
        }


def join_readouts(
    readouts: Sequence[tuple[ReadoutEnsemble, Sequence[int]]],
) -> tuple[ReadoutEnsemble, tuple[int, ...]] | None:
    """Put the members of several readouts side by side, as one that reads all that they read.

    A member has zero weights for what it does not read, so it says what it said before; the mean
    over all members is the mean of the readouts.

    Parameters
    ----------
    readouts
        Each with the layers that it reads; all of one hidden width.

    Returns
    -------
    tuple or None
        The joint readout and its layers; ``None`` where no kind reads all: means over outputs per
        atom and networks on pooled features do not mix.
    """
    wanted = {part for readout, _ in readouts for part in _parts(readout.kind)}
    kind = next((k for k in POOLED_PARTS if wanted <= set(_parts(k))), None)
    if kind is None:
        return None
    layers = tuple(sorted({layer for _, own in readouts for layer in own}))
    first, read = readouts[0]
    width = first.layer_dim // len(read)
    members = sum(readout.members for readout, _ in readouts)
    joint = ReadoutEnsemble(kind, width * len(layers), first.hidden_dim, members)
    begin = 0
    with torch.no_grad():
        joint.inner.zero_()
        for readout, own in readouts:
            blocks = [
                _parts(kind).index(part) * len(layers) + layers.index(layer)
                for part in _parts(readout.kind)
                for layer in own
            ]
            rows = torch.cat([torch.arange(width) + block * width for block in blocks])
            mine = slice(begin, begin + readout.members)
            joint.inner[mine, rows] = readout.inner
            joint.inner_bias[mine] = readout.inner_bias
            joint.outer[mine] = readout.outer
            joint.outer_bias[mine] = readout.outer_bias
            begin = mine.stop
    return joint, layers


def _parts(kind: str) -> tuple[str, ...]:
    return POOLED_PARTS[kind] or ("atoms",)


def _uniform(*shape: int, fan_in: int) -> Tensor:
    weights: Tensor = (2 * torch.rand(*shape) - 1) / fan_in**0.5
    return weights
