"""Rows of a transfer map: by what they are grouped, and means over targets."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.probing.cells import NO_SOURCES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: One line of a table: names and numbers by column.
Row = dict[str, Any]


def is_baseline(source: str) -> bool:
    """Say whether a name is that of no source: random weights, scratch, composition."""
    return source.startswith(NO_SOURCES)


def by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Return rows by a key, in the order in which keys occur."""
    found: defaultdict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return dict(found)


def mean_gain(rows: Sequence[Row]) -> float:
    """Return the gain over several targets: one less the geometric mean of error ratios."""
    ratios = [max(row["test_mae"] / row["reference_mae"], 1e-12) for row in rows]
    return float(1 - np.exp(np.mean(np.log(ratios))))
