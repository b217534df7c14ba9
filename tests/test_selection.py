"""Source selection: what is ranked, what is refused, and a planted negative transfer."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsRegressor

from matxfer.data.copies import materials
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.errors import OptionError
from matxfer.files import FormatError
from matxfer.model import load_model
from matxfer.pretraining.config import read_config
from matxfer.pretraining.run import pretrain
from matxfer.transfer.activations import Activations
from matxfer.transfer.baselines import composition_features
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.features import principal_axes
from matxfer.transfer.finetune import finetune
from matxfer.transfer.negative import _without_test_rows, checked, composition_error
from matxfer.transfer.plugin import load_plugin
from matxfer.transfer.ranking import Source, Verdict, mean_and_spread, ranked, useless_skill
from matxfer.transfer.scoring import Scored, score_layers
from matxfer.transfer.selection import candidates, rank_sources
from matxfer.transfer.strategies import run_strategy
from matxfer.transfer.task import make_task

TARGET = "debye_temperature_k"


# -- a planted source, another with shuffled labels, and a target --------------------------------
SPECIES = np.array([3, 8, 9, 11, 12, 13, 16, 17, 19, 20, 22, 26])
FCC = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def planted(n, seed):
    """Return n crystals of two elements in three structures, and a rule that binds both.

    h = (c_a - c_b)² exp(2 - d), with a charge c of each element and the distance d of a and b.
    """
    charge = dict(zip(SPECIES, np.random.default_rng(0).normal(size=len(SPECIES)), strict=True))
    rng, rows = np.random.default_rng(seed), []
    for k in range(n):
        a, b = rng.choice(SPECIES, 2, replace=False)
        size, kind = rng.uniform(3.6, 5.6), rng.integers(3)
        if kind == 0:  # rock salt
            cell, numbers, d = size * np.eye(3), [a] * 4 + [b] * 4, size / 2
            frac = np.concatenate([FCC, FCC + np.array([0.5, 0, 0])])
        elif kind == 1:  # CsCl
            cell, numbers, d = 0.62 * size * np.eye(3), [a, b], 0.62 * size * 0.75**0.5
            frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
        else:  # zinc blende
            cell, numbers, d = 0.5 * size * (1 - np.eye(3)), [a, b], size * 0.1875**0.5
            frac = np.array([[0, 0, 0], [0.25, 0.25, 0.25]])
        rows.append(
            {
                "material_id": f"p{seed}-{k}",
                "lattice": cell.ravel(),
                "numbers": np.array(numbers),
                "frac_coords": frac.ravel(),
                "split": (["train"] * 8 + ["val", "test"])[k % 10],
                "rule": (charge[a] - charge[b]) ** 2 * np.exp(2 - d),
            }
        )
    return pd.DataFrame(rows)


def pretrained(folder, frame, labels):
    """Pretrain a small network on labels, in seconds; return its folder."""
    folder.mkdir()
    frame.drop(columns="rule").assign(band_gap_ev=labels).to_parquet(folder / "table.parquet")
    config = {
        "name": folder.name,
        "sources": [{"table": "table.parquet", "targets": ["band_gap_ev"],
                     "split_column": "split"}],
        "network": {"n_layers": 2, "node_dim": 24, "edge_dim": 12, "basis_size": 10},
        "training": {"epochs": 20, "batch_size": 32, "learning_rate": 4e-3, "fisher_samples": 8},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "seed": 1,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    model = folder.parent / "models" / folder.name
    pretrain(read_config(path), model, run_folder=folder / "run")
    return model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return the folder of two models: ``good``, and ``shuffled``, whose labels are no one's."""
    root, frame = tmp_path_factory.mktemp("sources"), planted(240, 1)
    pretrained(root / "good", frame, frame["rule"])
    pretrained(root / "shuffled", frame, np.random.default_rng(5).permutation(frame["rule"]))
    return root / "models"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Return the path of a table of other crystals with a property that follows from the rule."""
    frame = planted(120, 2)
    frame[TARGET] = 200 + 150 * np.sqrt(frame["rule"])
    path = tmp_path_factory.mktemp("mine") / "mine.parquet"
    frame.drop(columns="rule").to_parquet(path)
    return path


@pytest.fixture(scope="module")
def ranking(sources, mine):
    return rank_sources(mine, TARGET, [sources], split_column="split")


@pytest.fixture(scope="module")
def automatic(sources, mine, tmp_path_factory):
    """Return what ``--model auto`` makes of the two."""
    folder = tmp_path_factory.mktemp("plugins") / "own"
    finetune(
        mine, TARGET, folder, model="auto", models=[sources / "shuffled", sources / "good"],
        split_column="split", epochs=20,
    )  # fmt: skip
    return folder


def test_the_shuffled_source_is_refused_by_name(ranking):
    assert [s.name for s in ranking.sources] == ["good", "shuffled"]
    good, shuffled = ranking.sources
    assert ranking.best is good
    assert list(ranking.refused) == ["shuffled"]
    assert "learnt nothing" in ranking.refused["shuffled"]
    assert good.verdict is Verdict.HELPS
    lowest = min(b.error for b in ranking.baselines)
    assert good.error < 0.7 * lowest
    assert shuffled.error > 0.9 * lowest, "its features are of no use either"
    assert {b.name for b in ranking.baselines} == {"composition", "untrained, shape of good"}
    assert ranking.rows == ranking.of_rows == 96


def test_auto_uses_the_good_source_and_says_whom_it_refused(automatic, sources):
    plugin = load_plugin(automatic, load_model(sources / "good"))
    assert plugin.meta["base"]["name"] == "good"
    found = plugin.meta["sources"]
    assert found["chosen"] == "good"
    verdicts = {s["name"]: s["verdict"] for s in found["sources"]}
    assert verdicts == {"good": "helps", "shuffled": "negative transfer expected"}
    transfer = plugin.meta["transfer"]
    assert not transfer["negative"]
    assert transfer["transferred"] == min(t["val_mae"] for t in plugin.meta["trials"])
    assert "scratch" not in transfer


def test_with_no_good_source_the_network_is_trained_from_scratch(sources, mine):
    plugin = finetune(
        mine, TARGET, model="auto", models=[sources / "shuffled"], split_column="split", epochs=3
    )
    assert plugin.meta["config"]["strategy"] == "scratch"
    assert plugin.meta["sources"]["chosen"] is None
    assert plugin.depth == 0
    with pytest.raises(OptionError, match=r"expected of every model \(shuffled: .*scratch"):
        finetune(
            mine, TARGET, model="auto", models=[sources / "shuffled"], split_column="split",
            freeze=2,
        )  # fmt: skip
    with pytest.raises(OptionError, match="nothing is transferred"):
        finetune(mine, TARGET, model="auto", strategy="scratch", split_column="split")


def test_a_bad_source_that_was_named_is_told(sources, mine):
    """The plugin is no better than the composition alone on validation rows: scratch is tried."""
    one, other = (
        finetune(mine, TARGET, model=sources / name, split_column="split", epochs=8)
        for name in ("good", "shuffled")
    )
    assert not one.meta["transfer"]["negative"]
    transfer = other.meta["transfer"]
    lowest = min(transfer["composition"], transfer["untrained"])
    assert transfer["negative"] == (transfer["transferred"] >= lowest)
    assert transfer["negative"]
    assert transfer["scratch"] == other.meta["trials"][-1]["val_mae"]
    assert "scratch" in other.meta["trials"][-1]["tried"]
    errors = [t["val_mae"] for t in other.meta["trials"]]
    assert other.meta["figures"]["val"]["mae"] == pytest.approx(min(errors))
    assert one.meta["transfer"]["composition"] == transfer["composition"]


def test_real_weights_in_random_order_are_refused(shared_data, tmp_path):
    path = shared_data / "small_tasks" / "mp_phonons.parquet"
    good = load_model("mp-base-strict")
    mixed = copy.deepcopy(good)
    order = torch.Generator().manual_seed(0)
    for weights in mixed.backbone.parameters():
        weights.copy_(weights.flatten()[torch.randperm(weights.numel(), generator=order)]
                      .view_as(weights))  # fmt: skip
    mixed.card = {**good.card, "name": "mixed"}
    mixed.save(tmp_path / "mixed")
    found = rank_sources(
        path, "log_last_phdos_peak_per_cm", [tmp_path / "mixed", good], split_column="split_0",
        most_rows=150,
    )  # fmt: skip
    assert found.best is not None
    assert found.best.name == "mp-base-strict"
    assert list(found.refused) == ["mixed"]
    assert "which needs no pretraining" in found.refused["mixed"]


# -- judging ------------------------------------------------------------------------------------
def scores_of(errors):
    """Return scores with these errors by row."""
    return Scored((0,), np.array(errors, float), {}, {"0": {"kernel_ridge": 1.0}})


def judged(source, *baselines, group=None):
    """Return the verdict on errors of a source against those of baselines."""
    known = [Source(f"b{k}", scores_of(e), None) for k, e in enumerate(baselines)]
    one = Source("one", scores_of(source), None, tuple(b.name for b in known))
    group = np.arange(len(source)) if group is None else group
    return ranked([one], known, group)[0][0]


def test_the_best_baseline_has_to_be_beaten_for_sure():
    rng = np.random.default_rng(2)
    base = rng.uniform(0.5, 1.5, 50)
    noise = 0.2 * rng.normal(size=50)
    noise -= noise.mean()
    spread = noise.std(ddof=1) / 50**0.5
    for gain, verdict in ((3, "helps"), (1, "no clear gain"), (-0.1, "negative transfer expected")):
        found = judged(base - gain * spread + noise, base, base + 5)
        assert found.verdict == verdict
        assert found.gain == pytest.approx(gain * spread)
        assert found.gain_spread == pytest.approx(spread)
        assert found.against == "b0"
    assert judged(base, base).verdict is Verdict.NEGATIVE, "as good is not better"


def test_copies_are_no_independent_evidence():
    """What four rows say, said five times each, is as sure as once."""
    values = np.array([1.0, 3.0, 2.0, 6.0])
    mean, spread = mean_and_spread(values, np.arange(4))
    assert (mean, spread) == pytest.approx((3.0, values.std(ddof=1) / 2))
    again, group = np.repeat(values, 5), np.repeat([7, 1, 0, 3], 5)
    assert mean_and_spread(again, group) == pytest.approx((mean, spread))
    assert mean_and_spread(again, np.arange(20))[1] < 0.6 * spread


def test_only_rows_that_all_can_use_are_compared():
    base, source = np.ones(30), np.full(30, 0.5)
    source[:10] = np.nan
    base[:10] = 100.0
    found = judged(source, base)
    assert (found.error, found.gain) == (0.5, 0.5)


def test_refused_models_come_last():
    base = np.ones(20)
    known = [Source("b", scores_of(base), None)]
    errors = {"poor": 0.9, "none": 1.1, "best": 0.4, "worst": 1.2}
    made = [Source(n, scores_of(e * base), None, ("b",)) for n, e in errors.items()]
    order, baselines = ranked(made, known, np.arange(20))
    assert [s.name for s in order] == ["best", "poor", "none", "worst"]
    assert baselines[0].error == 1.0


def test_what_a_card_says_of_its_own_held_out_rows(tiny_model):
    model = copy.copy(tiny_model)

    def said(**card):
        model.card = card
        return useless_skill(model)

    bad, good = {"test": {"r2": -0.2}}, {"test": {"r2": 0.3}}
    assert said() == ""
    assert "band_gap_ev -0.20" in said(figures={"band_gap_ev": bad})
    assert said(figures={"band_gap_ev": bad, "other": good}) == ""
    assert "0.00" in said(figures={"band_gap_ev": {"test": {"r2": None}, "val": {"r2": 0.0}}})
    denoised = [{"table": "x", "denoise_angstrom": 0.1}]
    assert said(figures={"band_gap_ev": bad}, data=denoised) == ""
    assert said(figures={"band_gap_ev": bad}, data=[{"table": "x", "forces": "f"}]) == ""


# -- scores ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def task(tiny_model, crystal_table):
    """A task that is fitted on a logarithmic scale."""
    data = read_property_table(crystal_table, ["bulk_modulus_vrh_gpa"], split_column="split")
    graphs = graph_store(data.crystals, tiny_model.backbone.graph_options).graphs
    kept = Activations(tiny_model, graphs)
    return make_task(tiny_model, data, "bulk_modulus_vrh_gpa", graphs, kept, None)


def test_errors_are_in_the_unit_of_the_target(task):
    rows = task.parts["train"]
    found = score_layers(task, None, np.arange(len(task.values)))
    inputs = task.inputs("statistics", (2,))
    centre, project = principal_axes(inputs, rows)
    x = (inputs[torch.from_numpy(rows)].double().numpy() - centre) @ project
    logs = np.log10(task.values[rows])
    told = cross_val_predict(KNeighborsRegressor(5), x, logs, cv=LeaveOneOut())
    expected = np.abs(10**told - task.values[rows]).mean()
    assert found.by_layers["2"]["neighbours"] == pytest.approx(expected, rel=1e-4)
    assert list(found.by_layers) == ["0", "1", "2", "3", "0,1,2,3"]
    best = min(found.by_layers.values(), key=lambda s: s["kernel_ridge"])
    assert np.nanmean(found.errors) == pytest.approx(best["kernel_ridge"])
    assert found.scores["kernel_ridge"] == best["kernel_ridge"]
    assert found.scores["alignment"] == max(s["alignment"] for s in found.by_layers.values())
    assert np.isnan(found.errors[task.parts["val"]]).all()


def test_the_difference_from_a_prediction_counts(task):
    """Here the base's prediction is random, so that the difference is harder to learn."""
    own = np.arange(len(task.values))
    plain = score_layers(task, None, own)
    other = score_layers(task, task.source(FinetuneConfig()), own)
    assert other.scores["kernel_ridge"] != plain.scores["kernel_ridge"]
    assert other.scores["log_evidence"] != plain.scores["log_evidence"]


