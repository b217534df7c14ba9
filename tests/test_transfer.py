"""Freezing, the prefix cache, elastic weight consolidation and fine-tuning as a whole."""

from __future__ import annotations

import copy
import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import matxfer.transfer.strategies as strategies_module
from matxfer.data.packed import PackedGraphs
from matxfer.data.properties import property_of
from matxfer.data.store import graph_store
from matxfer.data.table import TableError, read_property_table
from matxfer.files import FormatError, read_json, write_json
from matxfer.fisher import total_fisher
from matxfer.graph import build_graph
from matxfer.model import load_model
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.nn.plugin_head import PluginHead
from matxfer.transfer.activations import Activations
from matxfer.transfer.ewc import EWCPenalty
from matxfer.transfer.finetune import FinetuneConfig, finetune
from matxfer.transfer.freezing import parameter_groups, trainable_blocks
from matxfer.transfer.plugin import Plugin
from matxfer.transfer.readout_training import Fit
from matxfer.transfer.rows import PluginBatch, PluginRows
from matxfer.transfer.training import FinetuneModule

TARGET = "debye_temperature_k"
L = 3
#: Learns enough in a few steps to tell one run from another.
QUICK = {
    "freeze": 1, "epochs": 2, "learning_rate": 3e-3, "head_learning_rate": 1e-2,
    "probe_first": False, "batch_size": 32, "hidden_dim": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def graphs(tiny_model, table_crystals):
    """Return the graphs of the table, with a row that failed among them."""
    options = tiny_model.backbone.graph_options
    built = [build_graph(crystal, options) for crystal in table_crystals]
    return PackedGraphs.pack([*built[:7], None, *built[7:]])


@pytest.fixture(scope="module")
def tune(tiny_model, crystal_table):
    """Return a function that fine-tunes quickly, with other options where they are given."""

    def run(table=None, target=TARGET, model=None, **options):
        options = {"split_column": "split", **QUICK, **options}
        table = crystal_table if table is None else table
        return finetune(table, target, model=model or tiny_model, **options)

    return run


@pytest.fixture(scope="module")
def basic(tune):
    return tune()


def weights(plugin):
    """Return all weights of a plugin, frozen ones too."""
    own = {f"backbone.{k}": v for k, v in plugin.backbone.state_dict().items()}
    return {**own, **{f"head.{k}": v for k, v in plugin.head.state_dict().items()}}


def same_weights(first, second):
    first, second = weights(first), weights(second)
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def predictions(plugin, graphs, rows=range(6)):
    batch = graphs.batch(np.array(rows))
    with torch.no_grad():
        return plugin.values(batch)


def small_head():
    return PluginHead(property_of(TARGET), (L,), ReadoutEnsemble("pooled", 16, 4))


def block_of(name):
    """Return the depth of a backbone tensor: 0 for the embedding, k + 1 for layer k."""
    return 0 if name.startswith("embedding.") else int(name.split(".")[1]) + 1


# -- freezing ---------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", range(L + 1))
def test_frozen_layers_stay_and_the_others_learn(depth, tune, tiny_model, graphs):
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    batch = graphs.batch(np.arange(6))
    predicted = tiny_model.predict_graphs(batch)

    plugin = tune(freeze=depth)

    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in tiny_model.predict_graphs(batch).items():
        assert np.array_equal(value, predicted[name]), name
    base = dict(tiny_model.backbone.named_parameters())
    frozen_blocks = 0 if depth == 0 else depth + 1
    for name, parameter in plugin.backbone.named_parameters():
        if block_of(name) < frozen_blocks:
            assert parameter.data_ptr() == base[name].data_ptr(), name
            assert torch.equal(parameter, before[f"backbone.{name}"]), name
        else:
            assert parameter.data_ptr() != base[name].data_ptr(), name
            assert not torch.equal(parameter, before[f"backbone.{name}"]), name


@pytest.mark.parametrize("depth", [-1, L + 1, 99])
def test_depths_that_are_not_there(depth, tune):
    with pytest.raises(ValueError, match=rf"frozen depth {depth} is not between 0 .* and {L}"):
        tune(freeze=depth)


@pytest.mark.parametrize("depth", range(L + 1))
def test_parameter_groups(depth, tiny_model):
    head = small_head()
    plugin = Plugin(tiny_model, depth, head)
    rates = {"learning_rate": 1e-3, "head_learning_rate": 5e-3, "layer_decay": 0.5}
    groups = parameter_groups(plugin.backbone, head, depth, **rates, weight_decay=0.1)

    ids = [id(p) for group in groups for p in group["params"]]
    trainable = [p for m in (plugin.backbone, head) for p in m.parameters() if p.requires_grad]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in trainable}

    layers = [f"layers.{k}" for k in range(depth, L)]
    expected = {name: 1e-3 * 0.5 ** (L - 1 - int(name[-1])) for name in layers}
    if depth == 0:
        expected["embed"] = 1e-3 * 0.5**L
    expected["head"] = 5e-3
    assert {g["name"]: g["lr"] for g in groups} == pytest.approx(expected)
    assert {g["name"] for g in groups if g["weight_decay"] > 0} == {"head"}
    for group in groups:  # and the rates belong to the parameters of their names
        if group["name"] != "head":
            module = dict(trainable_blocks(plugin.backbone, depth))[group["name"]]
            assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}


