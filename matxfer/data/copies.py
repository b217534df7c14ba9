"""Rows of a table that are the same material: kept in one part of a split, and told.

Two rows are the same material if their structures are equal to the last digit or if they have the
same id. Structures that differ by a relaxation, a setting or a rotation are not recognised: that
is a matter of the one who splits.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import CrystalError

#: Values of one structure that differ by more than this share of the larger disagree.
TOLERANCE = 1e-6
#: So many ids are named in a warning.
_NAMED = 3


def materials(crystals: Sequence[Crystal | CrystalError]) -> NDArray[np.int64]:
    """Return a number for each row, the same for rows of one material, (n,).

    Materials are numbered by their first row; a row without a structure is one of its own.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(crystals)
    first: dict[bytes | str, int] = {}
    pairs = []
    for row, crystal in enumerate(crystals):
        if not isinstance(crystal, Crystal):
            continue
        names: tuple[bytes | str, ...] = (crystal.content_key(), crystal.id)
        pairs += [(row, first.setdefault(name, row)) for name in names if name]
    index = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    joined = coo_array((np.ones(index.shape[1]), (index[0], index[1])), shape=(n, n))
    _, label = connected_components(joined, directed=False)
    _, begin, inverse = np.unique(label, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(begin))[inverse], dtype=np.int64)


def copies_of(
    source: str,
    crystals: Sequence[Crystal | CrystalError],
    values: NDArray[np.float64],
    parts: Mapping[str, NDArray[np.int64]],
) -> dict[str, Any]:
    """Count the rows in use that are copies of others, and warn of those that mislead.

    Parameters
    ----------
    source
        What messages call the table.
    crystals, values
        Of all rows, (n,).
    parts
        Rows in use, ``train``, ``val`` and ``test``.

    Returns
    -------
    dict
        ``copies``: rows that repeat the material of an earlier row; ``disagreeing``: ids of
        structures with several values; ``leak``: by part (``val``, ``test``) the number of rows
        whose material occurs in an earlier part, and ``ids`` of some.
    """
    number = materials(crystals)
    used = np.sort(np.concatenate(list(parts.values())))
    names = {int(row): _name(crystals[row], int(row)) for row in used}
    disagreeing = _disagreeing(crystals, values, used)
    if disagreeing:
        told = ", ".join(
            f"{names[rows[0]]} ({values[rows[0]]:g} in row {rows[0]}, {values[rows[1]]:g} in row "
            f"{rows[1]})"
            for rows in disagreeing[:_NAMED]
        )
        warnings.warn(
            f"{source}: {len(disagreeing)} structure(s) occur with values that disagree: {told}; "
            "all are used, so correct the table if one is wrong",
            stacklevel=2,
        )
    leak: dict[str, Any] = {"val": 0, "test": 0, "ids": []}
    seen = number[parts["train"]]
    for part in ("val", "test"):
        again = parts[part][np.isin(number[parts[part]], seen)]
        leak[part] = len(again)
        leak["ids"] += [names[int(row)] for row in again[:_NAMED]]
        seen = np.concatenate([seen, number[parts[part]]])
    if leak["val"] or leak["test"]:
        warnings.warn(
            f"{source}: {leak['val']} row(s) of val and {leak['test']} of test hold materials of "
            f"an earlier part of the split too, such as {leak['ids'][0]}: their errors flatter; "
            "keep a material in one part, as a random split does",
            stacklevel=2,
        )
    return {
        "copies": len(used) - len(np.unique(number[used])),
        "disagreeing": [names[rows[0]] for rows in disagreeing],
        "leak": leak,
    }


def _name(crystal: Crystal | CrystalError, row: int) -> str:
    return crystal.id if isinstance(crystal, Crystal) and crystal.id else f"row {row}"


def _disagreeing(
    crystals: Sequence[Crystal | CrystalError],
    values: NDArray[np.float64],
    used: NDArray[np.int64],
) -> list[tuple[int, int]]:
    """Return for each structure with several values two rows whose values disagree."""
    rows: dict[bytes, list[int]] = {}
    for row in used.tolist():
        crystal = crystals[row]
        assert isinstance(crystal, Crystal), "a row in use has a structure"
        rows.setdefault(crystal.content_key(), []).append(row)
    pairs = []
    for same in rows.values():
        low, high = min(same, key=lambda r: values[r]), max(same, key=lambda r: values[r])
        if values[high] - values[low] > TOLERANCE * max(abs(values[high]), abs(values[low])):
            pairs.append((min(low, high), max(low, high)))
    return pairs