def test_composition_errors_against_scikit_learn(task):
    rows, features = task.parts, torch.from_numpy(composition_features(task.graphs))
    centre, project = principal_axes(features, rows["train"])
    x, y = (features.numpy() - centre) @ project, np.log10(task.values)
    errors = []
    for gamma, penalty in product((0.003, 0.01, 0.03, 0.1, 0.3), (1e-4, 1e-3, 1e-2, 0.1, 1.0)):
        model = KernelRidge(alpha=penalty, kernel="rbf", gamma=gamma)
        mean = y[rows["train"]].mean()
        told = model.fit(x[rows["train"]], y[rows["train"]] - mean).predict(x) + mean
        error = np.abs(10**told - task.values)
        chosen_by = np.abs(told - y)[rows["val"]].mean()
        errors.append((chosen_by, error[rows["val"]].mean(), error[rows["test"]].mean()))
    _, val, test = min(errors)
    assert composition_error(task) == pytest.approx(val, rel=1e-3)
    assert composition_error(task, "test") == pytest.approx(test, rel=1e-3)


# -- what is ranked -------------------------------------------------------------------------------
def plain(ranking):
    """Return a ranking as JSON without its times."""
    found = ranking.to_json()
    for each in [found, *found["sources"], *found["baselines"]]:
        del each["seconds"]
    return json.dumps(found, sort_keys=True)


