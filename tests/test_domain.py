"""The domain gap: tests of two samples, importance weights, what a diagnosis says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score

from matxfer.crystal import Crystal
from matxfer.domain.kinds import unseen_elements
from matxfer.domain.structures import (
    chemical_class,
    prototype_name,
    structure_facts,
    vacuum_angstrom,
)
from matxfer.domain.two_sample import (
    FOLDS,
    classifier_auc,
    holm,
    median_distance,
    mmd,
    permuted_labels,
    two_sample_tests,
)
from matxfer.domain.weights import LIMIT, clipped_weights, density_ratio
from matxfer.errors import OptionError


def halves(n):
    return np.arange(n) >= n // 2, np.full(n, -1)


# -- two samples --------------------------------------------------------------------------------
def test_mmd_is_that_of_the_double_loop():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(23, 3))
    label = np.arange(23) % 3 == 0
    width = median_distance(x, rng)
    assert width == pytest.approx(
        np.median([np.linalg.norm(a - b) for k, a in enumerate(x) for b in x[k + 1 :]])
    )
    kernel = lambda a, b: np.exp(-np.sum((a - b) ** 2) / (2 * width**2))  # noqa: E731
    parts = {}
    for name, one, other in (("ss", 0, 0), ("tt", 1, 1), ("st", 0, 1)):
        pairs = [
            kernel(x[i], x[j])
            for i in range(23)
            for j in range(23)
            if i != j and label[i] == one and label[j] == other
        ]
        parts[name] = np.mean(pairs)
    expected = parts["ss"] + parts["tt"] - 2 * parts["st"]
    found = mmd(x, label[:, None].astype(float), rng)
    assert found == pytest.approx([expected], rel=1e-9)


def test_auc_is_that_of_scikit_learn():
    """One fold at a time: the closed form for many labels against an explicit fit."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 2))
    label = rng.random(60) < 0.5
    x[label] += [1.0, 0.0]
    fold = np.arange(60) % FOLDS
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    both = np.column_stack([scaled, scaled**2 - (scaled**2).mean(axis=0)])
    above = total = 0.0
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        model = LinearRegression().fit(both[train], label[train])
        pairs = label[test].sum() * (~label[test]).sum()
        above += pairs * roc_auc_score(label[test], model.predict(both[test]))
        total += pairs
    found = classifier_auc(x, label[:, None].astype(float), fold)
    assert found[0] == pytest.approx(above / total, abs=0.01)  # the ridge is small, not nothing


def test_false_alarms_are_as_frequent_as_the_level_says():
    rng = np.random.default_rng(2)
    label, pair = halves(60)
    p_values = []
    for seed in range(150):
        x = rng.normal(size=(60, 4))
        views = {"all": x, "some": x[:, :2]}
        p_values.append(two_sample_tests(views, label, pair, permutations=49, seed=seed)[0])
    # Uniform, though four tests on dependent views had their say.
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert 1 <= sum(p <= 0.06 for p in p_values) <= 18


@pytest.mark.parametrize("change", ["mean", "width"])
def test_a_shift_is_found(change):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 4))
    label, pair = halves(200)
    x[label] = x[label] + 0.8 if change == "mean" else x[label] * 2
    p, results = two_sample_tests({"x": x}, label, pair, permutations=99)
    assert p == pytest.approx(0.01)
    assert {r.method for r in results} == {"classifier", "mmd"}
    assert all(r.p_adjusted >= r.p_value for r in results)
    assert next(r.statistic for r in results if r.method == "classifier") > 0.7


def test_copies_in_both_tables_neither_hide_nor_fake_a_shift():
    rng = np.random.default_rng(4)
    # Without pairs known, a classifier that has seen the copy guesses the wrong table.
    x = rng.normal(size=(100, 3))
    twice = np.concatenate([x, x])
    label, _ = halves(200)
    pair = np.concatenate([np.arange(100, 200), np.arange(100)])
    p, results = two_sample_tests({"x": twice}, label, pair, permutations=99)
    assert p > 0.5
    assert results[0].statistic == pytest.approx(0.5, abs=0.02)
    # Half of the target are copies, the other half is elsewhere.
    other = np.concatenate([x, x[:50], rng.normal(size=(50, 3)) + 2])
    pair = np.full(200, -1)
    pair[:50], pair[100:150] = np.arange(100, 150), np.arange(50)
    assert two_sample_tests({"x": other}, label, pair, permutations=99)[0] <= 0.02


def test_permutations_keep_pairs_and_numbers():
    rng = np.random.default_rng(5)
    label = np.array([False] * 4 + [True] * 4)
    pair = np.array([4, -1, -1, -1, 0, -1, -1, -1])
    labels = permuted_labels(label, pair, 200, rng)
    assert (labels[:, 0] == label).all()
    assert (labels.sum(axis=0) == 4).all()
    assert (labels[0] + labels[4] == 1).all()
    assert 60 < labels[0, 1:].sum() < 140


def test_holm_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


# -- importance weights -------------------------------------------------------------------------
def gaussians(shift=0.8, width=0.7, n=1500, dims=2, seed=0):
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(n, dims)), rng.normal(size=(n, dims))
    target[:, 0] = shift + width * target[:, 0]
    true = stats.norm.pdf(source[:, 0], shift, width) / stats.norm.pdf(source[:, 0])
    return source, target, true


