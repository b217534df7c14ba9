"""Transfer maps: planted truths are found, groups do not leak, intervals are those of scipy."""

from __future__ import annotations

import json
import sys
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.core.periodic_table import Element
from scipy import stats

import matxfer.cli
from matxfer.crystal import Crystal
from matxfer.data.store import graph_store
from matxfer.data.table import TableError
from matxfer.errors import OptionError
from matxfer.model import Model
from matxfer.probing import probe
from matxfer.probing.composition import features_of
from matxfer.probing.figure import _heat
from matxfer.probing.groups import KINDS, clusters, element_family, leave_out
from matxfer.probing.intervals import (
    BETTER,
    NEGATIVE,
    ONE_SPLIT,
    UNCLEAR,
    Gain,
    paired_gain,
    paired_share,
)
from matxfer.probing.networks import changed
from matxfer.probing.plan import Probe
from matxfer.probing.report import tables
from matxfer.transfer.activations import Activations
from matxfer.transfer.baselines import untrained

N = 240
Z = (3, 8, 11, 12, 17, 26)


@pytest.fixture(scope="module")
def crystals():
    """Return crystals of two elements whose atoms stand anywhere on a coarse grid."""
    rng = np.random.default_rng(0)
    grid = np.array([[x, y, z] for x in (0, 0.5) for y in (0, 0.5) for z in (0, 0.5)])
    made = []
    for k in range(N):
        n = int(rng.integers(2, 5))
        kinds = rng.choice(rng.choice(Z, 2, replace=False), n)
        at = grid[rng.choice(8, n, replace=False)] + rng.normal(0, 0.03, (n, 3))
        cell = rng.uniform(4.2, 5.4) * np.eye(3) + rng.normal(0, 0.2, (3, 3))
        made.append(Crystal(cell, kinds, at, id=f"m{k}"))
    return made


def frame_of(crystals, **columns):
    return pd.DataFrame(
        {
            "material_id": [c.id for c in crystals],
            "lattice": [c.lattice.ravel() for c in crystals],
            "numbers": [c.numbers for c in crystals],
            "frac_coords": [c.frac_coords.ravel() for c in crystals],
            **columns,
        }
    )


@pytest.fixture(scope="module")
def fingerprints(crystals, tiny_model):
    """Return fingerprints (n, D) of a model's layer."""

    def of(model, layer):
        graphs = graph_store(crystals, model.backbone.graph_options).graphs
        return Activations(model, graphs).inputs("statistics", (layer,)).double().numpy()

    return of


def mixed(x, seed=0):
    """Return a random sum of standardised features, (n,)."""
    x = (x - x.mean(axis=0))[:, x.std(axis=0) > 1e-6]
    y = (x / x.std(axis=0)) @ np.random.default_rng(seed).normal(size=x.shape[1])
    return y / y.std()


@pytest.fixture(scope="module")
def planted(crystals, tiny_model, fingerprints):
    """Return a table whose target is linear in what the model's second layer knows."""
    noise = np.random.default_rng(1).normal(0, 0.05, N)
    return frame_of(crystals, quantity=mixed(fingerprints(tiny_model, 2)) + noise)


def named(model, name):
    model.card["name"] = name
    return model


def cell(found, source, depth=None):
    rows = [r for r in found.cells if r["source"] == source and r["depth"] == depth]
    assert len(rows) == 1
    return rows[0]


# -- intervals -----------------------------------------------------------------------------------
def test_interval_is_that_of_scipy():
    rng = np.random.default_rng(0)
    reference, errors = rng.uniform(1, 2, 6), rng.uniform(0.8, 1.5, 6)
    test = stats.ttest_rel(np.log(errors), np.log(reference)).confidence_interval(0.95)
    gain = paired_gain(reference, errors)
    assert (gain.low, gain.high) == pytest.approx((1 - np.exp(test.high), 1 - np.exp(test.low)))
    assert gain.mean == pytest.approx(1 - stats.gmean(errors / reference))
    test = stats.ttest_rel(reference, errors).confidence_interval(0.95)
    share = paired_share(reference, errors, 0.5)
    assert (share.low, share.high) == pytest.approx((test.low / 0.5, test.high / 0.5))


