"""Classes of crystals (metals, magnetic order, stability) from fingerprints of a frozen network.

Logistic regression on the principal components of the fingerprints and on what the network predicts
of its own properties (a gap says much of metals), its logits divided by a temperature so that
probabilities are frequencies (Guo et al., ICML 2017). Penalty and temperature are chosen on samples
that the regression did not see, in folds that keep copies of a material together.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d

from matxfer.estimator.about import ABOUT, about_fit
from matxfer.estimator.files import read_estimator, write_estimator
from matxfer.estimator.fingerprint import KIND, frozen, layers_of, structures_in
from matxfer.estimator.samples import SampleError, crystals_of, materials_of, told
from matxfer.files import FormatError, read_tensors, write_tensors
from matxfer.metrics import classification_metrics
from matxfer.model import DEFAULT_MODEL, Model, check_base, load_model
from matxfer.options import COUNT, NOT_NEGATIVE, POSITIVE, check_ranges
from matxfer.transfer.features import principal_axes
from matxfer.transfer.report import KEPT_ROWS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.transfer.activations import Activations

    Floats = NDArray[np.float64]
    Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]

#: Inverse penalties that are tried.
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)
_ARRAYS = (
    "centre", "project", "source_mean", "source_std", "coef", "intercept", "temperature",
)  # fmt: skip
_WEIGHTS = "classifier.safetensors"
#: Bounds of the logarithm of the temperature.
_LOG_TEMPERATURE = (-3.0, 3.0)


class TransferClassifier(ClassifierMixin, BaseEstimator):
    """Classes of crystals with calibrated probabilities, all layers of the network frozen.

    Parameters
    ----------
    model
        Base model, its name or its folder.
    layers
        Layers whose fingerprints are read (0: the embedding); ``None``: all.
    source
        Whether the base's own predictions are read too.
    C
        Inverse penalty of the logistic regression; ``None``: the one of :data:`PENALTIES` with the
        smallest log loss in the folds.
    calibrate
        Whether to fit a temperature; without one, probabilities are those of the regression.
    cv
        Number of folds, fewer where a class has fewer materials.
    on_error
        A structure that cannot be used ends in an error (``"raise"``); or (``"nan"``) it is left
        out of ``fit`` with a warning, and has probabilities NaN.
    keep_predictions
        At most so many samples are kept with their ids, formulas, labels and the probabilities of
        the fold that did not see them, for :func:`matxfer.report.write_report`; 0: none, where
        labels are secret.
    random_state
        Seed of the folds.

    Attributes
    ----------
    classes_
        The labels, sorted, (K,).
    C_, temperature_
        What was chosen.
    figures_
        Of the samples in the folds that did not see them: ``auc`` (of more than two classes the
        mean over one against the rest), ``accuracy``, ``brier``, ``log_loss`` and
        ``log_loss_uncalibrated``, ``calibration_error`` (expected, ten bins), see
        :func:`matxfer.metrics.classification_metrics`; empty where there were too few samples.
        Penalty and temperature were chosen on the same folds, so they flatter a little: report a
        test set.
    about_
        What a report shows: ``target`` (the name of y, if it has one), ``data``, ``elements``,
        ``provenance`` and, if they are kept, ``predictions``.

    Examples
    --------
    >>> from matxfer.estimator import TransferClassifier
    >>> TransferClassifier(C=1.0)
    TransferClassifier(C=1.0)
    >>> from ase.build import bulk
    >>> metals = [bulk(name) for name in ("Al", "Cu", "Ag", "Au", "Ni")]
    >>> others = [bulk(name) for name in ("Si", "Ge", "C")] + [
    ...     bulk("MgO", "rocksalt", 4.2), bulk("NaCl", "rocksalt", 5.6)
    ... ]
    >>> classifier = TransferClassifier(model="mp-small", C=1.0).fit(
    ...     metals + others, ["metal"] * 5 + ["other"] * 5
    ... )
    >>> [str(label) for label in classifier.predict([bulk("Pd"), bulk("LiF", "rocksalt", 4.0)])]
    ['metal', 'other']
    """

    def __init__(
        self,
        model: str | Path | Model = DEFAULT_MODEL,
        *,
        layers: tuple[int, ...] | None = None,
        source: bool = True,
        C: float | None = None,
        calibrate: bool = True,
        cv: int = 5,
        on_error: str = "raise",
        keep_predictions: int = KEPT_ROWS,
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.layers = layers
        self.source = source
        self.C = C
        self.calibrate = calibrate
        self.cv = cv
        self.on_error = on_error
        self.keep_predictions = keep_predictions
        self.random_state = random_state

    def fit(self, X: Any, y: Any, groups: Any = None) -> TransferClassifier:
        """Fit the regression and its temperature.

        Parameters
        ----------
        X
            n structures, see :func:`matxfer.estimator.samples.crystals_of`.
        y
            Labels, (n,).
        groups
            Labels (n,): samples of one group are in one fold.

        Raises
        ------
        SampleError
            If a structure cannot be used and ``on_error`` is ``"raise"``.
        ValueError
            If there is one class alone.
        """
        started = time.monotonic()
        crystals = crystals_of(X)
        labels = _labels(y, len(crystals))
        ranges = {"cv": COUNT, "keep_predictions": NOT_NEGATIVE}
        check_ranges(self, ranges | ({} if self.C is None else {"C": POSITIVE}))
        self.base_ = self.model if isinstance(self.model, Model) else load_model(self.model)
        self.layers_ = layers_of(self.base_, self.layers)
        activations, good = frozen(self.base_, crystals, self.on_error)
        told(good)
        rows = np.flatnonzero(good)
        self.classes_, target = np.unique(labels[rows], return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"all usable samples are of one class, {self.classes_.tolist()}; a classifier "
                "needs two at least"
            )
        inputs = activations.inputs(KIND, self.layers_)
        self.centre_, self.project_ = principal_axes(inputs, rows)
        own = _predictions(activations)[rows]
        self.source_mean_, self.source_std_ = own.mean(axis=0), np.maximum(own.std(axis=0), 1e-6)
        x = self._read(activations)[rows]
        material = materials_of(crystals, groups, activations.graphs)[rows]
        folds = _folds(target, material, self.cv, self.random_state)
        probability = self._choose(x, target, folds)
        fitted = _regression(self.C_).fit(x, target)
        self.coef_, self.intercept_ = fitted.coef_, fitted.intercept_
        self.about_ = about_fit(
            y, crystals, rows, classes=self.classes_, target=target, folds=folds,
            materials=len(np.unique(material)), probability=probability,
            keep=self.keep_predictions, seconds=time.monotonic() - started,
        )  # fmt: skip
        return self

    def _choose(self, x: Floats, target: NDArray[np.int64], folds: Folds) -> Floats:
        """Choose penalty and temperature on the samples that a fold did not see.

        Return their probabilities, in the order of the folds, (m, K).
        """
        from sklearn.metrics import log_loss

        self.C_, self.temperature_, self.figures_ = self.C or 1.0, 1.0, {}
        if not folds:
            warnings.warn(
                "a class has too few materials for folds: the probabilities are not calibrated",
                stacklevel=3,
            )
            return np.zeros((0, len(self.classes_)))
        labels = np.arange(len(self.classes_))
        seen = np.concatenate([test for _, test in folds])
        best = np.inf
        for penalty in PENALTIES if self.C is None else (self.C,):
            logits = np.concatenate(
                [_logits_of(_regression(penalty).fit(x[a], target[a]), x[b]) for a, b in folds]
            )
            loss = log_loss(target[seen], _softmax(logits), labels=labels)
            if loss < best:
                best, self.C_, chosen = loss, penalty, logits
        if self.calibrate:
            self.temperature_ = _temperature(chosen, target[seen])
        probability = _softmax(chosen / self.temperature_)
        self.figures_ = classification_metrics(target[seen], probability)
        self.figures_["log_loss_uncalibrated"] = float(best)
        return probability

    def decision_function(self, X: Any) -> Floats:
        """Return logits over the temperature, (n, K), of two classes the difference, (n,)."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> Floats:
        """Return the probability of each class, in the order of ``classes_``, (n, K)."""
        return _softmax(self._logits(X))

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the likeliest class of each sample, (n,).

        Raises
        ------
        SampleError
            If a structure cannot be used: there is no class that says so.
        """
        logits = self._logits(X)
        missing = np.flatnonzero(np.isnan(logits).any(axis=1))
        if len(missing):
            raise SampleError(
                f"X: sample {missing[0]} cannot be used and has no class; predict_proba gives NaN"
            )
        found: NDArray[Any] = self.classes_[logits.argmax(axis=1)]
        return found

    def _read(self, activations: Activations) -> Floats:
        """Return what the regression reads of n structures, (n, d)."""
        inputs = activations.inputs(KIND, self.layers_).double().numpy()
        x = (inputs - self.centre_) @ self.project_
        if self.source:
            own = (_predictions(activations) - self.source_mean_) / self.source_std_
            x = np.hstack([x, own])
        return np.asarray(x)

    def _logits(self, X: Any) -> Floats:
        check_is_fitted(self)
        activations, good = frozen(self.base_, crystals_of(X), self.on_error)
        score = self._read(activations) @ self.coef_.T + self.intercept_
        logits = np.column_stack([np.zeros(len(score)), score]) if score.shape[1] == 1 else score
        logits[~good] = np.nan
        return np.asarray(logits / self.temperature_)

    def save(self, folder: str | Path) -> None:
        """Write arrays and parameters to a folder, as safetensors and JSON."""
        check_is_fitted(self)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: torch.as_tensor(np.asarray(getattr(self, f"{name}_"))) for name in _ARRAYS}
        write_tensors(folder / _WEIGHTS, arrays)
        write_estimator(folder, self, self.record())

    def record(self) -> dict[str, Any]:
        """Return what is to be known of a fitted classifier beside its parameters and arrays."""
        check_is_fitted(self)
        return {
            "base": {"name": self.base_.name, "sha256": self.base_.checksum},
            "classes": self.classes_.tolist(),
            "C": self.C_,
            "layers": list(self.layers_),
            "temperature": float(self.temperature_),
            "figures": self.figures_,
            **self.about_,
        }

    @classmethod
    def load(
        cls, folder: str | Path, model: str | Path | Model | None = None
    ) -> TransferClassifier:
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
        found, record = read_estimator(folder, cls, model)
        base = found.model if isinstance(found.model, Model) else load_model(found.model)
        try:
            check_base(Path(folder), record["base"], base)
            for name, array in read_tensors(Path(folder) / _WEIGHTS).items():
                if name not in _ARRAYS:
                    raise KeyError(name)
                setattr(found, f"{name}_", array.numpy())
            found.temperature_ = float(found.temperature_)
            found.base_, found.layers_ = base, layers_of(base, found.layers)
            found.classes_, found.C_ = np.asarray(record["classes"]), float(record["C"])
            found.figures_ = dict(record["figures"])
            found.about_ = {key: record[key] for key in ABOUT if key in record}
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{folder}: damaged ({error!r}); save the estimator again") from error
        return found  # type: ignore[no-any-return]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_") and hasattr(self, "coef_")

    def __sklearn_tags__(self) -> Any:
        tags = structures_in(super().__sklearn_tags__())
        tags.target_tags.required = True
        return tags


def _predictions(activations: Activations) -> Floats:
    """Return the base's own predictions on their fitted scales, (n, H)."""
    found = [activations.source(name) for name in activations.model.heads]
    return np.stack(found, axis=1) if found else np.zeros((len(activations.graphs), 0))


