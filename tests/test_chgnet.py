"""CHGNet as a backbone: the same numbers as its own package, and all that a base model can do."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ase.build import bulk

import matxfer.cli
from matxfer.backbones.bonds import edge_pairs, pairs_per_graph, undirected
from matxfer.calculator import MatxferCalculator
from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.errors import OptionError
from matxfer.files import FormatError
from matxfer.graph import GraphOptions, build_graph
from matxfer.model import load_model
from matxfer.nn.registry import MissingPackageError
from matxfer.prediction import predict
from matxfer.readers import crystals_of_table, load_table
from matxfer.readers.tables import ARRAY_COLUMNS
from matxfer.testing import check_backbone
from matxfer.transfer.activations import Activations
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

TARGET = "debye_temperature_k"
FULL = GraphOptions(6.0, symmetry=False)


# -- bonds, without CHGNet -------------------------------------------------------------------------
def some_crystals():
    """Return cells whose atoms see themselves, few others, many others and nothing."""
    rng = np.random.default_rng(2)
    loose = Crystal(np.diag([5.0, 6, 7]), [8, 14, 26, 8, 22], rng.random((5, 3)) * 0.9)
    return [Crystal.from_ase(bulk("Cu")), loose, Crystal(30 * np.eye(3), [8], [[0, 0, 0]])]


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_bonds_are_edges_and_their_opposites(order):
    pack = PackedGraphs.pack([build_graph(c, FULL) for c in some_crystals()])
    graphs = pack.batch(np.arange(3))
    index, vector = graphs.edge_index, graphs.edge_vector
    if order == "shuffled":  # and rounded as the vectors of moving atoms are
        shuffle = torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(0))
        index, vector = index[:, shuffle], vector[shuffle] + 1e-6 * torch.rand(len(vector), 3)
    bond, edge = undirected(index, vector)
    assert len(edge) == index.shape[1] // 2
    for k in range(len(edge)):
        one, other = (bond == k).nonzero().squeeze(1).tolist()
        assert edge[k] == min(one, other)
        assert index[:, one].tolist() == index[:, other].flip(0).tolist()
        torch.testing.assert_close(vector[one], -vector[other], atol=3e-6, rtol=0)


def test_an_edge_without_its_opposite_is_told():
    graphs = PackedGraphs.pack([build_graph(some_crystals()[1], FULL)]).batch(np.array([0]))
    for keep in (slice(1, None), slice(2, None)):
        with pytest.raises(OptionError, match="graphs of full cells"):
            undirected(graphs.edge_index[:, keep], graphs.edge_vector[keep])


def test_pairs_of_edges():
    receiver = torch.tensor([0, 0, 0, 1, 2, 2])
    first, second = edge_pairs(receiver, torch.tensor([5, 0, 2, 3, 4]))
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [
        (0, 2), (2, 0), (4, 5), (5, 4),
    ]  # fmt: skip
    assert receiver[first].tolist() == sorted(receiver[first].tolist())
    pack = PackedGraphs.pack([build_graph(c, FULL) for c in some_crystals()] + [None])
    for reach in (2.0, 3.0, 4.5):
        counts = pairs_per_graph(pack, reach)
        for k, count in enumerate(counts):
            graphs = pack.batch(np.array([k]))
            near = graphs.edge_vector.norm(dim=1) < reach
            pairs = edge_pairs(graphs.edge_index[1], near.nonzero().squeeze(1))
            assert len(pairs[0]) == count
    assert counts[0] == 42 * 41


def test_without_the_package_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setattr("matxfer.backbones.converted.find_spec", lambda _: None)
    remedy = "'chgnet' needs the package 'chgnet', which is not installed: pip install"
    with pytest.raises(MissingPackageError, match=remedy):
        load_model("chgnet")
    monkeypatch.setattr(sys, "argv", ["matxfer", "predict", "x.cif", "--model", "chgnet"])
    with pytest.raises(SystemExit) as exit_:
        matxfer.cli.main()
    assert exit_.value.code == 2
    assert f"{remedy} 'matxfer[chgnet]'" in capsys.readouterr().err


# -- the network -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def theirs():
    """Return CHGNet as its package loads it."""
    pytest.importorskip("chgnet")
    from chgnet.model import CHGNet

    with contextlib.redirect_stdout(io.StringIO()):
        model = CHGNet.load(use_device="cpu", verbose=False)
    model.graph_converter.set_isolated_atom_response("ignore")
    return model


@pytest.fixture(scope="module")
def ours():
    pytest.importorskip("chgnet")
    return load_model("chgnet")


def compared(theirs, ours, crystals):
    """Return the largest differences: energies in eV/atom, features of atoms and of crystals."""
    found = theirs.predict_structure(
        [c.to_pymatgen() for c in crystals], task="e", batch_size=8,
        return_atom_feas=True, return_crystal_feas=True,
    )  # fmt: skip
    backbone, head = ours.backbone, ours.heads["energy_ev_per_atom"]
    pack = PackedGraphs.pack([build_graph(c, backbone.graph_options) for c in crystals])
    graphs = pack.batch(np.arange(len(pack)))
    with torch.inference_mode():
        third = backbone.run(graphs, backbone.embed(graphs), 0, 3)
        last = backbone.run(graphs, third, 3, 4)
        energy = ours.predict_features(last, graphs)["energy_ev_per_atom"]
        normed = head.readout.net[0](last.node)
        pooled = normed.new_zeros(len(crystals), 64).index_add(0, graphs.batch, normed)
    atom = np.concatenate([each["atom_fea"] for each in found])
    crystal = np.stack([each["crystal_fea"] for each in found])
    return (
        np.abs(energy - [float(each["e"]) for each in found]).max(),
        np.abs(third.node.numpy() - atom).max() / np.abs(atom).max(),
        np.abs(pooled.numpy() - crystal).max() / np.abs(crystal).max(),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_energies_and_fingerprints_are_chgnets(theirs, ours, real_crystals):
    energy, atoms, crystals = compared(theirs, ours, real_crystals)
    assert energy < 1e-5
    assert atoms < 2e-5
    assert crystals < 2e-5


@pytest.mark.data
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_they_are_on_materials_project_crystals(theirs, ours, shared_data):
    frame = load_table(shared_data / "mp_formation_energy.parquet", ["material_id", *ARRAY_COLUMNS])
    small = frame[frame["numbers"].map(len) <= 12]
    rows = small.iloc[np.sort(np.random.default_rng(1).choice(len(small), 20, replace=False))]
    crystals = [entry.crystal for entry in crystals_of_table(rows, "table")]
    energy, atoms, fingerprints = compared(theirs, ours, crystals)
    assert energy < 1e-5
    assert atoms < 2e-5
    assert fingerprints < 2e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_forces_and_stresses_are_chgnets(theirs):
    from chgnet.model.dynamics import CHGNetCalculator

    atoms = bulk("NaCl", "rocksalt", a=5.7)
    atoms.set_cell(atoms.cell @ (np.eye(3) + 0.03 * np.eye(3, k=1)), scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    found = {}
    for name, calculator in (
        ("ours", MatxferCalculator("chgnet-potential")),
        ("theirs", CHGNetCalculator(theirs, use_device="cpu")),
    ):
        atoms.calc = calculator
        found[name] = (
            atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(),
        )  # fmt: skip
    for one, other, tolerance in zip(
        found["ours"], found["theirs"], (1e-4, 1e-4, 1e-6), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=tolerance)
    assert np.abs(found["theirs"][1]).max() > 0.05


def test_the_weights_conform(ours):
    assert check_backbone(ours.backbone)


def test_another_shape_and_nonsense(ours):
    chgnet = type(ours.backbone)
    small = chgnet(n_layers=2, width=8, n_radial=5, n_angular=5, bond_cutoff_angstrom=2.5,
                   graph_options=GraphOptions(4.0, symmetry=False))  # fmt: skip
    assert check_backbone(small)
    with pytest.raises(OptionError, match="symmetry must be false"):
        chgnet(graph_options=GraphOptions(6.0))


def test_the_folder_is_made_once_and_of_tensors_alone(ours, tmp_path, monkeypatch):
    names = sorted(path.name for path in ours.folder.iterdir())
    assert names == ["card.json", "fisher.safetensors", "model.safetensors"]
    assert ours.checksum == load_model(ours.folder).checksum
    assert ours.name == "chgnet"
    monkeypatch.setattr(torch, "load", None)  # nothing is converted a second time
    assert load_model("chgnet").checksum == ours.checksum
    # A plugin finds its base by this checksum on another machine too.
    assert ours.checksum.startswith("da1ad6efc199")


@pytest.mark.parametrize("content", ["pickle", "text", "other tensors"])
def test_other_weights_are_refused(content, tmp_path):
    pytest.importorskip("chgnet")
    from matxfer.backbones.chgnet_model import model_of

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    archive = tmp_path / "weights.pth.tar"
    if content == "pickle":
        torch.save({"model": {"state_dict": Bomb()}}, archive)
    elif content == "text":
        archive.write_bytes(pickle.dumps(Bomb()))
    else:
        state = {"mlp.layers.0.weight": torch.ones(2), "angle_layers.0.bn1.bias": torch.ones(2)}
        torch.save({"model": {"state_dict": state}}, archive)
    with pytest.raises(FormatError, match=r"not the weights of CHGNet 0\.3\.0"):
        model_of(archive)
    assert not (tmp_path / "exploded").exists()


# -- as a base model -------------------------------------------------------------------------------
def test_kept_prefixes_resume_with_their_angles(ours, table_crystals, tmp_path):
    crystals = [*table_crystals[:4], None, *table_crystals[4:6]]
    options = ours.backbone.graph_options
    pack = PackedGraphs.pack([None if c is None else build_graph(c, options) for c in crystals])
    kept = Activations(ours, pack, tmp_path)
    rows = np.array([5, 0, 4, 2])
    graphs = pack.batch(rows)
    with torch.inference_mode():
        whole = ours.backbone(graphs)
        for depth in range(1, 5):
            prefix = kept.prefix(rows, depth)
            assert len(prefix.extra) == pairs_per_graph(pack, 3.0)[rows].sum()
            resumed = ours.backbone.run(graphs, prefix, depth, 4)
            torch.testing.assert_close(resumed.node, whole.node, atol=2e-5, rtol=2e-5)
    energy = ours.predict_features(whole, graphs)["energy_ev_per_atom"]
    np.testing.assert_allclose(kept.source("energy_ev_per_atom")[rows], energy, atol=1e-5)
    # They are on disk for the next run.
    assert {path.name for path in tmp_path.glob("*/extra_*.npy")} == {
        f"extra_{k}.npy" for k in range(1, 5)
    }


def test_a_plugin_under_ewc_through_the_command(few_rows, ours, tmp_path, monkeypatch, capsys):
    few_rows.to_parquet(tmp_path / "mine.parquet")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            matxfer.cli.main()
        captured = capsys.readouterr()
        assert not exit_.value.code, captured.err
        return captured.out

    out = run("finetune", "mine.parquet", "--target", TARGET, "--split-column", "split", "--model",
              "chgnet", "--freeze", 2, "--retain", "ewc", "--epochs", 1, "-o", "mine")  # fmt: skip
    assert "chosen" not in out or "2 frozen" in out
    assert "energy_ev_per_atom" in out  # the drift of the source
    plugin = load_plugin(tmp_path / "mine")
    assert plugin.base.checksum == ours.checksum
    assert plugin.delta
    assert all(name.startswith(("layers.2.", "layers.3.")) for name in plugin.delta)
    assert plugin.meta["fisher"]["trace"] > 0
    crystals = [entry.crystal for entry in crystals_of_table(few_rows, "table")]
    run("predict", "mine.parquet", "--plugin", "mine", "-o", "out.jsonl")
    told = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    frame = predict(crystals, tmp_path / "mine")
    assert frame["error"].isna().all()
    assert told[TARGET] == pytest.approx(frame[TARGET][0], rel=1e-5)
    assert told["energy_ev_per_atom"] == pytest.approx(frame["energy_ev_per_atom"][0], abs=1e-5)
    atoms = crystals[0].to_ase()
    atoms.calc = MatxferCalculator(plugins=[tmp_path / "mine"])
    assert atoms.calc.get_property(TARGET, atoms) == pytest.approx(frame[TARGET][0], rel=1e-4)
    shares = atoms.calc.get_property("energy_ev_per_atom_contributions", atoms)
    assert shares.mean() == pytest.approx(frame["energy_ev_per_atom"][0], abs=1e-4)


def test_readouts_and_simple_models(few_rows, ours):
    for options in (
        {"strategy": "features", "features": "ridge"},
        {"strategy": "finetune", "freeze": 4, "epochs": 2, "readout": "extrema"},
        {"strategy": "scratch", "epochs": 1},
    ):
        plugin = finetune(few_rows, TARGET, model=ours, split_column="split", **options)
        assert np.isfinite(plugin.meta["figures"]["test"]["mae"])
        assert plugin.depth == (0 if options["strategy"] == "scratch" else 4)


def test_an_element_that_it_does_not_know(ours):
    frame = predict([Crystal(4 * np.eye(3), [86], [[0, 0, 0]])], model=ours)
    assert frame["error_kind"][0] == "unknown_element"
    assert isinstance(frame, pd.DataFrame)
