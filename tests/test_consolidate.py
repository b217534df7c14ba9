"""A plugin becomes the base of the next: layers, accumulated Fisher information, earlier heads."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from matxfer.cli import main
from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.errors import OptionError
from matxfer.evaluation import evaluate
from matxfer.files import FormatError, read_json
from matxfer.model import load_model
from matxfer.model_card import full_text
from matxfer.prediction import predict
from matxfer.report import write_report
from matxfer.transfer.consolidate import accumulated, consolidate
from matxfer.transfer.ewc import EWCPenalty
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

FIRST, SECOND = "debye_temperature_k", "opposite_k"
ENERGY = "formation_energy_ev_per_atom"
L = 3
QUICK = {
    "split_column": "split", "freeze": 1, "epochs": 4, "batch_size": 16, "learning_rate": 5e-3,
    "head_learning_rate": 1e-2, "members": 2, "hidden_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def frame(crystal_frame):
    """Return the table with a second property, of other structure–property relations."""
    z = np.array([numbers.max() for numbers in crystal_frame["numbers"]])
    sites = np.array([len(numbers) for numbers in crystal_frame["numbers"]])
    return crystal_frame.assign(**{SECOND: 300 + 100 * np.sin(z) + 20 * sites})


@pytest.fixture(scope="module")
def first(frame, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins") / "first"
    return finetune(frame, FIRST, folder, model=tiny_model, **QUICK)


@pytest.fixture(scope="module")
def merged(first, frame, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    consolidate(first, frame, folder, gamma=0.5)
    return load_model(folder)


@pytest.fixture(scope="module")
def packed(frame, tiny_model):
    crystals = read_property_table(frame, [FIRST]).crystals
    return graph_store(crystals, tiny_model.backbone.graph_options).graphs


# -- the model ----------------------------------------------------------------------------------
def test_layers_of_the_plugin_heads_of_the_base(merged, first, tiny_model):
    for name, value in merged.backbone.state_dict().items():
        assert torch.equal(value, first.backbone.state_dict()[name]), name
    assert not torch.equal(
        merged.backbone.get_parameter("layers.2.norm.weight"),
        tiny_model.backbone.get_parameter("layers.2.norm.weight"),
    )
    for name, head in merged.heads.items():
        theirs = tiny_model.heads[name].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in head.state_dict().items())
    assert merged.elements == tiny_model.elements


def test_the_card_names_its_parent(merged, tiny_model, first, tmp_path, frame):
    card = merged.card
    identity = {"name": "tiny", "sha256": tiny_model.checksum}
    assert card["parent"] == {**identity, "parent": None}
    assert (card["fisher"]["gamma"], card["fisher"]["source_size"]) == (0.5, 500)
    assert card["consolidated"]["plugin"] == "first"
    assert card["consolidated"]["rows"] == 48
    assert card["consolidated"]["drift"] == first.meta["retention"]["drift"]
    assert "figures" not in card  # those of the parent are not true of it
    assert "layers of plugin first" in full_text(str(merged.folder))
    again = finetune(frame, SECOND, tmp_path / "second", model=merged, **QUICK)
    grandchild = consolidate(again, frame, tmp_path / "grandchild")
    assert grandchild.card["parent"]["sha256"] == merged.checksum
    assert grandchild.card["parent"]["parent"]["name"] == "tiny"


def test_the_plugin_lies_beside_its_model(merged, first, frame):
    folder = merged.folder / "plugins" / "first"
    plugin = load_plugin(folder, merged)
    assert plugin.depth == L
    then, now = (predict(frame, p) for p in (first, plugin))
    np.testing.assert_allclose(now[FIRST], then[FIRST], rtol=1e-5)
    np.testing.assert_allclose(now[f"{FIRST}_std"], then[f"{FIRST}_std"], rtol=0.02)
    for part in ("val", "test"):
        mine, theirs = (p.meta["figures"][part]["mae"] for p in (plugin, first))
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert plugin.meta["consolidated"]["trained_on"]["name"] == "tiny"


def test_the_plugin_keeps_its_predictions_and_has_a_report(merged, first, frame, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = merged.folder / "plugins" / "first"
    kept = read_json(folder / "plugin.json")["predictions"]
    assert set(kept) == {"val", "test"}
    found = predict(frame[frame.split == "test"], folder)  # its base is found: it lies beside it
    assert kept["test"]["id"] == frame.material_id[frame.split == "test"].tolist()
    for column, name in (("predicted", FIRST), ("std", f"{FIRST}_std"), ("ood", "ood")):
        np.testing.assert_allclose(kept["test"][column], found[name], rtol=1e-4)
    write_report(folder, tmp_path / "r.html", data=frame)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    write_report(folder, tmp_path / "r.html")
    for page in (text, (tmp_path / "r.html").read_text(encoding="utf-8")):
        assert page.count("keeps no predictions") == 0
        assert "before the base was consolidated</th><td>tiny" in page
        assert first.meta["versions"]["torch"] in page
    with pytest.raises(FormatError, match=r"is a base model.*its plugins are .*plugins/first"):
        write_report(merged.folder, tmp_path / "r.html")


def test_secret_values_stay_secret(frame, tiny_model, tmp_path):
    options = QUICK | {"epochs": 1}
    for most in (0, 3):
        mine = finetune(
            frame, FIRST, tmp_path / f"p{most}", model=tiny_model, keep_predictions=most, **options
        )
        consolidate(mine, frame, tmp_path / f"m{most}", samples=5)
        said = read_json(tmp_path / f"m{most}" / "plugins" / f"p{most}" / "plugin.json")
        assert [len(part["truth"]) for part in said.get("predictions", {}).values()] == (
            [3, 3] if most else []
        )
        assert said["figures"]["test"]["n"] == 6


# -- Fisher information -----------------------------------------------------------------------
def _brute_force(plugin, packed, rows, truth):
    """Return σ and the mean squared derivatives of a few weights, by central differences."""
    model, scaler = plugin.base, plugin.head.scaler
    named = dict(model.backbone.named_parameters())

    def fitted(rows):  # the prediction on the fitted scale, in units of the targets' spread
        return plugin.values(packed.batch(np.array(rows))) / float(scaler.std)

    picks = {}
    for name in ("layers.0.update.0.weight", "layers.2.norm.bias", "embedding.bond.bias"):
        flat, step = named[name].data.flatten(), 1e-2
        for k in (0, 3):
            value = float(flat[k])
            shifted = []
            for sign in (1, -1):
                named[name].data.view(-1)[k] = value + sign * step
                shifted.append(fitted(rows))
            named[name].data.view(-1)[k] = value
            picks[name, k] = np.mean(((shifted[0] - shifted[1]) / (2 * step)) ** 2)
    return picks


@pytest.mark.parametrize("target", [FIRST, ENERGY])
def test_fisher_against_differences(target, frame, tiny_model, packed, tmp_path):
    """γ F_base + (n/N) F_plugin, with F_plugin from finite differences of the new predictions.

    An energy starts from the base's own prediction, which moves with the layers as well.
    """
    plugin = finetune(frame, target, tmp_path / "p", model=tiny_model, **QUICK)
    assert (plugin.head.source is not None) == (target == ENERGY)
    model = consolidate(plugin, frame, tmp_path / "m", gamma=0.25)
    train = np.flatnonzero(frame["split"] == "train")
    val = np.flatnonzero(frame["split"] == "val")
    with torch.no_grad():
        error = plugin.values(packed.batch(val)) - frame[target].to_numpy()[val]
    sigma = np.sqrt(np.mean((error / float(plugin.head.scaler.std)) ** 2))
    assert model.card["fisher"]["noise_normalised"][target] == pytest.approx(sigma, rel=1e-3)

    moved = load_plugin(tmp_path / "m" / "plugins" / "p", load_model(tmp_path / "m"))
    with torch.no_grad():
        expected = _brute_force(moved, packed, train, sigma)
    stored, base = model.fisher(), tiny_model.fisher()
    key = f"{target}__p"
    for (name, k), square in expected.items():
        mine = float(stored[f"{key}/{name}"].flatten()[k])
        assert mine == pytest.approx(48 / 500 * square / sigma**2, rel=0.05, abs=1e-5), name
        for task in tiny_model.heads:
            old = float(base[f"{task}/{name}"].flatten()[k])
            assert float(stored[f"{task}/{name}"].flatten()[k]) == pytest.approx(old / 4, rel=0.01)


def test_gamma_and_samples_change_the_information(first, frame, tmp_path):
    def trace(**options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model = consolidate(first, frame, folder, **options)
        return sum(float(v.sum()) for v in model.fisher().values()), model

    whole, model = trace()
    half, _ = trace(gamma=0.5)
    none, _ = trace(gamma=0.0)
    assert whole - half == pytest.approx(half - none, rel=0.01)
    assert whole > half > none > 0
    few, small = trace(samples=5)
    assert (model.card["fisher"]["samples"], small.card["fisher"]["samples"]) == (48, 5)
    assert few != whole
    assert trace(samples=5, seed=1)[0] != few


def test_information_that_is_there_already_is_added_to():
    earlier = {"a/w": torch.tensor([4.0]), "p/w": torch.tensor([2.0])}
    total = accumulated(earlier, {"p/w": torch.tensor([10.0]), "q/w": torch.ones(1)}, 0.5, 0.1)
    assert {k: v.item() for k, v in total.items()} == pytest.approx(
        {"a/w": 2.0, "p/w": 2.0, "q/w": 0.1}
    )
    assert earlier["a/w"].item() == 4.0


def test_three_linear_tasks_one_after_another_are_as_good_as_at_once():
    """For linear models with uncorrelated inputs the recursion with γ = 1 is exact.

    Squared loss with noise 1: F of a task is its mean squared input, and the weights after the
    last task are the least squares of all rows together.
    """
    rng = np.random.default_rng(0)
    sizes, d = (40, 25, 30), 4
    xs = [np.linalg.qr(rng.normal(size=(n, d)))[0] * rng.uniform(2, 6, d) for n in sizes]
    ys = [rng.normal(size=n) for n in sizes]
    joint = np.linalg.lstsq(np.concatenate(xs), np.concatenate(ys), rcond=None)[0]

    n_source = sizes[0]
    weight = np.linalg.lstsq(xs[0], ys[0], rcond=None)[0]
    fisher = {"w/weight": torch.tensor((xs[0] ** 2).mean(0)[None])}
    for x, y in zip(xs[1:], ys[1:], strict=True):
        module = nn.Linear(d, 1, bias=False).double()
        module.weight.data = torch.tensor(weight[None])
        flat = {"weight": sum(fisher.values())}
        penalty = EWCPenalty(module, flat, 1.0, n_source / len(x), floor_share=0.0)
        inputs, targets = torch.tensor(x), torch.tensor(y)
        optimizer = torch.optim.LBFGS(
            module.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss(optimizer=optimizer, module=module, penalty=penalty, inputs=inputs, t=targets):
            optimizer.zero_grad()
            total = 0.5 * (module(inputs)[:, 0] - t).square().mean() + penalty()
            total.backward()
            return total

        optimizer.step(loss)
        weight = module.weight.detach().numpy()[0]
        fresh = {"w/weight": torch.tensor((x**2).mean(0)[None])}
        fisher = accumulated(fisher, fresh, 1.0, len(x) / n_source)
    np.testing.assert_allclose(weight, joint, atol=1e-7)


# -- one task after another -------------------------------------------------------------------
def test_the_first_task_survives_the_second(frame, tiny_model, tmp_path):
    """The error on the first property after the second, with its information and without."""
    options = {**QUICK, "epochs": 30, "patience": 30, "members": 1, "probe_first": False}
    first = finetune(frame, FIRST, tmp_path / "first", model=tiny_model, **options)
    before = evaluate(frame, FIRST, first)["mae"]
    online = consolidate(first, frame, tmp_path / "online")
    bare = consolidate(first, frame, tmp_path / "bare")
    base_only = {k: v for k, v in online.fisher().items() if not k.startswith(f"{FIRST}__")}
    assert len(base_only) < len(online.fisher())
    bare.save(tmp_path / "bare", base_only)

    def after(model, strength):
        name = f"second-{model.name}-{strength}"
        second = finetune(
            frame, SECOND, tmp_path / name, model=model, retain="ewc", strength=strength, **options
        )
        last = consolidate(second, frame, tmp_path / f"{name}-model")
        plugin = tmp_path / f"{name}-model" / "plugins" / "first"
        assert {p.name for p in plugin.parent.iterdir()} == {"first", name}
        figures = evaluate(frame, FIRST, plugin, model=last)
        assert not {"figures", "predictions"} & set(read_json(plugin / "plugin.json"))
        write_report(plugin, tmp_path / "r.html")
        assert "consolidated with a later plugin since" in (tmp_path / "r.html").read_text()
        return figures["mae"], second.meta["figures"]["val"]["mae"]

    forgotten, _ = after(bare, 1.0)
    kept, learned = after(online, 1.0)
    assert before < kept < 0.8 * forgotten
    assert kept < after(online, 0.1)[0]
    constant = np.abs(frame[SECOND] - frame[SECOND].median()).mean()
    assert learned < 0.8 * constant  # and it is no standstill


# -- refusals ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, "gamma is -0.1, but must be between 0"),
        ({"gamma": 1.1}, "gamma is 1.1, but must be between 0"),
        ({"gamma": float("nan")}, "gamma is nan, but must be between 0"),
        ({"samples": 0}, "samples is 0, but must be at least 1"),
    ],
)
def test_options_out_of_range(options, message, first, frame, tmp_path):
    with pytest.raises(OptionError, match=message):
        consolidate(first, frame, tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_plugins_that_cannot_be_a_base(frame, tiny_model, tmp_path, merged):
    scratch = finetune(
        frame, FIRST, model=tiny_model, split_column="split", strategy="scratch", epochs=1
    )
    with pytest.raises(OptionError, match="trained from random weights"):
        consolidate(scratch, frame, tmp_path / "m")
    forest = finetune(frame, FIRST, model=tiny_model, split_column="split", features="forest")
    with pytest.raises(OptionError, match="forest, which has no gradient"):
        consolidate(forest, frame, tmp_path / "m")
    again = finetune(frame, SECOND, tmp_path / "first", model=merged, **QUICK)
    with pytest.raises(OptionError, match="holds a plugin called 'first' already; rename"):
        consolidate(again, frame, tmp_path / "m")
    other = finetune(frame, SECOND, tmp_path / "second", model=merged, **QUICK)
    with pytest.raises(OptionError, match="is the base of plugin 'second'; write to another"):
        consolidate(other, frame, merged.folder)


def test_a_kernel_on_frozen_layers_can_be_a_base(frame, tiny_model, tmp_path):
    """Its layers are the base's, but now they are held for its sake as well."""
    kernel = finetune(
        frame, FIRST, tmp_path / "k", model=tiny_model, split_column="split",
        features="kernel_ridge",
    )  # fmt: skip
    model = consolidate(kernel, frame, tmp_path / "m")
    assert sum(float(v.sum()) for k, v in model.fisher().items() if k.startswith(FIRST)) > 0


