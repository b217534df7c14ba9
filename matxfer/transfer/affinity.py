"""Task affinity without training: how well frozen features explain a target, in closed form.

All functions take features (n, D) or kernels (n, n) of n crystals and their target values (n,).
Residuals are those of predictions that have not seen the row itself, so their size is an error
that can be compared between sources; the other two are scores, the larger the better.
Nothing is scaled here: see :func:`matxfer.transfer.features.principal_axes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from matxfer.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: Penalties of ridge regression that are tried, in units of the number of rows.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
#: Exponents γ of exp(-γ |x - x'|²) that are tried, for features with a mean square of 1.
GAMMAS = (0.003, 0.01, 0.03, 0.1)
#: Neighbours whose mean is the prediction.
NEIGHBOURS = 5

_MANY_STEPS, _CONVERGED = 200, 1e-6


def gaussian_kernel(features: Floats, gamma: float) -> Floats:
    """Return exp(-γ |x_i - x_j|²), (n, n)."""
    return np.asarray(np.exp(-gamma * _squared_distances(features)))


def kernel_alignment(one: Floats, other: Floats) -> float:
    """Return the centred alignment of two kernels, -1 … 1.

    ⟨K, K'⟩ / (‖K‖ ‖K'‖) of the centred kernels HKH, H = I - 11ᵀ/n, in Frobenius' scalar product
    (Cortes, Mohri & Rostamizadeh, JMLR 13, 795 (2012), definition 4). 0 where a kernel is constant.
    """
    one, other = _centred(one), _centred(other)
    size = np.linalg.norm(one) * np.linalg.norm(other)
    return float((one * other).sum() / size) if size > 0 else 0.0


def target_alignment(kernel: Floats, targets: Floats) -> float:
    """Return the centred alignment of a kernel with that of the targets, yyᵀ, 0 … 1.

    See :func:`kernel_alignment`; without the second kernel being written out.
    """
    y = targets - targets.mean()
    centred = _centred(kernel)
    size = np.linalg.norm(centred) * (y @ y)
    return float(y @ centred @ y / size) if size > 0 else 0.0


def nearest_neighbour_residuals(
    features: Floats,
    targets: Floats,
    neighbours: int = NEIGHBOURS,
    groups: NDArray[np.int64] | None = None,
) -> Floats:
    """Return y_i minus the mean over its nearest neighbours, (n,).

    The proxy of transferability of, for example, Renggli et al. (CVPR 2022), for regression.

    Parameters
    ----------
    neighbours
        At most so many.
    groups
        Rows of one group (copies of a material) are no neighbours of each other, (n,).

    Raises
    ------
    OptionError
        If there are fewer than two groups.
    """
    group = _groups(groups, len(targets))
    distance = _squared_distances(features)
    distance[group[:, None] == group] = np.inf
    k = min(neighbours, len(targets) - int(np.bincount(group).max()))
    nearest = np.argpartition(distance, k - 1, axis=1)[:, :k]
    return np.asarray(targets - targets[nearest].mean(axis=1))


@dataclass(frozen=True, slots=True, eq=False)
class Smoother:
    """Ridge regression with a free constant as ŷ = H y, H = 11ᵀ/n + U diag(s / (s + λn)) Uᵀ.

    U and s are eigenvectors and eigenvalues of the centred kernel, so that one decomposition
    serves every penalty λ. In the feature space of the kernel this is linear ridge regression;
    with the kernel x·x' it is that of the features themselves.

    Attributes
    ----------
    vectors
        U, (n, r).
    values
        s, (r,).
    """

    vectors: Floats
    values: Floats

    @classmethod
    def of_kernel(cls, kernel: Floats) -> Smoother:
        """Decompose a kernel (n, n)."""
        values, vectors = np.linalg.eigh(_centred(kernel))
        kept = values > 1e-12 * max(float(values[-1]), 1e-300)
        return cls(vectors[:, kept], values[kept])

    @classmethod
    def of_features(cls, features: Floats) -> Smoother:
        """Decompose the kernel x·x' of features (n, D) without writing it out."""
        left, size, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
        kept = size > 1e-9 * max(float(size[0]), 1e-300)
        return cls(left[:, kept], size[kept] ** 2)

    def residuals(
        self, targets: Floats, penalty: float, groups: NDArray[np.int64] | None = None
    ) -> Floats:
        """Return y_i minus the prediction of a fit without row i, (n,).

        Not one fit is repeated: e_i = r_i / (1 - H_ii) with the residuals r of the fit to all rows
        (Allen's PRESS, Technometrics 16, 125 (1974)). A group g is left out whole by
        e_g = (I - H_gg)⁻¹ r_g.

        Parameters
        ----------
        penalty
            λ, positive, in units of the number of rows.
        groups
            Rows of one group are left out together, (n,).
        """
        n = len(targets)
        factor = self.values / (self.values + penalty * n)
        centred = targets - targets.mean()
        rest = centred - self.vectors @ (factor * (self.vectors.T @ centred))
        left_out = rest / (1 - 1 / n - (self.vectors**2) @ factor)
        if groups is None:
            return np.asarray(left_out)
        group = _groups(groups, n)
        for name in np.flatnonzero(np.bincount(group) > 1):
            rows = np.flatnonzero(group == name)
            own = self.vectors[rows]
            block = np.eye(len(rows)) - 1 / n - (own * factor) @ own.T
            left_out[rows] = np.linalg.solve(block, rest[rows])
        return np.asarray(left_out)

    def best(
        self,
        targets: Floats,
        penalties: Iterable[float] = PENALTIES,
        groups: NDArray[np.int64] | None = None,
    ) -> Floats:
        """Return the residuals of the penalty whose mean size is the smallest, (n,)."""
        return smallest([self.residuals(targets, p, groups) for p in penalties])


