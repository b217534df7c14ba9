"""Scales on which targets are fitted: exact inverses, limits, and the choice among them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit

from matxfer.data.properties import Property, apply_transform, invert_transform, limits_of
from matxfer.errors import OptionError
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

#: Two scales of a target that the fingerprints of a random network can tell.
STEADY, BROAD = "debye_temperature_k", "lifetime_k"


def floats(low, high):
    return st.lists(st.floats(low, high, allow_subnormal=False), min_size=1, max_size=20)


# -- inverses ---------------------------------------------------------------------------------
@given(values=floats(-1e12, 1e12))
def test_identity(values):
    x = np.array(values)
    assert np.array_equal(invert_transform("identity", apply_transform("identity", x)), x)
    there = invert_transform("nonnegative", apply_transform("nonnegative", np.abs(x)))
    assert np.array_equal(there, np.abs(x))


@pytest.mark.parametrize("transform", ["log", "log10"])
@given(values=floats(1e-30, 1e30))
def test_logarithms(transform, values):
    x = np.array(values)
    np.testing.assert_allclose(
        invert_transform(transform, apply_transform(transform, x)), x, rtol=1e-13
    )


@given(values=floats(-0.999, 1e30))
def test_log1p(values):
    x = np.array(values)
    there = invert_transform("log1p", apply_transform("log1p", x))
    np.testing.assert_allclose(there, x, rtol=1e-13, atol=1e-15)


@given(
    low=st.floats(-1e6, 1e6),
    width=st.floats(1e-3, 1e6),
    parts=st.lists(st.floats(0, 1), min_size=1),
)
def test_bounded(low, width, parts):
    high = low + width
    transform = f"bounded({low},{high})"
    assert limits_of(transform) == (low, high)
    x = np.clip(low + (high - low) * np.array(parts), low, high)
    there = apply_transform(transform, x)
    # The logit amplifies what rounding left of a small difference of large numbers.
    scale = max(abs(low), abs(high))
    back = invert_transform(transform, there)
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-13 * scale)
    assert np.isfinite(there).all()
    order = np.argsort(x)
    assert (np.diff(there[order]) >= 0).all()


@given(values=floats(-1e6, 1e6))
def test_bounded_predictions_stay_within_the_limits(values):
    back = invert_transform("bounded(-1,0.5)", np.array(values))
    assert ((back >= -1) & (back <= 0.5)).all()


# -- limits -----------------------------------------------------------------------------------
def test_bounded_is_a_logit_of_a_widened_range():
    x = np.array([-0.1, 0.0, 0.1, 0.5])
    expected = logit((x + 0.106) / 0.612)  # 1 % of 0.6 at either end
    np.testing.assert_allclose(apply_transform("bounded(-0.1,0.5)", x), expected, rtol=1e-12)
    assert limits_of("bounded") == (0, 1)
    unit = apply_transform("bounded", np.array([0, 0.5, 1]))
    np.testing.assert_allclose(unit, [-np.log(101), 0, np.log(101)], rtol=1e-12, atol=1e-15)


def test_values_at_the_limits_count_and_values_outside_do_not():
    found = apply_transform("bounded(0,2)", np.array([-1e-9, 0, 2, 2.000001, np.nan]))
    assert np.isfinite(found).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize(
    "transform",
    ["bounded()", "bounded(1)", "bounded(2,1)", "bounded(1,1)", "bounded(a,b)", "bounded(0,inf)",
     "bounded(0,1,2)", "bounded(nan,1)"],
)  # fmt: skip
def test_limits_that_are_none(transform):
    with pytest.raises(OptionError, match=r"write two limits, the lower first.*bounded\(0,0\.5\)"):
        Property("x_ev", "eV", transform)


@pytest.mark.parametrize("transform", ["bounded(LOW,HIGH)", "bounded 0,1", "unbounded", "logit"])
def test_words_that_are_no_transform(transform):
    with pytest.raises(OptionError, match=r"unknown transform|two limits"):
        Property("x_ev", "eV", transform)


# -- in a plugin ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def frame(crystal_frame, tiny_model):
    """Return the table with a broad target, an exponential of what the steady one is linear in."""
    steady = crystal_frame[STEADY].to_numpy()
    standard = (steady - steady.mean()) / steady.std()
    return crystal_frame.assign(
        **{BROAD: np.exp(3 * standard), "part": 1 / (1 + np.exp(-standard))}
    )


@pytest.fixture(scope="module")
def tune(tiny_model, frame):
    def run(target, table=None, **options):
        table = frame if table is None else table
        options = {"strategy": "features", "split_column": "split", **options}
        return finetune(table, target, model=tiny_model, **options)

    return run


def test_a_lognormal_target_is_recognised(tune):
    plugin = tune(BROAD, transform="auto")
    trials = plugin.meta["transform_trials"]
    assert trials["chosen"] == plugin.head.prop.transform == plugin.head.scaler.transform == "log"
    assert plugin.meta["config"]["transform"] == "log"
    assert list(trials["tried"]) == ["identity", "log", "log1p"]
    assert trials["tried"]["log"] == min(trials["tried"].values())
    assert f"identity {trials['tried']['identity']:.4g}" in trials["why"]
    assert trials["left_out"] == {}
    # What was tried is what the strategy of that name does with that transform.
    plain = tune(BROAD)
    assert trials["tried"]["identity"] == pytest.approx(plain.meta["figures"]["val"]["mae"])
    assert "transform_trials" not in plain.meta
    test = [p.meta["figures"]["test"]["mae"] for p in (plugin, plain)]
    assert test[0] < test[1]


def test_a_linear_target_stays_as_it_is(tune):
    plugin = tune(STEADY, transform="auto")
    assert plugin.meta["transform_trials"]["chosen"] == plugin.head.prop.transform == "identity"
    assert len(plugin.meta["transform_trials"]["tried"]) == 3


def test_another_transform_has_to_be_better_by_a_margin(tune, monkeypatch):
    from matxfer.transfer import transforms

    errors = {"identity": 1.0, "log": 0.985, "log1p": 0.99}

    def error_of(task, _):
        return type("Trial", (), {"error": errors[task.prop.transform]})

    monkeypatch.setattr(transforms, "run_strategy", error_of)
    assert tune(BROAD, transform="auto").meta["transform_trials"]["chosen"] == "identity"
    errors["log1p"] = 0.97
    assert tune(BROAD, transform="auto").meta["transform_trials"]["chosen"] == "log1p"


def test_the_domain_holds_all_training_values(tune, frame):
    """A zero has no logarithm, a value below minus one no log1p; test rows say nothing."""
    train = frame.index[frame["split"] == "train"]
    table = frame.copy()
    table.loc[frame.index[frame["split"] == "test"][:2], BROAD] = -5.0
    assert tune(BROAD, table, transform="auto").meta["transform_trials"]["left_out"] == {}
    table.loc[train[:2], BROAD] = 0.0
    trials = tune(BROAD, table, transform="auto").meta["transform_trials"]
    assert trials["left_out"] == {"log": 2}
    assert list(trials["tried"]) == ["identity", "log1p"]
    table.loc[train[0], BROAD] = -2.0
    plugin = tune(BROAD, table, transform="auto")
    assert plugin.meta["transform_trials"] == {
        "chosen": "identity",
        "why": "the only one whose domain holds all values",
        "tried": plugin.meta["transform_trials"]["tried"],
        "left_out": {"log": 2, "log1p": 1},
    }
    assert plugin.meta["data"]["rows"]["train"] == 48


def test_a_property_keeps_its_own_transform_among_those_of_its_shape(tune):
    trials = tune("bulk_modulus_vrh_gpa", transform="auto").meta["transform_trials"]
    assert list(trials["tried"]) == ["identity", "log10", "log1p"]
    assert tune("bulk_modulus_vrh_gpa").head.prop.transform == "log10"


def test_bounded_plugins(tune, frame, tiny_model, tmp_path):
    plain, bounded = tune("part"), tune("part", transform="bounded(0,1)", output=tmp_path / "p")
    values = load_plugin(tmp_path / "p", tiny_model)
    assert values.head.prop.transform == "bounded(0,1)"
    assert bounded.meta["figures"] != plain.meta["figures"]
    assert bounded.meta["figures"]["test"]["mae"] < 0.1
    # Half of the values lie outside these limits: left out of training, and predicted within them.
    half = tune("part", transform="bounded(0.2,0.6)")
    outside = ~frame["part"].between(0.2, 0.6) & (frame["split"] != "test")
    assert half.meta["data"]["rows_excluded"] == {
        "outside the transform's domain": int(outside.sum())
    }
    assert half.meta["figures"]["test"]["mae"] > bounded.meta["figures"]["test"]["mae"]


def test_the_choice_is_said(frame, tiny_model_folder, tmp_path, monkeypatch, capsys):
    import sys

    from matxfer.cli import main

    frame.to_parquet(tmp_path / "t.parquet")
    words = ["finetune", tmp_path / "t.parquet", "--target", BROAD, "--model", tiny_model_folder,
             "--split-column", "split", "--features", "ridge", "--transform", "auto", "-o",
             tmp_path / "p"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, words)])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    trials = json.loads((tmp_path / "p" / "plugin.json").read_text())["transform_trials"]
    assert f"transform: log, {trials['why']}" in out