def test_overlap_widens_the_interval_as_nadeau_and_bengio_say():
    reference, errors = [1.0, 1.2, 1.1, 0.9, 1.3], [0.9, 1.0, 1.1, 0.7, 1.2]
    plain, corrected = paired_share(reference, errors, 1), paired_share(reference, errors, 1, 0.25)
    wider = (corrected.high - corrected.low) / (plain.high - plain.low)
    assert wider == pytest.approx(np.sqrt((1 / 5 + 0.25) / (1 / 5)))
    assert corrected.mean == plain.mean


def test_correction_keeps_the_level_where_the_plain_interval_does_not():
    """Two readouts equally good by design, on random splits of one small sample."""
    rng = np.random.default_rng(0)
    false = {0.0: 0, 0.25: 0}
    for _ in range(300):
        one, other = rng.normal(size=(2, 100))  # losses of rows, of two models alike
        folds = [rng.permutation(100)[:20] for _ in range(10)]
        pair = [[loss[f].mean() for f in folds] for loss in (one + 9, other + 9)]
        for overlap in false:
            gain = paired_gain(*pair, overlap)
            false[overlap] += not gain.low < 0 < gain.high
    assert false[0.0] > 0.2 * 300
    assert false[0.25] < 0.1 * 300


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 0.2, BETTER), (-0.2, -0.1, NEGATIVE), (-0.1, 0.1, UNCLEAR), (None, None, ONE_SPLIT)],
)
def test_verdict_is_what_the_interval_says(low, high, word):
    assert Gain(0.1, low, high, 3).verdict == word


def test_one_split_has_no_interval():
    assert paired_gain([2.0], [1.0]).text() == "+50.0%"


# -- networks ------------------------------------------------------------------------------------
def test_a_changed_layer_is_changed_and_no_other(tiny_model):
    states = {w: changed(tiny_model, 2, w, 5).backbone.state_dict() for w in ("permuted", "alone")}
    states["reinitialised"] = changed(tiny_model, 2, "reinitialised", 5).backbone.state_dict()
    own, fresh = tiny_model.backbone.state_dict(), untrained(tiny_model, 5).backbone.state_dict()
    for name, tensor in own.items():
        mine = name.startswith("layers.1.")  # block 2
        assert torch.equal(states["reinitialised"][name], fresh[name] if mine else tensor)
        assert torch.equal(states["alone"][name], tensor if mine else fresh[name])
        shuffled = states["permuted"][name]
        if mine and len(tensor.unique()) > 1:
            assert not torch.equal(shuffled, tensor)
        assert torch.equal(shuffled.flatten().sort()[0], tensor.flatten().sort()[0])
        assert mine or torch.equal(shuffled, tensor)
    with pytest.raises(OptionError, match="reinitialised, permuted, alone"):
        changed(tiny_model, 0, "thawed", 0)


# -- composition ---------------------------------------------------------------------------------
def test_composition_features_know_no_structure(tiny_model):
    numbers = [11, 17]
    near, far = (
        Crystal(a * np.eye(3), numbers, [[0, 0, 0], [0.5, 0.5, 0.5]], id="") for a in (3.2, 4.0)
    )
    double = Crystal(
        np.diag([3.2, 3.2, 6.4]), [11, 17, 11, 17],
        [[0, 0, 0], [0.5, 0.5, 0.25], [0, 0, 0.5], [0.5, 0.5, 0.75]],
    )  # fmt: skip
    graphs = graph_store([near, far, double], tiny_model.backbone.graph_options).graphs
    for kind in ("elements", "composition"):
        x = features_of(kind, graphs).numpy()
        assert x[0] == pytest.approx(x[1], abs=1e-6)
        assert x[0] == pytest.approx(x[2], abs=1e-6)
    assert features_of("elements", graphs)[0, numbers].tolist() == [0.5, 0.5]


# -- planted truths ------------------------------------------------------------------------------
def test_a_planted_source_and_its_layer_are_found(planted, tiny_model, tmp_path):
    other = named(untrained(tiny_model, 99), "other")
    found = probe(planted, [tiny_model, other], method="ridge", output=tmp_path)
    by_depth = {d: cell(found, "tiny", d) for d in range(4)}
    assert min(by_depth, key=lambda d: by_depth[d]["test_mae"]) == 2
    best = cell(found, "tiny")
    assert best["depths"] == "2,2,2,2,2"
    assert best["verdict"] == BETTER
    assert best["gain"] > 0.3
    # Random weights under another name are no source.
    assert cell(found, "other")["verdict"] == UNCLEAR
    structure = next(r for r in found.structure if r["source"] == "tiny")
    assert structure["verdict"] == BETTER
    written = json.loads((tmp_path / "transfer_map.json").read_text())["cells"]
    for table in (
        pd.read_parquet(tmp_path / "transfer_map.parquet"),
        pd.read_csv(tmp_path / "transfer_map.csv"),
    ):
        assert table["test_mae"].tolist() == [row["test_mae"] for row in written]
        assert table["LogME"].isna().tolist() == [row["scores"] is None for row in written]