def test_validation_and_test_rows_are_not_looked_at(tiny_model, crystal_frame):
    """Other values and structures there change nothing."""
    other = crystal_frame.copy()
    held = (other["split"] != "train").to_numpy()
    other.loc[held, TARGET] = np.random.default_rng(1).normal(size=held.sum())
    other["frac_coords"] = [
        f + 0.01 if h else f for f, h in zip(other["frac_coords"], held, strict=True)
    ]
    other["numbers"] = [
        np.full_like(z, 26) if h else z for z, h in zip(other["numbers"], held, strict=True)
    ]
    one, same = (
        rank_sources(frame, TARGET, [tiny_model], split_column="split")
        for frame in (crystal_frame, other)
    )
    assert plain(one) == plain(same)
    other.loc[~held, TARGET] += np.random.default_rng(1).normal(size=(~held).sum())
    assert plain(rank_sources(other, TARGET, [tiny_model], split_column="split")) != plain(one)


def test_options_change_the_ranking(tiny_model, crystal_frame):
    def errors(**options):
        found = rank_sources(crystal_frame, options.pop("target", TARGET), [tiny_model], **options)
        return found.sources[0].error, found.rows

    first = errors(split_column="split")
    assert first == errors(split_column="split")
    assert errors()[0] != first[0]
    assert errors(seed=1)[0] != errors()[0]
    few, rows = errors(split_column="split", most_rows=20)
    assert (rows, few != first[0]) == (20, True)
    assert errors(split_column="split", most_rows=20, seed=1)[0] != few
    assert errors(split_column="split", transform="log")[0] != first[0]
    energy = {"target": "formation_energy_ev_per_atom", "split_column": "split"}
    assert errors(**energy)[0] != errors(**energy, difference=False)[0]
    with pytest.raises(OptionError, match="most_rows is 5"):
        errors(most_rows=5)


