"""What the estimators take as X: n structures of any library, and what is to happen to bad ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.data.table import crystals_or_errors
from matxfer.errors import MatxferError
from matxfer.options import check_choice
from matxfer.prediction import as_inputs
from matxfer.readers import crystals_of_table, read_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from matxfer.crystal import Crystal, CrystalError
    from matxfer.data.packed import PackedGraphs
    from matxfer.data.store import GraphStore
    from matxfer.model import Model

#: What to do with a structure that cannot be used.
ON_ERROR = ("raise", "nan")


class SampleError(MatxferError):
    """Samples that an estimator cannot take: says which, why and what to do."""


def crystals_of(X: Any) -> list[Crystal | CrystalError]:
    """Return the structure of each sample, or why there is none.

    Parameters
    ----------
    X
        n crystals, pymatgen structures, ASE atoms or paths of files with one structure each, as a
        list, an array of objects, (n,) or (n, 1), or a pandas series; or a data frame of n rows
        with structure columns (see :mod:`matxfer.readers`).

    Raises
    ------
    SampleError
        If there are no samples, or a file does not hold exactly one structure.
    TypeError
        If something in it holds no structure.
    """
    if hasattr(X, "iloc") and hasattr(X, "columns"):
        one = str(X.columns[0]) if len(X.columns) == 1 else None
        return crystals_or_errors(crystals_of_table(X, "X", structure_column=one))
    if isinstance(X, str | Path) or not hasattr(X, "__len__"):
        raise SampleError(
            f"X is a {type(X).__name__}; give a list of structures, or a data frame of them"
        )
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0]
    items = list(X)
    if not items:
        raise SampleError("X holds no samples; give at least one structure")
    given = as_inputs(items)
    if not isinstance(given, list):
        return crystals_or_errors(given)
    return [_only(path) for path in given]


def _only(path: str | Path) -> Crystal | CrystalError:
    found = list(read_file(path))
    if len(found) != 1:
        raise SampleError(
            f"{path}: holds {len(found)} structures where a sample is one; read it with "
            "matxfer.readers and give the crystals"
        )
    return crystals_or_errors(found)[0]


def usable(
    crystals: Sequence[Crystal | CrystalError], store: GraphStore, base: Model, on_error: str
) -> NDArray[np.bool_]:
    """Return which samples have a graph of elements that the model knows, (n,).

    Raises
    ------
    SampleError
        If one has not and ``on_error`` is ``"raise"``.
    """
    check_choice("on_error", on_error, ON_ERROR)
    foreign = store.graphs.has_elements_outside(base.elements)
    good = (store.graphs.nodes_per_graph > 0) & ~foreign
    bad = np.flatnonzero(~good)
    if len(bad) and on_error == "raise":
        row = int(bad[0])
        why = store.errors.get(row, f"an element is unknown to {base.name!r}")
        raise SampleError(
            f"X: sample {row} cannot be used ({why}); {len(bad)} of {len(crystals)} such. Remove "
            "them, or say on_error='nan'"
        )
    return np.asarray(good, dtype=np.bool_)


def told(good: NDArray[np.bool_]) -> None:
    """Warn that samples were left out of a fit."""
    if not good.all():
        warnings.warn(
            f"{int((~good).sum())} of {len(good)} samples cannot be used and were left out of the "
            "fit",
            stacklevel=3,
        )


def materials_of(
    crystals: Sequence[Crystal | CrystalError], groups: Any, graphs: PackedGraphs
) -> NDArray[np.int64]:
    """Return a number for each sample, the same for those that belong together, (n,).

    Parameters
    ----------
    groups
        Labels (n,); ``None``: samples of one material belong together
        (:mod:`matxfer.data.copies`).
    """
    from sklearn.utils.validation import check_consistent_length

    from matxfer.data.copies import materials

    if groups is None:
        return materials(crystals)
    check_consistent_length(groups, graphs.nodes_per_graph)
    return np.asarray(np.unique(np.asarray(groups), return_inverse=True)[1], dtype=np.int64)
