"""Remedies for a domain gap: importance weights in training, corrections of predictions."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime
from sklearn.linear_model import LinearRegression

import matxfer.cli
import matxfer.domain.remedies as remedies_module
from matxfer.data.properties import property_of
from matxfer.data.store import graph_store
from matxfer.domain import density_ratio, weights_for
from matxfer.domain.remedies import compared, try_remedies
from matxfer.domain.sample import read_collection
from matxfer.errors import OptionError
from matxfer.nn.scaling import TargetScaler, composition
from matxfer.transfer.activations import Activations
from matxfer.transfer.config import CORRECTIONS
from matxfer.transfer.correction import PENALTIES, fit_correction
from matxfer.transfer.features import METHODS, _noise, fit_features
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin
from matxfer.transfer.uncertainty import Uncertainty

TARGET = "debye_temperature_k"
ENERGY = "formation_energy_ev_per_atom"
L = 3
EYE = (np.zeros(1), np.eye(1))


def run(monkeypatch, capsys, *arguments):
    """Run the command; return its exit code and what it wrote."""
    monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        matxfer.cli.main()
    written = capsys.readouterr()
    return stop.value.code or 0, written.out, written.err


# -- weights in each learner ------------------------------------------------------------------
def twice(frame, gap=600.0):
    """Return each crystal twice, in the same part: once with its value, once with more."""
    import pandas as pd

    other = frame.assign(**{TARGET: frame[TARGET] + gap})
    return pd.concat([frame, other], ignore_index=True)


@pytest.mark.parametrize(
    "options",
    [
        *({"features": method} for method in METHODS),
        {"freeze": L, "epochs": 40},
        {"freeze": L, "epochs": 40, "readout": "atomwise"},
        {"freeze": 1, "epochs": 8, "learning_rate": 3e-3},
        {"strategy": "scratch", "epochs": 12},
        {"strategy": "auto", "epochs": 8, "freeze": L},
    ],
    ids=str,
)
def test_weights_reach_every_learner(options, tiny_model, crystal_frame):
    """Of two contradicting copies the one with the weight is learnt, whichever it is."""
    table, n = twice(crystal_frame), len(crystal_frame)
    found = {}
    for side in (0, 1):

        def weigh(_model, _graphs, rows, side=side):
            return np.where((rows >= n) == side, 1.0, 0.02), {"usable": True}

        plugin = finetune(
            table, TARGET, model=tiny_model, split_column="split", weigh=weigh, hidden_dim=64,
            head_learning_rate=2e-2, batch_size=16, **options,
        )  # fmt: skip
        graphs = graph_store(_crystals(crystal_frame), tiny_model.backbone.graph_options).graphs
        values = plugin.values(graphs.batch(np.arange(len(graphs))))
        wanted = crystal_frame[TARGET].to_numpy() + 600 * side
        found[side] = np.abs(values - wanted).mean()
        figures = plugin.meta["figures"]["val"]
        assert figures["weighted"]["mae"] < figures["mae"]
        assert plugin.meta["weights"]["effective_rows_by_part"]["train"] == pytest.approx(
            96 * (1.02 / 2) ** 2 / ((1 + 0.02**2) / 2)
        )
    assert max(found.values()) < 200, "of a gap of 600"


def _crystals(frame):
    from matxfer.readers import crystals_of_table

    return [entry.crystal for entry in crystals_of_table(frame, "<data frame>")]


def test_a_weighted_ridge_is_that_of_its_normal_equations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.normal(size=60)
    w = rng.uniform(0.1, 3, 60)
    w /= w[:40].mean()
    train, val = np.arange(40), np.arange(40, 60)
    axes = (np.zeros(3), np.eye(3))
    inputs = torch.from_numpy(x).float()
    readout = fit_features("ridge", inputs, y, train, val, 0, axes, w)
    best = {}
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        design = np.column_stack([x[train], np.ones(40)])
        pull = np.diag([penalty * 40] * 3 + [0])
        gram = design.T @ (w[train, None] * design) + pull
        solution = np.linalg.solve(gram, design.T @ (w[train] * y[train]))
        error = np.abs(x[val] @ solution[:3] + solution[3] - y[val])
        best[(w[val] * error).sum()] = solution
    expected = best[min(best)]
    np.testing.assert_allclose(readout.weight, expected[:3], atol=1e-5)
    assert float(readout.bias) == pytest.approx(expected[3], abs=1e-5)


@pytest.mark.parametrize("method", ["kernel_ridge"])
def test_a_row_that_counts_twice_is_two_rows(method):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 1)), rng.normal(size=50)
    w = rng.integers(1, 4, 50).astype(float)
    train, val = np.arange(35), np.arange(35, 50)
    inputs = torch.from_numpy(x).float()
    once = fit_features(method, inputs, y, train, val, 0, EYE, w)
    copies = [np.repeat(part, w[part].astype(int)) for part in (train, val)]
    many = fit_features(method, inputs, y, *copies, 0, EYE)
    np.testing.assert_allclose(once(inputs, None), many(inputs, None), atol=1e-4)


def test_noise_of_a_row_by_its_weight():
    w = np.array([0.5, 1.0, 4.0])
    kernel, x = _noise(0.3, w), np.zeros((3, 2))
    np.testing.assert_allclose(kernel(x), np.diag(0.3 / w))
    assert not kernel(x, np.zeros((2, 2))).any()
    slope = kernel(x, eval_gradient=True)[1][:, :, 0]
    slow = [approx_fprime(kernel.theta, lambda t, k=k: kernel.clone_with_theta(t)(x)[k, k])[0]
            for k in range(3)]  # fmt: skip
    np.testing.assert_allclose(np.diag(slope), slow, rtol=1e-5)
    assert type(_noise(0.3, None)).__name__ == "WhiteKernel"


def test_a_weighted_scaler_is_that_of_repeated_rows(table_crystals, tiny_model):
    crystals = table_crystals[:20]
    rng = np.random.default_rng(2)
    w, y = rng.integers(1, 4, 20), rng.normal(size=20)
    options, prop = tiny_model.backbone.graph_options, property_of(ENERGY)
    graphs = graph_store(crystals, options).graphs
    one = TargetScaler.fit(prop, y, graphs, weights=w.astype(float))
    rows = np.repeat(np.arange(20), w)
    many = TargetScaler.fit(prop, y[rows], graphs.select(rows))
    assert float(one.mean) == pytest.approx(float(many.mean))
    assert float(one.std) == pytest.approx(float(many.std))
    torch.testing.assert_close(one.reference, many.reference, rtol=1e-4, atol=1e-6)


def test_weights_mend_a_misspecified_model():
    """A line on a parabola: under covariate shift the right line is that of the target."""
    rng = np.random.default_rng(3)
    source, target = rng.normal(0, 1, (1200, 1)), rng.normal(1.2, 0.5, (1200, 1))
    y, wanted = (x[:, 0] ** 2 + rng.normal(0, 0.1, len(x)) for x in (source, target))
    weights = density_ratio(source, target)
    train, val = np.arange(1000), np.arange(1000, 1200)
    inputs, goal = (torch.from_numpy(x).float() for x in (source, target))

    def error(w):
        readout = fit_features("ridge", inputs, y, train, val, 0, EYE, w)
        return np.abs(readout(goal, None)[0].numpy() - wanted).mean()

    mended, plain = error(weights.values), error(None)
    assert mended < 0.85 * plain
    # An independent oracle: the true ratio of the densities, and another library's least squares.
    true = np.exp(-0.5 * ((source[:, 0] - 1.2) / 0.5) ** 2 + 0.5 * source[:, 0] ** 2)
    line = LinearRegression().fit(source[train], y[train], true[train])
    best = np.abs(line.predict(target) - wanted).mean()
    assert mended == pytest.approx(best, rel=0.1)


def test_intervals_hold_on_the_target():
    """Errors that grow towards the target: by weights the intervals grow with them."""
    rng = np.random.default_rng(4)
    coverage = {True: [], False: []}
    for _ in range(60):
        x, there = rng.normal(0, 1, 400), rng.normal(1, 1, 400)
        residual, later = (np.exp(0.5 * z) * rng.normal(size=400) for z in (x, there))
        w = np.exp(x - 0.5)
        for weighed, kept in coverage.items():
            found = Uncertainty(0, 0, 1, 1, 1)
            found.calibrate(residual, np.zeros(400), w / w.mean() if weighed else None)
            reach = found.quantile * found._deviation(np.zeros(400))
            kept.append((np.abs(later) <= reach).mean())
    assert 0.88 < np.mean(coverage[True]) < 0.95
    assert np.mean(coverage[False]) < 0.85
    same = [Uncertainty(0, 0, 1, 1, 1) for _ in range(2)]
    same[0].calibrate(residual, np.zeros(400))
    same[1].calibrate(residual, np.zeros(400), np.ones(400))
    assert same[0].to_json() == same[1].to_json()


def test_uneven_weights_are_refused(tiny_model, crystal_frame):
    def weigh(_model, _graphs, rows):
        return np.ones(len(rows)), {"usable": False, "words": "mine: too uneven"}

    with pytest.raises(OptionError, match="mine: too uneven; train without weights"):
        finetune(crystal_frame, TARGET, model=tiny_model, split_column="split", weigh=weigh)


def test_command_with_weights(
    tiny_model_folder, crystal_frame, crystal_table, tmp_path, monkeypatch, capsys
):
    """Candidates of two families of three: their rows count more; one structure is no target."""
    candidates = tmp_path / "candidates.parquet"
    crystal_frame[crystal_frame["family"] != "fcc"].drop(columns=TARGET).to_parquet(candidates)
    common = ("finetune", crystal_table, "--target", TARGET, "--model", tiny_model_folder,
              "--split-column", "split", "--features", "ridge")  # fmt: skip
    code, out, err = run(
        monkeypatch, capsys, *common, "-o", tmp_path / "plugin", "--weights-for", candidates
    )
    assert code == 0, err
    assert "weights: rows are as good as equal ones" in out
    assert "weighed: MAE" in out
    meta = json.loads((tmp_path / "plugin" / "plugin.json").read_text())
    assert meta["weights"]["usable"]
    assert meta["weights"]["effective_rows_by_part"]["train"] < 48
    few = tmp_path / "few.parquet"
    crystal_frame[:3].to_parquet(few)
    code, _, err = run(monkeypatch, capsys, *common, "-o", tmp_path / "other", "--weights-for", few)
    assert code == 2
    assert "3 target rows cannot be estimated" in err
    code, _, err = run(
        monkeypatch, capsys, *common, "-o", tmp_path / "no", "--weights-for", tmp_path / "nothing"
    )
    assert code == 2
    assert "nothing" in err


def test_rows_that_resemble_the_candidates_count_more(tiny_model, crystal_frame):
    family = crystal_frame["family"].to_numpy()
    weigh = weights_for(crystal_frame[family != "fcc"])
    graphs = graph_store(_crystals(crystal_frame), tiny_model.backbone.graph_options).graphs
    weights, facts = weigh(tiny_model, graphs, np.arange(60))
    assert weights[family != "fcc"].mean() > 1.5 * weights[family == "fcc"].mean()
    assert facts["words"].startswith("<data frame>")


# -- corrections ------------------------------------------------------------------------------
def planted(n, seed=0, noise=0.02):
    """Return predictions, fractions of four elements, and values of other references."""
    rng = np.random.default_rng(seed)
    fractions = np.zeros((n, 119))
    for row in fractions:
        row[rng.choice([8, 16, 26, 34], 2, replace=False)] = rng.dirichlet([3, 3])
    source = rng.normal(-1, 0.8, n)
    reference = np.zeros(119)
    reference[[8, 16, 26, 34]] = 0.4, -0.2, 0.0, -0.6
    target = source + fractions @ reference + rng.normal(0, noise, n)
    return source, fractions, target, reference


def slow_ridge(form, penalty, source, fractions, target, w, slope=1.0, scale_of=None):
    """Return a function that predicts: least squares with one more row for each pull."""
    own = w if scale_of is None else scale_of
    middle = np.average(source, weights=own)
    spread = np.sqrt(np.average((source - middle) ** 2, weights=own))

    def design(s, x):
        columns = [np.ones(len(s))]
        if form.endswith("linear"):
            columns.append((s - middle) / spread)
        if "elements" in form:
            columns += list(x.T)
        return np.stack(columns, axis=1)

    own = design(source, fractions)
    size = own.shape[1]
    pulls = np.sqrt(penalty) * np.eye(size)[1:]
    rows = np.concatenate([np.sqrt(w)[:, None] * own, pulls])
    wanted = np.concatenate([np.sqrt(w) * (target - slope * source), np.zeros(size - 1)])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return lambda s, x: slope * s + design(s, x) @ solution


@pytest.mark.parametrize("form", CORRECTIONS[1:])
@pytest.mark.parametrize("weighed", [False, True])
def test_a_correction_is_the_ridge_of_least_squares(form, weighed):
    source, fractions, target, _ = planted(25)
    w = np.random.default_rng(1).uniform(0.2, 2, 25) if weighed else np.ones(25)
    found = fit_correction(form, source, fractions, target, weights=w if weighed else None)
    slow = slow_ridge(form, found.penalty, source, fractions, target, w)
    there = planted(10, seed=5)[:2]
    np.testing.assert_allclose(found(*there), slow(*there), atol=1e-6)


@pytest.mark.parametrize("form", ["offset", "elements", "elements+linear"])
def test_the_error_is_that_of_rows_left_out(form):
    """Against as many fits; the penalty is the one of the smallest such error."""
    source, fractions, target, _ = planted(18, noise=0.2)
    found = fit_correction(form, source, fractions, target)

    def left_out(penalty):
        errors = []
        for k in range(18):
            w = np.where(np.arange(18) == k, 0.0, 1.0)
            slow = slow_ridge(form, penalty, source, fractions, target, w, scale_of=np.ones(18))
            errors.append(abs(slow(source, fractions)[k] - target[k]))
        return np.mean(errors)

    tried = {p: left_out(p) for p in (PENALTIES if form != "offset" else (0.0,))}
    assert found.error == pytest.approx(tried[found.penalty], rel=1e-4)
    assert found.error == pytest.approx(min(tried.values()), rel=1e-4)


def test_planted_references_are_found_from_twenty_rows():
    source, fractions, target, reference = planted(20)
    found = fit_correction("auto", source, fractions, target)
    assert found.form == "elements"
    there = planted(500, seed=9, noise=0.0)
    assert np.abs(found(*there[:2]) - there[2]).mean() < 0.03
    # Only differences count: a mean of fractions is an offset.
    own = found.elements[[8, 16, 26, 34]] + found.offset
    np.testing.assert_allclose(own, reference[[8, 16, 26, 34]], atol=0.06)


@pytest.mark.parametrize("form", CORRECTIONS)
def test_the_simplest_form_that_does_is_chosen(form):
    rng = np.random.default_rng(3)
    source, fractions, _, reference = planted(60)
    target = source * (1.3 if "linear" in form else 1.0) + rng.normal(0, 0.02, 60)
    target += fractions @ reference if "elements" in form else 0.0
    target += 0.5 if form in ("offset", "linear") else 0.0
    found = fit_correction("auto", source, fractions, target)
    assert found.form == form
    assert found.slope == pytest.approx(1.3 if "linear" in form else 1.0, abs=0.02)


@pytest.fixture(scope="module")
def shifted(tiny_model, crystal_frame):
    """Return the table with the base's own energies, other references and a smaller slope."""
    graphs = graph_store(_crystals(crystal_frame), tiny_model.backbone.graph_options).graphs
    source = Activations(tiny_model, graphs).source(ENERGY)
    reference = np.zeros(119)
    reference[[8, 17]] = 0.6, -0.4
    values = 0.8 * source + composition(graphs) @ reference - 0.1
    return crystal_frame.assign(**{ENERGY: values, "hull_energy_ev": 2 * source + 3})


