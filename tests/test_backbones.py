"""Backbones and models of other packages: found by declared names alone, and used like our own."""

from __future__ import annotations

import json
import sys
import tomllib
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from readme_schnet import blocks

from matxfer.data.packed import PackedGraphs
from matxfer.errors import OptionError
from matxfer.estimator.regressor import TransferRegressor
from matxfer.files import FormatError
from matxfer.graph import build_graph
from matxfer.model import load_model
from matxfer.nn import registry
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.nn.registry import MissingPackageError, backbone_class, declared
from matxfer.prediction import predict
from matxfer.pretraining.config import read_config
from matxfer.pretraining.run import pretrain
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

TARGET = "debye_temperature_k"


def install(patch, root, name, code, **groups):
    """Install a package for a while: a module, its code and its entry points."""
    site = root / "site" / name
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{name}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in groups.items():
        lines.append(f"[matxfer.{group}]")
        lines += [f"{key} = {value}" for key, value in entries.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    patch.syspath_prepend(site)
    patch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that installs a package for a test."""
    return partial(install, monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def schnet(tmp_path_factory):
    """Install the package that the reader of the README would write."""
    entries = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]["matxfer.backbones"]
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("schnet")
        install(patch, root, "my_package", blocks("python")[0], backbones=entries)
        yield


# -- names ------------------------------------------------------------------------------------
def test_ours_are_what_pyproject_declares(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == registry.OURS
    for group in registry.OURS:
        for entry in declared(group).values():
            assert set(entry.extras) <= set(project["optional-dependencies"])


def test_a_declared_backbone_is_found(schnet):
    assert backbone_class("schnet").__name__ == "SchNetBackbone"
    assert backbone_class("edge_gated") is EdgeGatedNetwork
    assert registry.origin(declared("matxfer.backbones")["schnet"]) == "my_package"


def test_no_other_name_imports_anything(package):
    package("trap", "raise SystemExit('imported')\n", backbones={})
    for name in ("trap", "trap:Class", "os:system", "SchNet", "", None, ["schnet"], {"a": 1}):
        with pytest.raises(OptionError, match="no installed package declares a backbone"):
            backbone_class(name)
    assert "trap" not in sys.modules


def test_nobody_takes_our_names(package):
    package("taker", "Class = None\n", backbones={"edge_gated": "taker:Class"})
    assert backbone_class("edge_gated") is EdgeGatedNetwork
    assert "taker" not in sys.modules


def test_two_packages_with_one_name(package):
    package("first", "", backbones={"net": "first:Net"})
    package("second", "", backbones={"net": "second:Net"})
    with pytest.raises(
        OptionError, match=r"'net' in matxfer\.backbones.*(first|second).*uninstall"
    ):
        declared("matxfer.backbones")


@pytest.mark.parametrize(
    ("code", "value", "error", "words"),
    [
        ("import not_installed_here", "broken:Net", MissingPackageError,
         "needs the package 'not_installed_here'.*: pip install 'not_installed_here'"),
        ("import not_installed_here", "broken:Net [full]", MissingPackageError,
         r"needs the package 'not_installed_here'.*: pip install 'broken\[full\]'"),
        ("", "broken:Net", OptionError, "'net' of broken cannot be imported from 'broken:Net'"),
        ("Net = 3", "broken:Net", OptionError, "has no from_config; see .*BackboneModule"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_whole(package, code, value, error, words):
    package("broken", code, backbones={"net": value})
    with pytest.raises(error, match=words):
        backbone_class("net")


def test_a_card_of_an_unknown_backbone(run, tiny_model_folder, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for file in tiny_model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    card = json.loads((folder / "card.json").read_text())
    card["architecture"]["kind"] = "absent_net"
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(FormatError, match=r"card.json.*no installed .*'absent_net'"):
        load_model(folder)
    code, _, err = run("predict", "x.cif", "--model", folder)
    assert code == 2
    assert "install the package that it comes from" in err
    # A class that is there, but not of this shape.
    card["architecture"]["kind"] = "edge_gated"
    card["architecture"]["wings"] = 2
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(FormatError, match=r"card and weights disagree .*wings"):
        load_model(folder)


def test_the_list_of_backbones(run, schnet):
    code, out, _ = run("models", "--backbones")
    assert code == 0
    assert "edge_gated: matxfer.nn.network:EdgeGatedNetwork (matxfer)" in out
    assert "(matxfer; pip install 'matxfer[chgnet]')" in out
    assert "schnet: my_package:SchNetBackbone (my_package)" in out
    listed = json.loads(run("models", "--backbones", "--json")[1])
    assert listed["schnet"] == {
        "package": "my_package", "class": "my_package:SchNetBackbone", "extra": "",
    }  # fmt: skip


# -- a model that a package brings ----------------------------------------------------------------
def test_a_model_of_a_package(run, package, tiny_model_folder, tiny_model):
    code = f"from pathlib import Path\ndef folder():\n    return Path({str(tiny_model_folder)!r})\n"
    package("bringer", code, models={"brought": "bringer:folder"})
    assert load_model("brought").checksum == tiny_model.checksum
    _, out, _ = run("models")
    assert f"brought: {sum(p.numel() for p in tiny_model.parameters()):,} parameters" in out
    _, _, err = run("models", "absent")
    assert "'brought'" in err


def test_a_model_whose_package_is_not_installed(run, package):
    package("half", "import not_installed_here\n", models={"brought": "half:folder [extra]"})
    remedy = "'brought' needs the package 'not_installed_here', which is not installed: pip install"
    code, out, _ = run("models")
    assert code == 0
    assert f"brought: {remedy} 'half[extra]'" in out
    code, _, err = run("predict", "x.cif", "--model", "brought")
    assert code == 2
    assert f"{remedy} 'half[extra]'" in err


# -- SchNet from the README to a plugin ----------------------------------------------------------
@pytest.fixture(scope="module")
def schnet_model(schnet, crystal_table, tmp_path_factory):
    """Return the folder of a SchNet pretrained for three epochs as the README says."""
    tmp_path = tmp_path_factory.mktemp("schnet-model")
    config = yaml.safe_load(blocks("yaml")[0])
    config["sources"] = [
        {"table": str(crystal_table), "targets": ["formation_energy_ev_per_atom"],
         "split_column": "split"},
    ]  # fmt: skip
    config["network"]["options"] |= {"width": 16, "basis_size": 12}
    config["graph"] = {"cutoff_angstrom": 4.0}
    config["training"] |= {"epochs": 3, "fisher_samples": 8}
    config["trainer"] = {"accelerator": "cpu"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    folder = tmp_path / "my-model"
    pretrain(read_config(tmp_path / "config.yaml"), folder, run_folder=tmp_path / "run")
    return folder


def test_schnet_from_pretraining_to_prediction(
    run, schnet_model, crystal_table, table_crystals, tmp_path
):
    card = json.loads((schnet_model / "card.json").read_text())
    assert card["architecture"]["kind"] == "schnet"
    assert card["architecture"]["width"] == 16
    base = load_model(schnet_model)
    assert type(base.backbone).__name__ == "SchNetBackbone"
    # All frozen, and two layers freed under EWC: from the cached prefix, into a plugin file.
    code, out, err = run(
        "finetune", crystal_table, "--target", TARGET, "--split-column", "split",
        "--model", schnet_model, "--freeze", 1, "--retain", "ewc", "--epochs", 2, "-o", "plugin",
    )  # fmt: skip
    assert code == 0, err
    assert "test  MAE" in out
    plugin = load_plugin(tmp_path / "plugin", base)
    assert plugin.delta
    assert all(name.startswith(("layers.1.", "layers.2.")) for name in plugin.delta)
    before = predict(table_crystals[:6], tmp_path / "plugin", model=base)
    again = predict(table_crystals[:6], tmp_path / "plugin", model=schnet_model)
    assert before["error"].isna().all()
    np.testing.assert_allclose(before[TARGET], again[TARGET], rtol=1e-6)
    frozen = finetune(
        crystal_table, TARGET, model=base, split_column="split", strategy="features",
        features="ridge",
    )  # fmt: skip
    assert frozen.depth == 3
    values = frozen.values(_batch(base, table_crystals))
    truth = pd.read_parquet(crystal_table)[TARGET].to_numpy()
    assert np.corrcoef(values, truth)[0, 1] > 0.8


def test_a_plugin_read_back_has_its_tied_weights_once(schnet_model, crystal_table, tmp_path):
    """PyG's interaction holds one network under two names."""
    base = load_model(schnet_model)
    state = base.backbone.state_dict()
    assert torch.equal(state["layers.2.mlp.0.weight"], state["layers.2.conv.nn.0.weight"])
    plugin = finetune(
        crystal_table, TARGET, tmp_path / "tied", model=base, split_column="split",
        strategy="finetune", freeze=2, epochs=2, readout="pooled",
    )  # fmt: skip
    again = load_plugin(tmp_path / "tied", base)
    for name, value in plugin.backbone.state_dict().items():
        assert torch.equal(value, again.backbone.state_dict()[name]), name


def test_the_estimator_takes_it_too(schnet_model, table_crystals):
    values = np.array([c.numbers.mean() for c in table_crystals])
    model = TransferRegressor("mean_z", model=str(schnet_model), strategy="features")
    model.fit(table_crystals, values)
    assert np.isfinite(model.predict(table_crystals[:3])).all()


def test_a_network_of_the_wrong_shape_is_told(run, schnet, crystal_table, tmp_path):
    source = {"table": str(crystal_table), "targets": [TARGET]}
    for network, sources, words in (
        ({"kind": "schnet", "options": {"wings": 2}}, [source], "'schnet' with {'wings': 2}"),
        ({"kind": "nowhere"}, [source], "no installed package declares a backbone 'nowhere'"),
        ({"options": {"width": 2}}, [source], "'options' in network are those of another"),
        ({"kind": "schnet"}, [source, {"table": str(crystal_table), "denoise_angstrom": 0.1}],
         "has no features of edges"),
    ):  # fmt: skip
        config = {"name": "x", "sources": sources, "network": network}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        code, _, err = run("pretrain", "c.yaml", "-o", "out")
        assert code == 2
        assert words in err


def _batch(model, crystals):
    graphs = [build_graph(c, model.backbone.graph_options) for c in crystals]
    return PackedGraphs.pack(graphs).batch(np.arange(len(graphs)))
