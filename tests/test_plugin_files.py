"""Plugin files: what is in them, what is refused; several plugins on one base."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import matxfer.model
from matxfer.calculator import MatxferCalculator
from matxfer.data.packed import PackedGraphs
from matxfer.data.properties import property_of
from matxfer.evaluation import evaluate
from matxfer.files import FormatError, read_json, sha256, write_json
from matxfer.graph import build_graph
from matxfer.model import Model, load_model
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.nn.plugin_head import PluginHead
from matxfer.prediction import predict
from matxfer.transfer.bases import with_base
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import Plugin, column_names, load_plugin, predict_all

TARGET = "debye_temperature_k"
L = 3


def make_plugin(model, depth, target=TARGET, seed=0, size=1.0):
    """Return a plugin with random changes to everything that it may change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100 * seed + depth)
        readout = ReadoutEnsemble("pooled", model.backbone.node_dim * (L + 1), 6, 2)
        head = PluginHead(property_of(target), range(L + 1), readout)
        head.scaler.mean.fill_(300.0)
        head.scaler.std.fill_(50.0)
        plugin = Plugin(model, depth, head)
        for parameter in plugin.backbone.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * size * torch.randn_like(parameter)
    return plugin.eval()


@pytest.fixture(scope="module")
def batch(tiny_model, table_crystals):
    options = tiny_model.backbone.graph_options
    return PackedGraphs.pack([build_graph(c, options) for c in table_crystals[:9]]).batch(
        np.arange(9)
    )


def predicted(plugin, batch):
    """Return a plugin's predictions through its whole own network, without the base's."""
    with torch.no_grad():
        return plugin.head.values(plugin.nodes(batch), batch)


# -- round trip -------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", range(L + 1))
def test_round_trip_and_only_changed_tensors(depth, tiny_model, tiny_model_folder, batch, tmp_path):
    plugin = make_plugin(tiny_model, depth)
    plugin.meta["figures"] = {"test": {"mae": 1.0}}
    plugin.save(tmp_path / "p")

    stored = load_file(tmp_path / "p" / "plugin.safetensors")
    names = [name for name, _ in tiny_model.backbone.named_parameters()]
    kept = [n for n in names if n.startswith("layers.") and int(n.split(".")[1]) >= depth]
    trainable = {f"delta.{name}" for name in (kept if depth else names)}
    stored = {k: v for k, v in stored.items() if not k.endswith(".step")}
    assert {k for k in stored if k.startswith("delta.")} == trainable
    assert (depth == L) == (not trainable)
    assert {k for k in stored if not k.startswith("delta.")} == {
        f"head.{k}" for k in plugin.head.state_dict()
    }

    for base in (tiny_model, load_model(tiny_model_folder)):
        again = load_plugin(tmp_path / "p", base)
        assert np.array_equal(predicted(again, batch), predicted(plugin, batch))
        assert again.depth == depth
        assert again.head.prop == plugin.head.prop
        assert again.meta["figures"] == {"test": {"mae": 1.0}}
        assert again.base is base
        assert again.name == "p"
        assert again.folder == tmp_path / "p"
        assert not any(p.requires_grad for p in again.backbone.parameters())
        assert not any(p.requires_grad for p in again.head.parameters())
        own = dict(again.backbone.named_parameters())
        for name, parameter in base.backbone.named_parameters():
            shared = own[name].data_ptr() == parameter.data_ptr()
            assert shared == (f"delta.{name}" not in trainable), name


