"""Plugins on their way: packed files and hostile ones, checks, old formats, lists and cards."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import stat
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from matxfer import sharing
from matxfer.batch.cache import weights_of
from matxfer.calculator import MatxferCalculator
from matxfer.errors import MatxferError, OptionError
from matxfer.files import FormatError
from matxfer.output_metadata import describe_prediction
from matxfer.plugin_files import META, NAMES, WEIGHTS, packed, read_plugin
from matxfer.potential.plugin import is_potential_plugin, load_potential_plugin
from matxfer.prediction import predict
from matxfer.transfer.finetune import finetune
from matxfer.transfer.plugin import load_plugin

TARGET = "debye_temperature_k"
COLUMN = f"{TARGET}_std"


@pytest.fixture(scope="module")
def original(crystal_table, tiny_model, tmp_path_factory):
    """Return the folder of a plugin that has been through all of a fine-tuning."""
    folder = tmp_path_factory.mktemp("original") / "debye"
    finetune(crystal_table, TARGET, folder, model=tiny_model, split_column="split",
             strategy="finetune", epochs=1, freeze=1)  # fmt: skip
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """Return a copy that a test may spoil."""
    return Path(shutil.copytree(original, tmp_path / "debye"))


@pytest.fixture
def shipped(tiny_model_folder, monkeypatch):
    """Let the tiny model be found by its name."""
    monkeypatch.setattr("matxfer.model.model_folders", lambda: [tiny_model_folder.parent])


def edit(folder, **changes):
    meta = json.loads((folder / META).read_text()) | changes
    (folder / META).write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
    return folder


def content(folder):
    return {name: (folder / name).read_bytes() for name in NAMES}


# -- the checksum -----------------------------------------------------------------------------
def test_plugin_json_holds_the_checksum_of_the_weights(folder):
    meta = json.loads((folder / META).read_text())
    assert meta["sha256"] == sha256((folder / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("old", ["with a checksum", "without one"])
def test_a_kill_between_the_two_files_never_pairs_new_weights_with_old_facts(
    old, folder, tiny_model, monkeypatch
):
    if old == "without one":
        edit(folder, sha256=None)
    plugin = load_plugin(folder, tiny_model)
    with torch.no_grad():
        plugin.head.scaler.mean += 1
    replace = Path.replace

    def killed(self, target):
        if Path(target).name == META:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            plugin.save(folder)
    words = "checksum differs" if old == "with a checksum" else "not readable"
    with pytest.raises(FormatError, match=words):
        load_plugin(folder, tiny_model)
    plugin.save(folder)  # and the next one mends it
    assert float(load_plugin(folder, tiny_model).head.scaler.mean) == float(plugin.head.scaler.mean)


def test_a_plugin_of_a_potential_is_held_to_its_weights_too(
    small_potential, small_potential_plugins, tmp_path
):
    mixed = Path(shutil.copytree(small_potential_plugins[0], tmp_path / "own"))
    load_potential_plugin(mixed, small_potential)
    shutil.copy(small_potential_plugins[1] / WEIGHTS, mixed / WEIGHTS)
    with pytest.raises(FormatError, match="checksum differs"):
        load_potential_plugin(mixed, small_potential)


def test_a_plugin_is_called_as_its_folder_or_file(folder, tiny_model, tmp_path):
    """So that two of one name can be told apart by renaming one."""
    renamed = folder.rename(tmp_path / "other")
    assert load_plugin(renamed, tiny_model).name == "other"
    assert load_plugin(sharing.pack(renamed, tmp_path / "third.matxfer.zip"), tiny_model).name == (
        "third"
    )


# -- one file ---------------------------------------------------------------------------------
def test_pack_and_unpack(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = sharing.pack(folder)
    assert path == Path("debye.matxfer.zip")
    first = path.read_bytes()
    assert abs(len(first) - sum(map(len, content(folder).values()))) < 500  # nothing compressed
    (folder / META).touch()
    assert sharing.pack(folder).read_bytes() == first
    assert content(sharing.unpack(path, "again")) == content(folder)
    assert sharing.pack("again", "other.matxfer.zip").read_bytes() == first
    # Any tool for zip files opens it.
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == list(NAMES)
    with pytest.raises(OptionError, match=r"something already.*-o"):
        sharing.unpack(path, "again")
    with pytest.raises(OptionError, match=r"ends in \.matxfer\.zip"):
        sharing.pack(folder, "x.zip")
    assert not list(tmp_path.glob(".*.part"))


def test_a_packed_plugin_is_taken_wherever_a_folder_is(
    folder, tiny_model, tiny_model_folder, crystal_table, tmp_path, run, monkeypatch
):
    path = sharing.pack(folder, tmp_path / "debye.matxfer.zip")
    before = set(tmp_path.rglob("*"))
    a, b = load_plugin(folder, tiny_model), load_plugin(path, tiny_model)
    left = predict(crystal_table, a, model=tiny_model)
    right = predict(crystal_table, str(path), model=tiny_model)
    assert np.array_equal(left[TARGET], right[TARGET])
    assert np.array_equal(left[COLUMN], right[COLUMN])
    assert set(tmp_path.rglob("*")) == before  # nothing is unpacked
    assert weights_of(tiny_model, [b]) == weights_of(tiny_model, [a])
    sums = [describe_prediction(tiny_model, [p], [])["plugins"] for p in (a, b)]
    assert sums[0] == sums[1]
    figures = [
        run("evaluate", crystal_table, "--target", TARGET, "--plugin", plugin,
            "--model", tiny_model_folder, "--json")[1]
        for plugin in (folder, path)
    ]  # fmt: skip
    assert figures[0] == figures[1]
    assert json.loads(figures[0])["n"] > 0
    code, _, err = run("consolidate", path, crystal_table, "-o", "merged",
                       "--model", tiny_model_folder, "--samples", 10)  # fmt: skip
    assert (code, (tmp_path / "merged" / "plugins" / "debye" / META).is_file()) == (0, True), err


def test_a_packed_plugin_of_a_potential(small_potential, small_potential_plugins, tmp_path):
    path = sharing.pack(small_potential_plugins[0], tmp_path / "own.matxfer.zip")
    assert is_potential_plugin(path)
    with pytest.raises(FormatError, match="plugin of a potential"):
        load_plugin(path)
    a, b = (
        MatxferCalculator(plugins=[p], potential=small_potential)
        for p in (small_potential_plugins[0], path)
    )
    from ase.build import bulk

    atoms = bulk("NaCl", "rocksalt", 5.6)
    atoms.rattle(0.1, seed=1)
    assert np.array_equal(a.get_property("forces", atoms), b.get_property("forces", atoms))


# -- hostile files ----------------------------------------------------------------------------
def zipped(members, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def of_mode(good, mode):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in NAMES:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, mode << 16
            archive.writestr(info, good[name])
    return stream.getvalue()


def lying_about_its_size(good):
    data = bytearray(packed(good))
    where = data.rindex(b"PK\x01\x02") + 20  # sizes in the directory, of the weights
    data[where : where + 8] = (1 << 20).to_bytes(4, "little") * 2
    return bytes(data)


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def evil_weights(good):
    """A pickle in the place of the weights, its checksum where it is compared."""
    data = pickle.dumps(Evil())
    meta = json.loads(good[META]) | {"sha256": sha256(data).hexdigest()}
    return packed({META: json.dumps(meta).encode(), WEIGHTS: data})


BOMB = b"\0" * (64 << 20)
HOSTILE = {
    "path traversal": (
        lambda g: zipped([*g.items(), ("../../evil.py", b"x")]),
        r"it holds '\.\./\.\./evil\.py'",
    ),
    "absolute path": (lambda g: zipped([*g.items(), ("/etc/cron.d/x", b"x")]), "it holds '/etc"),
    "renamed traversal": (
        lambda g: zipped([(META, g[META]), (f"../{WEIGHTS}", g[WEIGHTS])]),
        r"it holds '\.\./plugin\.safetensors'",
    ),
    "extra file": (lambda g: zipped([*g.items(), ("readme.txt", b"x")]), "'readme.txt'"),
    "extra pickle": (lambda g: zipped([*g.items(), ("model.pkl", pickle.dumps(Evil()))]), "pkl"),
    "twice the same": (
        lambda g: zipped([(META, g[META]), (META, g[META]), (WEIGHTS, g[WEIGHTS])]),
        "it holds plugin.json, plugin.json",
    ),
    "one missing": (lambda g: zipped([(META, g[META])]), "it holds plugin.json;"),
    "empty archive": (lambda _: zipped([]), "it holds nothing"),
    "bomb": (
        lambda g: zipped([(META, g[META]), (WEIGHTS, BOMB)], zipfile.ZIP_DEFLATED),
        "plugin.json is compressed",
    ),
    "symlink": (lambda g: of_mode(g, stat.S_IFLNK | 0o777), "is a link"),
    "folder": (lambda g: of_mode(g, stat.S_IFDIR | 0o755), "is a link or a folder"),
    "truncated": (lambda g: packed(g)[:-100], "not readable as a packed plugin"),
    "cut in front": (lambda g: packed(g)[100:], "not readable|is compressed|checksum"),
    "flipped bit": (
        lambda g: packed(g).replace(g[WEIGHTS], b"?" + g[WEIGHTS][1:]),
        "not readable as a packed plugin",
    ),
    "lies about its size": (lying_about_its_size, "not readable as a packed plugin"),
    "wrong checksum": (
        lambda g: packed({META: g[META], WEIGHTS: g[WEIGHTS][:-4] + b"abcd"}),
        "checksum differs",
    ),
    "no checksum": (
        lambda g: packed({
            META: json.dumps({k: v for k, v in json.loads(g[META]).items() if k != "sha256"})
            .encode(), WEIGHTS: g[WEIGHTS],
        }),
        "names no checksum",
    ),
    "pickle for weights": (evil_weights, "not readable as safetensors"),
    "a pickle itself": (lambda _: pickle.dumps(Evil()), "not readable as a packed plugin"),
    "a torch file": (lambda _: torch_file(), r"it holds '"),
    "text": (lambda _: b"hello", "not readable as a packed plugin"),
    "nothing": (lambda _: b"", "not readable as a packed plugin"),
    "json of a million brackets": (
        lambda g: packed({META: b"[" * 1_000_000, WEIGHTS: g[WEIGHTS]}), "not readable as JSON",
    ),
}  # fmt: skip


def torch_file():
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream)
    return stream.getvalue()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_before_anything_is_loaded(
    case, original, tiny_model, tmp_path, monkeypatch
):
    make, words = HOSTILE[case]
    path = tmp_path / "x.matxfer.zip"
    path.write_bytes(make(content(original)))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    for act in (
        lambda: load_plugin(path, tiny_model),
        lambda: sharing.unpack(path, tmp_path / "out"),
        lambda: sharing.pack(path, tmp_path / "y.matxfer.zip"),
    ):
        with pytest.raises(FormatError, match=words):
            act()
    result = sharing.verify(path)
    assert not result["ok"]
    assert result["problems"][0]["remedy"]
    # A list looks into no weights whose checksum is right.
    assert sharing.summary(path).problem or case == "pickle for weights"
    assert {p.name for p in tmp_path.rglob("*")} == {"x.matxfer.zip"}


def test_a_hostile_file_on_the_command_line(original, tmp_path, run):
    path = tmp_path / "x.matxfer.zip"
    path.write_bytes(evil_weights(content(original)))
    for words in (("predict", "x.cif", "--plugin"), ("relax", "x.cif", "-o", "x.db", "--plugin"),
                  ("plugins", "info"), ("plugins", "unpack"), ("plugins", "pack")):  # fmt: skip
        code, _, err = run(*words, path)
        assert code in (0, 2)  # the card reads no weights
        assert (code == 0) == (words[-1] == "info")
        assert (err.count("\n"), str(path) in err) == ((0, False) if code == 0 else (1, True))
    code, out, err = run("plugins", "list")
    assert (code, out.count("\n"), "(problem)" in out) == (0, 2, False)


def test_sizes_are_bounded(folder, tmp_path, monkeypatch, tiny_model):
    path = sharing.pack(folder, tmp_path / "x.matxfer.zip")
    monkeypatch.setattr("matxfer.plugin_files.LIMITS", {META: 1 << 20, WEIGHTS: 100})
    with pytest.raises(FormatError, match="has more than 0 MiB"):
        load_plugin(path, tiny_model)
    with pytest.raises(FormatError, match=r"safetensors: larger than 0 MiB"):
        load_plugin(folder, tiny_model)
    monkeypatch.setattr("matxfer.plugin_files.LIMITS", {META: 1, WEIGHTS: 1 - (1 << 20)})
    with pytest.raises(FormatError, match="more than a plugin has"):
        load_plugin(path, tiny_model)


# -- older and newer formats ------------------------------------------------------------------
#: ``plugin.json`` as matxfer's first plugins had it: a single readout, no uncertainty.
FIRST = {
    "format": 1,
    "name": "debye",
    "base": {"name": "tiny", "sha256": "ab" * 32},
    "frozen_depth": 1,
    "target": TARGET,
    "unit": "K",
    "transform": "identity",
    "scaler": {"mean": 300.0, "std": 50.0, "element_references": False},
    "head": {"readout": "pooled", "hidden_dim": 8},
    "config": {"freeze": 1, "epochs": 30, "seed": 4},
    "figures": {"test": {"mae": 12.0, "rmse": 20.0, "r2": 0.9, "n": 6, "unit": "K"}},
    "command": "matxfer finetune mine.csv --target debye_temperature_k --freeze 1",
    "versions": {"python": "3.11.7", "matxfer": "0.1.0", "torch": "2.6.0"},
}


def test_a_plugin_of_the_first_format_says_what_to_do(tmp_path, run):
    old = tmp_path / "old"
    old.mkdir()
    (old / META).write_text(json.dumps(FIRST))
    save_file({"head.x": torch.ones(3)}, old / WEIGHTS)
    with pytest.raises(FormatError) as caught:
        load_plugin(old)
    text = str(caught.value)
    assert "format 1, but this version of matxfer reads 2 and 3" in text
    assert f"train it again with the command that made it: {FIRST['command']}" in text
    assert "matxfer 0.1.0 made it" in text
    code, out, _ = run("plugins", "verify", old, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["format"]) == (1, False, 1)
    assert found["problems"][0]["file"] == META
    assert FIRST["command"] in found["problems"][0]["remedy"]
    # What it says of itself can be read all the same.
    assert sharing.summary(old).test_error == 12.0
    assert "MAE 12 K" in sharing.card_text(old)


def test_a_plugin_of_the_second_format_loads(original, tiny_model, crystal_table, tmp_path):
    """Format 2 kept the weights in half precision, and no checksum."""
    from matxfer.transfer.rounding import restored

    old = Path(shutil.copytree(original, tmp_path / "old"))
    new = restored(load_file(old / WEIGHTS))
    save_file({k: v.half() if v.dtype == torch.float else v for k, v in new.items()}, old / WEIGHTS)
    edit(old, format=2, sha256=None)
    now, then = (predict(crystal_table, p, model=tiny_model)[TARGET] for p in (original, old))
    np.testing.assert_allclose(then, now, rtol=2e-3)
    load_plugin(old, tiny_model).save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / META).read_text())["format"] == 3


def test_a_plugin_of_a_format_to_come(folder):
    edit(folder, format=9)
    with pytest.raises(FormatError, match=r"format 9.*pip install --upgrade matxfer"):
        load_plugin(folder)


@pytest.mark.parametrize("format_", [None, "3", True, -1, 0.5])
def test_what_has_no_format_is_no_plugin(format_, folder):
    edit(folder, format=format_)
    with pytest.raises(FormatError, match=r"no plugin of matxfer.*check the path"):
        load_plugin(folder)


def test_a_plugin_without_a_checksum_still_loads_and_pack_adds_it(folder, tiny_model, tmp_path):
    edit(folder, sha256=None)
    load_plugin(folder, tiny_model)
    again = read_plugin(sharing.pack(folder, tmp_path / "x.matxfer.zip"))
    assert again.meta()["sha256"] == sha256((folder / WEIGHTS).read_bytes()).hexdigest()


# -- verify -----------------------------------------------------------------------------------
def test_verify_says_that_all_is_well(folder, tiny_model_folder, shipped, tmp_path, run):
    result = sharing.verify(folder)
    assert result["ok"], result
    assert (result["problems"], result["notes"]) == ([], [])
    assert result["files"][WEIGHTS] == {
        "bytes": (folder / WEIGHTS).stat().st_size,
        "sha256": sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    assert result["base"]["found"]
    path = sharing.pack(folder, tmp_path / "x.matxfer.zip")
    code, out, _ = run("plugins", "verify", folder, path)
    assert (code, out.count(": good (format 3, on tiny; it loads)")) == (0, 2)


def _tensor(folder, name, value):
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = value
    save_file(tensors, folder / WEIGHTS)
    edit(folder, sha256=sha256((folder / WEIGHTS).read_bytes()).hexdigest())


PROBLEMS = {
    "weights": (
        lambda f: (f / WEIGHTS).write_bytes(b"x"), WEIGHTS, "checksum differs", "fetch or train",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS, "no such file", "fetch or train"),
    "no facts": (lambda f: (f / META).unlink(), META, "not readable", "check the path"),
    "infinite": (
        lambda f: _tensor(f, "head.scaler.mean", torch.tensor(float("inf"))),
        WEIGHTS, "infinities or NaN", "train",
    ),
    "infinite in 16 bits": (
        lambda f: _tensor(f, "head.x", torch.tensor([float("nan")], dtype=torch.bfloat16)),
        WEIGHTS, "infinities or NaN", "train",
    ),
    "foreign": (
        lambda f: _tensor(f, "evil.x", torch.ones(1)), WEIGHTS, "'evil.x' does not belong", "fetch",
    ),
    "shapes": (
        lambda f: _tensor(f, "head.scaler.mean", torch.ones(7)), META, "disagree", "train it again",
    ),
    "no base": (lambda f: edit(f, base=None), META, "names no base", "fetch"),
    "unknown base": (
        lambda f: edit(f, base={"name": "gone", "sha256": "ab"}), "debye", "no model 'gone'",
        "",
    ),
    "other base": (
        lambda f: edit(f, base={"name": "tiny", "sha256": "ab" * 32}), "debye", "trained on",
        "load it with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_verify_says_what_is_wrong_and_what_to_do(case, folder, shipped):
    spoil, file, what, remedy = PROBLEMS[case]
    spoil(folder)
    found = sharing.verify(folder)
    assert not found["ok"]
    (problem,) = found["problems"]
    assert file in problem["file"]
    assert what in problem["what"]
    assert remedy in problem["remedy"]
    json.dumps(found, allow_nan=False)


def test_verify_takes_the_base_that_is_given(folder, tiny_model_folder, run):
    code, out, _ = run("plugins", "verify", folder)
    assert (code, "no model 'tiny'" in out) == (1, True)
    assert run("plugins", "verify", folder, "--model", tiny_model_folder)[0] == 0


def test_verify_notes_what_else_lies_there(folder, shipped):
    (folder / "model.pkl").write_bytes(b"x")
    edit(folder, sha256=None)
    found = sharing.verify(folder)
    assert found["ok"]
    assert "not read: model.pkl" in found["notes"][0]
    assert "no checksum" in found["notes"][1]


def test_verify_of_a_potential_plugin(small_potential_folder, small_potential_plugins):
    found = sharing.verify(small_potential_plugins[0], small_potential_folder)
    assert (found["ok"], found["kind"]) == (True, "potential")


# -- list and info ----------------------------------------------------------------------------
def test_list(folder, original, small_potential_plugins, tmp_path, run):
    sharing.pack(folder, tmp_path / "deep" / "mail.matxfer.zip")
    shutil.copytree(small_potential_plugins[0], tmp_path / "force")
    shutil.copytree(original, tmp_path / ".hidden" / "p")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / META).write_text("{")
    code, out, err = run("plugins", "list")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["name", "target", "base", "test", "error", "MB", "format", "path"]
    assert [line[0] for line in lines[1:]] == ["broken", "debye", "mail", "force"]
    assert "(problem)" in out.splitlines()[1]
    assert err.startswith("broken: broken/plugin.json: not readable as JSON")
    assert err.count("\n") == 1
    meta = json.loads((folder / META).read_text())
    code, out, _ = run("plugins", "list", tmp_path, "--json")
    broken, debye, mail, force = json.loads(out)["plugins"]
    assert broken["problem"]
    assert debye["test_error"] == meta["figures"]["test"]["mae"]
    assert (debye["target"], debye["unit"], debye["base"]) == (TARGET, "K", "tiny")
    assert debye["megabytes"] == pytest.approx(sum(map(len, content(folder).values())) / 1e6, 0.01)
    assert [p["packed"] for p in (debye, mail)] == [False, True]
    assert force["kind"] == "potential"
    assert [p["problem"] for p in (debye, mail, force)] == [None] * 3
    empty = tmp_path / ".hidden" / "nothing"
    empty.mkdir()
    assert "no plugins in it" in run("plugins", "list", empty)[2]
    code, _, err = run("plugins", "list", tmp_path / "nowhere")
    assert (code, "no such folder" in err) == (2, True)


def test_info(folder, tmp_path, run):
    meta = json.loads((folder / META).read_text())
    code, out, _ = run("plugins", "info", folder)
    assert code == 0
    assert out.startswith(f"debye  ({folder})\n  {TARGET}, K\n  on tiny (sha256 ")
    test = meta["figures"]["test"]
    for text in (f"MAE {test['mae']:.4g} K", "train 48, val 6, test 6", "Li O Na Mg Cl Fe",
                 meta["sha256"], meta["data"]["sha256"]):  # fmt: skip
        assert text in out
    path = sharing.pack(folder, tmp_path / "debye.matxfer.zip")
    assert run("plugins", "info", path)[1].splitlines()[5:] == out.splitlines()[5:]
    assert json.loads(run("plugins", "info", path, "--json")[1]) == meta


def test_a_stranger_cannot_move_the_cursor(folder, run, tmp_path):
    edit(folder, target="x\x1b[2J\x1b]0;owned\x07", chosen="a\rb", command="\x9b31m")
    for words in (("list",), ("info", folder), ("verify", folder)):
        _, out, err = run("plugins", *words)
        assert all(c.isprintable() or c == "\n" for c in out + err)


@pytest.mark.parametrize(
    "changes",
    [
        {"figures": 3}, {"figures": {"test": []}}, {"figures": {"test": {"mae": "x", "n": 3}}},
        {"data": []}, {"data": {"rows": 4}}, {"elements": ["x", -4, 900]}, {"base": 7},
        {"versions": []}, {"unit": {}}, {"provenance": 3}, {"kind": "potential"},
        {"kind": "potential", "test": 4}, {"name": 5}, {"versions": {"matxfer": 4}, "format": 1},
    ],
)  # fmt: skip
def test_nonsense_in_the_facts_breaks_no_card(changes, folder):
    edit(folder, **changes)
    assert sharing.summary(folder).name == "debye"
    assert sharing.card_text(folder)
    from matxfer.sharing.card import readme

    assert readme(read_plugin(folder), "ada/debye")
    sharing.verify(folder)


# -- the card for the Hub ---------------------------------------------------------------------
def test_the_card_for_the_hub(folder, run):
    from matxfer.sharing.card import readme

    meta = json.loads((folder / META).read_text())
    text = readme(read_plugin(folder), "ada/debye", "cc-by-4.0")
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["license"] == "cc-by-4.0"
    assert front["base_model"] == "tiny"
    assert front["datasets"] == ["crystals"]
    (result,) = front["model-index"][0]["results"]
    assert result["task"]["name"] == TARGET
    assert result["dataset"]["name"] == "crystals.parquet, 6 test rows"
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert values == {key: meta["figures"]["test"][key] for key in ("mae", "rmse", "r2")}
    assert "matxfer predict *.cif --plugin hf://ada/debye" in body
    assert yaml.safe_load(readme(read_plugin(folder), "a/b").split("---\n")[1])["license"] == (
        "unknown"
    )
    code, out, _ = run("plugins", "push", folder, "ada/debye", "--show-card",
                       "--licence", "cc-by-4.0")  # fmt: skip
    assert (code, out.strip()) == (0, text.strip())


def test_errors_are_those_of_the_package(tmp_path):
    with pytest.raises(MatxferError, match=r"nowhere/plugin\.json: not readable"):
        sharing.pack(tmp_path / "nowhere")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / META).write_text("{}")
    with pytest.raises(FormatError, match="a plugin is its folder"):
        load_plugin(tmp_path / "p" / META)
