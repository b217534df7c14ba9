"""The sage: a simple model of scikit-learn on the fingerprints of a frozen network.

A fingerprint is mean, spread, maximum and minimum of the layers' features over the atoms, reduced
to its principal components. Widths, penalties and the like are chosen on the validation rows.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from matxfer.errors import OptionError
from matxfer.nn.feature_readout import FeatureReadout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]
    Axes = tuple[Floats, Floats]

METHODS = ("ridge", "kernel_ridge", "gaussian_process", "forest")
#: Principal components kept.
COMPONENTS = 48
#: Above so many rows a Gaussian process' many factorisations take minutes.
GAUSSIAN_PROCESS_ROWS = 2000

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_GAMMAS = (0.003, 0.01, 0.03, 0.1, 0.3)
_TREES, _LEAF = 64, 3
#: A smaller weight of a row is as good as none, and its noise would be without bound.
_LEAST_WEIGHT = 1e-4


def fit_features(
    method: str,
    inputs: Tensor,
    targets: Floats,
    train: NDArray[np.int64],
    val: NDArray[np.int64],
    seed: int = 0,
    axes: Axes | None = None,
    weights: Floats | None = None,
) -> FeatureReadout:
    """Fit a simple model; of its settings the one of the smallest validation error.

    Parameters
    ----------
    method
        See :data:`METHODS`.
    inputs
        Fingerprints (G, D) of all rows, not yet reduced.
    targets
        Normalised targets (G,).
    train, val
        Rows to fit to and to choose on.
    seed
        Of the forest.
    axes
        What :func:`principal_axes` returns for the training rows, if it is known.
    weights
        How much each row counts (G,), in the fit and in the choice; ``None``: all alike.

    Raises
    ------
    ValueError
        If there is no such method, or too many rows for it.
    """
    if method not in METHODS:
        raise OptionError(f"features are {method!r}, but must be one of {METHODS}")
    if method == "gaussian_process" and len(train) > GAUSSIAN_PROCESS_ROWS:
        raise OptionError(
            f"a Gaussian process on {len(train)} rows takes minutes (limit "
            f"{GAUSSIAN_PROCESS_ROWS}); use kernel_ridge, its equal without the marginal likelihood"
        )
    centre, project = axes or principal_axes(inputs, train)
    x = (inputs.double().numpy() - centre) @ project
    fits = {"ridge": _ridge, "kernel_ridge": _kernel_ridge, "forest": _forest}
    fit: Callable[..., Iterator[tuple[str, dict[str, Any]]]] = fits.get(method, _gaussian_process)

    def of(part: NDArray[np.int64]) -> Floats | None:
        return None if weights is None else weights[part]

    best, chosen = np.inf, None
    rows = inputs[torch.from_numpy(val)]
    for kind, arrays in fit(x[train], targets[train], of(train), seed):
        arrays |= {"centre": centre, "project": project}
        readout = FeatureReadout.of_arrays(kind, {n: _tensor(a) for n, a in arrays.items()})
        predicted = readout(rows, None).mean(0).double().numpy()
        error = float(np.average(np.abs(predicted - targets[val]), weights=of(val)))
        if chosen is None or error < best:
            best, chosen = error, readout
    assert chosen is not None
    return chosen


def principal_axes(inputs: Tensor, train: NDArray[np.int64]) -> Axes:
    """Return centre (D,) and axes (D, d), scaled so that components have a mean square of 1."""
    from sklearn.decomposition import PCA

    x = inputs[torch.from_numpy(train)].double().numpy()
    # Each feature counts alike: a constant one would be noise blown up, so it is left out.
    spread = x.std(axis=0)
    weight = np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0.0)
    size = max(min(COMPONENTS, len(x) - 1, x.shape[1]), 1)
    scaled = (x - x.mean(axis=0)) * weight
    if len(x) > x.shape[1]:
        pca = PCA(size, svd_solver="covariance_eigh").fit(scaled)
        components, variances = pca.components_, pca.explained_variance_
    else:
        components, variances = _components_of_few(scaled, size)
    total = np.sqrt(max(float(variances.mean()), 1e-12))
    return x.mean(axis=0), (components * weight).T / total


def _components_of_few(x: Floats, size: int) -> tuple[Floats, Floats]:
    """Return the largest components (d, D) of fewer rows (N, D) than features, and variances (d,).

    X Xᵀ = U S² Uᵀ gives X = U S Vᵀ at a sixth of the time of all of the decomposition. What has no
    variance to within rounding has no direction either: zeros.
    """
    from scipy.linalg import eigh

    n = len(x)
    squares, u = eigh(x @ x.T, subset_by_index=[n - size, n - 1])
    squares, u = squares[::-1], u[:, ::-1]
    there = squares > 1e-12 * max(squares[0], 0.0)
    scale = np.where(there, 1 / np.sqrt(np.where(there, squares, 1.0)), 0.0)
    return (u * scale).T @ x, np.maximum(squares, 0.0) / max(n - 1, 1)


def _tensor(array: Any) -> Tensor:
    tensor = torch.as_tensor(np.ascontiguousarray(array))
    return tensor.int() if not tensor.is_floating_point() else tensor.float()


def _ridge(
    x: Floats,
    y: Floats,
    w: Floats | None,
    seed: int,  # noqa: ARG001
) -> Iterator[tuple[str, dict[str, Any]]]:
    from sklearn.linear_model import Ridge

    for penalty in _PENALTIES:
        model = Ridge(alpha=penalty * len(x)).fit(x, y, w)
        yield "linear", {"weight": model.coef_, "bias": np.array(model.intercept_)}


def _kernel_ridge(
    x: Floats,
    y: Floats,
    w: Floats | None,
    seed: int,  # noqa: ARG001
) -> Iterator[tuple[str, dict[str, Any]]]:
    from sklearn.kernel_ridge import KernelRidge

    mean = float(np.average(y, weights=w))
    few = len(x) > GAUSSIAN_PROCESS_ROWS
    for gamma in _GAMMAS[1:4:2] if few else _GAMMAS:
        for penalty in _PENALTIES[1:5:2] if few else _PENALTIES[:-1]:
            model = KernelRidge(alpha=penalty, kernel="rbf", gamma=gamma).fit(x, y - mean, w)
            yield "kernel", _kernel(x, model.dual_coef_, gamma, mean)


def _gaussian_process(
    x: Floats,
    y: Floats,
    w: Floats | None,
    seed: int,  # noqa: ARG001
) -> Iterator[tuple[str, dict[str, Any]]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    mean = float(np.average(y, weights=w))
    kernel = ConstantKernel(1.0) * RBF(4.0) + _noise(0.05, w)
    with warnings.catch_warnings():
        # A noise at the end of its range is a finding (values without noise), not a failure.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianProcessRegressor(kernel).fit(x, y - mean)
    found = model.kernel_.k1
    gamma = 0.5 / found.k2.length_scale**2
    yield "kernel", _kernel(x, model.alpha_ * found.k1.constant_value, gamma, mean)


def _noise(level: float, w: Floats | None) -> Any:
    """Return noise of a variance σ²/w of each training row: a row that counts twice is two rows."""
    from sklearn.gaussian_process.kernels import WhiteKernel

    if w is None:
        return WhiteKernel(level)

    class RowNoise(WhiteKernel):
        def __init__(
            self,
            noise_level: float = 1.0,
            noise_level_bounds: tuple[float, float] = (1e-5, 1e5),
            scale: Floats | None = None,
        ) -> None:
            super().__init__(noise_level, noise_level_bounds)
            self.scale = scale

        def __call__(self, X: Floats, Y: Floats | None = None, eval_gradient: bool = False) -> Any:
            found = super().__call__(X, Y, eval_gradient)
            if Y is not None:  # other rows than those that were measured have no noise
                return found
            if not eval_gradient:
                return found * self.scale
            return found[0] * self.scale, found[1] * np.asarray(self.scale)[:, None, None]

    return RowNoise(level, scale=1 / np.maximum(w, _LEAST_WEIGHT))


def _kernel(points: Floats, dual: Floats, gamma: float, bias: float) -> dict[str, Any]:
    return {
        "points": points,
        "dual": dual,
        "gamma": np.array(gamma, dtype=float),
        "bias": np.array(bias, dtype=float),
    }


def _forest(
    x: Floats, y: Floats, w: Floats | None, seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    from sklearn.ensemble import RandomForestRegressor

    model = RandomForestRegressor(
        _TREES, min_samples_leaf=_LEAF, max_features=1 / 3, random_state=seed
    )
    trees = [estimator.tree_ for estimator in model.fit(x, y, w).estimators_]
    size = max(tree.node_count for tree in trees)
    arrays = {name: np.zeros((len(trees), size)) for name in ("threshold", "value")}
    arrays |= {n: np.zeros((len(trees), size), dtype=int) for n in ("feature", "left", "right")}
    for k, tree in enumerate(trees):
        own, leaf = np.arange(tree.node_count), tree.children_left < 0
        arrays["threshold"][k, own] = tree.threshold
        arrays["value"][k, own] = tree.value[:, 0, 0]
        arrays["feature"][k, own] = np.where(leaf, 0, tree.feature)
        # A leaf is its own child, so that all trees can be walked together.
        arrays["left"][k, own] = np.where(leaf, own, tree.children_left)
        arrays["right"][k, own] = np.where(leaf, own, tree.children_right)
    yield "forest", arrays
