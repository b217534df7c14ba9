"""The domain gap: tests of two samples, importance weights, what a diagnosis says."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import roc_auc_score

import matxfer.cli
from matxfer.crystal import Crystal
from matxfer.data.properties import Property
from matxfer.data.table import TableError
from matxfer.domain import diagnose, weights_for
from matxfer.domain.covariate import covariate_shift
from matxfer.domain.effects import (
    class_offsets,
    composition_effect,
    element_offsets,
    robust_slope,
    systematic_effects,
    trimmed_p_value,
)
from matxfer.domain.kinds import name_kinds, unseen_elements
from matxfer.domain.sample import make_sample, read_collection
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
from matxfer.evaluation import evaluate
from matxfer.metrics import regression_metrics
from matxfer.prediction import predict

ENERGY = "formation_energy_ev_per_atom"


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


def facts_of(elements, *, a=4.0, n=60, seed=0):
    """Return facts of rock salts and caesium chlorides of random pairs of elements."""
    rng = np.random.default_rng(seed)
    crystals = []
    for _ in range(n):
        one, other = rng.choice(elements, 2, replace=False)
        crystals.append(cubic([one, other], [[0, 0, 0], [0.5] * 3], a * rng.uniform(0.95, 1.05)))
    return structure_facts(crystals)


def test_differences_are_named():
    metals, anions = [11, 19, 12, 20, 26, 29, 30, 47, 48], [8, 16, 17, 34]
    source = facts_of(metals + anions)
    assert name_kinds(source, facts_of(metals + anions, seed=1)) == []
    found = {k.name: k for k in name_kinds(source, facts_of(metals, a=6.0, seed=1))}
    assert {"class", "volume"} <= set(found)
    assert "intermetallics 100% against" in found["class"].words
    assert found["volume"].words.startswith("more room")
    few = {k.name: k for k in name_kinds(source, facts_of([11, 17], seed=1))}
    assert few["elements"].words == "few elements: Na, Cl only, against 13 elements in the source"
    assert few["prototype"].words.startswith("one type of formula: AX, 100% of")
    slabs = structure_facts(
        [Crystal(np.diag([3.0, 3.0, 20.0]), [11, 17], [[0, 0, 0], [0, 0, 0.1]])] * 60
    )
    kinds = [k.name for k in name_kinds(source, slabs)]
    assert "vacuum" in kinds
    assert "less vacuum" in next(k.words for k in name_kinds(slabs, source) if k.name == "vacuum")


# -- effects --------------------------------------------------------------------------------------
def test_trimmed_p_value_agrees_with_the_interval_of_scipy():
    rng = np.random.default_rng(7)
    for shift in (0.0, 0.2, 0.5):
        x = rng.standard_t(2, size=60) + shift
        p = trimmed_p_value(x)
        assert 0 < p < 1
        # The interval of level 1 - p just touches zero.
        low, high = stats.mstats.trimmed_mean_ci(x, (0.1, 0.1), alpha=p)
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-6)
    assert trimmed_p_value(np.zeros(30)) == 1
    assert trimmed_p_value(np.ones(30)) == 0


def test_robust_slope_against_matrices():
    rng = np.random.default_rng(8)
    x = rng.normal(size=40)
    y = 0.7 * x + rng.normal(size=40) * (1 + x**2)
    slope, error = robust_slope(x, y)
    X = np.column_stack([np.ones(40), x])
    inverse = np.linalg.inv(X.T @ X)
    beta = inverse @ X.T @ y
    hat = np.einsum("ij,jk,ik->i", X, inverse, X)
    meat = X.T @ np.diag(((y - X @ beta) / (1 - hat)) ** 2) @ X
    assert slope == pytest.approx(beta[1])
    assert error == pytest.approx(np.sqrt((inverse @ meat @ inverse)[1, 1]))
    assert robust_slope(np.ones(9), np.arange(9.0)) == (0, 0)


def composed(n=300, seed=9):
    """Return fractions, compositions and a planted value per share of two elements."""
    rng = np.random.default_rng(seed)
    fractions = np.zeros((n, 119))
    for row in fractions:
        chosen = rng.choice([8, 9, 11, 12, 13, 14, 16, 17, 35], 3, replace=False)
        row[chosen] = rng.multinomial(6, [1 / 3] * 3) / 6
    names = [tuple((int(z), int(6 * f[z])) for z in np.flatnonzero(f)) for f in fractions]
    return fractions, names, -0.5 * fractions[:, 35] + 0.3 * fractions[:, 8]


def test_dependence_on_elements_is_found_and_told_apart_from_noise():
    fractions, names, planted = composed()
    noise = np.random.default_rng(10).normal(0, 0.02, 300)
    share, size, p = composition_effect(planted + noise, fractions, names)
    assert share > 0.9
    assert size == pytest.approx(planted.std(), rel=0.1)
    assert p == pytest.approx(1 / 500)
    assert composition_effect(noise, fractions, names)[2] > 0.02
    assert composition_effect(noise, fractions, names)[1] < 0.01
    found = element_offsets(planted + noise, fractions)
    assert found[35][0] == pytest.approx(-0.5, abs=0.1)
    assert found[8][0] == pytest.approx(0.3, abs=0.1)
    assert abs(found[11][0]) < 0.1
    assert found[35][1] == (fractions[:, 35] > 0).sum()
    # The ridge is that of scikit-learn.
    used = sorted(found)
    model = Ridge(alpha=1e-3 * 300).fit(fractions[:, used], planted)
    exact = element_offsets(planted, fractions)
    assert [exact[z][0] for z in used] == pytest.approx(model.coef_ + model.intercept_, abs=1e-6)


def test_false_alarms_of_dependence_on_elements():
    fractions, names, _ = composed(80)
    rng = np.random.default_rng(11)
    p_values = [
        composition_effect(rng.standard_t(3, 80), fractions, names, permutations=99, seed=k)[2]
        for k in range(100)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def effects_of(difference, level, threshold=0.1, reference=None):
    fractions, names, _ = composed(len(difference))
    found = systematic_effects(difference, level, fractions, names, threshold, reference=reference)
    return {e.name: e for e in found}


def test_effects_that_are_sure_and_effects_that_matter():
    rng = np.random.default_rng(12)
    level, noise = rng.normal(0, 2, 300), rng.normal(0, 0.05, 300)
    nothing = effects_of(noise, level)
    assert not any(e.matters for e in nothing.values())
    offset = effects_of(noise + 0.3, level)
    assert [e.name for e in offset.values() if e.matters] == ["offset"]
    assert offset["offset"].value == pytest.approx(0.3, abs=0.02)
    # As sure, but too small to matter.
    small = effects_of(noise + 0.03, level)
    assert small["offset"].p_adjusted < 1e-6
    assert not small["offset"].matters
    scale = effects_of(noise + 0.2 * level, level)
    assert [e.name for e in scale.values() if e.matters] == ["scale"]
    assert scale["scale"].value == pytest.approx(0.2, abs=0.01)
    assert scale["scale"].size == pytest.approx(0.4, abs=0.05)
    planted = composed()[2]
    elements = effects_of(noise + planted - planted.mean(), level)
    assert [e.name for e in elements.values() if e.matters] == ["composition"]
    # A wild value makes no offset.
    wild = noise.copy()
    wild[0] = 1000
    assert not effects_of(wild, level)["offset"].matters


def test_effects_are_counted_against_the_sources_own_errors():
    rng = np.random.default_rng(13)
    fractions, names, planted = composed()
    level = rng.normal(0, 2, 300)
    biased = 0.3 + 0.1 * level + planted + rng.normal(0, 0.05, 300)
    own = 0.3 + 0.1 * level + planted + rng.normal(0, 0.05, 300)
    against = effects_of(biased, level, reference=(own, level, fractions, names))
    assert not any(e.matters for e in against.values())
    assert all(e.matters for e in effects_of(biased, level).values())


def test_classes_that_depart_are_told():
    rng = np.random.default_rng(14)
    kinds = np.array(["oxides"] * 40 + ["bromides"] * 10 + ["carbides"] * 3)
    difference = rng.normal(0, 0.02, 53)
    difference[40:] -= 0.3
    found = class_offsets(difference, kinds, 0.1, float(np.median(difference)))
    assert [(name, n) for name, _, n in found] == [("bromides", 10)]
    assert found[0][1] == pytest.approx(-0.3, abs=0.02)


# -- the whole diagnosis, with a small model ------------------------------------------------------
def made_up(n, families, seed, stretch=1.0):
    """Return a table of random binaries of the elements of the tiny model, as a frame."""
    rng = np.random.default_rng(seed)
    rows = []
    for k in range(n):
        family = families[k % len(families)]
        one, other = rng.choice([3, 8, 11, 12, 17, 26], 2, replace=False)
        a = stretch * rng.uniform(2.7, 3.3)
        if family == "CsCl":
            cell, at = a * np.eye(3), [[0, 0, 0], [0.5, 0.5, 0.5]]
        else:
            cell, at = 0.72 * a * (1 - np.eye(3)), [[0, 0, 0], [0.5, 0.5, 0.5]]
        rows.append(
            {
                "material_id": f"{seed}-{k}",
                "lattice": cell.ravel(),
                "numbers": np.array([one, other]),
                "frac_coords": np.ravel(at),
                "split": ["train", "train", "val", "test"][k % 4],
            }
        )
    return pd.DataFrame(rows)


def with_energies(frame, model, noise, seed=0):
    """Add what the model predicts, with noise: a model that is right up to its own error."""
    crystals = read_collection(frame).crystals
    rng = np.random.default_rng(seed)
    values = predict(crystals, model=model)[ENERGY].to_numpy(float)
    return frame.assign(**{ENERGY: values + rng.normal(0, noise, len(frame))})


@pytest.fixture(scope="module")
def source(tiny_model):
    return with_energies(made_up(160, ["CsCl", "rock salt"], 1), tiny_model, 0.05)


@pytest.fixture(scope="module")
def target(tiny_model):
    return with_energies(made_up(120, ["CsCl", "rock salt"], 2), tiny_model, 0.05, 3)


def test_alike_tables_show_no_gap(source, target, tiny_model):
    found = diagnose(source, target, column=ENERGY, model=tiny_model)
    assert (found.covariate.shift, found.concept.shift) == (False, False)
    assert found.covariate.kinds == []
    assert found.concept.way == "residuals"
    assert found.concept.reference == "held-out rows of the source"
    assert found.concept.own_error == pytest.approx(0.05 * np.sqrt(2 / np.pi), rel=0.25)
    assert found.covariate.weights.share > 0.7
    assert found.verdict.startswith("the structures are alike. No concept shift")


def test_other_structures_are_found_and_named(source, tiny_model):
    other = with_energies(made_up(100, ["CsCl"], 4, stretch=1.3), tiny_model, 0.05)
    found = diagnose(source, other, model=tiny_model)
    assert found.covariate.shift
    names = [k.name for k in found.covariate.kinds]
    assert "volume" in names
    assert "prototype" in names
    assert found.concept.shift is None
    assert found.concept.way == "nothing to compare"
    # The rim is a distance: nearly all of the target lies beyond it, of another half half of it.
    assert (found.covariate.novelty > 1).mean() > 0.5
    worst = found.covariate.farthest[0]
    assert worst["novelty"] == pytest.approx(found.covariate.novelty.max())
    assert worst["id"].startswith("4-")


def test_unseen_elements_are_a_shift(source, target, tiny_model):
    iron = [np.isin(26, n).any() for n in target.numbers]
    without = source[[26 not in n for n in source.numbers]]
    found = diagnose(without, target[iron], model=tiny_model)
    assert found.covariate.shift
    assert found.covariate.unseen.symbols == ["Fe"]
    assert found.covariate.unseen.share == 1
    assert "elements unseen in the source: Fe" in found.verdict
    assert found.covariate.farthest[0]["unseen_elements"] == ["Fe"]
    assert diagnose(source, target, model=tiny_model).covariate.unseen.symbols == []


def test_other_rules_are_found(source, target, tiny_model):
    """Pure concept shifts of three kinds on the same kind of structures."""
    oxides = np.array([8 in n for n in target.numbers])
    changes = {
        "offset": target[ENERGY] + 0.2,
        "scale": 1.2 * target[ENERGY],
        "composition": target[ENERGY] - 0.4 * oxides,
    }
    for name, values in changes.items():
        found = diagnose(source, target.assign(**{ENERGY: values}), column=ENERGY, model=tiny_model)
        assert (found.covariate.shift, found.concept.shift) == (False, True)
        assert name in [e.name for e in found.concept.effects if e.matters]
    assert found.concept.elements["O"][0] == pytest.approx(-0.75, abs=0.35)
    assert found.concept.classes[0][0] == "oxides"
    assert "oxides -0.4" in found.verdict
    tiny = target.assign(**{ENERGY: target[ENERGY] + 0.004})
    assert diagnose(source, tiny, column=ENERGY, model=tiny_model).concept.shift is False


def test_the_same_structures_are_compared_directly(source, tiny_model):
    noise = np.random.default_rng(5).normal(0, 0.01, len(source))
    other = source.assign(band_gap_hse_ev=1.2 * source[ENERGY] + noise + 1)
    # Ids and structures name a material: either is enough.
    anonymous = other.drop(columns="material_id")
    options = {"column": "band_gap_hse_ev", "source_column": ENERGY, "model": tiny_model}
    for frame in (other, anonymous):
        found = diagnose(source, frame, **options)
        assert found.covariate.shift is False
        assert found.covariate.copies["shared"] == found.covariate.n_target
        assert found.concept.way == "same structures"
        assert found.concept.shift is True
        assert found.concept.n == len(source)
        assert "a scale of 1.2" in found.concept.words
    equal = diagnose(source, source, column=ENERGY, model=tiny_model)
    assert (equal.covariate.shift, equal.concept.shift, equal.concept.mae) == (False, False, 0)


def test_a_quantity_that_the_model_does_not_know(source, target, tiny_model):
    predicted = predict(read_collection(target).crystals, model=tiny_model)[ENERGY].to_numpy(float)
    rng = np.random.default_rng(6)
    monotone = target.assign(hardness_gpa=np.exp(predicted))
    found = diagnose(source, monotone, column="hardness_gpa", model=tiny_model)
    assert found.concept.way == "other quantity"
    assert found.concept.source == ENERGY
    assert found.concept.maps[ENERGY]["spearman"] == pytest.approx(1)
    assert found.concept.maps[ENERGY]["monotone"] > found.concept.maps[ENERGY]["linear"]
    assert found.concept.shift is False
    unrelated = target.assign(hardness_gpa=rng.normal(size=len(target)))
    found = diagnose(source, unrelated, column="hardness_gpa", model=tiny_model)
    assert found.concept.shift is True
    assert found.concept.maps[ENERGY]["linear"] < 0.1
    # Where the source has such values, a model of them is made.
    known = source.assign(hardness_gpa=source[ENERGY] * 3)
    shifted = target.assign(hardness_gpa=target[ENERGY] * 3 + 2)
    same = target.assign(hardness_gpa=target[ENERGY] * 3)
    for frame, expected in ((shifted, True), (same, False)):
        found = diagnose(known, frame, column="hardness_gpa", model=tiny_model)
        assert found.concept.way == "residuals"
        assert "kernel ridge" in found.concept.reference
        assert found.concept.shift is expected


def test_beyond_the_source_nothing_is_decided(source, tiny_model):
    far = with_energies(made_up(60, ["CsCl"], 7, stretch=1.9), tiny_model, 0.05)
    far[ENERGY] += 1
    found = diagnose(source, far, column=ENERGY, model=tiny_model)
    assert found.covariate.shift
    assert found.concept.shift is None
    assert found.concept.words.startswith("it cannot be told")
    assert found.to_json()["concept_shift"] is None


def test_random_halves_show_no_gap(source, tiny_model):
    collection = read_collection(source)
    sample = make_sample(tiny_model, collection, np.arange(len(collection)), (0, 3))
    found = 0
    for seed in range(12):
        order = np.random.default_rng(seed).permutation(len(sample))
        one, other = sample.take(order[:80]), sample.take(order[80:])
        unseen = unseen_elements(one.compositions, other.compositions)
        found += covariate_shift(one, other, unseen, permutations=199, seed=seed).shift
    assert found <= 1


def test_near_copies_are_one_material(source, tiny_model):
    """A relaxed, rotated or doubled cell is a copy; it counts once, and says so."""
    # One of each composition: all else is no copy.
    everything = read_collection(source)
    first = list(dict(zip(everything.compositions, everything.crystals, strict=True)).values())
    n = len(first)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    moved = [
        Crystal(1.0002 * c.lattice @ turn, c.numbers, c.frac_coords, id=f"moved-{k}")
        for k, c in enumerate(first)
    ]
    found = diagnose([*first, *moved], first, model=tiny_model)
    assert found.covariate.copies == {"source": n, "target": 0, "shared": n}
    assert found.covariate.shift is False


def test_options_change_what_is_compared(source, target, tiny_model):
    base = diagnose(source, target, column=ENERGY, model=tiny_model).to_json()
    assert {t["view"] for t in base["covariate"]["tests"]} == {"layer 0", "layer 1", "layer 3"}
    one = diagnose(source, target, model=tiny_model, layers=[2]).to_json()
    assert {t["view"] for t in one["covariate"]["tests"]} == {"layer 2"}
    few = diagnose(source, target, model=tiny_model, sample=50)
    assert (len(few.source), len(few.target)) == (50, 50)
    again = diagnose(source, target, model=tiny_model, sample=50)
    assert few.to_json() == again.to_json()
    other = diagnose(source, target, model=tiny_model, sample=50, seed=1)
    assert few.to_json() != other.to_json()
    renamed = source.rename(columns={"split": "part"})
    unknown = diagnose(renamed, target, column=ENERGY, model=tiny_model)
    assert "may have been fitted" in unknown.concept.reference
    told = diagnose(renamed, target, column=ENERGY, model=tiny_model, split_column="part")
    assert told.concept.own_error == base["concept"]["own_error"]
    # Without values of the source there is the model's card, and this one is silent.
    bare = source.drop(columns=ENERGY)
    assert diagnose(bare, target, column=ENERGY, model=tiny_model).concept.own_error is None


def test_bad_options_and_tables(source, target, tiny_model):
    with pytest.raises(TableError, match="no column 'nothing_ev'"):
        diagnose(source, target, column="nothing_ev", model=tiny_model)
    with pytest.raises(OptionError, match=r"layers are \[9\]"):
        diagnose(source, target, layers=[9], model=tiny_model)
    with pytest.raises(OptionError, match="sample is 3"):
        diagnose(source, target, sample=3, model=tiny_model)
    with pytest.raises(OptionError, match="permutations"):
        diagnose(source, target, permutations=10, model=tiny_model)
    with pytest.raises(TableError, match="at least 10 are needed"):
        diagnose(source, target[:5], model=tiny_model)
    copies = pd.concat([target[:3]] * 10)
    with pytest.raises(OptionError, match="the target has 3 distinct"):
        diagnose(source, copies, model=tiny_model)
    broken = target.copy()
    broken.at[0, "numbers"] = np.array([11, 200])
    assert diagnose(source, broken, model=tiny_model).unread == 1


def test_command(source, target, tiny_model_folder, tmp_path, monkeypatch, capsys):
    source.to_parquet(tmp_path / "source.parquet")
    target.assign(**{ENERGY: target[ENERGY] + 0.5}).to_parquet(tmp_path / "target.parquet")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["matxfer", "shift", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            matxfer.cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    tables = (tmp_path / "source.parquet", tmp_path / "target.parquet")
    model = ("--model", tiny_model_folder, "--target", ENERGY)
    code, out, _ = run(*tables, *model, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["covariate_shift"], found["concept_shift"]) == (False, True)
    assert found["concept"]["effects"]["offset"]["value"] == pytest.approx(0.5, abs=0.05)
    picture = tmp_path / "gap.png"
    code, out, _ = run(*tables, *model, "--figure", picture, "--layers", "0,3")
    assert code == 0
    assert "concept shift: yes (residuals)" in out
    assert "an offset of +0.49" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(tmp_path / "none.parquet", tables[1])
    assert code == 2
    assert "none.parquet" in err


# -- weights in an evaluation ---------------------------------------------------------------------
def test_weighted_metrics_are_those_of_repeated_rows():
    rng = np.random.default_rng(15)
    truth, found = rng.uniform(1, 9, 20), rng.uniform(1, 9, 20)
    times = rng.integers(0, 4, 20)
    for prop in (Property("x_ev", "eV"), Property("x_gpa", "GPa", transform="log10")):
        weighted = regression_metrics(truth, found, prop, times.astype(float))
        repeated = regression_metrics(np.repeat(truth, times), np.repeat(found, times), prop)
        assert weighted.pop("n") == (times > 0).sum()
        repeated.pop("n")
        assert weighted == pytest.approx(repeated)


def test_an_evaluation_is_weighed_for_a_target(tiny_model, tiny_model_folder, tmp_path,
                                               monkeypatch, capsys):  # fmt: skip
    """Errors of 0.5 on one family and 0.1 on the other; the target is of the other."""
    table = made_up(240, ["CsCl", "rock salt"], 8)
    signs = np.where(np.random.default_rng(0).random(240) < 0.5, 1, -1)
    size = np.where(np.arange(240) % 2 == 0, 0.5, 0.1)
    exact = predict(read_collection(table).crystals, model=tiny_model)[ENERGY].to_numpy(float)
    table[ENERGY] = exact + signs * size
    target = made_up(120, ["rock salt"], 9)
    found = evaluate(table, ENERGY, model=tiny_model, weigh=weights_for(target))
    assert found["mae"] == pytest.approx(0.3, abs=1e-4)
    assert found["weighted"]["mae"] < 0.2
    assert found["weighted"]["weights"]["usable"]
    assert found["weighted"]["n"] == 240
    assert "weighted" not in evaluate(table, ENERGY, model=tiny_model)
    far = made_up(60, ["CsCl"], 10, stretch=2.0)
    with pytest.warns(UserWarning, match="<data frame>: "):
        evaluate(table, ENERGY, model=tiny_model, weigh=weights_for(far))
    # The same on the command line.
    table.to_parquet(tmp_path / "table.parquet")
    target.to_parquet(tmp_path / "target.parquet")
    words = ["evaluate", tmp_path / "table.parquet", "--target", ENERGY, "--model",
             tiny_model_folder, "--weights-for", tmp_path / "target.parquet"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, words)])
    with pytest.raises(SystemExit):
        matxfer.cli.main()
    out = capsys.readouterr().out
    assert f"MAE {found['weighted']['mae']:.4g} eV/atom" in out
    assert f"as good as {found['weighted']['weights']['effective_rows']:.0f} rows" in out


# -- with the real model --------------------------------------------------------------------
@pytest.mark.data
def test_another_correction_scheme_is_found(shared_data):
    torch.set_num_threads(1)
    columns = ["material_id", "lattice", "numbers", "frac_coords", ENERGY, "split"]
    frame = pd.read_parquet(shared_data / "mp_formation_energy.parquet", columns=columns)
    held = frame[frame.split == "test"].sample(300, random_state=0)
    source = pd.concat([frame.sample(600, random_state=0), held]).drop_duplicates("material_id")
    wbm = shared_data / "wbm_formation_energy.parquet"
    found = diagnose(source, wbm, column=ENERGY, sample=300)
    assert (found.covariate.shift, found.concept.shift) == (True, True)
    matters = [e.name for e in found.concept.effects if e.matters]
    assert "composition" in matters
    # The newer scheme corrects selenides and tellurides, and sulfides less.
    symbols = found.concept.elements
    assert symbols["Se"][0] < -0.15
    assert symbols["Te"][0] < -0.1
    assert symbols["S"][0] > 0.1


@pytest.mark.data
def test_another_level_of_theory_is_a_concept_shift_alone(shared_data):
    torch.set_num_threads(1)
    frame = pd.read_parquet(shared_data / "mp_band_gap_multifidelity.parquet")
    frame = frame[frame.band_gap_pbe_ev.notna() & frame.band_gap_gllbsc_ev.notna()]
    options = {"column": "band_gap_gllbsc_ev", "source_column": "band_gap_pbe_ev"}
    found = diagnose(frame, frame, **options, sample=200)
    assert (found.covariate.shift, found.concept.shift) == (False, True)
    assert found.concept.way == "same structures"
    assert {e.name: e for e in found.concept.effects}["offset"].value > 1
