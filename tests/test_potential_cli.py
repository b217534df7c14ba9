"""The commands ``matxfer potential`` and ``finetune`` on frames: what they say and refuse."""

from __future__ import annotations

import json

import ase.io
import pytest
from emt_frames import emt_frames, table_of

from matxfer.graph import GraphOptions
from matxfer.nn.network import EdgeGatedNetwork
from matxfer.potential.fit import make_potential
from matxfer.potential.plugin import load_potential_plugin

CONFIG = EdgeGatedNetwork(2, 12, 8, 8, GraphOptions(3.6, symmetry=False), 2).config()


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Return a table and an extended XYZ file of twelve frames each."""
    folder, atoms = tmp_path_factory.mktemp("frames"), emt_frames(24)
    for k, a in enumerate(atoms):
        a.info |= {"part": ["train", "train", "val", "test"][k // 2 % 4], "copper": k % 2}
    ase.io.write(folder / "a.xyz", atoms[:12], format="extxyz")
    table = table_of(atoms[12:]).assign(
        part=[a.info["part"] for a in atoms[12:]], copper=[a.info["copper"] for a in atoms[12:]]
    )
    table.to_parquet(folder / "b.parquet")
    return folder / "a.xyz", folder / "b.parquet"


@pytest.fixture(scope="module")
def general(frames, tmp_path_factory):
    folder = tmp_path_factory.mktemp("potentials") / "general"
    make_potential(
        list(frames), folder, model=None, architecture=CONFIG, split_column="part", epochs=2
    )
    return folder


def test_a_potential_and_a_plugin_of_it(frames, tiny_model_folder, run, tmp_path):
    code, out, err = run(
        "potential", *frames, "--model", tiny_model_folder, "-o", "general", "--epochs", 1,
        "--split-column", "part", "--licence", "CC0",
    )  # fmt: skip
    assert code == 0
    assert "a.xyz: energy, forces, stress" in err
    assert "frames: 6 test, 12 train, 6 val" in err
    assert "epoch 1: validation MAE energy" in err
    assert "test: MAE energy" in out
    assert out.count("GPa") == 2
    card = json.loads((tmp_path / "general" / "card.json").read_text())
    assert card["data"]["frames"] == "a.xyz, b.parquet"
    code, out, err = run(
        "finetune", *frames, "--model", "general", "-o", "own", "--epochs", 1, "--split-column",
        "part", "--retain", "ewc", "--strength", "2", "--source-data", frames[1],
    )  # fmt: skip
    assert code == 0
    assert "meV/atom" in out
    assert "→" in out
    assert "errors of the potential on its own test frames" in out
    plugin = load_potential_plugin("own")
    assert plugin.meta["configuration"]["strength"] == 2.0


def test_json_is_one_object(frames, general, run):
    code, out, err = run(
        "finetune", frames[1], "--model", general, "-o", "own", "--epochs", 1, "--split-column",
        "part", "--target", "forces", "--json", "--stress-weight", 0, "--energy-weight", 2,
        "--force-weight", 3, "--max-force", 9, "--where", "copper=1",
    )  # fmt: skip
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["plugin"] == "own"
    config = told["configuration"]
    weights = [config[f"{what}_weight"] for what in ("energy", "force", "stress")]
    assert weights == [2.0, 3.0, 0.0]
    assert config["max_force_ev_per_a"] == 9.0
    assert sum(told["data"]["rows"].values()) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "band_gap_ev"], "is a potential, whose plugins learn energies"),
        (["--members", "2"], "--members: is of properties, but"),
        (["--transform", "log", "--patience", "3"], "--patience, --transform: is of properties"),
        (["--structure-column", "cif"], "--structure-column: is of properties"),
        (["--strength", "auto", "--retain", "ewc"], "needs a number"),
        (["--retain", "replay"], "must be one of"),
        (["--where", "copper"], "COLUMN=VALUE"),
    ],
)
def test_options_that_are_not_of_potentials(words, message, frames, general, run):
    code, out, err = run("finetune", frames[1], "--model", general, *words)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the column of one with --target"),
        (["--target", "forces"], "is a model of properties: give --model mp-potential"),
        (["--target", "x_ev", "--force-weight", "2"], "--force-weight: is of frames"),
        (["--target", "x_ev", "--no-check"], "--no-check: is of frames"),
        (["--target", "x_ev", "--where", "a=b"], "--where: is of frames"),
        (["--target", "x_ev", "other.csv"], "one table is needed"),
    ],
)
def test_options_that_are_not_of_properties(words, message, frames, tiny_model_folder, run):
    code, out, err = run("finetune", frames[1], "--model", tiny_model_folder, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_other_units_end_the_command(general, run, tmp_path):
    table = table_of(emt_frames(24))
    table["forces_ev_per_a"] = [-f for f in table.forces_ev_per_a]
    table.to_parquet(tmp_path / "wrong.parquet")
    code, _, err = run("finetune", "wrong.parquet", "--model", general, "--epochs", 1)
    assert code == 2
    assert "other sign" in err
    code, _, err = run("finetune", "wrong.parquet", "--model", general, "--epochs", 1, "--no-check")
    assert code == 0
    assert "other sign" in err


def test_other_commands_say_what_to_do_with_a_potential(general, frames, run):
    code, out, err = run("predict", frames[0], "--model", general)
    assert (code, out) == (2, "")
    assert "matxfer relax" in err
    code, out, _ = run("models", general)
    assert code == 0
    assert "test: energy MAE" in out
    assert "a.xyz, b.parquet: test 6, train 12, val 6" in out