def test_copies_are_left_out_together(tiny_model, crystal_frame):
    """A table said twice is no easier."""
    twice = pd.concat([crystal_frame, crystal_frame], ignore_index=True)
    data = read_property_table(twice, [TARGET], split_column="split")
    assert len(np.unique(materials(data.crystals))) == 60
    once = rank_sources(crystal_frame, TARGET, [tiny_model], split_column="split")
    both = rank_sources(twice, TARGET, [tiny_model], split_column="split")
    for name in ("kernel_ridge", "ridge"):
        known = once.sources[0].scored.scores[name]
        assert both.sources[0].scored.scores[name] == pytest.approx(known, rel=0.15)


def test_candidates(tiny_model_folder, tiny_model, small_potential_folder, tmp_path):
    found, left_out = candidates([tiny_model_folder.parent, small_potential_folder, tiny_model])
    assert list(found) == ["tiny"]
    assert left_out[str(small_potential_folder)].startswith("a potential")
    assert left_out["tiny"] == "the same weights as tiny"
    shipped, reasons = candidates(None)
    assert {"mp-base", "mp-base-strict", "mp-small"} <= set(shipped)
    assert "mp-potential" in reasons
    with pytest.raises(FormatError, match="no model"):
        candidates([tmp_path])
    with pytest.raises(OptionError, match="no model was given"):
        candidates([])


