"""Fingerprints as matminer's users want them: a featurizer of structures, batched.

Where matminer is installed the featurizer is one of its own (a ``BaseFeaturizer``); without it the
methods that matminer's guide names are there all the same.
"""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from matxfer.crystal import CrystalError
from matxfer.data.store import GraphStore, graph_store, pack_chunk
from matxfer.errors import OptionError
from matxfer.estimator.fingerprint import KIND, StructureFingerprint
from matxfer.estimator.samples import SampleError, crystals_of, usable
from matxfer.model import DEFAULT_MODEL, Model
from matxfer.runtime import use_threads
from matxfer.transfer.activations import Activations

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from matxfer.crystal import Crystal
    from matxfer.graph import GraphOptions

#: Fewer structures than this leave nothing in the cache: there would be a folder for each call.
FEW = 256
_CITATIONS = (
    (
        "@software{matxfer, title = {matxfer: transfer learning for crystals}, "
        "author = {{The matxfer developers}}}"
    ),
    (
        "@article{Jain2013, doi = {10.1063/1.4812323}, year = {2013}, volume = {1}, pages = "
        "{011002}, author = {Anubhav Jain and others}, title = {Commentary: The Materials Project: "
        "A materials genome approach to accelerating materials innovation}, journal = {APL "
        "Materials}}"
    ),
)