# -- kept activations ----------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [None, 0], ids=["cache", "temporary"])
def test_activations_equal_recomputing(limit, tiny_model, graphs, tmp_path):
    kept = Activations(tiny_model, graphs, tmp_path, limit)
    rng = np.random.default_rng(0)
    backbone = tiny_model.backbone
    for size in (1, 5, 30):
        index = rng.choice(np.flatnonzero(graphs.nodes_per_graph), size, replace=False)
        batch = graphs.batch(index)
        with torch.no_grad():
            states = [backbone.embed(batch)]
            states += backbone.states(batch, states[0], 0, L)
        for depth, state in enumerate(states):
            prefix = kept.prefix(index, depth)
            torch.testing.assert_close(prefix.node, state.node, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(prefix.edge, state.edge, atol=1e-6, rtol=1e-5)
        for name, head in tiny_model.heads.items():
            fitted = head.scaler.to_unit(kept.source(name)[index])
            expected = head.values(states[-1].node, batch)
            np.testing.assert_allclose(fitted, expected, rtol=1e-4, atol=1e-5)
    assert bool(list(tmp_path.iterdir())) == (limit is None)


def test_activations_are_computed_once(tiny_model, graphs, tmp_path, monkeypatch):
    first = Activations(tiny_model, graphs, tmp_path)
    expected = first.node(L).clone(), first.edge(1).clone(), first.source("band_gap_ev")
    monkeypatch.setattr(Activations, "_compute", lambda *_: pytest.fail("computed again"))
    again = Activations(tiny_model, graphs, tmp_path)
    assert torch.equal(again.node(L), expected[0])
    assert torch.equal(again.edge(1), expected[1])
    assert np.array_equal(again.source("band_gap_ev"), expected[2])
    # Other structures are kept elsewhere.
    other = Activations(tiny_model, graphs.select(np.arange(3)), tmp_path)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        other.node(0)


def test_activations_are_bounded(tiny_model, graphs, tmp_path):
    """The least recently used folder goes when the next one would pass the limit."""
    packs = [graphs.select(np.arange(k, k + 20)) for k in (0, 10, 20)]
    kept = []
    for k, pack in enumerate(packs):
        kept.append(Activations(tiny_model, pack, tmp_path, limit_bytes=1 << 30))
        kept[-1].node(0)
        os.utime(kept[-1]._folder(), (k, k))
    used = [sum(p.stat().st_size for p in f.iterdir()) for f in tmp_path.iterdir()]
    last = Activations(tiny_model, graphs, tmp_path, limit_bytes=sum(used) + 400_000)
    assert len(list(tmp_path.iterdir())) == 3
    need = last.graphs.edge_offset[-1] * 8 * 4 + last.graphs.node_offset[-1] * 16 * 4 * (L + 1)
    last.limit_bytes = int(need) + max(used) + 1
    last.node(0)
    names = {f.name for f in tmp_path.iterdir()}
    assert kept[0]._name not in names
    assert {kept[2]._name, last._name} <= names
    assert kept[0].node(0).shape[1] == 16  # what is in use goes on


@pytest.mark.parametrize("readout", ["atomwise", "pooled"])
@pytest.mark.parametrize("depth", range(L + 1))
def test_training_starts_from_the_kept_activations(depth, readout, tune, monkeypatch):
    kept = tune(freeze=depth, readout=readout)
    original, calls = PluginRows.batch, []

    def recompute(self, rows):
        calls.append(len(rows))
        known, graphs = original(self, rows), self.task.graphs.batch(rows)
        inputs = None
        if self.plugin.runs_no_layer:
            with torch.no_grad():
                inputs = self.plugin.head.inputs(self.plugin.nodes(graphs), graphs)
        return PluginBatch(graphs, known.targets, inputs)

    monkeypatch.setattr(PluginRows, "batch", recompute)
    recomputed = tune(freeze=depth, readout=readout)
    assert len(calls) > 4
    for name, value in weights(kept).items():
        torch.testing.assert_close(
            value, weights(recomputed)[name], atol=2e-4, rtol=2e-3,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


# -- elastic weight consolidation -------------------------------------------------------------
def linear_with_fisher(seed=0):
    """Return a small module in double precision, one tensor of it frozen, and a made-up Fisher."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    module[0].bias.requires_grad_(False)
    fisher = {name: torch.rand_like(p) for name, p in module.named_parameters()}
    return module, fisher


def moved(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


def test_penalty_equals_a_slow_loop():
    module, fisher = linear_with_fisher()
    start = copy.deepcopy(module)
    penalty = EWCPenalty(module, fisher, strength=0.7, sample_ratio=20.0, floor_share=0.01)
    assert float(penalty().detach()) == 0
    moved(module)

    trainable = [n for n, p in module.named_parameters() if p.requires_grad]
    assert "0.bias" not in trainable
    values = [v for name in trainable for v in fisher[name].flatten().tolist()]
    floor = 0.01 * sum(values) / len(values)
    expected, gradients = 0.0, {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        now = parameter.detach().flatten().tolist()
        then = dict(start.named_parameters())[name].detach().flatten().tolist()
        stiffness = [f + floor for f in fisher[name].flatten().tolist()]
        for f, a, b in zip(stiffness, now, then, strict=True):
            expected += 0.7 / 2 * 20.0 * f * (a - b) ** 2
        gradients[name] = [
            0.7 * 20.0 * f * (a - b) for f, a, b in zip(stiffness, now, then, strict=True)
        ]
    assert float(penalty().detach()) == pytest.approx(expected, rel=1e-12)
    penalty().backward()
    for name, parameter in module.named_parameters():
        if name in gradients:
            assert parameter.grad.flatten().tolist() == pytest.approx(gradients[name], rel=1e-12)
        else:
            assert parameter.grad is None


def test_penalty_of_frozen_and_unsampled_weights():
    """Frozen weights cost nothing; weights that the Fisher sample never touched cost a little."""
    module, fisher = linear_with_fisher()
    fisher["1.bias"].zero_()
    penalty = EWCPenalty(module, fisher, 1.0, 1.0)
    with torch.no_grad():
        module[0].bias += 1
    assert float(penalty().detach()) == 0
    with torch.no_grad():
        module[1].bias += 1
    little = float(penalty().detach())
    with torch.no_grad():
        module[1].bias -= 1
        module[1].weight += 1
    assert 0 < little < 0.01 * float(penalty().detach())


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_closed_form_of_a_linear_model(strength):
    """Squared loss plus EWC is a ridge regression towards the anchor, one stiffness per weight."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=40)
    anchor, fisher = rng.normal(size=5), rng.uniform(0, 2, 5)
    ratio, floor = 7.0, 1e-3 * fisher.mean()
    d = np.diag(strength * ratio / 2 * (fisher + floor))
    expected = np.linalg.solve(x.T @ x / 40 + d, x.T @ y / 40 + d @ anchor)

    module = nn.Linear(5, 1, bias=False).double()
    module.weight.data = torch.tensor(anchor[None])
    penalty = EWCPenalty(module, {"weight": torch.tensor(fisher[None])}, strength, ratio)
    moved(module)
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    inputs, targets = torch.tensor(x), torch.tensor(y)

    def loss():
        optimizer.zero_grad()
        total = (module(inputs)[:, 0] - targets).square().mean() + penalty()
        total.backward()
        return total

    optimizer.step(loss)
    np.testing.assert_allclose(module.weight.detach().numpy()[0], expected, atol=1e-7)


def test_penalty_refuses_what_does_not_fit():
    module, fisher = linear_with_fisher()
    with pytest.raises(ValueError, match="must not be negative"):
        EWCPenalty(module, fisher, -0.1, 1.0)
    with pytest.raises(ValueError, match=r"1\.weight is missing or of another shape; use"):
        EWCPenalty(module, {**fisher, "1.weight": torch.ones(2, 1)}, 1.0, 1.0)
    del fisher["0.weight"]
    with pytest.raises(ValueError, match=r"0\.weight is missing or of another shape; use"):
        EWCPenalty(module, fisher, 1.0, 1.0)
    fisher["0.weight"] = torch.ones(2, 3)
    del fisher["0.bias"]  # frozen: needs none
    EWCPenalty(module, fisher, 1.0, 1.0)


def test_more_strength_means_less_drift(tune, tiny_model):
    fisher = total_fisher(tiny_model.fisher())
    base = dict(tiny_model.backbone.named_parameters())

    def drift(**options):
        plugin = tune(epochs=10, batch_size=8, patience=10, **options)
        return sum(
            float((fisher[name] * (p - base[name]).square()).sum())
            for name, p in plugin.backbone.named_parameters()
        )

    free = drift()
    held = [drift(retain="ewc", strength=strength) for strength in (1e-2, 1.0, 1e2)]
    assert free > held[0] > held[1] > held[2] > 0
    assert held[2] < 0.1 * free


def test_strength_counts_per_source_sample(tune, tiny_model, monkeypatch):
    """λ is multiplied by the ratio of the sample sizes, N source over n training rows."""
    made = []
    original = EWCPenalty.__init__

    def spy(self, module, fisher, strength, sample_ratio, *rest):
        made.append((strength, sample_ratio))
        original(self, module, fisher, strength, sample_ratio, *rest)

    monkeypatch.setattr(EWCPenalty, "__init__", spy)
    tune(retain="ewc", strength=0.3, epochs=1)
    assert made == [(0.3, 500 / 48)]
    tune(retain="ewc", freeze=L, epochs=1)  # nothing of the backbone is trained
    tune(retain="none", epochs=1)
    assert len(made) == 1


def copied_model(folder, target):
    shutil.copytree(folder, target)
    return target


def test_ewc_needs_the_fisher_file(tune, tiny_model_folder, tmp_path):
    folder = copied_model(tiny_model_folder, tmp_path / "bare")
    (folder / "fisher.safetensors").unlink()
    bare = load_model(folder)
    with pytest.raises(FormatError, match=r"'tiny' comes without fisher\.safetensors; compute it"):
        tune(model=bare, retain="ewc")
    tune(model=bare, epochs=1)  # and nothing else does
    tune(model=bare, epochs=1, retain="ewc", freeze=L)  # where there is nothing to hold back


def test_ewc_needs_the_size_of_the_source(tune, tiny_model_folder, tmp_path):
    folder = copied_model(tiny_model_folder, tmp_path / "sizeless")
    card = read_json(folder / "card.json")
    del card["fisher"]
    write_json(folder / "card.json", card)
    with pytest.raises(FormatError, match=r"source_size.*write"):
        tune(model=load_model(folder), retain="ewc")


# -- options ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("option", "value", "others"),
    [
        ("freeze", 2, {}),
        ("retain", "ewc", {"strength": 1.0}),
        ("strength", 10.0, {"retain": "ewc"}),
        ("epochs", 3, {}),
        ("probe_first", True, {}),
        ("patience", 12, {"epochs": 12, "learning_rate": 0.02, "head_learning_rate": 0.05}),
        ("batch_size", 16, {}),
        ("learning_rate", 1e-3, {}),
        ("layer_decay", 0.1, {}),
        ("head_learning_rate", 1e-3, {}),
        ("weight_decay", 0.5, {}),
        ("readout", "atomwise", {}),
        ("layers", (3,), {}),
        ("members", 2, {}),
        ("hidden_dim", 16, {}),
        ("unfreeze_every", 1, {}),
        ("warmup_fraction", 0.9, {}),
        ("average", 0.5, {}),
        ("strategy", "scratch", {}),
        ("strategy", "features", {}),
        ("features", "ridge", {"strategy": "features"}),
        ("features", "forest", {"strategy": "features"}),
        ("features", "gaussian_process", {"strategy": "features"}),
        ("retain", "l2sp", {}),
        ("retain", "distill", {"learning_rate": 0.05}),
        ("transform", "log", {}),
        ("seed", 1, {}),
    ],
)
def test_every_option_changes_the_plugin(option, value, others, tune, basic, graphs):
    first = tune(**others, **({"patience": 1} if option == "patience" else {})) if others else basic
    second = tune(**{**others, option: value})
    assert second.meta["config"][option] == value != first.meta["config"][option]
    difference = np.abs(predictions(second, graphs) - predictions(first, graphs))
    assert difference.max() > 1e-3, "K, where the predictions are hundreds of K"


def test_options_or_config(tune, basic):
    """A configuration and single options say the same; an option wins over the configuration."""
    assert same_weights(tune(config=FinetuneConfig(seed=3), seed=0), basic)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("retain", "l2"),
        ("strength", -1.0),
        ("strength", float("nan")),
        ("epochs", 0),
        ("patience", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("layer_decay", 0.0),
        ("layer_decay", -0.5),
        ("head_learning_rate", -1e-3),
        ("weight_decay", -1e-3),
        ("readout", "median"),
        ("transform", "sqrt"),
        ("strategy", "magic"),
        ("features", "boosting"),
        ("members", 0),
        ("average", 1.0),
        ("warmup_fraction", -0.1),
        ("strength", "much"),
        ("unfreeze_every", -1),
        ("seed", -1),
    ],
)
def test_options_out_of_range(option, value, tune):
    with pytest.raises(ValueError, match=f"{option}|unknown"):
        tune(**{option: value})