def test_a_plugin_of_a_correction(shifted, tiny_model, tmp_path):
    few = shifted.assign(split=np.where(np.arange(60) < 20, "train", shifted["split"]))
    few.loc[np.arange(60) >= 20, "split"] = np.where(np.arange(40) < 5, "val", "test")
    plugin = finetune(
        few, ENERGY, tmp_path / "plugin", model=tiny_model, split_column="split",
        strategy="correction",
    )  # fmt: skip
    facts = plugin.meta["correction"]
    assert (facts["form"], facts["source"], facts["rows"]) == ("elements+linear", ENERGY, 20)
    assert facts["slope"] == pytest.approx(0.8, abs=0.03)
    assert plugin.meta["figures"]["test"]["mae"] < 0.02
    elements = facts["elements"]
    assert elements["O"]["value"] - elements["Cl"]["value"] == pytest.approx(1.0, abs=0.05)
    assert plugin.meta["chosen"] == f"correction, elements+linear, of {ENERGY}"
    # Read back it predicts the same, with slope and all.
    again = load_plugin(tmp_path / "plugin", tiny_model)
    graphs = graph_store(_crystals(few), tiny_model.backbone.graph_options).graphs
    batch = graphs.batch(np.arange(60))
    np.testing.assert_array_equal(again.values(batch), plugin.values(batch))
    assert np.abs(again.values(batch) - few[ENERGY]).max() < 0.1
    # Every form is another plugin.
    errors = {
        form: finetune(few, ENERGY, model=tiny_model, split_column="split", correction=form).meta[
            "figures"
        ]["test"]["mae"]
        for form in CORRECTIONS
    }
    assert len(set(errors.values())) == len(CORRECTIONS)
    assert min(errors, key=errors.get) == "elements+linear"