def test_models_that_do_not_know_the_elements_are_left_out(tiny_model, crystal_frame):
    other = copy.deepcopy(tiny_model)
    other.elements = frozenset({3, 8})
    other.card = {**tiny_model.card, "name": "narrow", "sha256": "another"}
    found = rank_sources(crystal_frame, TARGET, [other, tiny_model], split_column="split")
    assert [s.name for s in found.sources] == ["tiny"]
    assert "knows the elements of" in found.left_out["narrow"]
    with pytest.raises(OptionError, match=r"no model is left .*narrow: knows"):
        rank_sources(crystal_frame, TARGET, [other], split_column="split")


def test_options_that_speak_against_scratch(task):
    """With a depth or a retention that was asked for, none but such trials are made."""
    config = FinetuneConfig(strategy="finetune", freeze=3, epochs=1, head_learning_rate=1e-9)
    trial = run_strategy(task, config)
    best, trials, facts = checked(task, config, [trial])
    assert facts["negative"]
    assert (best, trials) == (trial, [trial])
    assert "scratch" not in facts
    free = FinetuneConfig(strategy="auto", epochs=1)
    best, trials, facts = checked(task, free, [trial])
    assert len(trials) == 2
    assert facts["scratch"] == trials[1].error
    assert best.error == min(t.error for t in trials)