def test_a_plugin_is_no_model(first):
    with pytest.raises(FormatError, match="first is a plugin, not a model; matxfer consolidate"):
        load_model(first.folder)


# -- the command ------------------------------------------------------------------------------
def test_the_command(first, frame, tiny_model_folder, tmp_path, monkeypatch, capsys):
    frame.to_parquet(tmp_path / "t.parquet")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out

    words = ["consolidate", first.folder, tmp_path / "t.parquet", "--model", tiny_model_folder]
    out = run(*words, "-o", tmp_path / "m", "--gamma", 0.3)
    assert f"--model {tmp_path / 'm'}" in out
    card = json.loads(run(*words, "-o", tmp_path / "n", "--gamma", 0.3, "--samples", 7, "--json"))
    assert (card["fisher"]["gamma"], card["fisher"]["samples"]) == (0.3, 7)
    # And the next plugin is fine-tuned on it.
    run("finetune", tmp_path / "t.parquet", "--target", SECOND, "--model", tmp_path / "m",
        "--split-column", "split", "--freeze", 2, "--retain", "ewc", "--epochs", 1,
        "-o", tmp_path / "second")  # fmt: skip
    out = run("predict", tmp_path / "t.parquet", "--model", tmp_path / "m", "--plugin",
              tmp_path / "second", "--plugin", tmp_path / "m" / "plugins" / "first")  # fmt: skip
    assert SECOND in out.splitlines()[0]
    assert FIRST in out.splitlines()[0]
