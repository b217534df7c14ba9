"""How far a plugin's predictions can be trusted: spread, intervals, out-of-domain score.

Spread (on the fitted scale, in units of the training targets' spread)::

    s²(x) = c² (var_m y_m(x) + mean_m φ_mᵀ Σ_m φ_m + s0²)

with the disagreement of the M readouts and the last-layer Laplace approximation of each (MacKay
1992; Daxberger et al., NeurIPS 2021): φ is the last hidden layer, in which a readout is linear, and
Σ = (ΦᵀΦ / σ² + H)⁻¹ over the training set. s0 and c make the validation residuals likely.

Intervals: split conformal (Lei et al., JASA 113, 1094 (2018)) with residuals in units of s(x). With
n validation rows the level-th interval reaches to the ⌈(n + 1) level⌉-th smallest of them. Rows
with weights count by them, and the row to come by the mean weight of such rows, Σw² / Σw
(Tibshirani et al., NeurIPS 2019).

Score: mean distance to the nearest training crystals in scaled principal components of the
fingerprint, over the 95th percentile of the same distance among the training crystals: 1 is a rim
of the training set. A crystal with an element that training never saw scores at least 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from matxfer.crystal import MAX_ATOMIC_NUMBER
from matxfer.nn.ensemble import normalised_layers
from matxfer.nn.readout import pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.nn.plugin_head import Evaluation
    from matxfer.nn.scaling import TargetScaler

#: Coverage of the intervals.
LEVEL = 0.9
#: Score of a crystal with an element that was not in the training set.
NEW_ELEMENT_SCORE = 2.0
_NEIGHBOURS, _COMPONENTS = 5, 16
_PARTS = ("mean", "spread")
_SPREADS = np.geomspace(1e-2, 3.0, 40)


def crystal_features(nodes: Sequence[Tensor], graphs: GraphLike) -> Tensor:
    """Return what the score compares: mean and spread of the layers over the atoms, (B, 2·S·F)."""
    return pool(normalised_layers(nodes), graphs, _PARTS)


class Uncertainty(nn.Module):
    """What is known of a plugin's errors, as arrays that travel with it.

    Parameters
    ----------
    members, hidden_dim
        Shape of the Laplace part; 0 members: none (a simple model on fingerprints).
    feature_dim, components, n_train
        Shapes of the score's part.
    level
        Coverage of the intervals.
    spread, factor, quantile
        s0, c and the conformal quantile, in units of s.
    """

    covariance: Tensor
    centre: Tensor
    project: Tensor
    points: Tensor
    scale: Tensor
    seen: Tensor

    def __init__(
        self,
        members: int,
        hidden_dim: int,
        feature_dim: int,
        components: int,
        n_train: int,
        level: float = LEVEL,
        spread: float = 1.0,
        factor: float = 1.0,
        quantile: float | None = None,
    ) -> None:
        super().__init__()
        self.level, self.spread, self.factor = level, spread, factor
        self.quantile = math.inf if quantile is None else quantile
        self._shape = (members, hidden_dim, feature_dim, components, n_train)
        self.register_buffer("covariance", torch.zeros(members, hidden_dim, hidden_dim))
        self.register_buffer("centre", torch.zeros(feature_dim))
        self.register_buffer("project", torch.zeros(feature_dim, components, dtype=torch.half))
        self.register_buffer("points", torch.zeros(n_train, components, dtype=torch.half))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("seen", torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.bool))

    # -- fitting ------------------------------------------------------------------------------
    @classmethod
    def fit(
        cls, hidden: Tensor | None, noise: float, features: Tensor, elements: Sequence[int]
    ) -> Uncertainty:
        """Fit all but the calibration to the training set.

        Parameters
        ----------
        hidden
            Last hidden layers (M, n, H), ``None`` for a simple model.
        noise
            Spread σ of the residuals, in units of the targets' spread.
        features
            See :func:`crystal_features`, (n, D).
        elements
            Atomic numbers that occur.
        """
        n, width = features.shape
        components = max(min(_COMPONENTS, n - 1, width), 1)
        centre = features.mean(0)
        _, size, axes = torch.linalg.svd((features - centre).double(), full_matrices=False)
        scaled = axes[:components].T * (
            n**0.5 / size[:components].clamp(min=1e-9 * size[0] + 1e-12)
        )
        members, hidden_dim = (0, 0) if hidden is None else (len(hidden), hidden.shape[2])
        self = cls(members, hidden_dim, width, components, n)
        if hidden is not None:
            gram = hidden.double().transpose(1, 2) @ hidden.double() / max(noise, 1e-3) ** 2
            prior = hidden_dim * torch.eye(hidden_dim, dtype=torch.float64)
            self.covariance.copy_(torch.linalg.inv(gram + prior))
        self.centre.copy_(centre)
        self.project.copy_(scaled)
        self.points.copy_(self._components(features))
        own = self._distance(self.points.float(), leave_out_self=True)
        self.scale.fill_(max(float(own.quantile(0.95)), 1e-6) if n > 1 else 1.0)
        self.seen[list(elements)] = True
        return self

    def calibrate(
        self,
        residual: NDArray[np.float64],
        variance: NDArray[np.float64],
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        """Set s0, c and the quantile from residuals of rows that were not trained on.

        Parameters
        ----------
        residual
            In units of the targets' spread, (n,).
        variance
            Members' and Laplace variance of the same rows, (n,).
        weights
            How much each row counts, (n,).
        """
        w = np.ones(len(residual)) if weights is None else weights
        best = math.inf
        for spread in _SPREADS:
            shape = variance + spread**2
            factor = float(np.average(residual**2 / shape, weights=w)) + 1e-12
            # The rest is constant at this factor.
            surprise = float(np.average(np.log(factor * shape), weights=w))
            if surprise < best:
                best, self.spread, self.factor = surprise, float(spread), factor**0.5
        score = np.abs(residual) / self._deviation(variance)
        order = np.argsort(score)
        share = np.cumsum(w[order]) / (w.sum() + (w**2).sum() / w.sum())
        enough = np.flatnonzero(share >= self.level - 1e-12)
        self.quantile = float(score[order[enough[0]]]) if len(enough) else math.inf

    # -- use ----------------------------------------------------------------------------------
    def variance(self, evaluation: Evaluation) -> NDArray[np.float64]:
        """Return the members' and the Laplace variance, in units of the targets' spread², (B,)."""
        hidden = evaluation.hidden
        if hidden is None:
            return np.zeros(len(evaluation.fitted))
        laplace = torch.einsum("mbh,mhk,mbk->mb", hidden, self.covariance, hidden).mean(0)
        total = evaluation.outputs.var(0, correction=0) + laplace
        return np.asarray(total.detach().double().cpu().numpy())

    def score(self, nodes: Sequence[Tensor], graphs: GraphLike) -> NDArray[np.float64]:
        """Return how far each crystal lies from the training set, (B,)."""
        distance = self._distance(self._components(crystal_features(nodes, graphs)))
        score = distance / self.scale
        new = (~self.seen[graphs.z]).to(score.dtype) * NEW_ELEMENT_SCORE
        least = score.new_zeros(len(score)).scatter_reduce(0, graphs.batch, new, "amax")
        return torch.maximum(score, least).double().cpu().numpy()

    def of(
        self,
        scaler: TargetScaler,
        evaluation: Evaluation,
        nodes: Sequence[Tensor],
        graphs: GraphLike,
    ) -> tuple[NDArray[np.float64], ...]:
        """Return spread, lower bound, upper bound (in the unit) and score, each (B,)."""
        to_unit, mean = scaler.to_unit, evaluation.fitted
        deviation = self._deviation(self.variance(evaluation)) * float(scaler.std)
        spread = 0.5 * (to_unit(mean + deviation) - to_unit(mean - deviation))
        reach = self.quantile * deviation
        return spread, to_unit(mean - reach), to_unit(mean + reach), self.score(nodes, graphs)

    def _deviation(self, variance: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.factor * np.sqrt(variance + self.spread**2))

    def _components(self, features: Tensor) -> Tensor:
        components: Tensor = (features - self.centre) @ self.project.float()
        return components

    def _distance(self, x: Tensor, *, leave_out_self: bool = False) -> Tensor:
        distance = torch.cdist(x, self.points.float())
        if leave_out_self:
            distance.fill_diagonal_(math.inf)
        k = max(min(_NEIGHBOURS, len(self.points) - int(leave_out_self)), 1)
        nearest: Tensor = distance.topk(k, dim=1, largest=False).values.mean(1)
        return nearest

    def to_json(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        members, hidden_dim, feature_dim, components, n_train = self._shape
        return {
            "members": members,
            "hidden_dim": hidden_dim,
            "feature_dim": feature_dim,
            "components": components,
            "n_train": n_train,
            "level": self.level,
            "spread": self.spread,
            "factor": self.factor,
            "quantile": self.quantile if math.isfinite(self.quantile) else None,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Uncertainty:
        """Build what :meth:`to_json` described, arrays not yet filled."""
        return cls(**data)
