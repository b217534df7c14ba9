"""What a fitted classifier says of its samples and folds, for its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.crystal import Crystal
from matxfer.provenance import provenance
from matxfer.transfer.report import rows_to_keep, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import CrystalError

    Floats = NDArray[np.float64]
    Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]

#: Keys of :func:`about_fit`.
ABOUT = ("target", "data", "elements", "predictions", "provenance")
#: Part of the samples of which a fold that did not see them says something.
FOLDS = "folds"


def about_fit(
    y: Any,
    crystals: Sequence[Crystal | CrystalError],
    rows: NDArray[np.int64],
    *,
    classes: NDArray[Any],
    target: NDArray[np.int64],
    folds: Folds,
    materials: int,
    probability: Floats,
    keep: int,
    seconds: float,
) -> dict[str, Any]:
    """Return what is known of a fit.

    Parameters
    ----------
    y
        Labels as they were given; a series has a name.
    crystals
        Of all samples.
    rows
        Samples that are of use, (n,).
    classes
        The labels, sorted, (K,).
    target
        Numbers of the classes of these samples, (n,).
    folds
        Training and other samples of each fold, among the n.
    materials
        How many materials there are.
    probability
        Of the samples that the folds did not see, fold by fold, (m, K).
    keep
        At most so many of them are kept.
    seconds
        That the fit took.
    """
    good = [crystals[row] for row in rows]
    numbers = {int(z) for c in good if isinstance(c, Crystal) for z in c.numbers}
    counts = np.bincount(target, minlength=len(classes)).tolist()
    about: dict[str, Any] = {
        "data": {
            "samples": len(rows),
            "left_out": len(crystals) - len(rows),
            "materials": materials,
            "folds": len(folds),
            "class_counts": counts,
        },
        "elements": sorted(numbers),
        "provenance": provenance(seconds),
    }
    if isinstance(name := getattr(y, "name", None), str):
        about["target"] = name
    seen = np.concatenate([test for _, test in folds]) if folds else np.zeros(0, dtype=np.int64)
    kept = kept_probabilities(
        [(f"sample {rows[k]}", good[k]) for k in seen], classes, target[seen], probability, keep
    )
    return about | ({"predictions": {FOLDS: kept}} if kept else {})


def kept_probabilities(
    named: Sequence[tuple[str, Crystal | CrystalError]],
    classes: NDArray[Any],
    target: NDArray[np.int64],
    probability: Floats,
    most: int,
) -> dict[str, Any]:
    """Return columns of samples for a report, at most so many, drawn at random.

    Parameters
    ----------
    named
        What to call a sample without an id, and the sample; n of them.
    classes
        The labels, (K,).
    target
        Numbers of the true classes, (n,).
    probability
        (n, K).
    most
        How many samples are kept.

    Returns
    -------
    dict
        ``rows`` (n) and columns ``id``, ``formula``, ``truth`` (the label) and ``probability`` (a
        column for each class); empty if none is kept.
    """
    drawn = rows_to_keep(len(named), most)
    if not len(drawn):
        return {}
    samples = [(name, c) for name, c in (named[k] for k in drawn) if isinstance(c, Crystal)]
    return {
        "rows": len(named),
        "id": [c.id or name for name, c in samples],
        "formula": [c.formula for _, c in samples],
        "truth": classes[target[drawn]].tolist(),
        "probability": [short(column) for column in probability[drawn].T],
    }
