"""Networks with one layer changed: reset, shuffled, or the only one that is kept."""

from __future__ import annotations

import json
from copy import deepcopy
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

from matxfer.errors import OptionError
from matxfer.model import Model
from matxfer.transfer.baselines import untrained

if TYPE_CHECKING:
    from torch import nn

#: What is done to a block. ``reinitialised``: the block gets random weights, as before any
#: training (Zhang, Bengio & Singer, JMLR 23, 67 (2022)). ``permuted``: the entries of each of its
#: tensors change places, so that their sizes stay and what they mean is lost. ``alone``: all other
#: blocks get random weights.
WAYS = ("reinitialised", "permuted", "alone")


def changed(model: Model, block: int, way: str, seed: int) -> Model:
    """Return a copy of a model without heads, a block of which has been changed.

    Parameters
    ----------
    block
        0: the embedding; k: the k-th layer.
    way
        See :data:`WAYS`.
    seed
        Of random weights and places.

    Raises
    ------
    OptionError
        If there is no such way.
    """
    if way not in WAYS:
        raise OptionError(f"a layer can be {', '.join(WAYS)}, but not {way!r}")
    network, fresh = deepcopy(model.backbone), untrained(model, seed).backbone
    blocks = [b for _, b in network.blocks()]
    random = [b for _, b in fresh.blocks()]
    if way == "permuted":
        _permute(blocks[block], seed)
    for k in range(len(blocks)):
        if (way == "reinitialised") == (k == block) and way != "permuted":
            blocks[k].load_state_dict(random[k].state_dict())
    # Without a checksum nothing of it is kept under the name of the source.
    card = {"name": f"{model.name}, {block_names(model)[block]} {way}"}
    return Model(network, [], model.elements, card).eval().requires_grad_(False)


def block_names(model: Model) -> list[str]:
    """Return what the blocks of a model are called in tables."""
    return ["embedding", *(f"layer {k}" for k in range(1, model.backbone.n_layers + 1))]


def architecture(model: Model) -> str:
    """Return a digest of the shape of a network; equal shapes have one scratch."""
    text = json.dumps(model.backbone.config(), sort_keys=True)
    return blake2b(text.encode(), digest_size=6).hexdigest()


def _permute(block: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            places = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[places].view_as(parameter))
