"""Target tables: which column is the target, which rows can be used, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from matxfer.crystal import Crystal
from matxfer.data.copies import materials
from matxfer.data.properties import unit_of
from matxfer.data.store import store_key
from matxfer.data.table import (
    SPLITS,
    PropertyTable,
    TableError,
    open_table,
    random_split,
    read_property_table,
    require_column,
    split_words,
)
from matxfer.errors import OptionError
from matxfer.graph import GraphOptions
from matxfer.transfer.task import FEWEST_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

#: Random splits where a table has none, and their shares (train, val, test).
RANDOM_SPLITS, FRACTIONS = 5, (0.7, 0.1, 0.2)
#: Columns that are numbers, but never a target.
_NO_TARGETS = frozenset({"n_sites", "frame", "index"})


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A column of a table that is to be learnt.

    Attributes
    ----------
    name
        What tables and figures call it.
    column, unit
        The column and its unit.
    data
        Structures and values of all rows, n; the split is not yet chosen.
    usable
        Rows with a structure of known elements and a value, (n,).
    splits
        Name → ``train``, ``val``, ``test`` or another word, (n,).
    told
        What a person should know: rows left out, materials in two parts.
    """

    name: str
    column: str
    unit: str
    data: PropertyTable
    usable: NDArray[np.bool_]
    splits: dict[str, NDArray[np.str_]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def split(self, name: str, most: int | None, seed: int) -> PropertyTable:
        """Return the rows in a split, of the training rows at most so many.

        For one seed a smaller part of the training rows lies in a larger one.
        """
        words = np.where(self.usable, self.splits[name], "unused").astype("<U8")
        train = np.random.default_rng(seed).permutation(np.flatnonzero(words == "train"))
        if most is not None:
            words[train[most:]] = "unused"
        return replace(self.data, split=words)

    def digest(self, split: str) -> str:
        """Return a digest of structures, values and split: other data has another one."""
        found = blake2b(store_key(self.data.crystals, GraphOptions()).encode(), digest_size=8)
        found.update(np.ascontiguousarray(self.data.values[self.column]).data)
        found.update(",".join(np.where(self.usable, self.splits[split], "").tolist()).encode())
        return found.hexdigest()

    def overlap(self, split: str) -> float:
        """Return the number of test rows over that of all training rows."""
        words = self.splits[split][self.usable]
        return float((words == "test").sum() / max((words == "train").sum(), 1))


def read_targets(
    table: str | Path | pd.DataFrame,
    columns: Sequence[str] | None,
    elements: frozenset[int],
    *,
    structure_column: str | None = None,
    called: str | None = None,
) -> list[Target]:
    """Read the targets of a table, as yet without splits.

    Parameters
    ----------
    table
        Path or data frame.
    columns
        Names of targets, of which the table must hold one; ``None``: its only column of numbers.
    elements
        Those that all models know; rows with another are left out, so that all models are
        measured on the same rows.
    called
        What tables and figures call it; default: the name of the file.

    Raises
    ------
    TableError
        If there is no such column, or too few rows can be used.
    """
    frame, source = open_table(table)
    there = [c for c in columns if c in frame.columns] if columns else [_only_number(frame, source)]
    if not there:
        raise TableError(
            f"{source}: none of the targets {list(columns or ())} is a column; the columns are "
            f"{list(frame.columns)}"
        )
    called = called or (Path(source).stem if isinstance(table, str | Path) else source)
    data = read_property_table(frame, there, structure_column=structure_column, source=source)
    readable = np.array([isinstance(crystal, Crystal) for crystal in data.crystals])
    foreign = np.array([_foreign(crystal, elements) for crystal in data.crystals])
    found = []
    for column in there:
        value = np.isfinite(data.values[column])
        reasons = {
            "unreadable structure": ~readable,
            "no value": readable & ~value,
            "an element that a source does not know": readable & value & foreign,
        }
        counts = {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}
        name = called if len(there) == 1 else f"{called}: {column}"
        told = [f"{name}: left out {n} of {len(data)} rows, {why}" for why, n in counts.items()]
        usable = readable & value & ~foreign
        if usable.sum() < 2 * FEWEST_ROWS:
            left_out = f" ({'; '.join(told)})" if told else ""
            raise TableError(
                f"{source}: {usable.sum()} rows of {column!r} can be used, but at least "
                f"{2 * FEWEST_ROWS} are needed{left_out}"
            )
        found.append(Target(name, column, unit_of(column), data, usable, told=told))
    return found


def with_splits(
    target: Target, frame: pd.DataFrame, wanted: str | Sequence[str] | int | None, seed: int
) -> Target:
    """Return a target with its splits: named columns, so many random ones, or what there is.

    Parameters
    ----------
    frame
        The table.
    wanted
        Columns; or a number of random splits; ``None``: all columns that start with ``split``,
        or without one five random splits.

    Raises
    ------
    TableError
        If a column is missing, or a part of a split has too few rows.
    """
    source, told = target.data.source, list(target.told)
    if wanted is None:
        names = [c for c in map(str, frame.columns) if c.startswith("split")]
        wanted = [c for c in names if np.isin(split_words(frame[c]), SPLITS).any()]
        wanted = wanted or RANDOM_SPLITS
    material = materials(target.data.crystals)
    if isinstance(wanted, int):
        if wanted < 1:
            raise OptionError(f"splits are {wanted}, but must be at least 1")
        splits = {f"random {k}": random_split(material, FRACTIONS, seed + k) for k in range(wanted)}
    else:
        columns = [wanted] if isinstance(wanted, str) else list(wanted)
        splits = {c: split_words(require_column(frame, c, source)) for c in columns}
    both = 0
    for name, words in splits.items():
        check_split(words[target.usable], f"{source}: split {name!r}")
        test, train = (words == "test") & target.usable, (words == "train") & target.usable
        both = max(both, int(np.isin(material[test], material[train]).sum()))
    if both:
        told.append(
            f"{target.name}: up to {both} test rows of a split hold a material of its training "
            "rows too, which flatters all errors"
        )
    return replace(target, splits=splits, told=told)


def check_split(words: NDArray[np.str_], place: str) -> None:
    """Check that each part of a split has rows enough.

    Raises
    ------
    TableError
        If one has not.
    """
    for part, least in (("train", FEWEST_ROWS), ("val", 2), ("test", 2)):
        count = int((words == part).sum())
        if count < least:
            raise TableError(
                f"{place} has {count} usable {part} row(s), but at least {least} are needed; name "
                "other columns or a number of random splits with --splits"
            )


def _only_number(frame: pd.DataFrame, source: str) -> str:
    """Return the one column of numbers that may be the target."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    numbers = [
        str(c)
        for c in frame.columns
        if is_numeric_dtype(frame[c])
        and not is_bool_dtype(frame[c])
        and str(c) not in _NO_TARGETS
        and not str(c).startswith("split")
    ]
    if len(numbers) != 1:
        found = f"the columns of numbers are {numbers}" if numbers else "no column holds numbers"
        raise TableError(f"{source}: which column is the target? {found}; name it with --target")
    return numbers[0]


def _foreign(crystal: object, elements: frozenset[int]) -> bool:
    return isinstance(crystal, Crystal) and not set(crystal.numbers.tolist()) <= elements