def test_affinity_without_training_finds_the_planted_layer(planted, tiny_model):
    found = probe(planted, [tiny_model, named(untrained(tiny_model, 99), "other")],
                  method="ridge", splits=3)  # fmt: skip
    scores = {d: cell(found, "tiny", d)["scores"] for d in range(4)}
    for row in found.affinity:
        if row["score"] not in ("ridge", "LogME"):  # the others ask for more than a linear model
            continue
        assert max(scores, key=lambda d: scores[d][row["score"]]) == 2
        assert row["pick"] == "tiny"
        assert row["regret"] == 0
        assert row["rank_correlation"] > 0.5
    mine = [r for r in found.cells if r["depth"] is not None]
    given = [r["scores"]["LogME"] for r in mine], [r["gain"] for r in mine]
    (row,) = (r for r in found.affinity if r["score"] == "LogME")
    assert row["rank_correlation"] == pytest.approx(stats.spearmanr(*given).statistic)


def test_shares_of_layers_are_those_that_are_planted(planted, tiny_model):
    found = probe(
        planted, [tiny_model], depths=[3], method="ridge", splits=3,
        by_layer=["reinitialised", "alone"],
    )  # fmt: skip
    share = {(r["way"], r["block"]): r["share"] for r in found.layers}
    # What lies above the second layer adds nothing that is asked for.
    assert share["reinitialised", "layer 3"] < 0.5 * share["reinitialised", "layer 2"]
    assert share["alone", "layer 3"] < 0.5
    whole = found.layers[0]
    lost = {r["block"]: r["test_mae"] for r in found.layers if r["way"] == "reinitialised"}
    gain = whole["random_mae"] - whole["source_mae"]
    assert share["reinitialised", "layer 2"] == pytest.approx(
        (lost["layer 2"] - whole["source_mae"]) / gain
    )


def test_a_target_of_composition_gains_nothing_from_structure(crystals, tiny_model):
    z = np.array([c.numbers.mean() for c in crystals])
    noise = np.random.default_rng(2).normal(0, 0.1, N)
    frame = frame_of(crystals, quantity=(z - z.mean()) / z.std() + noise)
    found = probe(frame, [tiny_model], method="ridge")
    (structure,) = found.structure
    assert structure["verdict"] != BETTER
    assert structure["composition_mae"] < 0.15  # that of the noise is 0.08


def test_negative_transfer_is_marked(planted, tiny_model):
    """A source that maps all crystals to nearly the same features."""
    dull = Model(deepcopy(tiny_model.backbone), [], tiny_model.elements, {"name": "dull"}).eval()
    for parameter in dull.backbone.parameters():
        parameter.data *= 0
    found = probe(planted, [dull], method="ridge", against="random weights")
    assert {row["source"] for row in found.negative if row["is_source"]} == {"dull"}
    text = "\n".join(table.markdown() for table in tables(found))
    assert "negative transfer**" in text


def test_scratch_is_trained_on_the_target(planted, tiny_model, monkeypatch):
    monkeypatch.setattr("matxfer.transfer.strategies.SCRATCH_EPOCHS", 2)
    found = probe(
        planted, [tiny_model], splits=2, depths=[2], method="ridge", against="scratch", rows=60
    )
    scratch, best = cell(found, "scratch"), cell(found, "tiny")
    assert scratch["gain"] == 0
    assert best["reference_mae"] == scratch["test_mae"] != cell(found, "random weights")["test_mae"]


