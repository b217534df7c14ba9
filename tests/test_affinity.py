"""Scores of task affinity against slow and explicit versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut, LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsRegressor

from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.errors import OptionError
from matxfer.graph import GraphOptions, build_graph
from matxfer.transfer import affinity
from matxfer.transfer.baselines import ELEMENT_PROPERTIES, composition_features, untrained

N = 40


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(3)
    return rng.normal(size=(N, 6)) * np.array([3.0, 2, 1, 1, 0.5, 0.1]) + 5


@pytest.fixture(scope="module")
def targets(features):
    noise = np.random.default_rng(4).normal(size=N)
    return np.sin(features[:, 0]) + 0.9 * features[:, 2] + 0.3 * noise + 7


@pytest.fixture(scope="module")
def groups(features):
    """Two groups of rows that are near each other, the rest alone."""
    number = np.arange(10, 10 + N)
    for name, row, size in ((3, 0, 3), (70, 20, 2)):
        near = np.argsort(((features - features[row]) ** 2).sum(axis=1))
        number[near[:size]] = name
    assert sorted(np.unique(number, return_counts=True)[1])[-3:] == [1, 2, 3]
    return number


# -- alignment --------------------------------------------------------------------------------
def explicit_alignment(one, other):
    h = np.eye(len(one)) - np.ones((len(one), len(one))) / len(one)
    one, other = h @ one @ h, h @ other @ h
    return np.trace(one @ other) / np.sqrt(np.trace(one @ one) * np.trace(other @ other))


def test_alignment_is_that_of_its_definition(features, targets):
    kernel = affinity.gaussian_kernel(features, 0.1)
    for i, j in ((0, 1), (3, 17)):
        distance = ((features[i] - features[j]) ** 2).sum()
        assert kernel[i, j] == pytest.approx(np.exp(-0.1 * distance), rel=1e-9)
    other = np.outer(targets, targets)
    expected = explicit_alignment(kernel, other)
    assert 0.05 < expected < 0.95
    assert affinity.kernel_alignment(kernel, other) == pytest.approx(expected, rel=1e-10)
    assert affinity.target_alignment(kernel, targets) == pytest.approx(expected, rel=1e-10)


def test_alignment_ignores_offset_and_scale(features, targets):
    kernel = features @ features.T
    moved = 3.0 * (features + 2.0) @ (features + 2.0).T
    first = affinity.target_alignment(kernel, targets)
    assert affinity.target_alignment(moved, 5 - 2 * targets) == pytest.approx(first, rel=1e-9)
    y = np.outer(targets, targets)
    assert affinity.kernel_alignment(y, y) == pytest.approx(1.0)
    assert affinity.kernel_alignment(y, np.ones_like(y)) == 0.0
    assert affinity.target_alignment(np.ones_like(y), targets) == 0.0


# -- neighbours -------------------------------------------------------------------------------
def test_neighbours_against_scikit_learn(features, targets, groups):
    model = KNeighborsRegressor(5)
    alone = cross_val_predict(model, features, targets, cv=LeaveOneOut())
    together = cross_val_predict(model, features, targets, groups=groups, cv=LeaveOneGroupOut())
    found = affinity.nearest_neighbour_residuals(features, targets)
    np.testing.assert_allclose(found, targets - alone, rtol=1e-10)
    found = affinity.nearest_neighbour_residuals(features, targets, groups=groups)
    np.testing.assert_allclose(found, targets - together, rtol=1e-10)
    assert not np.allclose(alone, together)
    one = affinity.nearest_neighbour_residuals(features, targets, neighbours=1)
    assert not np.allclose(one, targets - alone)


def test_few_rows_have_fewer_neighbours():
    x, y = np.arange(3.0)[:, None], np.array([0.0, 3.0, 9.0])
    np.testing.assert_allclose(affinity.nearest_neighbour_residuals(x, y), [-6, -1.5, 7.5])
    with pytest.raises(OptionError, match="one material"):
        affinity.nearest_neighbour_residuals(x, y, groups=np.zeros(3, dtype=int))


# -- ridge ------------------------------------------------------------------------------------
@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_ridge_against_fits_without_each_row(penalty, features, targets, groups):
    """The penalty stays that of all rows, so the identity is exact."""
    model = Ridge(alpha=penalty * N)
    smoother = affinity.Smoother.of_features(features)
    for split, own in ((LeaveOneOut(), None), (LeaveOneGroupOut(), groups)):
        told = cross_val_predict(model, features, targets, groups=own, cv=split)
        found = smoother.residuals(targets, penalty, own)
        np.testing.assert_allclose(found, targets - told, rtol=1e-7, atol=1e-9)


def refitted(kernel, targets, penalty, out):
    """Fit kernel ridge regression with a constant to the other rows; return what it misses by."""
    kept = np.setdiff1d(np.arange(len(targets)), out)
    m = len(kept)
    system = np.zeros((m + 1, m + 1))
    system[:m, :m] = kernel[np.ix_(kept, kept)] + penalty * np.eye(m)
    system[:m, m] = system[m, :m] = 1
    solved = np.linalg.solve(system, np.append(targets[kept], 0))
    return targets[out] - kernel[np.ix_(out, kept)] @ solved[:m] - solved[m]


@pytest.mark.parametrize("penalty", [1e-4, 1e-2])
def test_kernel_ridge_against_fits_without_each_row(penalty, features, targets, groups):
    kernel = affinity.gaussian_kernel(features, 0.1)
    smoother = affinity.Smoother.of_kernel(kernel)
    alone = [refitted(kernel, targets, penalty * N, np.array([i]))[0] for i in range(N)]
    np.testing.assert_allclose(smoother.residuals(targets, penalty), alone, rtol=1e-6)
    together = np.zeros(N)
    for name in np.unique(groups):
        rows = np.flatnonzero(groups == name)
        together[rows] = refitted(kernel, targets, penalty * N, rows)
    found = smoother.residuals(targets, penalty, groups)
    np.testing.assert_allclose(found, together, rtol=1e-6)
    assert not np.allclose(found, smoother.residuals(targets, penalty))


def test_the_kernel_of_features_is_ridge_regression(features, targets):
    one = affinity.Smoother.of_kernel(features @ features.T).residuals(targets, 0.01)
    other = affinity.Smoother.of_features(features).residuals(targets, 0.01)
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_the_best_of_the_grid_is_chosen(features, targets):
    smoother = affinity.Smoother.of_features(features)
    errors = [np.abs(smoother.residuals(targets, p)).mean() for p in affinity.PENALTIES]
    found = np.abs(affinity.ridge_residuals(features, targets)).mean()
    assert found == min(errors) < max(errors)
    each = [affinity.kernel_ridge_residuals(features, targets, gammas=[g]) for g in affinity.GAMMAS]
    errors = [np.abs(r).mean() for r in each]
    found = np.abs(affinity.kernel_ridge_residuals(features, targets)).mean()
    assert found == min(errors) < max(errors)
    assert found < np.abs(affinity.ridge_residuals(features, targets)).mean(), "y is not linear"


# -- evidence ---------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [6, 60])
def test_evidence_is_the_largest_of_the_marginal_likelihood(width, features, targets):
    """Of y ~ N(0, FFᵀ/α + 1/β), searched with a general optimiser; also with more columns."""
    lift = np.random.default_rng(5).normal(size=(6, width))
    x = features if width == 6 else np.tanh(features @ lift / 4)
    f, y = x - x.mean(axis=0), targets - targets.mean()

    def surprise(logs):
        covariance = f @ f.T * np.exp(logs[0]) + np.eye(N) * np.exp(logs[1])
        return -multivariate_normal.logpdf(y, cov=covariance)

    starts = [(a, b) for a in (-6.0, -2.0, 1.0) for b in (-3.0, 0.0)]
    fits = [minimize(surprise, s, method="Nelder-Mead", options={"maxiter": 800}) for s in starts]
    expected = -min(fit.fun for fit in fits) / N
    assert affinity.log_evidence(x, targets) == pytest.approx(expected, abs=1e-5)


def test_evidence_tells_good_features_from_bad(features, targets):
    rng = np.random.default_rng(6)
    good = affinity.log_evidence(features, targets)
    assert affinity.log_evidence(7 * features - 3, targets) == pytest.approx(good, abs=1e-6)
    bad = [affinity.log_evidence(rng.permutation(features), targets) for _ in range(5)]
    assert good > max(bad)


# -- what a source has to beat ------------------------------------------------------------------
def test_composition_features_of_salt_and_iron(table_crystals):
    options = GraphOptions(cutoff_angstrom=4.0)
    packed = PackedGraphs.pack([*(build_graph(c, options) for c in table_crystals), None])
    found = composition_features(packed)
    assert found.shape == (61, 119 + 4 * len(ELEMENT_PROPERTIES))
    assert not found[-1].any()
    assert np.isfinite(found).all()
    fractions, statistics = found[:, :119], found[:, 119:].reshape(61, 4, -1)
    for row, crystal in enumerate(table_crystals):
        z, count = np.unique(crystal.numbers, return_counts=True)
        np.testing.assert_allclose(fractions[row, z], count / count.sum())
        mean, deviation, highest, lowest = statistics[row, :, 0]  # of the atomic number
        scale = np.arange(1, 104).std()
        assert mean == pytest.approx((crystal.numbers.mean() - 52) / scale)
        spread = np.abs(crystal.numbers - crystal.numbers.mean()).mean()
        assert deviation == pytest.approx(spread / scale)
        assert highest - lowest == pytest.approx(np.ptp(crystal.numbers) / scale)


def test_structure_does_not_count_in_the_composition(table_crystals):
    """Rock salt, and CsCl of the same elements, are alike."""
    options = GraphOptions(cutoff_angstrom=4.0)
    salt = table_crystals[0]
    other = Crystal(3.0 * np.eye(3), np.unique(salt.numbers), [[0, 0, 0], [0.5, 0.5, 0.5]])
    one, same, different = composition_features(
        PackedGraphs.pack([build_graph(c, options) for c in (salt, other, table_crystals[1])])
    )
    np.testing.assert_allclose(one, same, atol=1e-12)
    assert np.abs(one - different).max() > 0.5


def test_an_untrained_network_has_the_shape_and_not_the_weights(tiny_model):
    one, same, other = untrained(tiny_model), untrained(tiny_model), untrained(tiny_model, seed=1)
    assert one.backbone.config() == tiny_model.backbone.config()
    assert one.checksum == same.checksum
    assert len({one.checksum, other.checksum, tiny_model.checksum}) == 3
    assert one.elements == tiny_model.elements
    assert not one.heads