def test_another_quantity_is_a_map_of_a_prediction(shifted, tiny_model):
    options = {"model": tiny_model, "split_column": "split"}
    plugin = finetune(shifted, "hull_energy_ev", correction="linear", **options)
    assert plugin.meta["correction"]["source"] == ENERGY
    assert plugin.meta["correction"]["slope"] == pytest.approx(2, abs=0.05)
    assert plugin.meta["figures"]["test"]["mae"] < 0.05
    with pytest.raises(OptionError, match="predicts nothing like 'hull_energy_ev'"):
        finetune(shifted, "hull_energy_ev", correction="elements", **options)
    with pytest.raises(OptionError, match="cannot be left out"):
        finetune(shifted, ENERGY, correction="elements", difference=False, **options)
    with pytest.raises(OptionError, match="correction is 'cubic'"):
        finetune(shifted, ENERGY, correction="cubic", **options)


def test_command_with_a_correction(shifted, tiny_model_folder, tmp_path, monkeypatch, capsys):
    shifted.to_parquet(tmp_path / "mine.parquet")
    code, out, err = run(
        monkeypatch, capsys, "finetune", tmp_path / "mine.parquet", "--target", ENERGY,
        "--model", tiny_model_folder, "--split-column", "split", "--correction", "elements+linear",
        "-o", tmp_path / "plugin",
    )  # fmt: skip
    assert code == 0, err
    assert re.search(rf"correction: 0\.(79|80).* × {ENERGY}", out)
    assert "by element, times its atomic fraction: O +" in out


