"""Readout ensembles, simple models on fingerprints, spread, intervals and out-of-domain score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor

from matxfer.data.batch import GraphBatch
from matxfer.nn.ensemble import (
    POOLED_PARTS,
    ReadoutEnsemble,
    join_readouts,
    normalised_layers,
    readout_inputs,
)
from matxfer.nn.feature_readout import FeatureReadout
from matxfer.transfer.features import METHODS, fit_features
from matxfer.transfer.uncertainty import NEW_ELEMENT_SCORE, Uncertainty

MULTIPLICITY = torch.tensor([1.0, 3.0, 2.0, 2.0, 1.0])
BATCH = GraphBatch(
    z=torch.tensor([3, 8, 11, 17, 26]), multiplicity=MULTIPLICITY,
    edge_index=torch.zeros(2, 0, dtype=torch.long), edge_vector=torch.zeros(0, 3),
    batch=torch.tensor([0, 0, 1, 1, 2]), num_graphs=3,
)  # fmt: skip


@pytest.fixture
def nodes():
    torch.manual_seed(0)
    return [torch.randn(5, 4) * scale for scale in (1.0, 100.0)]


@pytest.mark.parametrize("kind", POOLED_PARTS)
def test_ensemble_equals_a_loop_over_members_and_atoms(kind, nodes):
    torch.manual_seed(1)
    readout = ReadoutEnsemble(kind, 8, hidden_dim=6, members=3)
    readout.inner_bias.data.normal_()
    readout.outer_bias.data.normal_()
    layers = normalised_layers(nodes)
    found = readout(readout_inputs(kind, layers, BATCH), BATCH)
    assert found.shape == (3, 3)
    for member in range(3):
        inner, outer = readout.inner[member], readout.outer[member]

        def network(x, inner=inner, outer=outer, member=member):
            hidden = x @ inner + readout.inner_bias[member]
            hidden = hidden * torch.sigmoid(hidden)
            return float(hidden @ outer + readout.outer_bias[member])

        for graph in range(3):
            rows = torch.nonzero(BATCH.batch == graph)[:, 0]
            weight = MULTIPLICITY[rows] / MULTIPLICITY[rows].sum()
            if kind == "atomwise":
                expected = sum(w * network(layers[r]) for w, r in zip(weight, rows, strict=True))
            else:
                x, mean = layers[rows], (layers[rows] * weight[:, None]).sum(0)
                spread = ((x - mean) ** 2 * weight[:, None]).sum(0)
                parts = {"mean": mean, "spread": (spread + 1e-6).sqrt(),
                         "highest": x.amax(0), "lowest": x.amin(0)}  # fmt: skip
                expected = network(torch.cat([parts[p] for p in POOLED_PARTS[kind]]))
            assert float(found[member, graph]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "kind", "layers"),
    [
        (("pooled", (0, 1)), ("extrema", (0, 1)), "extrema", (0, 1)),
        (("pooled", (1,)), ("pooled", (0, 1)), "pooled", (0, 1)),
        (("statistics", (0,)), ("pooled", (1,)), "statistics", (0, 1)),
        (("atomwise", (1,)), ("atomwise", (0,)), "atomwise", (0, 1)),
    ],
)
def test_joined_readouts_say_what_each_said(first, second, kind, layers, nodes):
    torch.manual_seed(2)

    def outputs(readout, read):
        inputs = readout_inputs(readout.kind, normalised_layers([nodes[k] for k in read]), BATCH)
        return readout(inputs, BATCH)

    alone = [
        (ReadoutEnsemble(kind, 4 * len(read), hidden_dim=6, members=2), read)
        for kind, read in (first, second)
    ]
    for readout, _ in alone:
        readout.inner_bias.data.normal_()
        readout.outer_bias.data.normal_()
    joint, read = join_readouts(alone)
    assert (joint.kind, read, joint.members) == (kind, layers, 4)
    torch.testing.assert_close(outputs(joint, read), torch.cat([outputs(*one) for one in alone]))


def test_means_over_outputs_do_not_join_means_over_features():
    alone = [(ReadoutEnsemble(kind, 4), (0,)) for kind in ("atomwise", "pooled")]
    assert join_readouts(alone) is None


def test_layers_are_normalised_one_by_one(nodes):
    layers = normalised_layers(nodes)
    scaled = normalised_layers([nodes[0] * 1000, nodes[1]])
    torch.testing.assert_close(scaled, layers, atol=1e-3, rtol=1e-3)
    assert torch.equal(layers[:, 4:], torch.nn.functional.layer_norm(nodes[1], (4,)))


def test_a_crystal_of_equal_atoms_can_be_differentiated():
    x = torch.ones(2, 8, requires_grad=True)
    graphs = GraphBatch(BATCH.z[:2], torch.ones(2), BATCH.edge_index, BATCH.edge_vector,
                        torch.zeros(2, dtype=torch.long), 1)  # fmt: skip
    readout_inputs("statistics", x, graphs).sum().backward()
    assert torch.isfinite(x.grad).all()


# -- simple models ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12))
    y = np.tanh(x[:, 0] / 3) + 0.2 * x[:, 1]
    order = rng.permutation(150)
    return torch.from_numpy(x).float(), (y - y.mean()) / y.std(), order[:90], order[90:120]


@pytest.mark.parametrize("method", METHODS)
def test_simple_models_learn(method, rows):
    x, y, train, val = rows
    test = np.setdiff1d(np.arange(150), [*train, *val])
    readout = fit_features(method, x, y, train, val)
    predicted = readout(x, None).mean(0).numpy()
    assert np.abs(predicted - y)[test].mean() < 0.8 * np.abs(y[test]).mean()
    # What is kept is enough: built anew from its description and arrays it says the same.
    again = FeatureReadout(**readout.to_json())
    again.load_state_dict(readout.state_dict())
    assert torch.equal(again(x, None), readout(x, None))


def test_kernel_equals_the_library_s_gaussian_process(rows):
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    x, y, train, val = rows
    readout = fit_features("gaussian_process", x, y, train, val)
    z = readout.components(x).double().numpy()
    kernel = ConstantKernel(1.0) * RBF(4.0) + WhiteKernel(0.05)
    mean = y[train].mean()
    model = GaussianProcessRegressor(kernel).fit(z[train], y[train] - mean)
    np.testing.assert_allclose(readout(x, None)[0].numpy(), model.predict(z) + mean, atol=2e-2)


def test_trees_equal_the_library_s_forest(rows):
    x, y, train, val = rows
    readout = fit_features("forest", x, y, train, val, seed=3)
    z = readout.components(x).double().numpy()
    model = RandomForestRegressor(64, min_samples_leaf=3, max_features=1 / 3, random_state=3)
    expected = np.stack([t.predict(z) for t in model.fit(z[train], y[train]).estimators_])
    found = readout(x, None).numpy()
    assert found.shape == expected.shape
    # Rounding moves a few points over a threshold.
    assert (np.abs(found - expected) < 1e-4).mean() > 0.98


def test_the_choice_reads_no_test_value(rows):
    x, y, train, val = rows
    other = y.copy()
    other[np.setdiff1d(np.arange(150), [*train, *val])] = np.nan
    first, second = (fit_features("kernel_ridge", x, t, train, val) for t in (y, other))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_too_many_rows_for_a_gaussian_process():
    many = np.arange(2001)
    with pytest.raises(ValueError, match=r"2001 rows takes minutes.*kernel_ridge"):
        fit_features("gaussian_process", torch.zeros(2001, 2), many * 1.0, many, many[:5])


# -- uncertainty ------------------------------------------------------------------------------
def test_laplace_is_the_posterior_of_a_linear_model():
    """Against Bayes' rule for weights with a prior of variance 1/H and noise σ²."""
    torch.manual_seed(0)
    hidden, features = torch.randn(2, 40, 5), torch.randn(40, 7)
    found = Uncertainty.fit(hidden, 0.3, features, [1])
    for member in range(2):
        phi = hidden[member].double().numpy()
        expected = np.linalg.inv(phi.T @ phi / 0.3**2 + 5 * np.eye(5))
        np.testing.assert_allclose(found.covariance[member].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("n", [40, 200])
def test_intervals_hold_what_they_promise(n):
    """Over many draws of heteroscedastic residuals; the spread follows the true one."""
    rng = np.random.default_rng(1)
    coverage, followed = [], []
    for _ in range(60):
        true = rng.uniform(0.2, 2.0, n + 500)
        residual = true * rng.normal(size=n + 500)
        found = Uncertainty(1, 1, 1, 1, 1)
        found.calibrate(residual[:n], true[:n] ** 2)
        deviation = found._deviation(true[n:] ** 2)
        coverage.append((np.abs(residual[n:]) <= found.quantile * deviation).mean())
        followed.append(np.median(deviation / true[n:]))
    assert 0.885 < np.mean(coverage) < 0.94
    assert np.mean(followed) == pytest.approx(1.0, abs=0.15)


def test_too_few_rows_promise_nothing():
    found = Uncertainty(0, 0, 1, 1, 1)
    found.calibrate(np.ones(5), np.ones(5))
    assert found.quantile == np.inf
    assert found.to_json()["quantile"] is None
    assert Uncertainty.from_json(found.to_json()).quantile == np.inf


def test_score_grows_with_the_distance_and_knows_new_elements():
    torch.manual_seed(0)
    train = torch.randn(300, 6)
    found = Uncertainty.fit(None, 1.0, train, [3, 8, 11])
    near = found._distance(found._components(torch.randn(200, 6))) / found.scale
    far = found._distance(found._components(5 + torch.randn(200, 6))) / found.scale
    assert 0.75 < float(near.quantile(0.95)) < 1.25
    assert float(far.min()) > 2
    nodes = [torch.randn(5, 3)]
    found = Uncertainty.fit(None, 1.0, torch.randn(50, 6) * 100, [3, 8, 11, 17])
    score = found.score(nodes, BATCH)
    assert (score[:2] < NEW_ELEMENT_SCORE).all()
    assert score[2] >= NEW_ELEMENT_SCORE  # iron
