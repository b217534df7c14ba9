"""Training potentials and plugins: losses, references, Fisher information, retention, files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from emt_frames import emt_frames, table_of

from matxfer.data.table import TableError
from matxfer.errors import OptionError
from matxfer.files import FormatError
from matxfer.graph import GraphOptions
from matxfer.model import load_model
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.potential.config import PotentialConfig
from matxfer.potential.errors import differences, measure
from matxfer.potential.fisher import potential_fisher
from matxfer.potential.fit import finetune_potential, make_potential
from matxfer.potential.frames import read_frames
from matxfer.potential.model import load_potential, potential_from
from matxfer.potential.packed import PackedFrames
from matxfer.potential.plugin import PotentialPlugin, load_potential_plugin
from matxfer.potential.references import energies_per_atom, fit_references, shift_references
from matxfer.potential.training import FrameSet, PotentialModule, train_potential
from matxfer.transfer.plugin import load_plugin

pytestmark = pytest.mark.filterwarnings("ignore:.*energies of:UserWarning")
CONFIG = EdgeGatedNetwork(2, 12, 8, 8, GraphOptions(3.6, symmetry=False), 2).config()
FAST = {"epochs": 2, "max_edges": 400}


@pytest.fixture(scope="module")
def table():
    words = ["train"] * 20 + ["val"] * 4 + ["test"] * 4
    return table_of(emt_frames(28)).assign(split=words)


@pytest.fixture(scope="module")
def packed(table):
    return PackedFrames.build(read_frames(table, split_column="split"), 3.6)


@pytest.fixture(scope="module")
def base_folder(table, tmp_path_factory):
    """Return a potential trained on the frames for a few epochs, with its Fisher information."""
    folder = tmp_path_factory.mktemp("base") / "general"
    make_potential(
        table, folder, model=None, architecture=CONFIG, split_column="split", epochs=30,
        max_edges=250, learning_rate=1e-2, head_learning_rate=2e-2, average=0.9,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def base(base_folder):
    return load_potential(base_folder)


@pytest.fixture(scope="module")
def target():
    """Return frames of another alloy at another reference."""
    words = ["train"] * 16 + ["val"] * 4 + ["test"] * 4
    table = table_of(emt_frames(24, ("Ag", "Cu"), seed=5))
    return table.assign(split=words, energy_ev=table.energy_ev - 8.0)


def fresh(seed=0):
    torch.manual_seed(seed)
    return potential_from(None, CONFIG, 10)


def plugin_of(base, target, **options):
    return finetune_potential(
        target, potential=base, split_column="split", **{"freeze": 1, **FAST, **options}
    )


def tensors(potential):
    return {name: value.clone() for name, value in potential.state_dict().items()}


# -- the loss ---------------------------------------------------------------------------------
def test_loss_on_forces_has_the_right_gradient(packed):
    """Double backward against central differences of the loss in single weights."""
    potential = fresh().double()
    batch = packed.batch(np.array([0, 3]))
    graphs = replace(batch.graphs, edge_vector=batch.graphs.edge_vector.double())
    batch = replace(batch, graphs=graphs)
    module = PotentialModule(potential, PotentialConfig(), packed)
    torch.autograd.backward(module.training_step(batch, 0))
    checked = 0
    for name, parameter in potential.named_parameters():
        if parameter.grad is None or parameter.grad.abs().max() < 1e-6:
            continue
        k = int(parameter.grad.abs().argmax())
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[k] += step
            losses.append(float(module.training_step(batch, 0)))
            with torch.no_grad():
                parameter.view(-1)[k] -= step
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float(parameter.grad.view(-1)[k]), rel=1e-3), name
        checked += 1
    assert checked > 15


def test_what_was_not_calculated_has_no_part_in_the_loss(table):
    """Whatever is missing: the loss is finite, and of what there is."""
    potential = fresh()
    for gone, left in (
        (["stress_ev_per_a3"], {"energy", "forces"}),
        (["forces_ev_per_a"], {"energy", "stress"}),
        (["energy_ev"], {"forces", "stress"}),
    ):
        packed = PackedFrames.build(read_frames(table.drop(columns=gone)), 3.6)
        batch = packed.batch(np.arange(3))
        errors = differences(potential.respond(batch.graphs), batch)
        assert {name for name, error in errors.items() if error.numel()} == left
        figures = measure(potential, packed, "test")
        assert {name.split("_")[0] for name in figures} == left
        module = PotentialModule(potential, PotentialConfig(), packed)
        assert torch.isfinite(module.training_step(batch, 0))


def test_errors_are_those_of_numpy(packed, base):
    rows = packed.rows("test")
    batch = packed.batch(rows)
    response = base.respond(batch.graphs)
    energy = response.energy_ev.numpy() / 4 - packed.energy_ev[rows] / 4
    force = response.forces_ev_per_a.numpy() - batch.forces_ev_per_a.numpy()
    figures = measure(base, packed, "test", max_edges=300)
    assert figures["energy_mae_ev_per_atom"] == pytest.approx(np.abs(energy).mean(), rel=1e-4)
    assert figures["forces_rmse_ev_per_a"] == pytest.approx(np.sqrt((force**2).mean()), rel=1e-4)


# -- training ---------------------------------------------------------------------------------
def test_training_lowers_the_error(base, packed, base_folder):
    start = fresh()
    fit_references(start, packed)
    before, after = measure(start, packed, "test"), measure(base, packed, "test")
    assert after["forces_mae_ev_per_a"] < 0.7 * before["forces_mae_ev_per_a"]
    card = json.loads((base_folder / "card.json").read_text())
    assert card["test"] == pytest.approx(after, rel=1e-3)
    assert card["data"]["rows"] == {"test": 4, "train": 20, "val": 4}
    assert card["elements"] == [28, 29]


CHANGES = {
    "freeze": 0, "energy_weight": 20.0, "force_weight": 5.0, "stress_weight": 0.0,
    "energy_delta": 3.0, "force_delta": 3.0, "stress_delta": 3.0,
    "epochs": 3, "max_edges": 150, "learning_rate": 1e-2,
    "layer_decay": 0.2, "head_learning_rate": 2e-2, "average": 0.0, "weight_decay": 5.0,
    "warmup_fraction": 0.6, "max_force_ev_per_a": 2.5, "seed": 1, "strategy": "scratch",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(base, target):
    return tensors(plugin_of(base, target).potential)


@pytest.mark.parametrize("name", [*CHANGES, "retain", "strength"])
def test_every_option_changes_the_result(name, base, target, plain):
    if name in ("retain", "strength"):
        strength = {"retain": 1.0, "strength": 1e-3}[name]
        plain = plain if name == "retain" else tensors(
            plugin_of(base, target, retain="ewc").potential
        )  # fmt: skip
        options = {"retain": "ewc", "strength": strength}
    else:
        options = {name: CHANGES[name]}
    if name == "layer_decay":  # one layer alone has no lower one
        plain = tensors(plugin_of(base, target, freeze=0).potential)
    if name in ("layer_decay", "strategy"):
        options["freeze"] = 0
    changed = tensors(plugin_of(base, target, **options).potential)
    assert any(not torch.equal(plain[key], changed[key]) for key in plain)


def test_every_option_is_tried():
    assert {*CHANGES, "retain", "strength"} == set(PotentialConfig.__slots__)


def test_the_same_seed_gives_the_same_plugin(base, target, plain):
    again = tensors(plugin_of(base, target).potential)
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize(
    "options",
    [
        {"retain": "l2sp"}, {"strategy": "auto"}, {"epochs": 0}, {"average": 1.0},
        {"learning_rate": -1.0}, {"energy_weight": float("nan")},
        {"strategy": "scratch", "freeze": 1},
    ],
)  # fmt: skip
def test_wrong_options(options):
    with pytest.raises(OptionError):
        PotentialConfig(**options)


def test_order_of_an_epoch_depends_on_seed_and_epoch_alone(packed):
    def order(seed, epoch):
        module = PotentialModule(fresh(seed + epoch), PotentialConfig(seed=seed), packed)
        module.__dict__["_trainer"] = type("T", (), {"current_epoch": epoch})()
        torch.manual_seed(np.random.default_rng().integers(1000))
        return [tuple(b.energy_ev.tolist()) for b in module.train_dataloader()]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_batches_are_bounded_and_a_large_frame_is_alone(packed):
    edges = packed.graphs.edges_per_graph
    rows = packed.rows("train")
    frames = FrameSet(packed, rows, int(2.5 * edges.max()))
    sizes = [int(frames[k].graphs.edge_index.shape[1]) for k in range(len(frames))]
    assert max(sizes) <= 2.5 * edges.max() < max(sizes) + edges.max()
    assert sum(frames[k].graphs.num_graphs for k in range(len(frames))) == len(rows)
    tiny = FrameSet(packed, rows, int(edges.min()) - 1)
    assert [tiny[k].graphs.num_graphs for k in range(len(tiny))] == [1] * len(rows)


# -- references -------------------------------------------------------------------------------
def test_references_of_elements_that_always_occur_together(table):
    """Half copper, half nickel in every frame: the sum is told, the ridge shares it out."""
    numbers = [np.array([29, 28, 29, 28])] * len(table)
    both = table.assign(numbers=numbers, energy_ev=-20.0)
    packed = PackedFrames.build(read_frames(both, split_column="split"), 3.6)
    potential = fresh()
    fit_references(potential, packed)
    potential.repulsion = None
    found = energies_per_atom(potential, packed, packed.rows("train"))
    np.testing.assert_allclose(found, -5.0, atol=1e-3)
    assert potential.head.scaler.reference.abs().max() < 20


def test_shifted_references_leave_forces_alone(base, packed, table):
    offset = {28: 3.0, 29: -1.5}
    moved = table.assign(
        energy_ev=[
            e + sum(offset[z] for z in numbers)
            for e, numbers in zip(table.energy_ev, table.numbers, strict=True)
        ]
    )
    other = PackedFrames.build(read_frames(moved, split_column="split"), 3.6)
    batch = packed.batch(packed.rows("test"))
    before = base.respond(batch.graphs)
    plugin = PotentialPlugin(base, 2)
    shift = shift_references(plugin.potential, other)
    after = plugin.potential.respond(batch.graphs)
    assert torch.equal(before.forces_ev_per_a, after.forces_ev_per_a)
    for z, told in offset.items():
        # The ridge pulls a little to the common mean.
        assert shift[z] == pytest.approx(told, abs=0.3)
    rise = (after.energy_ev - before.energy_ev) / batch.n_atoms
    nickel = batch.graphs.z.reshape(-1, 4)[:, 0] == 28
    assert rise[nickel].mean() == pytest.approx(offset[28], abs=0.3)
    assert rise[~nickel].mean() == pytest.approx(offset[29], abs=0.3)


# -- Fisher information and retention -----------------------------------------------------------
def test_fisher_information_against_every_output_by_itself(packed):
    """σ⁻² Σ over all forces of squared gradients; v is random, so many frames are averaged."""
    potential = fresh()
    for parameter in potential.parameters():
        parameter.requires_grad_(True)
    noise = {"energy": 0.1, "forces": 0.5}
    row = int(packed.rows("train")[0])
    named = dict(potential.backbone.named_parameters())
    exact = {name: torch.zeros_like(p) for name, p in named.items()}
    response = potential.respond(packed.graphs.batch(np.array([row])), create_graph=True)
    for output in response.forces_ev_per_a.flatten():
        found = torch.autograd.grad(
            output, list(named.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(exact, found, strict=True):
            if gradient is not None:
                exact[name] += gradient.square() / noise["forces"] ** 2
    found = torch.autograd.grad(response.energy_ev[0] / 4, list(named.values()), allow_unused=True)
    energies = dict(zip(named, found, strict=True))
    draws = 120
    fisher = potential_fisher(potential, packed.graphs, np.full(draws, row), noise, seed=1)
    for name, energy in energies.items():
        told = fisher[f"energy/{name}"]
        expected = torch.zeros_like(told) if energy is None else energy.square() / 0.01
        torch.testing.assert_close(told, expected, rtol=1e-3, atol=1e-8)
    trace = sum(float(v.sum()) for v in exact.values())
    drawn = sum(float(fisher[f"forces/{name}"].sum()) for name in exact)
    assert trace > 0
    assert drawn == pytest.approx(trace, rel=0.25)


def test_ewc_holds_the_general_potential(base, target, table):
    """The stronger, the less its layers move and the less its own test frames suffer."""
    options = {"freeze": 0, "epochs": 6, "learning_rate": 2e-2}
    moved, damage = {}, {}
    for strength in (0.0, 1.0, 100.0):
        plugin = finetune_potential(
            target, potential=base, split_column="split", retain="ewc", strength=strength,
            source_data=read_frames(table, split_column="split"), **{**FAST, **options},
        )  # fmt: skip
        own = plugin.potential.backbone.state_dict()
        moved[strength] = sum(
            float((v - own[k]).square().sum()) for k, v in base.backbone.state_dict().items()
        )
        held = plugin.meta["retention"]
        assert held["before"] == pytest.approx(base.card["test"], rel=1e-3)
        damage[strength] = held["after"]["forces_mae_ev_per_a"]
    assert moved[0.0] > moved[1.0] > moved[100.0] > 0
    assert damage[0.0] > damage[100.0]
    none = tensors(plugin_of(base, target, **options).potential)
    zero = tensors(plugin_of(base, target, **options, retain="ewc", strength=0.0).potential)
    assert all(torch.equal(none[key], zero[key]) for key in none)


def test_retention_that_cannot_be(base, target, small_potential):
    with pytest.raises(OptionError, match="nothing to retain"):
        plugin_of(base, target, freeze=2, retain="ewc")
    with pytest.raises(FormatError, match="fisher"):
        plugin_of(small_potential, target, retain="ewc")
    with pytest.raises(OptionError, match="frozen depth 3"):
        plugin_of(base, target, freeze=3)


# -- plugins and their files ------------------------------------------------------------------
@pytest.fixture(scope="module")
def plugin_folder(base, target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin") / "silver"
    finetune_potential(target, folder, potential=base, split_column="split", freeze=1, **FAST)
    return folder


def test_frozen_layers_are_the_base_itself(base, plain):
    before = {f"backbone.{k}": v for k, v in base.backbone.state_dict().items()}
    frozen = [k for k in before if k.startswith(("backbone.embed", "backbone.layers.0"))]
    assert len(frozen) > 5
    assert all(torch.equal(before[k], plain[k]) for k in frozen)
    trained = [k for k in before if k.startswith("backbone.layers.1") and before[k].dim() == 2]
    assert any(not torch.equal(before[k], plain[k]) for k in trained)
    plugin = PotentialPlugin(base, 1)
    mine, theirs = plugin.potential.backbone, base.backbone
    assert mine.layers[0].state_dict().keys() == theirs.layers[0].state_dict().keys()
    pairs = zip(mine.layers[0].parameters(), theirs.layers[0].parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    pairs = zip(mine.layers[1].parameters(), theirs.layers[1].parameters(), strict=True)
    assert not any(a is b for a, b in pairs)


def test_plugin_from_its_file_is_the_same_to_the_last_bit(base_folder, plugin_folder, plain):
    plugin = load_potential_plugin(plugin_folder, load_potential(base_folder))
    found = plugin.potential.state_dict()
    assert all(torch.equal(plain[key], found[key]) for key in plain)
    assert plugin.meta["data"]["rows"] == {"test": 4, "train": 16, "val": 4}
    assert plugin.meta["elements"] == [29, 47]
    assert 47 in plugin.potential.elements
    before, after = plugin.meta["test_before"], plugin.meta["test"]
    assert after["forces_mae_ev_per_a"] < before["forces_mae_ev_per_a"]


def test_files_that_do_not_fit(base, plugin_folder, small_potential, tmp_path):
    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in plugin_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    with pytest.raises(FormatError, match="trained on weights"):
        load_potential_plugin(plugin_folder, small_potential)
    cut = copy("cut")
    weights = (cut / "plugin.safetensors").read_bytes()
    (cut / "plugin.safetensors").write_bytes(weights[: len(weights) // 2])
    deep = copy("deep")
    meta = json.loads((deep / "plugin.json").read_text())
    (deep / "plugin.json").write_text(json.dumps(meta | {"frozen_depth": 2}))
    garbled = copy("garbled")
    (garbled / "plugin.json").write_text("{")
    property_ = copy("property")
    del meta["kind"]
    (property_ / "plugin.json").write_text(json.dumps(meta))
    for folder, words in [
        (cut, "safetensors"), (deep, "disagree"), (garbled, "JSON"), (property_, "of a property"),
        (tmp_path / "none", "JSON"),
    ]:  # fmt: skip
        with pytest.raises(FormatError, match=words):
            load_potential_plugin(folder, base)


def test_damaged_potentials(base_folder, tiny_model_folder, tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in base_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(FormatError, match="checksum"):
        load_potential(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="no such file"):
        load_potential(folder)
    with pytest.raises(FormatError, match="not a potential"):
        load_potential(tiny_model_folder)


def test_models_of_properties_refuse_potentials(base_folder, plugin_folder):
    with pytest.raises(FormatError, match="MatxferCalculator"):
        load_model(base_folder)
    with pytest.raises(FormatError, match="MatxferCalculator"):
        load_plugin(plugin_folder)


# -- frames that a training cannot have -------------------------------------------------------
def test_a_general_potential_needs_energies_and_forces(table, tmp_path):
    for column, word in (("forces_ev_per_a", "forces"), ("energy_ev", "energies")):
        with pytest.raises(TableError, match=f"no {word}"):
            make_potential(
                table.drop(columns=column), tmp_path, model=None, architecture=CONFIG, **FAST
            )


def test_plugins_of_forces_alone_and_of_energies_alone(base, target):
    for column in ("forces_ev_per_a", "energy_ev"):
        plugin = plugin_of(base, target.drop(columns=column))
        assert plugin.meta["test"]
        assert all(v.isfinite().all() for v in plugin.potential.state_dict().values())


def test_a_frame_of_nan_forces_is_left_out(base, target):
    bad = target.copy()
    bad.at[2, "forces_ev_per_a"] = np.full(12, np.nan)
    with pytest.warns(UserWarning, match=r"1 of 24 frames.*frame 2.*remove it"):
        plugin = plugin_of(base, bad)
    assert plugin.meta["data"]["errors"] == 1
    assert plugin.meta["data"]["rows"]["failed"] == 1
    assert all(v.isfinite().all() for v in plugin.potential.state_dict().values())


def test_new_elements_under_frozen_layers_are_told(base, target):
    with pytest.warns(UserWarning, match="never seen Ag"):
        plugin_of(base, target, epochs=1)


def test_the_start_can_be_a_model_of_properties(table, tiny_model, tiny_model_folder, tmp_path):
    """Its layers are the start: with no step to speak of they are still there."""
    made = make_potential(
        table, tmp_path / "p", model=tiny_model_folder, split_column="split", epochs=1,
        learning_rate=1e-9, head_learning_rate=1e-9, average=0.0,
    )  # fmt: skip
    for key, value in tiny_model.backbone.state_dict().items():
        torch.testing.assert_close(made.backbone.state_dict()[key], value, atol=1e-6, rtol=0)
    assert set(tiny_model.elements) < set(made.elements)


def test_best_epoch_is_kept(packed):
    potential = fresh()
    fit_references(potential, packed)
    told = []
    config = PotentialConfig(epochs=4, max_edges=400, learning_rate=0.05, average=0.0)
    fit = train_potential(
        potential, packed, config, on_best=lambda _, figures: told.append(figures)
    )
    assert fit.best_epoch == int(np.argmin(fit.history)) == told[-1]["epoch"]
    val = measure(potential, packed, "val")
    assert val["forces_mae_ev_per_a"] == pytest.approx(told[-1]["forces_mae_ev_per_a"], rel=1e-4)
