"""Rows of a table with labels, as a classifier sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.table import (
    SPLITS,
    TableError,
    crystals_or_errors,
    open_table,
    require_column,
    split_words,
)
from matxfer.errors import OptionError
from matxfer.estimator.about import kept_probabilities
from matxfer.estimator.classifier import TransferClassifier
from matxfer.metrics import classification_metrics
from matxfer.readers import crystals_of_table
from matxfer.report.record import ALL

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.model import Model
    from matxfer.report.record import Record


def measure_labels(
    record: Record,
    classifier: str | Path | TransferClassifier,
    table: str | Path | pd.DataFrame,
    *,
    target: str | None = None,
    model: str | Path | Model | None = None,
    split_column: str | None = None,
    structure_column: str | None = None,
) -> None:
    """Predict a table and put probabilities and figures in place of those that were kept.

    Rows without a label, or whose structure cannot be used, are left out, and counted in the notes.

    Parameters
    ----------
    record
        Of the classifier.
    classifier
        A fitted one, or its folder.
    table
        Structures and labels.
    target
        Column of labels; ``None``: that of the name of y.
    model
        Base model; ``None``: the one that the classifier names.
    split_column
        Column of ``train``, ``val`` and ``test``; without one all rows are shown together.
    structure_column
        Column of structures, where the table has an unusual one.

    Raises
    ------
    TableError
        If the table or a column is missing, or a label is none of the classes.
    OptionError
        If the column is not known, or no row is of use.
    """
    column = target or record.meta.get("target")
    if not isinstance(column, str):
        raise OptionError(
            f"{record.name} does not know the column of its labels; name it with --target COLUMN"
        )
    frame, source = open_table(table)
    labels = require_column(frame, column, source, " of labels")
    if isinstance(classifier, str | Path):
        classifier = TransferClassifier.load(classifier, model)
    crystals = crystals_or_errors(
        crystals_of_table(frame, source, structure_column=structure_column)
    )
    numbers = _numbers(labels, classifier.classes_, f"{source}: column {column!r}")
    split = np.full(len(frame), ALL)
    if split_column is not None:
        split = split_words(require_column(frame, split_column, source, " of the split"))
    wanted = np.flatnonzero((numbers >= 0) & np.isin(split, (*SPLITS, ALL)))
    probability = np.full((len(frame), len(classifier.classes_)), np.nan)
    if len(wanted):
        probability[wanted] = _forgiving(classifier).predict_proba([crystals[k] for k in wanted])
    known = np.isfinite(probability).all(axis=1)
    predictions: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for part in (*SPLITS, ALL):
        rows = np.flatnonzero(known & (split == part))
        if not len(rows):
            continue
        named = [(f"row {row}", crystals[row]) for row in rows]
        predictions[part] = kept_probabilities(
            named, classifier.classes_, numbers[rows], probability[rows], len(rows)
        )
        figures[part] = classification_metrics(numbers[rows], probability[rows])
    if not predictions:
        raise OptionError(f"{source}: no row has both a label in {column!r} and a structure of use")
    record.meta["predictions"], record.meta["figures"] = predictions, figures
    record.parts = tuple(p for p in ("test", ALL, "val", "train") if p in predictions)
    record.notes.append(f"Predicted for this report: {Path(source).name}, labels of {column}.")
    out = len(frame) - sum(each["rows"] for each in predictions.values())
    if out:
        record.notes.append(
            f"{out:,} of {len(frame):,} rows were left out: no label, no structure of use, or no "
            "part of the split."
        )
    if split_column is None:
        record.notes.append(
            "There is no split column, so some of these rows may have been trained on: their "
            "figures would flatter."
        )


def _forgiving(classifier: TransferClassifier) -> TransferClassifier:
    """Return the same classifier, which gives NaN for structures that cannot be used."""
    from copy import copy

    return copy(classifier).set_params(on_error="nan")  # type: ignore[no-any-return]


def _numbers(labels: pd.Series[Any], classes: NDArray[Any], place: str) -> NDArray[np.int64]:
    """Return the number of the class of each label, (n,), -1 where there is none.

    A table may hold numbers where the classifier was given text, and the other way round.
    """
    number: dict[Any, int] = {str(label): k for k, label in enumerate(classes.tolist())}
    number |= {label: k for k, label in enumerate(classes.tolist())}
    found = np.full(len(labels), -1, dtype=np.int64)
    for row, (label, empty) in enumerate(zip(labels.tolist(), labels.isna(), strict=True)):
        if empty:
            continue
        known = number.get(label, number.get(str(label)))
        if known is None:
            raise TableError(
                f"{place}, row {row}: {label!r:.80} is none of the classes "
                f"{classes.tolist()[:10]}; give the column with --target"
            )
        found[row] = known
    return found