def test_unknown_option(tune):
    with pytest.raises(TypeError, match="frozen"):
        tune(frozen=2)


# -- the difference from the source ---------------------------------------------------------------
def untrained(monkeypatch):
    monkeypatch.setattr(strategies_module, "train_plugin", lambda *_: Fit(0, 0.0))


@pytest.mark.parametrize("target", ["formation_energy_ev_per_atom", "bulk_modulus_vrh_gpa"])
def test_a_property_of_the_base_starts_from_its_prediction(target, tune, tiny_model, crystal_frame):
    """A target that the base predicts but for a constant factor or shift is learned at once."""
    data = read_property_table(crystal_frame, [target], split_column="split")
    packed = graph_store(data.crystals, tiny_model.backbone.graph_options).graphs
    known = tiny_model.predict_graphs(packed.batch(np.arange(len(packed))))[target]
    moved = known + 0.7 if target.startswith("formation") else known * 3
    plugin = tune(crystal_frame.assign(**{target: moved}), target)
    figures = plugin.meta["figures"]["test"]
    assert plugin.head.source == target
    assert figures["mae"] < 0.05 * np.std(moved)
    without = tune(crystal_frame.assign(**{target: moved}), target, difference=False)
    assert without.head.source is None
    assert without.meta["figures"]["test"]["mae"] > 3 * figures["mae"]