def ridge_residuals(
    features: Floats, targets: Floats, groups: NDArray[np.int64] | None = None
) -> Floats:
    """Return leave-one-out residuals of ridge regression, its penalty chosen on them, (n,)."""
    return Smoother.of_features(features).best(targets, groups=groups)


def kernel_ridge_residuals(
    features: Floats,
    targets: Floats,
    groups: NDArray[np.int64] | None = None,
    gammas: Iterable[float] = GAMMAS,
) -> Floats:
    """Return leave-one-out residuals of Gaussian kernel ridge regression, (n,).

    Width and penalty are chosen on them, which flatters a little, and every source alike.
    """
    smoothers = (Smoother.of_kernel(gaussian_kernel(features, gamma)) for gamma in gammas)
    return smallest([smoother.best(targets, groups=groups) for smoother in smoothers])


def smallest(residuals: Sequence[Floats]) -> Floats:
    """Return the residuals whose mean absolute value is the smallest."""
    return min(residuals, key=lambda each: float(np.abs(each).mean()))


def log_evidence(features: Floats, targets: Floats) -> float:
    """Return LogME: the logarithm of the evidence of a linear model, over n.

    y = F w + noise, w ~ N(0, 1/α), noise ~ N(0, 1/β), α and β where p(y | F, α, β) is largest, by
    MacKay's fixed point (You et al., ICML 2021, algorithm 1, with the values of F and y centred
    for the constant). Scales of F do not count, those of y do.
    """
    y = targets - targets.mean()
    left, size, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    values, z = size**2, (left.T @ y) ** 2  # σ² and squared components of y
    kept = values > 1e-12 * max(float(values[0]), 1e-300)
    values, z = values[kept], z[kept]
    n, width = features.shape
    outside = max(float(y @ y - z.sum()), 0.0)  # what no weights explain
    alpha, beta = 1.0 / max(float(values.mean()), 1e-12), 1.0 / max(float(y @ y) / n, 1e-12)
    for _ in range(_MANY_STEPS):
        gain = alpha + beta * values
        gamma = float((beta * values / gain).sum())
        weights = float((beta**2 * values * z / gain**2).sum())  # |m|²
        error = float((alpha**2 * z / gain**2).sum()) + outside  # |F m - y|²
        ratio = alpha / beta
        alpha = gamma / max(weights, 1e-12)
        beta = max(n - gamma, 1e-12) / max(error, 1e-12)
        if abs(alpha / beta / ratio - 1) < _CONVERGED:
            break
    gain = alpha + beta * values
    weights = float((beta**2 * values * z / gain**2).sum())
    error = float((alpha**2 * z / gain**2).sum()) + outside
    logs = width * np.log(alpha) + n * np.log(beta) - n * np.log(2 * np.pi)
    logs -= np.log(gain).sum() + (width - len(values)) * np.log(alpha)
    return float((logs - beta * error - alpha * weights) / (2 * n))


def _centred(kernel: Floats) -> Floats:
    mean = kernel.mean(axis=0)
    return np.asarray(kernel - mean - kernel.mean(axis=1)[:, None] + mean.mean())


def _squared_distances(features: Floats) -> Floats:
    square = (features**2).sum(axis=1)
    return np.asarray(np.maximum(square[:, None] + square - 2 * features @ features.T, 0.0))


def _groups(groups: NDArray[np.int64] | None, n: int) -> NDArray[np.int64]:
    """Return numbers of the groups from zero; without any each row is one."""
    if groups is None:
        groups = np.arange(n)
    names, number = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise OptionError(f"{n} row(s) of one material: nothing is left to predict it from")
    return np.asarray(number, dtype=np.int64)
