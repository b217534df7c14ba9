"""Fine-tuning as a scikit-learn regressor: the plugin is what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import (
    assert_all_finite,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
)

from matxfer.crystal import Crystal
from matxfer.data.store import graph_store
from matxfer.data.table import PropertyTable, random_split
from matxfer.estimator.files import read_estimator, write_estimator
from matxfer.estimator.fingerprint import structures_in
from matxfer.estimator.samples import ON_ERROR, SampleError, crystals_of, materials_of, told, usable
from matxfer.model import DEFAULT_MODEL, Model, load_model
from matxfer.options import PART, check_choice, check_ranges
from matxfer.prediction import Predictor
from matxfer.readers.entry import Entry
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin, prediction_columns
from matxfer.transfer.task import FEWEST_ROWS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: Parameters that are fields of :class:`matxfer.transfer.config.FinetuneConfig`.
_OPTIONS = (
    "strategy", "freeze", "layers", "readout", "hidden_dim", "members", "features", "difference",
    "retain", "strength", "epochs", "patience", "batch_size", "learning_rate",
    "head_learning_rate",
)  # fmt: skip


class TransferRegressor(RegressorMixin, BaseEstimator):
    """A property of crystals, learned on top of a pretrained network.

    ``fit`` is :func:`matxfer.finetune`: the network's frozen layers read the structures, and a
    readout, or the layers above the frozen ones, learn y. A part of the samples is kept from
    training to stop it and to choose among strategies; copies of a material stay together.

    Parameters
    ----------
    target
        Name of the property; its end says the unit (``band_gap_ev``), and what is known of the
        name decides the transform and whether the base's own prediction is a start.
    model
        Base model, its name or its folder.
    validation_fraction
        Part of the samples that ``fit`` keeps from training, between 0 and 1.
    on_error
        A structure that cannot be used ends in an error (``"raise"``); or (``"nan"``) it is left
        out of ``fit`` with a warning, and predicted as NaN.
    strategy, freeze, layers, readout, hidden_dim, members, features, difference
        What is trained, see :class:`matxfer.FinetuneConfig`; ``None``: its default.
    retain, strength, epochs, patience, batch_size, learning_rate, head_learning_rate
        How, see there too.
    target_transform
        ``transform`` there; scikit-learn takes what has a ``transform`` for a transformer.
    random_state
        Seed, or a generator of seeds.

    Attributes
    ----------
    plugin_
        The fitted :class:`matxfer.Plugin`; ``plugin_.meta`` holds figures and what was tried.

    Examples
    --------
    >>> from matxfer.estimator import TransferRegressor
    >>> TransferRegressor("band_gap_ev", features="ridge").get_params()["features"]
    'ridge'
    >>> from ase.build import bulk
    >>> solids = [bulk(name) for name in "Al Cu Ag Au Ni Pd Pt Pb Fe W V Nb".split()]
    >>> gpa = [79, 140, 104, 177, 184, 187, 283, 46, 170, 310, 157, 170]
    >>> regressor = TransferRegressor(
    ...     "bulk_modulus_gpa", model="mp-small", strategy="features", validation_fraction=0.2
    ... ).fit(solids, gpa)
    >>> regressor.predict([bulk("Rh"), bulk("Ir")]).shape
    (2,)
    """

    def __init__(
        self,
        target: str = "y",
        *,
        model: str | Path | Model = DEFAULT_MODEL,
        validation_fraction: float = 0.1,
        on_error: str = "raise",
        strategy: str | None = None,
        freeze: int | None = None,
        layers: tuple[int, ...] | None = None,
        readout: str | None = None,
        hidden_dim: int | None = None,
        members: int | None = None,
        features: str | None = None,
        difference: bool | None = None,
        retain: str | None = None,
        strength: float | str | None = None,
        epochs: int | None = None,
        patience: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        target_transform: str | None = None,
        random_state: Any = 0,
    ) -> None:
        self.target = target
        self.model = model
        self.validation_fraction = validation_fraction
        self.on_error = on_error
        self.strategy = strategy
        self.freeze = freeze
        self.layers = layers
        self.readout = readout
        self.hidden_dim = hidden_dim
        self.members = members
        self.features = features
        self.difference = difference
        self.retain = retain
        self.strength = strength
        self.epochs = epochs
        self.patience = patience
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.head_learning_rate = head_learning_rate
        self.target_transform = target_transform
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> TransferRegressor:
        """Fine-tune a plugin.

        Parameters
        ----------
        X
            n structures, see :func:`matxfer.estimator.samples.crystals_of`.
        y
            Values in the unit of ``target``, (n,).
        groups
            Labels (n,): samples of one group are all trained on or all kept from it.

        Raises
        ------
        SampleError
            If a structure cannot be used and ``on_error`` is ``"raise"``.
        MatxferError
            If there are too few samples, or an option is out of its range.
        """
        crystals = crystals_of(X)
        values = _targets(y, len(crystals))
        check_ranges(self, {"validation_fraction": PART})
        base = self.model if isinstance(self.model, Model) else load_model(self.model)
        store = graph_store(crystals, base.backbone.graph_options)
        good = usable(crystals, store, base, self.on_error)
        told(good)
        seed = _seed(self.random_state)
        number = materials_of(crystals, groups, store.graphs)
        shares = (1 - self.validation_fraction, self.validation_fraction, 0.0)
        split = random_split(number, shares, seed)
        _check_parts(split[good])
        data = PropertyTable("X", crystals, {self.target: values}, split)
        given = {name: getattr(self, name) for name in _OPTIONS}
        given["transform"] = self.target_transform
        options = {name: value for name, value in given.items() if value is not None}
        self.plugin_ = finetune(data, self.target, model=base, seed=seed, **options)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return predictions in the unit of ``target``, (n,), and their spreads if asked for.

        Raises
        ------
        SampleError
            If a structure cannot be used and ``on_error`` is ``"raise"``.
        """
        found = self._predict(X)
        return (found[:, 0], found[:, 1]) if return_std else found[:, 0]

    def predict_interval(self, X: Any) -> tuple[Floats, Floats]:
        """Return the lower and upper ends of the 90 % conformal intervals, each (n,)."""
        found = self._predict(X)
        return found[:, 2], found[:, 3]

    def _predict(self, X: Any) -> Floats:
        """Return value, spread, interval and out-of-domain score of n structures, (n, 5)."""
        check_is_fitted(self)
        check_choice("on_error", self.on_error, ON_ERROR)
        entries = [
            Entry("X", k, str(k), crystal=crystal)
            if isinstance(crystal, Crystal)
            else Entry("X", k, str(k), error=crystal.located("X", k))
            for k, crystal in enumerate(crystals_of(X))
        ]
        columns = prediction_columns(self.plugin_.base, [self.plugin_])[0]
        predictor = Predictor(self.plugin_.base, [self.plugin_])
        found = np.full((len(entries), len(columns)), np.nan)
        for k, row in enumerate(predictor.rows(iter(entries), workers=0)):
            if row["error"] is None:
                found[k] = [row[name] for name in columns]
            elif self.on_error == "raise":
                raise SampleError(
                    f"X: sample {k} cannot be used ({row['error']}); remove it, or say "
                    "on_error='nan'"
                )
        return found

    def save(self, folder: str | Path) -> None:
        """Write the plugin and the parameters to a folder, as safetensors and JSON."""
        check_is_fitted(self)
        self.plugin_.save(folder)
        write_estimator(Path(folder), self)

    @classmethod
    def load(cls, folder: str | Path, model: str | Path | Model | None = None) -> TransferRegressor:
        """Read a fitted estimator back.

        Parameters
        ----------
        folder
            Where it was saved.
        model
            Base model; ``None``: the one that it was fitted with, by its name or folder.

        Raises
        ------
        FormatError
            If files are missing or damaged, or the base is another one.
        """
        found, _ = read_estimator(folder, cls, model)
        base = found.model if isinstance(found.model, Model) else load_model(found.model)
        found.plugin_ = load_plugin(folder, base)
        return found  # type: ignore[no-any-return]

    def __sklearn_tags__(self) -> Any:
        tags = structures_in(super().__sklearn_tags__())
        tags.target_tags.required = True
        return tags


def _targets(y: Any, n: int) -> Floats:
    """Return y as numbers, (n,)."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    values = column_or_1d(y, warn=True)
    check_consistent_length(values, np.empty(n))
    found = np.asarray(values, dtype=np.float64)
    assert_all_finite(found, input_name="y")
    return found


def _check_parts(split: NDArray[np.str_]) -> None:
    """Raise a :class:`SampleError` if the usable samples (n,) are too few."""
    train, val = (int((split == part).sum()) for part in ("train", "val"))
    if train < FEWEST_ROWS or not val:
        raise SampleError(
            f"{len(split)} sample(s) are {train} to train on and {val} to validate with, but "
            f"{FEWEST_ROWS} and 1 are needed at least; give more, or another validation_fraction"
        )


def _seed(random_state: Any) -> int:
    """Return a seed that Lightning and NumPy take."""
    if isinstance(random_state, int | np.integer) and not isinstance(random_state, bool):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))
