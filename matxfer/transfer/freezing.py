"""Which parameters a frozen depth K freezes, and how fast the others may move.

Depth K freezes the embedding and the layers 0 … K-1; K = 0 freezes nothing and K = L trains the
readout alone. This is the only place that knows.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar, cast

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from matxfer.nn.backbone import Backbone

    M = TypeVar("M", bound=nn.Module)


def check_depth(backbone: Backbone, depth: int) -> int:
    """Return the depth if the backbone has that many layers.

    Raises
    ------
    ValueError
        If it has not.
    """
    if not 0 <= depth <= backbone.n_layers:
        raise OptionError(
            f"frozen depth {depth} is not between 0 (train everything) and {backbone.n_layers} "
            "(train the readout alone)"
        )
    return depth


def trainable_blocks(backbone: Backbone, depth: int) -> list[tuple[str, nn.Module]]:
    """Return the blocks that stay trainable at a frozen depth, from the input to the output."""
    blocks = list(backbone.blocks())
    return blocks if depth == 0 else blocks[1 + check_depth(backbone, depth) :]


def trainable_names(backbone: nn.Module, depth: int) -> set[str]:
    """Return the names, in the backbone's state, of all tensors of its trainable blocks."""
    blocks = trainable_blocks(cast("Backbone", backbone), depth)
    own = {id(t) for _, block in blocks for t in block.state_dict(keep_vars=True).values()}
    return {name for name, t in backbone.state_dict(keep_vars=True).items() if id(t) in own}


def adaptable_copy(backbone: M, depth: int) -> M:
    """Return a backbone whose first ``depth`` layers are the given one's own, the rest a copy.

    The shared part is the same memory: it is not trained, not saved and computed once for all.
    """
    own = {
        id(p)
        for _, block in trainable_blocks(cast("Backbone", backbone), depth)
        for p in block.parameters()
    }
    shared = {id(p): p for p in backbone.parameters() if id(p) not in own}
    adapted = copy.deepcopy(backbone, dict(shared))
    adapted.requires_grad_(False)
    for _, block in trainable_blocks(cast("Backbone", adapted), depth):
        block.requires_grad_(True)
    return adapted


def parameter_groups(
    backbone: Backbone,
    head: nn.Module,
    depth: int,
    *,
    learning_rate: float,
    head_learning_rate: float,
    layer_decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Return optimiser groups with rates that fall geometrically towards the input.

    The last layer learns with ``learning_rate``, each one below with ``layer_decay`` times the
    rate of the layer above (Howard & Ruder, ACL 2018). Weight decay acts on the readout only: on
    the backbone it would pull away from the source weights.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": list(head.parameters()),
            "lr": head_learning_rate,
            "weight_decay": weight_decay,
            "name": "head",
        }
    ]
    for height, (name, block) in enumerate(reversed(trainable_blocks(backbone, depth))):
        rate = learning_rate * layer_decay**height
        parameters = list(block.parameters())
        groups.append({"params": parameters, "lr": rate, "weight_decay": 0.0, "name": name})
    return groups