def test_no_start_where_the_scale_is_another(tune):
    assert tune(target="bulk_modulus_vrh_gpa", transform="identity").head.source is None
    assert tune(target=TARGET).head.source is None


# -- what a run depends on --------------------------------------------------------------------
def test_same_seed_same_weights(tune, basic, tmp_path):
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002 - the global state is the point
    again = tune(output=tmp_path / "plugin")
    assert same_weights(again, basic)
    assert again.meta["figures"] == basic.meta["figures"]


def test_it_learns(tune):
    plugin = tune(epochs=40, batch_size=8, patience=40)
    figures = plugin.meta["figures"]["val"]
    assert figures["mae"] < 0.5 * figures["mae_of_a_constant"]


def test_test_rows_never_influence_training(tune, basic, crystal_frame):
    frame = crystal_frame.copy()
    test = (frame["split"] == "test").to_numpy()
    assert test.sum() == 6
    frame.loc[test, TARGET] *= 100
    other = tune(frame)
    assert same_weights(other, basic)
    assert other.meta["figures"]["val"] == basic.meta["figures"]["val"]
    assert other.meta["figures"]["test"]["mae"] > 10 * basic.meta["figures"]["test"]["mae"]
    # Nor do their structures, by the scaler for example: without them all is the same too.
    assert same_weights(tune(frame[~test]), basic)
    # While training rows do.
    frame.loc[~test, TARGET] += np.arange((~test).sum())
    assert not same_weights(tune(frame), basic)