def test_a_planted_density_ratio_is_recovered():
    source, target, true = gaussians()
    weights = density_ratio(source, target)
    assert np.corrcoef(weights.values, true)[0, 1] > 0.98
    assert np.abs(weights.values - true).mean() < 0.12
    expected = true.sum() ** 2 / (true**2).sum()
    assert weights.effective == pytest.approx(expected, rel=0.1)
    assert weights.usable
    assert weights.cover == pytest.approx(1, abs=0.1)
    # Weighted means of the source are those of the target.
    assert np.average(source[:, 0], weights=weights.values) == pytest.approx(0.8, abs=0.1)
    # Without squares the widths cannot be told apart.
    straight = density_ratio(source, target, squares=False)
    assert np.corrcoef(straight.values, true)[0, 1] < 0.95


def test_no_shift_gives_even_weights():
    source, target, _ = gaussians(0, 1)
    assert density_ratio(source, target).share > 0.95


def test_weights_mend_a_misspecified_model():
    rng = np.random.default_rng(6)
    source, target = rng.normal(0, 1, (1200, 1)), rng.normal(1.2, 0.5, (1200, 1))

    def truth(x):
        return x[:, 0] ** 2 + rng.normal(0, 0.1, len(x))

    y, wanted = truth(source), truth(target)
    weights = density_ratio(source, target)

    def error(sample_weight):
        model = LinearRegression().fit(source, y, sample_weight)
        return np.abs(model.predict(target) - wanted).mean()

    assert weights.usable
    assert error(weights.values) < 0.85 * error(None)


def test_weights_that_are_too_uneven_are_refused():
    source, target, _ = gaussians(shift=3.0, width=0.3, n=400)
    weights = density_ratio(source, target)
    assert not weights.usable
    assert "too uneven" in weights.words() or "covers" in weights.words()
    # Tables that do not overlap at all: all weights are as small, and so even.
    apart = density_ratio(source, target + 60)
    assert not apart.usable
    assert "covers" in apart.words()
    assert density_ratio(*gaussians()[:2]).words().endswith("even enough for importance weights")


def test_weights_are_clipped():
    ratio = np.ones(1000)
    ratio[:2] = 1e6
    weights = clipped_weights(ratio)
    assert weights.values.mean() == pytest.approx(1)
    assert weights.values[0] / weights.values[5] == pytest.approx(LIMIT * ratio.mean())
    assert weights.clipped == pytest.approx(0.002)
    assert clipped_weights(ratio, limit=5.0).effective > weights.effective
    even = clipped_weights(np.full(50, 3.0))
    assert (even.effective, even.share, even.clipped) == (50, 1, 0)


def test_weights_of_too_few_rows():
    with pytest.raises(OptionError, match="3 source"):
        density_ratio(np.zeros((3, 2)), np.zeros((9, 2)))
    with pytest.raises(OptionError, match="2 source features"):
        density_ratio(np.zeros((9, 2)), np.zeros((9, 3)))


# -- what crystals are ----------------------------------------------------------------------------
def cubic(numbers, coords, a=4.0):
    return Crystal(a * np.eye(3), numbers, coords)


PEROVSKITE = [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]


def test_prototypes_are_those_of_the_frame():
    facts = structure_facts(
        [
            cubic([20, 22, 8, 8, 8], PEROVSKITE),
            cubic([20, 22, 8, 7, 9], PEROVSKITE),  # three anions, one frame
            cubic([29], [[0, 0, 0]]),
            cubic([11, 17], [[0, 0, 0], [0.5] * 3]),
        ]
    )
    assert facts.prototype.tolist() == ["ABX3 221", "ABX3 221", "A 221", "AX 221"]
    assert facts.n_primitive.tolist() == [5, 5, 1, 2]
    assert facts.volume_angstrom3 == pytest.approx([64 / 5, 64 / 5, 64, 32])
    assert facts.kind.tolist() == ["oxides", "fluorides", "elements", "chlorides"]
    assert facts.fractions[0, [8, 20, 22]] == pytest.approx([0.6, 0.2, 0.2])
    assert prototype_name("ABX3 221") == "ABX3 in space group 221 (cubic perovskite)"
    assert prototype_name("A2B7 12") == "A2B7 in space group 12"


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [([8, 26], "oxides"), ([9, 8, 26], "fluorides"), ([28, 22], "intermetallics"),
     ([6, 26], "carbides"), ([26], "elements"), ([16, 30], "sulfides")],
)  # fmt: skip
def test_classes(numbers, kind):
    assert chemical_class(np.array(numbers)) == kind


def test_vacuum_is_the_widest_gap_between_planes():
    sheet = Crystal(np.diag([3.0, 3.0, 20.0]), [6, 6], [[0, 0, 0.98], [0.3, 0.6, 0.05]])
    assert vacuum_angstrom(sheet) == pytest.approx(0.93 * 20)
    skewed = Crystal([[3, 0, 0], [0, 3, 0], [10, 0, 20]], [6], [[0, 0, 0]])
    assert vacuum_angstrom(skewed) == pytest.approx(20)


def test_unseen_elements_count_compositions():
    source = [((8, 1), (26, 1)), ((8, 1), (11, 2))] * 5
    target = [((9, 1), (11, 1)), ((9, 2), (26, 1)), ((8, 1), (26, 1)), ((55, 1),)]
    found = unseen_elements(source, target)
    assert found.symbols == ["F", "Cs"]
    assert found.share == pytest.approx(0.75)
    # Two of the compositions with F are in the target, which has 4 of 6; 5 elements in all.
    assert found.p_value == pytest.approx(min(1, 5 * (4 / 6) ** 2))
    assert unseen_elements(source, source[:3]).p_value == 1