def test_an_unchanged_layer_is_not_stored(tiny_model, tmp_path):
    plugin = make_plugin(tiny_model, 0)
    name = "layers.1.norm.weight"
    plugin.backbone.get_parameter(name).data.copy_(tiny_model.backbone.get_parameter(name))
    plugin.save(tmp_path / "p")
    assert f"delta.{name}" not in load_file(tmp_path / "p" / "plugin.safetensors")


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_saved_twice_is_the_same(size, tiny_model, tmp_path):
    """Differences so small that the base's weights swallow most of their digits too."""
    plugin = make_plugin(tiny_model, 1, size=size)
    plugin.save(tmp_path / "p")
    first = {p.name: p.read_bytes() for p in (tmp_path / "p").iterdir()}
    assert set(first) == {"plugin.json", "plugin.safetensors"}
    load_plugin(tmp_path / "p", tiny_model).save(tmp_path / "p")
    assert {p.name: p.read_bytes() for p in (tmp_path / "p").iterdir()} == first


def test_loading_leaves_the_seeds_and_the_base_alone(tiny_model, tmp_path):
    make_plugin(tiny_model, 1).save(tmp_path / "p")
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    load_plugin(tmp_path / "p", tiny_model)
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_plugin(tmp_path / "p", tiny_model)
    assert torch.equal(torch.rand(2), expected)


def test_the_base_is_found_by_its_name(tiny_model, tiny_model_folder, batch, tmp_path, monkeypatch):
    plugin = make_plugin(tiny_model, 2)
    plugin.save(tmp_path / "p")
    with pytest.raises(FormatError, match=r"no model 'tiny': give the folder of a model"):
        load_plugin(tmp_path / "p")
    monkeypatch.setattr(matxfer.model, "model_folders", lambda: [tiny_model_folder.parent])
    again = load_plugin(tmp_path / "p")
    assert again.base is not tiny_model
    assert np.array_equal(predicted(again, batch), predicted(plugin, batch))


# -- plugin.json ------------------------------------------------------------------------------
def test_what_plugin_json_says(
    crystal_table, crystal_frame, tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        sys, "argv", [str(tmp_path / "bin" / "matxfer"), "finetune", str(crystal_table), "--seed=4"]
    )
    folder = tmp_path / "my-plugin"
    finetune(
        crystal_table, "bulk_modulus_vrh_gpa", folder, model=tiny_model_folder, freeze=1,
        split_column="split", epochs=1, retain="ewc", strength=0.5, seed=4,
    )  # fmt: skip
    text = (folder / "plugin.json").read_text(encoding="utf-8")
    meta = json.loads(text)
    assert meta["format"] == 3
    assert meta["name"] == "my-plugin"
    assert meta["base"] == {
        "name": "tiny", "sha256": sha256(tiny_model_folder / "model.safetensors"),
    }  # fmt: skip
    assert meta["frozen_depth"] == 1
    assert (meta["target"], meta["unit"]) == ("bulk_modulus_vrh_gpa", "GPa")
    assert meta["transform"] == "log10"
    assert meta["head"]["source"] == "bulk_modulus_vrh_gpa"  # the base predicts it already
    assert meta["scaler"]["std"] > 0
    assert meta["uncertainty"]["level"] == 0.9
    assert meta["elements"] == sorted({3, 8, 11, 12, 17, 26})
    assert set(meta["retention"]["drift"]) == {h["property"]["name"] for h in read_json(
        tiny_model_folder / "card.json")["heads"]}  # fmt: skip
    assert meta["config"]["freeze"] == 1
    assert meta["config"]["retain"] == "ewc"
    assert meta["config"]["strength"] == 0.5
    assert meta["config"]["seed"] == 4
    assert set(meta["config"]) > {"epochs", "patience", "batch_size", "learning_rate", "readout"}
    assert meta["data"]["table"] == "crystals.parquet"
    assert meta["data"]["sha256"] == sha256(crystal_table)
    assert meta["data"]["rows"] == dict(crystal_frame["split"].value_counts())
    assert meta["figures"]["test"]["mae_log10"] > 0
    assert meta["versions"]["torch"] == torch.__version__
    assert set(meta["versions"]) >= {"python", "matxfer", "numpy"}
    assert meta["command"] == "matxfer finetune crystals.parquet --seed=4"
    assert meta["seconds"] > 0
    assert meta["fisher"]["trace"] > 0
    assert not re.search(r'[" =]/|[A-Za-z]:\\\\', text), "an absolute path"
    assert str(Path.home()) not in text
    assert Path(tmp_path).name not in text


