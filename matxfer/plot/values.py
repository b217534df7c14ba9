"""What a figure is about, from whatever it is given: arrays, columns of a frame, a plugin."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.properties import Property, property_of
from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """n true values and predictions, in the unit of their property.

    Attributes
    ----------
    prop
        The property.
    truth, predicted
        (n,), NaN where there is none.
    lower, upper, std, ood
        Bounds of the intervals, spread, and distance from the training set, (n,) or empty.
    names, formulas
        What the rows are called, and their compositions; or empty.
    level
        Coverage that the intervals promise.
    rows
        How many there were, should these be a part of them.
    """

    prop: Property
    truth: Floats
    predicted: Floats
    lower: Floats = field(default_factory=lambda: np.zeros(0))
    upper: Floats = field(default_factory=lambda: np.zeros(0))
    std: Floats = field(default_factory=lambda: np.zeros(0))
    ood: Floats = field(default_factory=lambda: np.zeros(0))
    names: Sequence[str] = ()
    formulas: Sequence[str] = ()
    level: float = 0.9
    rows: int = 0

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def has_intervals(self) -> bool:
        """Whether there are bounds for all rows."""
        return 0 < len(self.truth) == len(self.lower) == len(self.upper)

    def known(self, what: str) -> Values:
        """Return the rows that have a value and a prediction.

        Raises
        ------
        OptionError
            If there is none.
        """
        good = np.isfinite(self.truth) & np.isfinite(self.predicted)
        if not good.any():
            raise OptionError(
                f"{what}: of {len(good)} row(s) none has both a value and a prediction"
            )
        return self.take(np.flatnonzero(good))

    def take(self, rows: NDArray[np.int64]) -> Values:
        """Return some of the rows."""
        kept: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, np.ndarray):
                value = value[rows] if len(value) else value
            elif each.name in ("names", "formulas"):
                value = [value[k] for k in rows] if len(value) else value
            kept[each.name] = value
        return Values(**kept)


def values_of(
    truth: Any, predicted: Any = None, *, data: Any = None, target: str | None = None,
    part: str = "test", lower: Any = None, upper: Any = None, std: Any = None, formulas: Any = None,
) -> Values:  # fmt: skip
    """Return what a figure of true values and predictions is about.

    Parameters
    ----------
    truth
        True values (n,), or the name of their column in ``data``; or a plugin, which brings all.
    predicted
        Predictions (n,), or the name of their column.
    data
        Data frame of the columns.
    target
        Column name of the property, which says the unit; ``None``: the name of the column or
        series, if there is one.
    part
        Rows of a plugin: ``"val"`` or ``"test"``.
    lower, upper, std, formulas
        As ``predicted``. ``None``: with ``data``, the columns ``NAME_lo``, ``NAME_hi``,
        ``NAME_std`` and ``formula`` that :func:`matxfer.predict` makes, if they are there.

    Raises
    ------
    OptionError
        If lengths differ, a column is missing, or something is no number.
    """
    if isinstance(getattr(truth, "meta", None), dict):
        found = of_record(truth.meta, part)
        prop = getattr(getattr(truth, "head", None), "prop", found.prop)  # not in meta until saved
        return replace(found, prop=prop)
    if predicted is None:
        raise OptionError("give true values and predictions, or a plugin")
    if isinstance(predicted, str) and data is not None:
        own = {"lower": f"{predicted}_lo", "upper": f"{predicted}_hi", "std": f"{predicted}_std"}
        present = {key: name for key, name in own.items() if name in data.columns}
        lower, upper = lower or present.get("lower"), upper or present.get("upper")
        std = std or present.get("std")
        formulas = formulas or ("formula" if "formula" in data.columns else None)
    names = [target, *(_name(each) for each in (truth, predicted))]
    prop = property_of(next((name for name in names if name), ""))
    given = {"truth": truth, "predicted": predicted, "lower": lower, "upper": upper, "std": std}
    arrays: dict[str, Any] = {k: _numbers(k, v, data) for k, v in given.items() if v is not None}
    kinds = () if formulas is None else [str(word) for word in column(formulas, data, "formulas")]
    n = len(arrays["truth"])
    for key, array in {**arrays, "formulas": kinds}.items():
        if len(array) not in ((n, 0) if key == "formulas" else (n,)):
            raise OptionError(f"{key} has {len(array)} entries, but truth has {n}")
    return Values(prop, formulas=kinds, rows=n, **arrays)


def of_record(meta: dict[str, Any], part: str = "test") -> Values:
    """Return the predictions that a plugin keeps of its rows, from what ``plugin.json`` says.

    Raises
    ------
    OptionError
        If it keeps none of that part.
    """
    kept = (meta.get("predictions") or {}).get(part)
    if not kept or not kept.get("truth"):
        raise OptionError(
            f"the plugin keeps no predictions of its {part} rows (it was made before they were "
            "kept, or asked not to); predict a table with it and give values and predictions"
        )
    head = meta.get("head") or {}
    prop = Property.from_json(head["property"]) if "property" in head else property_of(
        str(meta.get("target", ""))
    )  # fmt: skip
    arrays: dict[str, Any] = {
        key: _numbers(key, kept[key], None)
        for key in ("truth", "predicted", "lower", "upper", "std", "ood")
        if kept.get(key)
    }
    if len({len(array) for array in arrays.values()}) != 1:
        raise OptionError(f"the predictions of the {part} rows are damaged: columns differ in size")
    level = float((meta.get("uncertainty") or {}).get("level", 0.9))
    words: dict[str, Any] = {
        key: [str(w) for w in kept.get(name, ())] for key, name in _WORDS.items()
    }
    return Values(prop, level=level, rows=int(kept["rows"]), **words, **arrays)


_WORDS = {"names": "id", "formulas": "formula"}


def _name(given: Any) -> str | None:
    if isinstance(given, str):
        return given
    name = getattr(given, "name", None)
    return name if isinstance(name, str) else None


def column(given: Any, data: Any, what: str = "") -> Any:
    """Return a column of a frame by its name; what is no name is itself a column.

    Raises
    ------
    OptionError
        If there is no such column; ``what`` says what it was to be.
    """
    if not isinstance(given, str):
        return given
    if data is None or given not in data.columns:
        place = f"{what}: " if what else ""
        raise OptionError(f"{place}there is no column {given!r} in the data given")
    return data[given]


def _numbers(what: str, given: Any, data: Any) -> Floats:
    found = column(given, data, what)
    try:
        if hasattr(found, "to_numpy"):  # pandas has missing values of its own
            found = found.to_numpy(dtype=np.float64, na_value=np.nan)
        array = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{what}: holds something that is no number ({error})") from error
    if array.ndim != 1:
        raise OptionError(f"{what}: expected one number per row, found an array of {array.shape}")
    return array
