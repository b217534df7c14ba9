"""Playing a fold of Matbench v0.1: a learner sees its training rows, its test rows are predicted.

The learner keeps a part of the training rows to choose by; test rows are read once, for the scores.
"""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from matxfer.benchmark.matbench import N_FOLDS, log10_of
from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from matxfer.benchmark.matbench import MatbenchData, MatbenchTask
    from matxfer.benchmark.records import Record
    from matxfer.model import Model

    Floats = NDArray[np.float64]

#: Below this, values are left out of the percentage error, as in the benchmark's package.
_SMALL = 1e-5


def run_of(
    base: Model, data: MatbenchData, fold: int, options: Mapping[str, Any], repeats: int
) -> dict[str, Any]:
    """Return what identifies the run of a fold: base, data, fold, options."""
    return {
        "model": base.name,
        "weights": base.checksum[:12],
        "task": data.task.name,
        "data": data.checksum,
        "fold": fold,
        "repeats": repeats,
        "options": dict(options),
    }


def play(base: Model, data: MatbenchData, run: dict[str, Any]) -> Record:
    """Play a fold: train on its training rows, predict its test rows, score.

    Returns
    -------
    Record
        ``predictions`` of the test rows in their order, ``scores``, ``parameters`` of the
        submission, ``seconds``; ``auc`` of probabilities, of classes.
    """
    started = time.monotonic()
    train, test = data.task.folds(data.values)[run["fold"]]
    predicted, parameters = predictions(
        data.task,
        [data.crystals[k] for k in train],
        data.values[train],
        [data.crystals[k] for k in test],
        fold=run["fold"],
        model=base,
        repeats=run["repeats"],
        options=run["options"],
    )
    truth = data.values[test]
    record = {
        "predictions": predicted.tolist(),
        "scores": scores(truth, predicted, classes=data.task.classes),
        "parameters": parameters,
        "seconds": round(time.monotonic() - started, 1),
    }
    if data.task.classes:
        from sklearn.metrics import roc_auc_score

        record["auc"] = float(roc_auc_score(truth, predicted))
    return record


def predictions(
    task: MatbenchTask,
    structures: Sequence[Any],
    values: Floats,
    test: Sequence[Any],
    *,
    fold: int,
    model: str | Path | Model,
    repeats: int = 1,
    options: Mapping[str, Any] | None = None,
) -> tuple[Floats, dict[str, Any]]:
    """Learn from a fold's training rows and predict its test rows.

    Parameters
    ----------
    task
        The task.
    structures, values
        Training rows: n structures, values in the benchmark's unit (true and false), (n,).
    test
        Structures of the m test rows.
    fold
        Number of the fold, the seed of the inner split.
    model
        Base model.
    repeats
        So many learners, each with another part of the training rows to choose by; the mean of
        their predictions.
    options
        Of :class:`matxfer.TransferRegressor` (or ``TransferClassifier``).

    Returns
    -------
    predictions, parameters
        Values in the benchmark's unit, of classes the probability of true, (m,); and what the
        submission says of the fold. A test structure that cannot be used is given the median of
        the training values (the frequency of true), and told.
    """
    found, chosen, errors = [], [], []
    y = np.asarray(values)
    for k in range(repeats):
        learner = learner_of(task, model, options or {}, seed=fold + N_FOLDS * k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # rows that cannot be used: counted below
            if task.classes:
                learner.fit(list(structures), y.astype(bool))
                found.append(learner.predict_proba(list(test))[:, -1])
                chosen.append(f"C {learner.C_:g}, temperature {learner.temperature_:.3g}")
                continue
            learner.fit(list(structures), 10.0**y if task.logarithmic else y.astype(float))
        one = learner.predict(list(test))
        found.append(log10_of(one) if task.logarithmic else one)
        chosen.append(str(learner.plugin_.meta["chosen"]))
        errors.append(float(learner.plugin_.meta["figures"]["val"]["mae"]))
    predicted = np.mean(found, axis=0)
    unusable = ~np.isfinite(predicted)
    predicted[unusable] = y.mean() if task.classes else np.median(y)
    parameters = {"chosen": chosen, "unusable_test_structures": int(unusable.sum())}
    return predicted, parameters | ({"validation_mae": errors} if errors else {})


def learner_of(
    task: MatbenchTask, model: str | Path | Model, options: Mapping[str, Any], seed: int
) -> Any:
    """Return the untrained learner of a task."""
    from matxfer.estimator import TransferClassifier, TransferRegressor

    if task.classes:
        if options:
            raise OptionError(
                f"{task.name}: classes are learned with all layers frozen, without "
                f"{', '.join(options)}; leave the task or the options out"
            )
        return TransferClassifier(model, on_error="nan", random_state=seed)
    return TransferRegressor(
        task.columns[0], model=model, on_error="nan", random_state=seed, **options
    )


def scores(truth: Floats, predicted: Floats, *, classes: bool) -> dict[str, float]:
    """Return the figures that the benchmark's package takes of a fold.

    Its ``rocauc`` is of the classes at probability 0.5, which is balanced accuracy.
    """
    from sklearn import metrics

    if classes:
        label, said = truth > 0.5, predicted > 0.5
        return {
            "accuracy": float(metrics.accuracy_score(label, said)),
            "balanced_accuracy": float(metrics.balanced_accuracy_score(label, said)),
            "f1": float(metrics.f1_score(label, said)),
            "rocauc": float(metrics.roc_auc_score(label, said)),
        }
    error = np.abs(predicted - truth)
    large = np.abs(truth) > _SMALL
    return {
        "mae": float(error.mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "mape": float((error[large] / np.abs(truth[large])).mean()),
        "max_error": float(error.max()),
    }