# -- what is refused --------------------------------------------------------------------------
def _edit_json(folder, **changes):
    write_json(folder / "plugin.json", read_json(folder / "plugin.json") | changes)


def _edit_tensors(folder, change):
    path = folder / "plugin.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    _agree(folder)


def _agree(folder):
    """Write the checksum of changed weights where it is compared, so that the rest is too."""
    _edit_json(folder, sha256=sha256(folder / "plugin.safetensors"))


def _pickled(folder):
    torch.save({"a": torch.ones(1)}, folder / "plugin.safetensors")
    _agree(folder)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def _wrong_shape(tensors):
    tensors["delta.layers.2.norm.weight"] = torch.ones(5)


DAMAGE = {
    "other base": (
        lambda f: _edit_json(f, base={"name": "tiny", "sha256": "ab" * 32}),
        r"trained on weights abababababab… of 'tiny', but 'tiny' has .*load it with",
    ),
    "other format": (lambda f: _edit_json(f, format=7), r"plugin\.json: format 7, .*install"),
    "no json": (lambda f: (f / "plugin.json").unlink(), r"plugin\.json: not read.*check the path"),
    "cut json": (lambda f: _cut(f / "plugin.json"), r"plugin\.json: not readable as JSON.*again"),
    "a list": (lambda f: (f / "plugin.json").write_text("[]"), r"expected a JSON object.*again"),
    "no weights": (
        lambda f: (f / "plugin.safetensors").unlink(),
        r"plugin\.safetensors: not readable.*again",
    ),
    "cut weights": (
        lambda f: _cut(f / "plugin.safetensors"),
        r"plugin\.safetensors: the checksum differs.*again",
    ),
    "cut weights with their checksum": (
        lambda f: (_cut(f / "plugin.safetensors"), _agree(f)),
        r"plugin\.safetensors: not readable.*again",
    ),
    "a pickle": (_pickled, r"plugin\.safetensors: not readable.*again"),
    "frozen layer": (
        lambda f: _edit_tensors(
            f, lambda t: t.update({"delta.layers.0.norm.weight": torch.ones(16)})
        ),
        r"layers\.0\.norm\.weight does not belong.*again",
    ),
    "embedding": (
        lambda f: _edit_tensors(
            f, lambda t: t.update({"delta.embedding.element.weight": torch.ones(119, 16)})
        ),
        r"embedding\.element\.weight does not belong.*again",
    ),
    "no layer": (
        lambda f: _edit_tensors(
            f, lambda t: t.update({"delta.layers.3.norm.weight": torch.ones(16)})
        ),
        r"layers\.3\.norm\.weight does not belong.*again",
    ),
    "nobody's": (
        lambda f: _edit_tensors(f, lambda t: t.update({"heads.x.weight": torch.ones(2)})),
        r"heads\.x\.weight does not belong.*again",
    ),
    "half a head": (
        lambda f: _edit_tensors(f, lambda t: t.pop("head.scaler.mean")),
        r"disagree \(.*scaler\.mean.*again",
    ),
    "wrong shape": (lambda f: _edit_tensors(f, _wrong_shape), r"disagree \(.*size mismatch.*again"),
    "no depth": (lambda f: _edit_json(f, frozen_depth=None), r"disagree \(.*again"),
    "deeper than the base": (lambda f: _edit_json(f, frozen_depth=9), r"frozen depth 9.*again"),
    "no base": (lambda f: _edit_json(f, base=None), r"disagree \(.*again"),
    "no readout": (lambda f: _edit_json(f, head={}), r"disagree \(.*again"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_plugins_are_refused(damage, tiny_model, tmp_path):
    folder = tmp_path / "some-plugin"
    make_plugin(tiny_model, 1).save(folder)
    load_plugin(folder, tiny_model)
    change, pattern = DAMAGE[damage]
    change(folder)
    before = {k: v.clone() for k, v in tiny_model.state_dict().items()}
    with pytest.raises(FormatError, match=f"(?s){pattern}") as caught:
        load_plugin(folder, tiny_model)
    assert str(folder) in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in tiny_model.state_dict().items())


def test_no_such_folder(tiny_model, tmp_path):
    with pytest.raises(FormatError, match=r"nowhere/plugin\.json: not readable.*check the path"):
        load_plugin(tmp_path / "nowhere", tiny_model)


def test_another_base_is_refused(tiny_model, tiny_model_folder, tmp_path):
    """The same architecture with one weight changed is another base."""
    make_plugin(tiny_model, 1).save(tmp_path / "p")
    shutil.copytree(tiny_model_folder, tmp_path / "other")
    other = load_model(tmp_path / "other")
    other.backbone.get_parameter("layers.0.norm.weight").data += 0.1
    other.save(tmp_path / "other")
    with pytest.raises(FormatError, match=r"trained on weights .*fine-tune again"):
        load_plugin(tmp_path / "p", load_model(tmp_path / "other"))


def test_nothing_unpickles(repository):
    """No file format of ours can run code when it is read."""
    pattern = re.compile(
        r"\bpickle\b|\bjoblib\b|\bdill\b|torch\.(load|save)\b|weights_only\s*=\s*False"
        r"|allow_pickle\s*=\s*True|\bmarshal\b|yaml\.(load|unsafe_load|full_load)\(|\beval\(\"|exec\("
    )
    # CHGNet and SevenNet carry their weights as archives of PyTorch: their tensors alone are read.
    allowed = re.compile(
        r"allow_pickle=False"
        r"|torch\.load\((archive|checkpoint), map_location=\"cpu\", weights_only=True\)"
    )
    sources = sorted((repository / "matxfer").rglob("*.py"))
    assert len(sources) > 30
    found = []
    for path in sources:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = allowed.sub("", line.split("#")[0])
            # Words in docstrings say that there is none; imports and calls are what counts.
            if pattern.search(code) and re.search(r"import|\(|=", code):
                found.append(f"{path.name}:{number}: {line.strip()}")
    assert not found
    # And the pattern sees what it should.
    for bad in ("import pickle", "torch.load(path)", "np.load(p, allow_pickle=True)"):
        assert pattern.search(allowed.sub("", bad))


# -- several plugins --------------------------------------------------------------------------
def named(plugin, name):
    plugin.meta["name"] = name
    return plugin


def test_column_names(tiny_model):
    gap, gap2 = (make_plugin(tiny_model, L, "band_gap_ev") for _ in range(2))
    debye, debye2, debye3 = (make_plugin(tiny_model, L) for _ in range(3))
    plugins = [named(debye, "a"), named(gap, "b"), named(debye2, "c"), named(gap2, "d")]
    assert column_names(tiny_model, plugins) == [
        TARGET, "band_gap_ev__b", f"{TARGET}__c", "band_gap_ev__d",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="two plugins are called 'c'; rename"):
        column_names(tiny_model, [*plugins, named(debye3, "c")])
    assert column_names(tiny_model, []) == []


def _count_calls(modules):
    """Count forward calls of modules by name."""
    calls = Counter()
    handles = [
        module.register_forward_hook(lambda *_, n=name: calls.update([n]))
        for name, module in modules.items()
    ]
    return calls, handles


def _blocks(owner, backbone):
    return {f"{owner}.{name}": module for name, module in backbone.blocks()}


def test_several_plugins_equal_each_alone_and_share_the_base(tiny_model, batch):
    depths = (2, 0, L, 1, 2)
    plugins = [make_plugin(tiny_model, depth, seed=k) for k, depth in enumerate(depths)]
    modules = _blocks("base", tiny_model.backbone)
    for k, plugin in enumerate(plugins):
        modules |= _blocks(str(k), plugin.backbone)
    calls, handles = _count_calls(modules)
    with torch.no_grad():
        together = predict_all(tiny_model, plugins, batch)
    for handle in handles:
        handle.remove()

    expected = {f"base.{name}": 1 for name, _ in tiny_model.backbone.blocks()}
    for k, depth in enumerate(depths):
        expected |= {f"{k}.layers.{layer}": 1 for layer in range(depth, L)}
        if depth == 0:
            expected[f"{k}.embed"] = 1
    assert calls == expected

    source = tiny_model.predict_graphs(batch)
    assert len(together) == len(source) + len(plugins)
    for values, (name, expected_values) in zip(together, source.items(), strict=False):
        np.testing.assert_array_equal(values, expected_values, err_msg=name)
    for plugin, values in zip(plugins, together[len(source) :], strict=True):
        np.testing.assert_allclose(values, predicted(plugin, batch), rtol=1e-6)
    # They do differ from one another, or the comparison would say nothing.
    flat = np.stack(together[len(source) :])
    assert (np.abs(flat[:, None] - flat[None]).max(axis=-1)[~np.eye(5, dtype=bool)] > 0.1).all()


def test_without_plugins(tiny_model, batch):
    with torch.no_grad():
        values = predict_all(tiny_model, [], batch)
    source = tiny_model.predict_graphs(batch)
    assert [v.tolist() for v in values] == [v.tolist() for v in source.values()]


def test_plugins_load_without_the_training_libraries(tiny_model, tiny_model_folder, tmp_path):
    make_plugin(tiny_model, 1).save(tmp_path / "p")
    code = (
        "import sys, matxfer; m = matxfer.load_model(sys.argv[1]);"
        "matxfer.load_plugin(sys.argv[2], m);"
        "print([n for n in ('lightning', 'torch_geometric', 'pymatgen') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model_folder), str(tmp_path / "p")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == "[]"


# -- the base of a call -----------------------------------------------------------------------
def test_without_a_model_the_plugins_say_which(
    tiny_model, tiny_model_folder, monkeypatch, tmp_path
):
    monkeypatch.setattr(matxfer.model, "model_folders", lambda: [tiny_model_folder.parent])
    plugin = make_plugin(tiny_model, 1)
    plugin.save(tmp_path / "p")
    assert with_base([plugin])[0] is tiny_model
    base, found = with_base([tmp_path / "p", plugin])  # the base is found by its name
    assert base.checksum == tiny_model.checksum
    assert [p.base is base for p in found] == [True, False]
    assert with_base([plugin], tiny_model_folder)[1] == [plugin]  # the same weights, read again


def test_a_plugin_of_another_base_is_refused(
    tiny_model, tiny_model_folder, table_crystals, tmp_path
):
    """Its own layers would run on those of the other without a complaint, and be wrong."""
    shutil.copytree(tiny_model_folder, tmp_path / "other")
    other = load_model(tmp_path / "other")
    other.backbone.get_parameter("layers.0.norm.weight").data += 0.1
    other.save(tmp_path / "other")
    plugin = make_plugin(tiny_model, 1)
    pattern = r"belongs to model 'tiny' \(.*but 'other' .*was given; give the model it was trained"
    for use in (
        lambda: predict(table_crystals[:2], plugin, model=other),
        lambda: predict(table_crystals[:2], [make_plugin(other, 1), plugin]),
        lambda: evaluate(pd.DataFrame(), TARGET, plugin, model=other),
        lambda: MatxferCalculator(other, [plugin]),
    ):
        with pytest.raises(FormatError, match=pattern):
            use()
    assert TARGET in predict(table_crystals[:2], plugin)  # without a model it is its own
    bare = Model(copy.deepcopy(tiny_model.backbone), [], tiny_model.elements)
    with pytest.raises(FormatError, match="belongs to model"):
        with_base([plugin], bare)  # weights that were never written are known by nothing