# -- groups --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_left_out_groups_never_leak(kind, crystals, tiny_model, fingerprints):
    # Copies of some crystals, which no split may tear apart.
    rows = [*crystals, *crystals[:30]]
    prints = fingerprints(tiny_model, 3)
    prints = np.concatenate([prints, prints[:30]])
    usable = np.ones(len(rows), dtype=bool)
    usable[5] = False
    splits, told = leave_out(kind, rows, usable, prints)
    assert splits
    for name, words in splits.items():
        assert words[5] == "unused"
        for k in range(30):
            pair = {words[k], words[N + k]} - {"unused"}
            assert len(pair) <= 1, name
        held = [rows[k] for k in np.flatnonzero(words == "test")]
        others = [rows[k] for k in np.flatnonzero(np.isin(words, ["train", "val"]))]
        assert len(held) >= 5
        if kind == "group":
            assert all(name in {element_family(int(z)) for z in c.numbers} for c in held)
            assert not any(name in {element_family(int(z)) for z in c.numbers} for c in others)
        if kind == "anion" and name == "oxides":
            assert all(8 in c.numbers for c in held)
            assert not any(8 in c.numbers and len(set(c.numbers)) > 1 for c in others)
    if kind in ("cluster", "anion"):  # each row is left out once
        count = sum((words == "test").astype(int) for words in splits.values())
        assert count[usable].max() == 1
    assert all(isinstance(line, str) for line in told)


def test_clusters_are_those_that_are_planted():
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(5), [50, 40, 30, 20, 10])
    x = rng.normal(size=(5, 12))[label] * 10 + rng.normal(size=(150, 12))
    assert clusters(x).tolist() == label.tolist()


def test_a_chemistry_left_out_needs_features_that_carry(crystals, tiny_model):
    """Shares of elements say nothing of an element that no training row holds."""
    y = np.array([np.mean([Element.from_Z(z).X for z in c.numbers]) for c in crystals])
    found = probe(frame_of(crystals, quantity=y), [tiny_model], leave_out="group", method="ridge")
    errors = {}
    for row in found.groups:
        errors.setdefault(row["source"], []).append(row["test_mae"])
    assert np.mean(errors["composition"]) < 0.5 * np.mean(errors["elements"])
    assert {row["group"] for row in found.groups} >= {"halogens", "chalcogens"}
    with pytest.raises(OptionError, match="choose one"):
        probe(frame_of(crystals, quantity=y), [tiny_model], leave_out="group", splits=2)


# -- rows, options, resuming ---------------------------------------------------------------------
def test_rows_that_cannot_be_used_are_told(crystals, tiny_model):
    frame = frame_of(crystals, quantity=np.arange(N, dtype=float), n_sites=1)
    frame.loc[3, "quantity"] = np.nan
    frame.at[4, "numbers"] = np.full(len(frame["numbers"][4]), 92)
    frame.at[6, "lattice"] = np.zeros(9)
    made = Probe([frame], [tiny_model], rows=50)
    assert made.told == [
        "table 1: left out 1 of 240 rows, unreadable structure",
        "table 1: left out 1 of 240 rows, no value",
        "table 1: left out 1 of 240 rows, an element that a source does not know",
        "table 1: 50 of up to 167 training rows are used; more with --rows",
    ]
    used = made.targets["table 1"].split("random 0", 50, 0)
    assert (used.split == "train").sum() == 50
    smaller = made.targets["table 1"].split("random 0", 20, 0)
    assert set(np.flatnonzero(smaller.split == "train")) < set(
        np.flatnonzero(used.split == "train")
    )


def test_every_option_changes_the_map(planted, tiny_model):
    base = {"splits": 2, "depths": [1, 3], "method": "ridge", "rows": 80}
    frame = planted.assign(quantity=planted["quantity"] + 10)
    plain = cell(probe(frame, [tiny_model], **base), "tiny")
    for change in (
        {"depths": [0]}, {"method": "forest"}, {"rows": 40}, {"transform": "log"}, {"seed": 1},
        {"splits": 3}, {"method": "readouts"},
    ):  # fmt: skip
        assert cell(probe(frame, [tiny_model], **base | change), "tiny") != plain, change


def test_learning_curves_are_of_nested_rows(planted, tiny_model):
    found = probe(planted, [tiny_model], splits=3, depths=[2], method="ridge", rows=[40, 150])
    few, many = (r for r in found.cells if r["source"] == "tiny" and r["chosen"])
    assert (few["train_rows"], many["train_rows"]) == (40, 150)
    assert many["test_mae"] < few["test_mae"]
    assert any("Learning curves" in table.heading for table in tables(found))


def test_a_killed_probe_goes_on(planted, tiny_model, tmp_path):
    options = {"splits": 2, "depths": [1, 2], "method": "ridge", "by_layer": ["permuted"]}
    whole = probe(planted, [tiny_model], **options)
    seen = []

    def kill(record):
        seen.append(record)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(planted, [tiny_model], output=tmp_path, on_record=kill, **options)
    found = probe(planted, [tiny_model], output=tmp_path, on_record=seen.append, **options)
    assert len(seen) == found.settings["n_cells"]
    assert found.cells == whole.cells
    assert found.layers == whole.layers
    # Other values are other cells.
    again = planted.assign(quantity=planted["quantity"] ** 3)
    probe(again, [tiny_model], output=tmp_path, on_record=seen.append, **options)
    assert len(seen) == 2 * found.settings["n_cells"]


