"""Features that know a crystal's composition and nothing of its structure."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.nn.scaling import composition as element_fractions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.packed import PackedGraphs

#: Kinds of them. ``elements``: the share of each element, which says nothing of an element that
#: the training rows lack. ``composition``: mean, spread, largest and smallest of properties of the
#: elements (after Ward et al., npj Comput. Mater. 2, 16028 (2016)), which carry to other elements.
KINDS = ("elements", "composition")


def composition_features(kind: str, graphs: PackedGraphs) -> Tensor:
    """Return features (G, D) of packed graphs that depend on the composition alone."""
    shares = element_fractions(graphs)
    if kind == "elements":
        return torch.from_numpy(shares).float()
    table = element_properties()
    present = shares > 0
    mean = shares @ table
    variance = np.maximum(shares @ table**2 - mean**2, 0.0)
    high = np.array([table[row].max(axis=0) if row.any() else mean[0] * 0 for row in present])
    low = np.array([table[row].min(axis=0) if row.any() else mean[0] * 0 for row in present])
    return torch.from_numpy(np.concatenate([mean, np.sqrt(variance), high, low], axis=1)).float()


@cache
def element_properties() -> NDArray[np.float64]:
    """Return properties of the elements by atomic number, (119, 10), each with spread 1.

    Atomic number, period, group, Mendeleev number, Pauling electronegativity, atomic radius, and
    electrons in the outermost s, p, d and f shells (pymatgen). An unknown value is the mean of the
    known ones.
    """
    from pymatgen.core.periodic_table import Element

    table = np.full((MAX_ATOMIC_NUMBER + 1, 10), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of elements without an electronegativity
        for z in range(1, MAX_ATOMIC_NUMBER + 1):
            element = Element.from_Z(z)
            try:
                # The last shell of each kind in order of filling is the outermost.
                shells = {shell: count for _, shell, count in element.full_electronic_structure}
            except KeyError:
                continue  # superheavy elements of which pymatgen knows nothing
            radius = element.atomic_radius
            table[z] = [
                z,
                element.row,
                element.group,
                element.mendeleev_no if element.mendeleev_no is not None else np.nan,
                element.X,
                np.nan if radius is None else float(radius),
                *(shells.get(kind, 0) for kind in "spdf"),
            ]
    known = np.isfinite(table)
    mean = np.where(known, table, 0.0).sum(axis=0) / known.sum(axis=0)
    filled = np.where(known, table, mean)
    filled[0] = mean
    return np.asarray((filled - mean) / filled.std(axis=0))