def _labels(y: Any, n: int) -> NDArray[Any]:
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    labels = column_or_1d(y, warn=True)
    check_consistent_length(labels, np.empty(n))
    check_classification_targets(labels)
    return np.asarray(labels)


def _folds(target: NDArray[np.int64], material: NDArray[np.int64], most: int, seed: Any) -> Folds:
    """Return folds whose training parts hold every class; none if there are no such."""
    from sklearn.model_selection import StratifiedGroupKFold

    fewest = min(len(np.unique(material[target == k])) for k in np.unique(target))
    for n in range(min(most, fewest), 1, -1):
        splitter = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            # Classes smaller than the number of folds are what the next line looks for.
            warnings.simplefilter("ignore", UserWarning)
            folds = [(a, b) for a, b in splitter.split(target, target, material) if len(b)]
        if all(len(np.unique(target[a])) == target.max() + 1 for a, _ in folds):
            return folds
    return []


def _regression(C: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=C, max_iter=2000)


def _logits_of(fitted: Any, x: Floats) -> Floats:
    """Return logits (n, K), of two classes with the first at zero."""
    score = fitted.decision_function(x)
    return np.column_stack([np.zeros(len(score)), score]) if score.ndim == 1 else score


def _softmax(logits: Floats) -> Floats:
    from scipy.special import softmax

    return np.asarray(softmax(logits, axis=1))


def _temperature(logits: Floats, target: NDArray[np.int64]) -> float:
    """Return the temperature of the smallest log loss."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-scaled[np.arange(len(target)), target].mean())

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURE, method="bounded").x))