class PlainFeaturizer(TransformerMixin, BaseEstimator):
    """What a ``BaseFeaturizer`` of matminer does with ``featurize_many``, where there is none."""

    def set_n_jobs(self, n_jobs: int) -> None:
        """Note a number of processes."""
        self._n_jobs = n_jobs

    @property
    def n_jobs(self) -> int:
        """The number noted, else 1."""
        return int(getattr(self, "_n_jobs", 1))

    def precheck(self, *_: Any) -> bool:
        """Return whether a structure is in scope: there is no quick way to say, so it is."""
        return True

    def featurize_dataframe(
        self,
        df: pd.DataFrame,
        col_id: str | list[str],
        ignore_errors: bool = False,
        return_errors: bool = False,
        inplace: bool = False,
        multiindex: bool = False,
        pbar: bool = True,
    ) -> pd.DataFrame | None:
        """Return a data frame with columns of features; see matminer.

        Raises
        ------
        ValueError
            If a column is there already, or ``multiindex`` is asked for.
        """
        import pandas as pd

        if multiindex:
            raise OptionError("multiindex needs matminer: pip install 'matxfer[matminer]'")
        column = df[col_id if isinstance(col_id, str) else col_id[0]]
        labels = self.feature_labels()
        if return_errors:
            labels.append(f"{type(self).__name__} Exceptions")
        if twice := [name for name in labels if name in df.columns]:
            raise OptionError(f'"{twice[0]}" exists in input dataframe')
        features = self.featurize_many(
            column.tolist(), ignore_errors=ignore_errors, return_errors=return_errors, pbar=pbar
        )
        found = pd.DataFrame(features, index=df.index, columns=labels)
        if inplace:
            df[labels] = found
            return None
        return pd.concat([df, found], axis=1)

    def fit_featurize_dataframe(
        self,
        df: pd.DataFrame,
        col_id: str,
        fit_args: Sequence[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> pd.DataFrame | None:
        """Fit, and return a data frame with columns of features."""
        self.fit(df[col_id], *(fit_args or ()))
        return self.featurize_dataframe(df, col_id, *args, **kwargs)


try:
    from matminer.featurizers.base import BaseFeaturizer
except ImportError:
    BaseFeaturizer = PlainFeaturizer


class FingerprintFeaturizer(BaseFeaturizer):
    """Fingerprints of structures as a featurizer in matminer's sense.

    Many structures are one pass of the network in batches: ``featurize_many``,
    ``featurize_dataframe`` and ``transform`` use it whatever ``set_n_jobs`` says, and inside of
    matminer's ``MultipleFeaturizer`` so does ``iterate_over_entries=False``. By its default,
    structures come one by one, which is much slower.

    Parameters
    ----------
    model, layers, kind
        See :class:`matxfer.StructureFingerprint`.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from matxfer.estimator import FingerprintFeaturizer
    >>> featurizer = FingerprintFeaturizer("mp-small", layers=(3,), kind="pooled")
    >>> len(featurizer.featurize(bulk("Cu")))
    192
    >>> featurizer.feature_labels()[0]
    'mp-small mean_layer3_0'
    """

    def __init__(
        self,
        model: str | Path | Model = DEFAULT_MODEL,
        *,
        layers: tuple[int, ...] | None = None,
        kind: str = KIND,
    ) -> None:
        self.model = model
        self.layers = layers
        self.kind = kind

    def fit(self, X: Any = None, y: Any = None, **_: Any) -> FingerprintFeaturizer:  # noqa: ARG002
        """Load the network; nothing is learned, and nothing need be given."""
        self._opened()
        return self

    def featurize(self, structure: Any) -> list[float]:
        """Return the features of one structure, a list of D numbers.

        Raises
        ------
        SampleError
            If it cannot be used.
        """
        return self.featurize_many([structure])[0]

    def featurize_many(
        self,
        entries: Any,
        ignore_errors: bool = False,
        return_errors: bool = False,
        pbar: Any = True,  # noqa: ARG002 - there is nothing to show between batches
    ) -> list[list[Any]]:
        """Return the features of n structures, a list of n lists of D numbers.

        Parameters
        ----------
        entries
            Structures of pymatgen or ASE, or tuples of one; as a list, array, series or frame.
        ignore_errors
            A structure that cannot be used has NaN; else it is an error.
        return_errors
            Add to each list why the structure cannot be used, NaN if it can.
        pbar
            Ignored.

        Raises
        ------
        SampleError
            If a structure cannot be used and errors are not ignored.
        ValueError
            If ``return_errors`` is asked for without ``ignore_errors``.
        """
        if return_errors and not ignore_errors:
            raise OptionError("return_errors needs ignore_errors=True")
        values = entries.to_numpy() if hasattr(entries, "to_numpy") else entries
        crystals = [_crystal(entry) for entry in values]
        if not crystals:
            return []
        found, reasons = self._fingerprints(crystals)
        if reasons and not ignore_errors:
            row, why = next(iter(reasons.items()))
            raise SampleError(
                f"entry {row} cannot be used ({why}); {len(reasons)} of {len(crystals)} such. "
                "Remove them, or say ignore_errors=True"
            )
        rows: list[list[Any]] = found.tolist()
        if return_errors:
            for row, features in enumerate(rows):
                features.append(reasons.get(row, float("nan")))
        return rows

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Return the features of n structures, (n, D); NaN for one that cannot be used."""
        return np.asarray(self.featurize_many(X, ignore_errors=True), dtype=np.float64)

    def feature_labels(self) -> list[str]:
        """Return the name of each feature: model, statistic, layer and number."""
        network = self._opened()
        return [f"{network.model_.name} {name}" for name in network.get_feature_names_out()]

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:  # noqa: ARG002
        """Return the same, as scikit-learn asks for them."""
        return np.asarray(self.feature_labels(), dtype=object)

    def citations(self) -> list[str]:
        """Return what to cite, as BibTeX."""
        return list(_CITATIONS)

    def implementors(self) -> list[str]:
        """Return who wrote it."""
        return ["The matxfer developers"]

    def _fingerprints(
        self, crystals: list[Crystal | CrystalError]
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """Return features, (n, D), and why rows have none."""
        network = self._opened()
        base, options = network.model_, network.model_.backbone.graph_options
        keep = len(crystals) >= FEW
        store = (
            graph_store(crystals, options) if keep else GraphStore(*pack_chunk(crystals, options))
        )
        good = usable(crystals, store, base, "nan")
        activations = Activations(base, store.graphs, limit_bytes=None if keep else 0)
        found = activations.inputs(network.kind, network.layers_).double().numpy()
        found[~good] = np.nan
        unknown = f"an element is unknown to {base.name!r}"
        reasons = {int(k): store.errors.get(int(k), unknown) for k in np.flatnonzero(~good)}
        return found, reasons

    def _opened(self) -> StructureFingerprint:
        """Return the network of the present parameters."""
        asked = (self.model, self.layers, self.kind)
        if getattr(self, "_open", (None,))[0] != asked:
            if multiprocessing.parent_process() is not None:
                # In a process that was forked, torch's threads would wait for ever.
                use_threads(1)
            network = StructureFingerprint(self.model, layers=self.layers, kind=self.kind)
            self._open = (asked, network.open_network())
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        # Weights that a name stands for do not travel to other processes.
        state: dict[str, Any] = dict(super().__getstate__())
        if not isinstance(self.model, Model):
            state.pop("_open", None)
        return state

    def __sklearn_is_fitted__(self) -> bool:
        return True


def _in_memory(crystals: Sequence[Crystal | CrystalError], options: GraphOptions) -> GraphStore:
    return GraphStore(*pack_chunk(crystals, options))


def _crystal(entry: Any) -> Crystal | CrystalError:
    """Return the crystal of an entry, or why there is none."""
    if isinstance(entry, tuple | list | np.ndarray):
        if len(entry) != 1:
            return CrystalError(f"{len(entry)} objects where an entry is one structure")
        entry = entry[0]
    try:
        return crystals_of([entry])[0]
    except (TypeError, SampleError) as error:
        return CrystalError(str(error))