@pytest.mark.data
def test_elements_mend_another_correction_scheme(shared_data):
    """WBM's energies have another correction scheme than those that the base has learnt."""
    import pandas as pd

    columns = ["material_id", "lattice", "numbers", "frac_coords", ENERGY]
    frame = pd.read_parquet(shared_data / "wbm_formation_energy.parquet", columns=columns)
    frame = frame.sample(frac=1, random_state=0).reset_index(drop=True)
    frame["split"] = np.where(frame.index < 450, "train", "test")
    frame.loc[400:449, "split"] = "val"
    found = {
        form: finetune(frame, ENERGY, split_column="split", correction=form).meta
        for form in ("none", "elements")
    }
    error = {form: meta["figures"]["test"]["mae"] for form, meta in found.items()}
    assert error["elements"] < 0.85 * error["none"]
    elements = found["elements"]["correction"]["elements"]
    assert elements["Se"]["value"] < -0.15
    assert elements["S"]["value"] > 0.1


# -- which of them help -----------------------------------------------------------------------
def test_what_helps_is_sure_and_matters():
    rng = np.random.default_rng(0)
    before = np.abs(rng.normal(1, 0.1, 200))
    found = {
        share: compared("x", "--x", "of", (before, before * share + rng.normal(0, 0.01, 200)))
        for share in (0.9, 0.99, 1.0, 1.1)
    }
    assert [each.verdict for each in found.values()] == [
        "helps", "no difference", "no difference", "harms",
    ]  # fmt: skip
    assert found[0.9].gain == pytest.approx(0.1 * before.mean(), rel=0.05)
    assert found[0.9].words().endswith("; --x")
    assert "--x" not in found[1.1].words()
    # By a tenth on average, but of two rows: not sure.
    unsure = compared("x", "--x", "of", (np.array([1.0, 1.0]), np.array([0.5, 1.3])))
    assert unsure.verdict == "no difference"


