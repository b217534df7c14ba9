"""Splits that leave out a whole chemistry, structure type or cluster: no row of it is trained on.

``anion``: oxides, sulfides, intermetallics … (:func:`matxfer.domain.structures.chemical_class`).
``group``: all compounds that hold an element of one group of the periodic table. ``prototype``:
anonymous formula and space group. ``cluster``: k-means on fingerprints (leave-one-cluster-out:
Meredig et al., Mol. Syst. Des. Eng. 3, 819 (2018)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from matxfer.crystal import Crystal
from matxfer.data.copies import materials
from matxfer.domain.structures import chemical_class, prototype_name, structure_facts
from matxfer.options import check_choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import CrystalError

    Mask = NDArray[np.bool_]

KINDS = ("anion", "group", "prototype", "cluster")
#: A group of fewer rows says little of the error, so it is not left out …
FEWEST = 5
#: … nor is one without which less than this share of the rows is left to train on.
LEAST_LEFT = 0.3
#: At most so many groups are left out, the largest first.
MOST = 10
#: Number of clusters.
CLUSTERS = 5
#: Share of the other rows that a choice is made on.
VALIDATION = 0.125
_COMPONENTS = 20
#: Names of the groups of the periodic table that have one.
_NAMES = {
    1: "alkali metals", 2: "alkaline earths", 13: "group 13", 14: "group 14", 15: "pnictogens",
    16: "chalcogens", 17: "halogens", 18: "noble gases",
}  # fmt: skip


def leave_out(
    kind: str,
    crystals: Sequence[Crystal | CrystalError],
    usable: Mask,
    fingerprints: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> tuple[dict[str, NDArray[np.str_]], list[str]]:
    """Return a split for each group that can be left out.

    The group is ``test``; of the other rows a random eighth is ``val``, copies of one material
    together. Copies of materials of the group that are not in it themselves are ``unused``.

    Parameters
    ----------
    kind
        See :data:`KINDS`.
    crystals
        Of all rows, (n,).
    usable
        Which rows count, (n,).
    fingerprints
        Of all rows, (n, D); for ``cluster``.
    seed
        Of clusters and validation rows.

    Returns
    -------
    splits
        Name of the group → ``train``, ``val``, ``test`` or ``unused``, (n,).
    told
        What was not left out, and why.
    """
    check_choice("leave_out", kind, KINDS)
    rows = np.flatnonzero(usable)
    chosen = [crystals[k] for k in rows.tolist()]
    known = [crystal for crystal in chosen if isinstance(crystal, Crystal)]
    assert len(known) == len(rows), "usable rows have structures"
    masks = _masks(kind, known, None if fingerprints is None else fingerprints[rows], seed)
    material = materials(known)
    splits: dict[str, NDArray[np.str_]] = {}
    small, large = 0, []
    for name, mask in sorted(masks.items(), key=lambda item: -item[1].sum()):
        if mask.sum() < FEWEST:
            small += 1
        elif mask.mean() > 1 - LEAST_LEFT:
            large.append(f"{name} ({mask.mean():.0%} of the rows)")
        elif len(splits) < MOST:
            words = np.full(len(usable), "unused", dtype="<U6")
            words[rows] = _split(mask, material, seed)
            splits[name] = words
    told = [f"too large to be left out: {', '.join(large)}"] if large else []
    if small:
        told.append(f"{small} groups of fewer than {FEWEST} rows are not left out")
    if (beyond := len(masks) - small - len(large) - len(splits)) > 0:
        told.append(f"{beyond} further groups are not left out: the {MOST} largest are")
    return splits, told


def _split(held: Mask, material: NDArray[np.int64], seed: int) -> NDArray[np.str_]:
    copies = np.isin(material, material[held]) & ~held
    words = np.where(held, "test", np.where(copies, "unused", "train")).astype("<U6")
    others = np.unique(material[words == "train"])
    size = max(round(VALIDATION * len(others)), 1)
    drawn = np.random.default_rng(seed).permutation(others)[:size]
    words[np.isin(material, drawn) & (words == "train")] = "val"
    for part in ("train", "val"):
        shared = np.intersect1d(material[words == part], material[words == "test"])
        assert not len(shared), "a left-out material is trained on"
        assert not held[words == part].any(), "a left-out group is trained on"
    return words


def _masks(
    kind: str, crystals: Sequence[Crystal], fingerprints: NDArray[np.float64] | None, seed: int
) -> Mapping[str, Mask]:
    """Return which rows belong to each group; those of ``group`` overlap."""
    if kind == "group":
        families = [{element_family(int(z)) for z in np.unique(c.numbers)} for c in crystals]
        names = sorted(set().union(*families)) if families else []
        return {name: np.array([name in family for family in families]) for name in names}
    if kind == "anion":
        labels = [chemical_class(np.unique(c.numbers)) for c in crystals]
    elif kind == "prototype":
        labels = [prototype_name(p) for p in structure_facts(crystals).prototype.tolist()]
    else:
        assert fingerprints is not None, "clusters are those of fingerprints"
        labels = [f"cluster {k + 1}" for k in clusters(fingerprints, seed)]
    words = np.array(labels, dtype=str)
    return {str(name): words == name for name in np.unique(words)}


def clusters(fingerprints: NDArray[np.float64], seed: int = 0) -> NDArray[np.int64]:
    """Return the number of each row's cluster, the largest cluster first, (n,)."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    spread = fingerprints.std(axis=0)
    x = (fingerprints - fingerprints.mean(axis=0))[:, spread > 1e-6] / spread[spread > 1e-6]
    size = min(_COMPONENTS, *x.shape)
    if size > 1:
        x = PCA(size, svd_solver="full").fit_transform(x)
    found = KMeans(min(CLUSTERS, len(x)), n_init=4, random_state=seed).fit_predict(x)
    rank = np.argsort(np.argsort(-np.bincount(found), kind="stable"), kind="stable")
    return np.asarray(rank[found], dtype=np.int64)


def element_family(z: int) -> str:
    """Return the group of the periodic table of an element, the f block and hydrogen apart."""
    from pymatgen.core.periodic_table import Element

    if z == 1:
        return "hydrogen"
    if 57 <= z <= 71:
        return "lanthanides"
    if 89 <= z <= 103:
        return "actinides"
    group = int(Element.from_Z(z).group)
    return _NAMES.get(group, f"group {group}")
