"""Structures in, fingerprints of a frozen network out: a transformer for pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from matxfer.data.store import graph_store
from matxfer.errors import OptionError
from matxfer.estimator.samples import crystals_of, usable
from matxfer.model import DEFAULT_MODEL, Model, load_model
from matxfer.nn.ensemble import POOLED_PARTS
from matxfer.transfer.activations import Activations

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.crystal import Crystal, CrystalError

#: Statistics of a fingerprint: mean, spread, highest and lowest over the atoms.
KIND = "statistics"


class StructureFingerprint(TransformerMixin, BaseEstimator):
    """Fingerprints of structures: statistics over the atoms of a frozen network's features.

    Nothing is learned from X; ``fit`` loads the network. Scale or reduce the many columns with
    what scikit-learn has: ``make_pipeline(StructureFingerprint(), StandardScaler(), Ridge())``.

    Parameters
    ----------
    model
        Base model, its name or its folder.
    layers
        Layers to read (0: the embedding); ``None``: all.
    kind
        ``"statistics"`` (mean, spread, highest, lowest of each feature over the atoms),
        ``"extrema"`` (without spread) or ``"pooled"`` (mean and highest).
    on_error
        A structure that cannot be used ends in an error (``"raise"``) or in a row of NaN
        (``"nan"``).

    Attributes
    ----------
    model_
        The network.
    layers_
        The layers read.
    n_features_out_
        Width D of a fingerprint: statistics × layers × features of an atom.

    Examples
    --------
    >>> from ase.build import bulk
    >>> from matxfer import StructureFingerprint
    >>> from sklearn.decomposition import PCA
    >>> from sklearn.pipeline import make_pipeline
    >>> solids = [bulk(name) for name in ("Al", "Cu", "Ag", "Au", "Si", "Ge")]
    >>> StructureFingerprint("mp-small", layers=(3,)).fit_transform(solids).shape
    (6, 384)
    >>> make_pipeline(StructureFingerprint("mp-small"), PCA(2)).fit_transform(solids).shape
    (6, 2)
    """

    def __init__(
        self,
        model: str | Path | Model = DEFAULT_MODEL,
        *,
        layers: tuple[int, ...] | None = None,
        kind: str = KIND,
        on_error: str = "raise",
    ) -> None:
        self.model = model
        self.layers = layers
        self.kind = kind
        self.on_error = on_error

    def fit(self, X: Any, y: Any = None) -> StructureFingerprint:  # noqa: ARG002
        """Load the network.

        Parameters
        ----------
        X
            See :func:`matxfer.estimator.samples.crystals_of`; looked at, but not learned from.
        y
            Ignored.

        Raises
        ------
        OptionError
            If a layer or kind does not exist.
        """
        crystals_of(X)
        return self.open_network()

    def open_network(self) -> StructureFingerprint:
        """Do what ``fit`` does, without structures.

        Raises
        ------
        OptionError
            If a layer or kind does not exist.
        """
        self.model_ = self.model if isinstance(self.model, Model) else load_model(self.model)
        backbone = self.model_.backbone
        self.layers_ = layers_of(self.model_, self.layers)
        if not (parts := POOLED_PARTS.get(self.kind)):
            known = [kind for kind, parts in POOLED_PARTS.items() if parts]
            raise OptionError(f"kind is {self.kind!r}, but must be one of {known}")
        self.n_features_out_ = len(parts) * len(self.layers_) * backbone.node_dim
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Return the fingerprints of n structures, shape (n, D).

        Raises
        ------
        SampleError
            If a structure cannot be used and ``on_error`` is ``"raise"``.
        """
        check_is_fitted(self)
        activations, good = frozen(self.model_, crystals_of(X), self.on_error)
        found = activations.inputs(self.kind, self.layers_).double().numpy()
        found[~good] = np.nan
        return found

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:  # noqa: ARG002
        """Return the name of each column: statistic, layer and number of the feature."""
        check_is_fitted(self)
        parts = POOLED_PARTS[self.kind] or ()
        width = self.model_.backbone.node_dim
        names = [
            f"{part}_layer{k}_{i}" for part in parts for k in self.layers_ for i in range(width)
        ]
        return np.asarray(names, dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    def __sklearn_tags__(self) -> Any:
        return structures_in(super().__sklearn_tags__())


def layers_of(base: Model, layers: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the layers to read, checked, in their order.

    Raises
    ------
    OptionError
        If one does not exist.
    """
    every = tuple(range(base.backbone.n_layers + 1))
    if layers is None:
        return every
    if not layers or not set(layers) <= set(every):
        raise OptionError(f"layers are {list(layers)}, but must be among {list(every)}")
    return tuple(sorted(set(layers)))


def frozen(
    base: Model, crystals: list[Crystal | CrystalError], on_error: str
) -> tuple[Activations, NDArray[np.bool_]]:
    """Return what a network makes of n structures, and which rows are of use, (n,)."""
    store = graph_store(crystals, base.backbone.graph_options)
    good = usable(crystals, store, base, on_error)
    return Activations(base, store.graphs), good


def structures_in(tags: Any) -> Any:
    """Say in an estimator's tags that its samples are structures, which it checks itself."""
    tags.input_tags.two_d_array = False
    tags.no_validation = True
    return tags