def test_weights_stay_with_their_rows(task):
    """Rows that count more or less do so in the comparison, too."""
    weights = np.random.default_rng(0).uniform(0.5, 2.0, len(task.values))
    small = _without_test_rows(replace(task, weights=weights), 0)
    known = dict(zip(task.values, weights, strict=True))
    np.testing.assert_array_equal(small.weights, [known[value] for value in small.values])

    rows = task.parts["test"][: len(task.parts["test"]) // 2 * 2]
    task = replace(task, parts={**task.parts, "test": rows})
    errors = []
    for counted in (rows, rows[::2], rows[1::2]):
        weights = np.ones(len(task.values))
        weights[np.setdiff1d(rows, counted)] = 0.0
        errors.append(composition_error(replace(task, weights=weights), "test"))
    assert errors[1] != pytest.approx(errors[2], rel=1e-3)
    assert (errors[1] + errors[2]) / 2 == pytest.approx(errors[0])


# -- the command ----------------------------------------------------------------------------------
def test_sources_on_the_command_line(run, sources, mine, ranking):
    options = (mine, "--target", TARGET, "--models", sources, "--split-column", "split")
    code, out, err = run("sources", *options)
    assert code == 0
    table = [line.split() for line in out.splitlines() if line.startswith("      ")]
    assert [words[0] for words in table][:2] == ["model", "good"]
    assert {words[0] for words in table[2:]} == {"composition", "shuffled", "untrained,"}
    assert float(table[1][1]) == pytest.approx(ranking.sources[0].error, rel=1e-3)
    assert "refused: shuffled: on its own held-out rows" in out
    assert "model: good" in out
    assert "leave-one-out MAE" in err
    code, out, _ = run("sources", *options, "--json")
    assert (code, json.loads(out)["chosen"]) == (0, "good")


def test_finetune_auto_on_the_command_line(run, sources, mine):
    models = f"{sources / 'shuffled'},{sources / 'good'}"
    code, out, _ = run(
        "finetune", mine, "--target", TARGET, "--model", "auto", "--models", models,
        "--split-column", "split", "--strategy", "features",
    )  # fmt: skip
    assert code == 0
    assert "refused: shuffled" in out
    assert "model: good" in out
    assert "transfer: validation" not in out, "one strategy was asked for"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("sources", "{mine}", "--target", TARGET, "--models", "no-such"), "no model 'no-such'"),
        (("sources", "{mine}", "--target", TARGET, "--models", "a,,b"), "names with commas"),
        (("sources", "{mine}", "--target", TARGET, "--models", "mp-potential"), "a potential"),
        (("sources", "{mine}", "--target", "no_such"), "no column 'no_such'"),
        (("finetune", "{mine}", "--target", TARGET, "--models", "mp-base"), "model='auto'"),
        (("finetune", "{mine}", "--model", "auto"), "models of properties"),
        (("finetune", "{mine}", "--target", "forces", "--model", "auto"), "mp-potential"),
        (("finetune", "{mine}", "--model", "mp-potential", "--models", "a"), "--models"),
    ],
)
def test_mistakes_are_told(run, mine, words, told):
    code, _, err = run(*(word.format(mine=mine) for word in words))
    assert code == 2
    assert told in err