def test_hatches_mark_negative_transfer():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    rows = [
        {"target": "a", "source": s, "gain": g, "verdict": v}
        for s, g, v in (("x", 0.3, BETTER), ("y", -0.4, NEGATIVE), ("z", 0.01, UNCLEAR))
    ]
    _heat(axis, rows, ["a"], ["x", "y", "z"], "source")
    assert [bool(patch.get_hatch()) for patch in axis.patches] == [False, True, False]
    assert [text.get_text() for text in axis.texts] == ["+30", "-40", "+1"]
    assert [text.get_weight() for text in axis.texts] == ["bold", "bold", "normal"]


# -- the command ---------------------------------------------------------------------------------
def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["matxfer", "probe", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        matxfer.cli.main()
    return stop.value.code, capsys.readouterr()


def test_the_command(planted, tiny_model_folder, tmp_path, monkeypatch, capsys):
    table, output = tmp_path / "mine.parquet", tmp_path / "out"
    planted.to_parquet(table)
    words = (table, "--sources", tiny_model_folder, "--splits", "2", "--depths", "0,2",
             "--method", "ridge", "--threads", "1", "-o", output)  # fmt: skip
    code, said = run(monkeypatch, capsys, *words)
    assert code == 0
    assert "mine: random weights" in said.out
    assert "12 cells, 0 of them in" in said.err
    for end in ("md", "csv", "parquet", "json", "png"):
        assert (output / f"transfer_map.{end}").stat().st_size > 100
    assert "## What structure adds" in (output / "transfer_map.md").read_text()
    code, said = run(monkeypatch, capsys, *words, "--json")
    assert code == 0
    assert json.loads(said.out)["settings"]["n_cells"] == 12
    assert "12 cells, 12 of them in" in said.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--depths", "9"], "frozen depth 9"),
        (["--depths", "one"], "write numbers with commas"),
        (["--method", "magic"], "method is 'magic'"),
        (["--against", "nothing"], "against is 'nothing'"),
        (["--leave-out", "colour"], "leave_out is 'colour'"),
        (["--by-layer", "thawed"], "by_layer is 'thawed'"),
        (["--rows", "0"], "rows are [0], but must be at least 1"),
        (["--target", "tc_k"], "none of the targets ['tc_k']"),
        (["--splits", "fold"], "no column 'fold'"),
        (["--splits", "0"], "splits are 0"),
        (["--sources", "no-such"], "no model 'no-such'"),
        (["--transform", "auto"], "name it"),
        (["--transform", "sqrt"], "unknown transform 'sqrt'"),
        (["--threads", "0"], "--threads is 0"),
        (["-o", "{table}"], "is a file, but results go into a folder"),
    ],
)
def test_mistakes_end_in_one_line(
    words, says, planted, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    table = tmp_path / "mine.parquet"
    planted.to_parquet(table)
    code, said = run(
        monkeypatch,
        capsys,
        table,
        "--sources",
        tiny_model_folder,
        "-o",
        tmp_path,
        *(word.format(table=table) for word in words),
    )
    assert code == 2
    assert said.err.startswith("error: ")
    assert says in said.err
    assert said.err.count("\n") == 1


def test_tables_that_cannot_be_probed_are_refused(crystals, planted, tiny_model, tmp_path):
    with pytest.raises(TableError, match="which column is the target"):
        probe(frame_of(crystals, a=1.0, b=2.0), [tiny_model])
    with pytest.raises(TableError, match="at least 20 are needed"):
        probe(planted.iloc[:15], [tiny_model])
    with pytest.raises(OptionError, match="two sources are called"):
        probe(planted, [tiny_model, tiny_model])
    with pytest.raises(TableError, match="usable val row"):
        probe(planted.assign(split=np.array(["train", "test"])[np.arange(N) % 2]), [tiny_model])
    both = probe(planted.assign(other=1.0 * np.arange(N)), [tiny_model], splits=2, depths=[0],
                 method="ridge", target=["quantity", "other"])  # fmt: skip
    assert {r["target"] for r in both.cells} == {"table 1: quantity", "table 1: other"}
