"""Features that know a crystal's composition and nothing of its structure, in two parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.transfer.baselines import composition_features

if TYPE_CHECKING:
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs

#: Kinds of them. ``elements``: the share of each element, which says nothing of an element that
#: the training rows lack. ``composition``: statistics of properties of the elements, which carry to
#: other elements.
KINDS = ("elements", "composition")


def features_of(kind: str, graphs: PackedGraphs) -> Tensor:
    """Return features (G, D) of packed graphs that depend on the composition alone."""
    both = torch.from_numpy(composition_features(graphs)).float()
    shares = MAX_ATOMIC_NUMBER + 1
    return both[:, :shares] if kind == "elements" else both[:, shares:]
