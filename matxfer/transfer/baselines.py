"""What a source has to beat: features of the composition alone, and of a network never trained."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.model import Model
from matxfer.nn.registry import build_backbone
from matxfer.nn.scaling import composition

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.data.packed import PackedGraphs

    Floats = NDArray[np.float64]

#: Properties of the elements, by their names in pymatgen; what is not known is the mean.
ELEMENT_PROPERTIES = (
    "Z",
    "row",
    "group",
    "mendeleev_no",
    "atomic_mass",
    "X",
    "atomic_radius",
    "electron_affinity",
    "ionization_energy",
    "melting_point",
)
#: What the tables say of elements beyond lawrencium are guesses.
_HEAVIEST = 103


def composition_features(graphs: PackedGraphs) -> Floats:
    """Return what the composition says of each graph, (G, 119 + 4·P).

    Atomic fractions of the elements, and mean, mean deviation, maximum and minimum of each of P
    :data:`ELEMENT_PROPERTIES` over them, in units of its spread over the elements; after Magpie
    (Ward et al., npj Comput. Mater. 2, 16028 (2016)). Zeros for a graph without atoms.
    """
    fractions = composition(graphs)
    table = _element_properties()
    mean = fractions @ table
    present = fractions > 0
    deviation = np.zeros_like(mean)
    highest, lowest = np.zeros_like(mean), np.zeros_like(mean)
    for row in np.flatnonzero(present.any(axis=1)):
        own = table[present[row]]
        deviation[row] = fractions[row, present[row]] @ np.abs(own - mean[row])
        highest[row], lowest[row] = own.max(axis=0), own.min(axis=0)
    return np.concatenate([fractions, mean, deviation, highest, lowest], axis=1)


@cache
def _element_properties() -> Floats:
    """Return the properties of the elements, standardised, (119, P)."""
    import warnings

    from pymatgen.core.periodic_table import Element

    table = np.full((MAX_ATOMIC_NUMBER + 1, len(ELEMENT_PROPERTIES)), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen says for each element what it does not know
        for z in range(1, _HEAVIEST + 1):
            for k, name in enumerate(ELEMENT_PROPERTIES):
                try:
                    table[z, k] = float(getattr(Element.from_Z(z), name))
                except (AttributeError, KeyError, TypeError):
                    continue  # not known
    table = (table - np.nanmean(table, axis=0)) / np.nanstd(table, axis=0)
    return np.asarray(np.nan_to_num(table))


def untrained(model: Model, seed: int = 0) -> Model:
    """Return a network of the same shape with random weights, and without heads.

    Its checksum is that of its weights, so that what it makes of a pack of graphs is kept like
    that of any other model (:class:`matxfer.transfer.activations.Activations`).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(model.backbone.config())
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    card = {"name": f"untrained, shape of {model.name}", "sha256": digest.hexdigest()}
    return Model(backbone, (), model.elements, card).eval().requires_grad_(False)