def test_figures_are_those_of_the_returned_weights(basic, crystal_frame, table_crystals, graphs):
    """The best epoch's weights come back, and the figures are computed with them."""
    packed = graphs.select(np.flatnonzero(graphs.nodes_per_graph))
    for part in ("val", "test"):
        rows = np.flatnonzero(crystal_frame["split"] == part)
        truth = crystal_frame[TARGET].to_numpy()[rows]
        error = predictions(basic, packed, rows) - truth
        figures = basic.meta["figures"][part]
        assert figures["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
        assert figures["n"] == len(rows) == 6
        train = crystal_frame[TARGET][crystal_frame["split"] == "train"]
        constant = np.abs(truth - np.median(train)).mean()
        assert figures["mae_of_a_constant"] == pytest.approx(constant)


def test_retention_is_the_drift_of_the_source_heads(basic, tiny_model, crystal_frame, graphs):
    packed = graphs.select(np.flatnonzero(graphs.nodes_per_graph))
    batch = packed.batch(np.flatnonzero(crystal_frame["split"] != "train"))
    before = tiny_model.predict_graphs(batch)
    with torch.no_grad():
        after = tiny_model.predict_features(basic.backbone(batch), batch)
    drift = basic.meta["retention"]["drift"]
    assert list(drift) == list(tiny_model.heads)
    for name, entry in drift.items():
        expected = np.abs(after[name] - before[name]).mean()
        assert entry["mean_absolute_drift"] == pytest.approx(expected, rel=1e-3)
        assert entry["unit"] == property_of(name).unit
    assert expected > 1e-4


def test_each_layer_is_clipped_on_its_own(tiny_model):
    """A stiff penalty on the layers leaves the gradient of the readout as it is."""
    plugin = Plugin(tiny_model, 1, small_head())
    module = FinetuneModule(plugin, FinetuneConfig())
    groups = parameter_groups(
        plugin.backbone, plugin.head, 1, learning_rate=1e-3, head_learning_rate=1e-3,
        layer_decay=0.5, weight_decay=0.0,
    )  # fmt: skip
    sizes = {"head": 0.5, "layers.2": 1e4, "layers.1": 30.0}

    def norm(group):
        return float(torch.cat([p.grad.flatten() for p in group["params"]]).norm())

    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
        scale = sizes[group["name"]] / norm(group)
        for parameter in group["params"]:
            parameter.grad *= scale
    module.configure_gradient_clipping(torch.optim.AdamW(groups))
    clipped = {group["name"]: norm(group) for group in groups}
    assert clipped == pytest.approx({"head": 0.5, "layers.2": 1.0, "layers.1": 1.0}, rel=1e-3)


# -- rows -------------------------------------------------------------------------------------
def test_excluded_rows_are_counted(tune, crystal_frame):
    frame = crystal_frame.copy()
    frame.loc[[0, 1], TARGET] = np.nan
    frame.at[2, "lattice"] = np.zeros(9)
    frame.at[3, "frac_coords"] = None
    frame.at[4, "numbers"] = np.full(2, 92)  # a CsCl row: an element that the model never saw
    frame.loc[5, "split"] = "holdout"
    plugin = tune(frame)
    assert plugin.meta["data"]["rows_excluded"] == {
        "unreadable structure": 2,
        "no value": 2,
        "element unknown to the model": 1,
    }
    assert plugin.meta["data"]["rows"] == {"train": 42, "val": 6, "test": 6}
    assert set(plugin.meta["elements"]) == {3, 8, 11, 12, 17, 26}
    # They are as good as not there.
    assert same_weights(plugin, tune(frame.drop(index=range(6)).reset_index(drop=True)))


@pytest.mark.parametrize("part", ["train", "val"])
def test_too_few_rows(part, tune, crystal_frame, tmp_path):
    frame = crystal_frame.copy()
    frame.loc[frame["split"] == part, TARGET] = np.nan
    path = tmp_path / "thin.parquet"
    frame.to_parquet(path)
    with pytest.raises(TableError, match=rf"thin\.parquet: 0 usable row\(s\) in '{part}'.*check"):
        tune(path)


@pytest.mark.parametrize("part", ["train", "val"])
def test_values_outside_the_domain_of_the_transform(part, tune, crystal_frame):
    """A logarithm of nothing but negative values trains nothing, and says so."""
    frame = crystal_frame.copy()
    frame.loc[frame["split"] == part, TARGET] *= -1
    with pytest.raises(ValueError, match=rf"'{part}'|no training value"):
        tune(frame, transform="log10")


def test_some_values_outside_the_domain_are_counted(tune, crystal_frame):
    frame = crystal_frame.copy()
    frame.loc[frame.index[frame["split"] == "train"][:5], TARGET] *= -1
    plugin = tune(frame, transform="log10")
    assert plugin.meta["data"]["rows_excluded"] == {"outside the transform's domain": 5}
    assert np.isfinite(plugin.meta["figures"]["test"]["mae_log10"])


def test_no_test_rows(tune, crystal_frame):
    plugin = tune(crystal_frame[crystal_frame["split"] != "test"])
    assert plugin.meta["figures"]["test"]["n"] == 0
    assert plugin.meta["figures"]["val"]["n"] == 6


def test_missing_columns(tune, crystal_table):
    with pytest.raises(TableError, match=r"crystals\.parquet: no column 'hardness_gpa'; the col"):
        tune(target="hardness_gpa")
    with pytest.raises(TableError, match=r"crystals\.parquet: no column 'fold'; the columns are"):
        tune(split_column="fold")
    with pytest.raises(TableError, match=r"'family' holds none of .*'train'.*but \['cscl', "):
        tune(split_column="family")


def test_random_split(tune, crystal_frame, table_crystals, tiny_model):
    seeds = {}
    for seed in (0, 0, 5):
        plugin = tune(split_column=None, seed=seed)
        assert plugin.meta["data"]["rows"] == {"train": 48, "val": 6, "test": 6}
        assert plugin.meta["data"]["split_column"] is None
        if seed in seeds:
            assert same_weights(plugin, seeds[seed])
        seeds[seed] = plugin
    # It is the split of read_property_table, under that seed.
    split = read_property_table(crystal_frame, [TARGET], seed=5).split
    assert not (split == read_property_table(crystal_frame, [TARGET], seed=0).split).all()
    store = graph_store(table_crystals, tiny_model.backbone.graph_options)
    rows = np.flatnonzero(split == "test")
    error = predictions(seeds[5], store.graphs, rows) - crystal_frame[TARGET].to_numpy()[rows]
    figures = seeds[5].meta["figures"]["test"]
    assert figures["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    given = crystal_frame.assign(split=split)
    assert same_weights(tune(given, seed=5), seeds[5])


def test_an_impossible_output_is_found_before_training(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(strategies_module, "train_plugin", lambda *_: pytest.fail("it trained"))
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        tune(output=tmp_path / "taken")