def test_remedies_are_measured_on_rows_that_nothing_saw(shifted, tiny_model, monkeypatch):
    """Target values that are measured on change neither fit nor choice; and what helps is told."""
    import pandas as pd

    target = pd.concat([shifted] * 2, ignore_index=True)  # 60 compositions would do; copies too
    source = shifted.assign(**{ENERGY: shifted[ENERGY] + 1})
    collections = [read_collection(frame, [ENERGY]) for frame in (source, target)]
    fitted = []
    original = remedies_module.run_strategy

    def quick(task, config, source=None, probe=None):
        fitted.append(task)
        config = replace(config, epochs=2) if config.strategy == "finetune" else config
        return original(task, config, source, probe)

    monkeypatch.setattr(remedies_module, "run_strategy", quick)
    found = try_remedies(tiny_model, *collections, (ENERGY, ENERGY))
    told = {each.name: each for each in found.tried}
    assert told["correction (elements+linear)"].verdict == "helps"
    assert any("invariant features (mmd" in name for name in told)
    assert len([name for name in told if name.startswith("importance weights")]) == 1
    assert len(told) == 6
    lines = "\n".join(found.lines())
    assert f"on {found.measured} target structures" in lines
    assert "--correction elements+linear" in lines
    for task in fitted:
        # Compositions are kept whole.
        names = [
            {collections[1].compositions[k % 60] for k in task.parts[part] if k < 120}
            for part in ("train", "val", "test")
        ]
        if len(task.graphs) == 120:
            assert not names[0] & names[2]
            assert not names[1] & names[2]
    json.dumps(found.to_json())
    # Without values of the source only what mends predictions is tried.
    alone = try_remedies(tiny_model, *collections, (ENERGY, None))
    assert {each.name for each in alone.tried} == {
        "correction (elements+linear)", "fine-tuning instead (kernel ridge)",
    }  # fmt: skip


