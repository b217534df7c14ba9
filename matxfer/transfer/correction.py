"""Corrections of the base's predictions where the rules differ by a reference: few numbers.

y = a s + b + Σ_Z x_Z r_Z, with the base's prediction s on its fitted scale and atomic fractions x:
other reference energies, another correction scheme by element or another functional are of this
form. a, b and r come from a ridge regression that pulls r to zero and a to one (to zero where s is
another quantity), which has a closed form, and so has leaving out one row at a time::

    e_i = (y_i - ŷ_i) / (1 - h_ii)    (Allen, Technometrics 16, 125 (1974))

By these errors the penalty and the form are chosen, on the training rows: of some twenty rows too
few are left for validation to choose on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.errors import OptionError
from matxfer.nn.feature_readout import FeatureReadout
from matxfer.nn.scaling import TargetScaler, composition
from matxfer.transfer.config import CORRECTIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from matxfer.nn.plugin_head import PluginHead
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.task import Task

    Floats = NDArray[np.float64]

#: Penalties that are tried, in units of one row.
PENALTIES = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
#: A form of more numbers has to lower the error by more than this.
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """A fitted correction.

    Attributes
    ----------
    form, penalty
        What was fitted, and how strongly numbers were pulled.
    slope, offset, elements
        a, b and r (by atomic number, (119,)).
    error
        Mean absolute error of rows left out one at a time, on the fitted scale.
    """

    form: str
    penalty: float
    slope: float
    offset: float
    elements: Floats
    error: float

    def __call__(self, source: Floats, fractions: Floats) -> Floats:
        """Correct predictions (n,) of structures with element fractions (n, 119)."""
        return np.asarray(self.slope * source + self.offset + fractions @ self.elements)


def fit_correction(
    form: str,
    source: Floats,
    fractions: Floats,
    target: Floats,
    *,
    weights: Floats | None = None,
    slope: float = 1.0,
) -> Correction:
    """Fit a correction of one form, or of that which suits best.

    Parameters
    ----------
    form
        One of :data:`matxfer.transfer.config.CORRECTIONS`, or ``"auto"``: the simplest within 2 %
        of the best.
    source, target
        Predictions and values, (n,), on one scale each.
    fractions
        Element fractions, (n, 119).
    weights
        How much each row counts, (n,).
    slope
        What a is pulled to.
    """
    w = np.ones(len(target)) if weights is None else weights
    if form != "auto":
        found = [
            _fitted(form, penalty, source, fractions, target, w, slope)
            for penalty in (PENALTIES if form not in ("none", "offset") else (0.0,))
        ]
        return min(found, key=lambda each: each.error)
    # Without a slope of its own, another quantity is no prediction of this one.
    tried = [
        fit_correction(each, source, fractions, target, weights=weights, slope=slope)
        for each in CORRECTIONS
        if slope or each.endswith("linear")
    ]
    limit = min(each.error for each in tried) * (1 + TOLERANCE)
    return next(each for each in tried if each.error <= limit)


def _fitted(
    form: str,
    penalty: float,
    source: Floats,
    fractions: Floats,
    target: Floats,
    w: Floats,
    slope: float,
) -> Correction:
    start = target - slope * source
    none = np.zeros(MAX_ATOMIC_NUMBER + 1)
    if form == "none":
        return Correction(form, 0.0, slope, 0.0, none, float(np.average(abs(start), weights=w)))
    used = np.flatnonzero(fractions.any(axis=0)) if "elements" in form else np.zeros(0, int)
    middle = float(np.average(source, weights=w))
    spread = float(np.average((source - middle) ** 2, weights=w)) ** 0.5
    linear = form.endswith("linear") and spread > 0
    columns = [fractions[:, used], np.ones((len(start), 1))]
    if linear:
        columns.insert(0, ((source - middle) / spread)[:, None])
    design = np.concatenate(columns, axis=1)  # the last column, of ones, is not pulled
    pull = np.full(design.shape[1], penalty)
    pull[-1] = 0.0
    inverse = np.linalg.pinv((design * w[:, None]).T @ design + np.diag(pull))
    found = inverse @ (design.T @ (w * start))
    leverage = w * np.einsum("ij,jk,ik->i", design, inverse, design)
    left_out = (start - design @ found) / np.maximum(1 - leverage, 1e-9)
    elements, change = none.copy(), float(found[0]) / spread if linear else 0.0
    elements[used] = found[int(linear) : -1]
    return Correction(
        form,
        penalty,
        slope + change,
        float(found[-1]) - change * middle,
        elements,
        float(np.average(np.abs(left_out), weights=w)),
    )


def corrected_head(task: Task, config: FinetuneConfig) -> tuple[PluginHead, dict[str, Any]]:
    """Return a head that predicts with a correction, and what was found.

    Where the base has no like property, a linear map of each of its predictions is tried.

    Raises
    ------
    OptionError
        If the form needs a like property and there is none.
    """
    form, rows = config.correction or "auto", task.parts["train"]
    like = task.source(config)
    if not config.difference:
        raise OptionError(
            "a correction is one of the base's prediction, so it cannot be left out: "
            "no --no-difference with a correction"
        )
    if like is None and not form.endswith(("linear", "auto")):
        raise OptionError(
            f"{task.base.name} predicts nothing like {task.prop.name!r}, but "
            f"{list(task.base.heads)}; choose the correction linear, a map of what it predicts, or "
            "another strategy"
        )
    fractions = composition(task.graphs.select(rows))
    scaler = TargetScaler(task.prop.transform)
    target = scaler.normalised(task.values, task.graphs).astype(np.float64)[rows]
    found = {
        name: fit_correction(
            form,
            task.activations.source(name)[rows],
            fractions,
            target,
            weights=task.weights_of(rows),
            slope=0.0 if like is None else 1.0,
        )
        for name in ([like] if like else task.base.heads)
    }
    source = min(found, key=lambda name: found[name].error)
    best = found[source]
    scaler.mean.fill_(best.offset)
    scaler.reference.copy_(torch.from_numpy(best.elements))
    scaler.std.fill_(max(best.error, 1e-8))
    last = task.base.backbone.n_layers
    head = task.head((last,), _nothing(task, last), source, scaler)
    head.slope = best.slope
    return head, {"correction": _facts(best, source, rows, fractions)}


def _nothing(task: Task, layer: int) -> FeatureReadout:
    """Return a readout that says 0: all that is predicted lies in source, slope and scaler."""
    width = task.inputs(FeatureReadout.kind, (layer,)).shape[1]
    shapes = {"centre": (width,), "project": (width, 1), "weight": (1,), "bias": ()}
    arrays = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return FeatureReadout.of_arrays("linear", arrays)


def _facts(
    found: Correction, source: str, rows: NDArray[np.int64], fractions: Floats
) -> dict[str, Any]:
    from ase.data import chemical_symbols

    counts = (fractions > 0).sum(axis=0)
    return {
        "form": found.form,
        "source": source,
        "penalty": found.penalty,
        "slope": found.slope,
        "offset": found.offset,
        "elements": {
            chemical_symbols[z]: {"value": float(found.elements[z]), "compounds": int(counts[z])}
            for z in np.flatnonzero(found.elements)
        },
        "left_out_error": found.error,
        "rows": len(rows),
    }
