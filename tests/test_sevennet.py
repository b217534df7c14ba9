"""SevenNet as a backbone: the same numbers as its own package, and all that a base model can do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk

from matxfer.calculator import MatxferCalculator
from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.errors import OptionError
from matxfer.files import FormatError
from matxfer.graph import GraphOptions, build_graph
from matxfer.model import load_model
from matxfer.nn.registry import MissingPackageError
from matxfer.potential.model import load_potential
from matxfer.prediction import predict
from matxfer.readers import crystals_of_table, load_table
from matxfer.readers.tables import ARRAY_COLUMNS
from matxfer.testing import check_backbone
from matxfer.transfer.activations import Activations
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

TARGET = "debye_temperature_k"
ENERGY = "energy_ev_per_atom"
REMEDY = "sevenn is not installed: pip install matxfer[sevennet]"


def test_without_the_package_the_remedy_is_told(monkeypatch, run):
    monkeypatch.setattr("matxfer.backbones.converted.find_spec", lambda _: None)
    remedy = "'sevennet' needs the package 'sevenn', which is not installed: pip install"
    with pytest.raises(MissingPackageError, match=remedy):
        load_model("sevennet")
    code, _, err = run("predict", "x.cif", "--model", "sevennet")
    assert code == 2
    assert f"{remedy} 'matxfer[sevennet]'" in " ".join(err.split())


# -- the network -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def theirs():
    """Return SevenNet-0 as its package offers it."""
    pytest.importorskip("sevenn", reason=REMEDY)
    from sevenn.calculator import SevenNetCalculator

    return SevenNetCalculator("7net-0", device="cpu")


@pytest.fixture(scope="module")
def ours():
    pytest.importorskip("sevenn", reason=REMEDY)
    return load_model("sevennet")


@pytest.fixture(scope="module")
def potential(ours):
    return load_potential("sevennet-potential")


def compared(theirs, ours, potential, crystals):
    """Return the largest differences: energies in eV/atom, forces in eV/Å, stresses in eV/Å³."""
    pack = PackedGraphs.pack([build_graph(c, ours.backbone.graph_options) for c in crystals])
    found = {"energy": 0.0, "forces": 0.0, "stress": 0.0}
    for k, crystal in enumerate(crystals):
        graphs = pack.batch(np.array([k]))
        response = potential.respond(graphs)
        with torch.inference_mode():
            energy = ours.predict_features(ours.backbone(graphs), graphs)[ENERGY][0]
        atoms = crystal.to_ase()
        atoms = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
        atoms.calc = theirs
        n, volume = len(atoms), atoms.get_volume()
        each = {
            "energy": [
                energy - atoms.get_potential_energy() / n,
                float(response.energy_ev[0]) / n - energy,
            ],
            "forces": response.forces_ev_per_a.numpy() - atoms.get_forces(),
            "stress": response.virial_ev[0].numpy() / volume - atoms.get_stress(voigt=False),
        }
        found = {name: max(found[name], np.abs(each[name]).max()) for name in found}
    return found


def test_energies_forces_and_stresses_are_sevennets(theirs, ours, potential, real_crystals):
    apart = compared(theirs, ours, potential, real_crystals)
    print(apart)
    assert apart["energy"] < 1e-5
    assert apart["forces"] < 1e-5
    assert apart["stress"] < 1e-6


@pytest.mark.data
def test_they_are_on_materials_project_crystals(theirs, ours, potential, shared_data):
    frame = load_table(shared_data / "mp_formation_energy.parquet", ["material_id", *ARRAY_COLUMNS])
    small = frame[frame["numbers"].map(len) <= 8]
    rows = small.iloc[np.sort(np.random.default_rng(1).choice(len(small), 10, replace=False))]
    crystals = [entry.crystal for entry in crystals_of_table(rows, "table")]
    apart = compared(theirs, ours, potential, crystals)
    print(apart)
    assert apart["energy"] < 1e-5
    assert apart["forces"] < 2e-5
    assert apart["stress"] < 1e-6


def test_the_calculator_is_sevennets(theirs):
    atoms = bulk("NaCl", "rocksalt", a=5.7)
    atoms.set_cell(atoms.cell @ (np.eye(3) + 0.03 * np.eye(3, k=1)), scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    found = []
    for calculator in (MatxferCalculator("sevennet-potential"), theirs):
        atoms.calc = calculator
        found.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    for one, other, tolerance in zip(*found, (1e-5, 1e-5, 1e-6), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)
    assert np.abs(found[1][1]).max() > 0.05


def test_the_weights_conform(ours):
    assert check_backbone(ours.backbone)


def test_another_shape_and_nonsense(ours):
    sevennet = type(ours.backbone)
    small = sevennet(n_layers=2, channels=(8, 4), n_radial=5, smooth_from_angstrom=3.5,
                     graph_options=GraphOptions(4.0, symmetry=False))  # fmt: skip
    assert check_backbone(small)
    assert check_backbone(sevennet(n_layers=1, channels=(8, 4, 2, 2)))
    with pytest.raises(OptionError, match="symmetry must be false"):
        sevennet(graph_options=GraphOptions(5.0))


def test_vectors_turn_and_are_read(ours):
    """What is no node feature depends on the axes, order by order, and later layers need it."""
    atoms = bulk("NaCl", "rocksalt", a=5.7, cubic=True)
    atoms.rattle(0.1, seed=1)
    turned = atoms.copy()
    turned.rotate(37, (1, 2, 3), rotate_cell=True)
    backbone, features = ours.backbone, []
    for each in (atoms, turned):
        graph = build_graph(Crystal.from_ase(each), backbone.graph_options)
        graphs = PackedGraphs.pack([graph]).batch(np.array([0]))
        with torch.inference_mode():
            features.append(backbone.run(graphs, backbone.embed(graphs), 0, 2))
    left, right = features
    torch.testing.assert_close(left.node, right.node, atol=2e-5, rtol=2e-5)
    assert float((left.extra - right.extra).abs().max()) > 0.01
    for part, order in ((slice(0, 192), 1), (slice(192, 352), 2)):
        one, other = (
            f.extra[:, part].unflatten(1, (-1, 2 * order + 1)).norm(dim=2) for f in features
        )
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)
    with torch.inference_mode():
        whole = backbone.run(graphs, right, 2, 5).node
        right.extra = torch.zeros_like(right.extra)
        assert float((backbone.run(graphs, right, 2, 5).node - whole).abs().max()) > 0.01


def test_the_folder_is_made_once_and_of_tensors_alone(ours, monkeypatch):
    names = sorted(path.name for path in ours.folder.iterdir())
    assert names == ["card.json", "fisher.safetensors", "model.safetensors"]
    assert ours.checksum == load_model(ours.folder).checksum
    assert ours.name == "sevennet"
    monkeypatch.setattr(torch, "load", None)  # nothing is converted a second time
    assert load_model("sevennet").checksum == ours.checksum


@pytest.mark.parametrize("content", ["pickle", "text", "other tensors"])
def test_other_weights_are_refused(content, tmp_path):
    pytest.importorskip("sevenn", reason=REMEDY)
    from matxfer.backbones.sevennet_model import model_of

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    checkpoint = tmp_path / "weights.pth"
    if content == "pickle":
        torch.save({"model_state_dict": {}, "config": {"shift": Bomb()}}, checkpoint)
    elif content == "text":
        checkpoint.write_bytes(pickle.dumps(Bomb()))
    else:
        config = {"version": "0.9.1", "_type_map": {8: 0}}
        state = {"0_convolution.denominator": torch.ones(1)}
        torch.save({"model_state_dict": state, "config": config}, checkpoint)
    with pytest.raises(FormatError, match="not the weights of SevenNet-0 11Jul2024"):
        model_of(checkpoint)
    assert not (tmp_path / "exploded").exists()


# -- as a base model -------------------------------------------------------------------------------
def test_kept_prefixes_resume_with_their_vectors(ours, table_crystals, tmp_path):
    crystals = [*table_crystals[:4], None, *table_crystals[4:6]]
    options = ours.backbone.graph_options
    pack = PackedGraphs.pack([None if c is None else build_graph(c, options) for c in crystals])
    kept = Activations(ours, pack, tmp_path)
    rows = np.array([5, 0, 4, 2])
    graphs = pack.batch(rows)
    with torch.inference_mode():
        whole = ours.backbone(graphs)
        for depth in range(1, 6):
            prefix = kept.prefix(rows, depth)
            assert prefix.extra.shape == (len(graphs.z), 352)
            resumed = ours.backbone.run(graphs, prefix, depth, 5)
            torch.testing.assert_close(resumed.node, whole.node, atol=2e-5, rtol=2e-5)
    energy = ours.predict_features(whole, graphs)[ENERGY]
    np.testing.assert_allclose(kept.source(ENERGY)[rows], energy, atol=1e-5)


def test_a_plugin_under_ewc_through_the_command(few_rows, ours, tmp_path, run):
    few_rows.to_parquet(tmp_path / "mine.parquet")
    code, out, err = run(
        "finetune", "mine.parquet", "--target", TARGET, "--split-column", "split", "--model",
        "sevennet", "--freeze", 4, "--retain", "ewc", "--epochs", 1, "-o", "mine",
    )  # fmt: skip
    assert not code, err
    assert ENERGY in out  # the drift of the source
    plugin = load_plugin(tmp_path / "mine")
    assert plugin.base.checksum == ours.checksum
    # Nothing of e3nn's constants travels with a plugin.
    names = {name.split(".", 2)[2] for name in plugin.delta}
    parts = ("self_connection_intro", "self_interaction_1", "self_interaction_2", "convolution")
    assert names
    assert all(name.startswith(parts) for name in names)
    assert not any("w3j" in name or "mask" in name for name in names)
    assert plugin.meta["fisher"]["trace"] > 0
    crystals = [entry.crystal for entry in crystals_of_table(few_rows, "table")]
    code, _, err = run("predict", "mine.parquet", "--plugin", "mine", "-o", "out.jsonl")
    assert not code, err
    told = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    frame = predict(crystals, tmp_path / "mine")
    assert frame["error"].isna().all()
    assert told[TARGET] == pytest.approx(frame[TARGET][0], rel=1e-5)
    assert told[ENERGY] == pytest.approx(frame[ENERGY][0], abs=1e-5)
    atoms = crystals[0].to_ase()
    atoms.calc = MatxferCalculator(plugins=[tmp_path / "mine"])
    assert atoms.calc.get_property(TARGET, atoms) == pytest.approx(frame[TARGET][0], rel=1e-4)
    shares = atoms.calc.get_property(f"{ENERGY}_contributions", atoms)
    assert shares.mean() == pytest.approx(frame[ENERGY][0], abs=1e-4)


def test_readouts_and_simple_models(few_rows, ours):
    for options in (
        {"strategy": "features", "features": "ridge"},
        {"strategy": "finetune", "freeze": 5, "epochs": 2, "readout": "extrema"},
        {"strategy": "scratch", "epochs": 1},
    ):
        plugin = finetune(few_rows, TARGET, model=ours, split_column="split", **options)
        assert np.isfinite(plugin.meta["figures"]["test"]["mae"])
        assert plugin.depth == (0 if options["strategy"] == "scratch" else 5)


def test_an_element_that_it_does_not_know(ours):
    frame = predict([Crystal(4 * np.eye(3), [86], [[0, 0, 0]])], model=ours)
    assert frame["error_kind"][0] == "unknown_element"