def test_a_like_quantity_of_another_name_is_corrected(shifted, tiny_model):
    """As the diagnosis compares it: another functional's energies, by exactly 1 eV off."""
    graphs = graph_store(_crystals(shifted), tiny_model.backbone.graph_options).graphs
    said = Activations(tiny_model, graphs).source(ENERGY)
    names = ["formation_energy_scan_ev_per_atom", "total_magnetization_mub_per_cell"]
    target = read_collection(shifted.assign(**dict.fromkeys(names, said + 1)), names)
    correction, tuned = try_remedies(tiny_model, target, target, (names[0], None)).tried
    assert correction.before == pytest.approx(1, abs=1e-4)
    assert tuned.before == correction.before
    assert (correction.name, correction.verdict) == ("correction (linear)", "helps")
    assert correction.after < 0.05
    (nothing,) = try_remedies(tiny_model, target, target, (names[1], None)).tried
    assert nothing.verdict == "refused"
    assert "predicts nothing like total_magnetization_mub_per_cell" in nothing.why


def test_a_target_of_one_composition_is_halved_by_materials(shifted, tiny_model, monkeypatch):
    """As carbon is; copies stay together."""
    import pandas as pd

    target = read_collection(pd.concat([shifted] * 2, ignore_index=True), [ENERGY])
    target = replace(target, compositions=[((6, 1),)] * len(target))
    tasks = []
    original = remedies_module.run_strategy

    def kept(task, *options):
        tasks.append(task)
        return original(task, *options)

    monkeypatch.setattr(remedies_module, "run_strategy", kept)
    found = try_remedies(tiny_model, target, target, (ENERGY, None))
    assert (found.measured, found.fitted) == (60, 60)
    parts = [set((tasks[0].parts[part] % 60).tolist()) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [24, 6, 30]
    assert len(set.union(*parts)) == 60, "no material in two parts"


def test_command_that_tries_remedies(shifted, tiny_model_folder, tmp_path, monkeypatch, capsys):
    shifted.to_parquet(tmp_path / "target.parquet")
    shifted.drop(columns=ENERGY).to_parquet(tmp_path / "source.parquet")
    words = ("shift", tmp_path / "source.parquet", tmp_path / "target.parquet",
             "--model", tiny_model_folder, "--permutations", 199)  # fmt: skip
    code, out, err = run(monkeypatch, capsys, *words, "--target", ENERGY, "--try-remedies")
    assert code == 0, err
    assert "remedies, measured in eV/atom on" in out
    assert "correction (elements+linear): helps" in out
    code, out, _ = run(monkeypatch, capsys, *words, "--target", ENERGY, "--json")
    assert code == 0
    assert json.loads(out)["remedies"] is None
    code, _, err = run(monkeypatch, capsys, *words, "--try-remedies")
    assert code == 2
    assert "--target" in err
    few = shifted.assign(**{ENERGY: shifted[ENERGY].where(shifted.index < 14)})
    few.to_parquet(tmp_path / "target.parquet")
    code, _, err = run(monkeypatch, capsys, *words, "--target", ENERGY, "--try-remedies")
    assert code == 2
    assert "target.parquet" in err
