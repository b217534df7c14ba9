"""Checkpoints without pickle, and pretraining on small tables made here."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from matxfer.checkpoint import SafetensorsCheckpointIO
from matxfer.crystal import Crystal
from matxfer.data.packed import PackedGraphs
from matxfer.data.resident import ResidentGraphs
from matxfer.data.table import TableError
from matxfer.errors import OptionError
from matxfer.files import FormatError, read_json, read_tensors, write_json
from matxfer.graph import GraphOptions, build_graph
from matxfer.model import load_model
from matxfer.pretraining.callbacks import TrainingError
from matxfer.pretraining.config import (
    ConfigError,
    NetworkConfig,
    SourceConfig,
    TrainingConfig,
    read_config,
)
from matxfer.pretraining.module import PretrainModule
from matxfer.pretraining.run import pretrain

# -- checkpoints ------------------------------------------------------------------------------
TREE = {
    "state": {
        0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)},
        7: {"flag": torch.tensor([True, False]), "empty": torch.zeros(0, 4)},
    },
    "betas": (0.9, 0.999),
    "nested": [1, "text Å", None, True, (2, [torch.arange(3), ()])],
    "floats": [0.1 + 0.2, 1e-300, float("inf")],
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "numpy": np.float64(1.25),
    "": {},
    "view": torch.arange(12).reshape(3, 4).T,
}


def assert_same_tree(first, second):
    if isinstance(second, torch.Tensor):
        assert isinstance(first, torch.Tensor)
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(second, dict):
        assert list(first) == list(second)
        for key, value in second.items():
            assert_same_tree(first[key], value)
    elif isinstance(second, list | tuple):
        assert type(first) is type(second)
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_tree(one, other)
    else:
        assert first == second
        assert isinstance(first, type(second)) or hasattr(second, "item")


def test_checkpoint_round_trip(tmp_path):
    io, path = SafetensorsCheckpointIO(), tmp_path / "new" / "folder" / "a.ckpt"
    io.save_checkpoint(TREE, path)
    assert_same_tree(io.load_checkpoint(path), TREE)
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]  # nothing half-written is left
    io.save_checkpoint({"other": 1}, path)
    assert io.load_checkpoint(str(path)) == {"other": 1}
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)
    assert not path.exists()


def test_tied_tensors_and_training_state(tmp_path):
    """A network's and an optimiser's state as Lightning hands them over."""
    layer = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    shared = torch.ones(3)
    state = {"a": shared, "b": shared, "optimizer": optimizer.state_dict()}
    io = SafetensorsCheckpointIO()
    io.save_checkpoint(state, tmp_path / "a.ckpt")
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")
    assert_same_tree(loaded, state)
    torch.optim.AdamW(layer.parameters()).load_state_dict(loaded["optimizer"])


def test_checkpoint_holds_no_pickle(tmp_path):
    path = tmp_path / "a.ckpt"
    SafetensorsCheckpointIO().save_checkpoint(TREE, path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert "checkpoint" in header["__metadata__"]
    tensors = sum(end - start for k, v in header.items() if k != "__metadata__"
                  for start, end in [v["data_offsets"]])  # fmt: skip
    assert len(content) == 8 + length + tensors  # header and numbers, nothing else

    with pytest.raises(TypeError, match="cannot hold function"):
        SafetensorsCheckpointIO().save_checkpoint({"f": lambda: 0}, path)
    assert path.read_bytes() == content


def _junk(kind, path):
    if kind == "pickle":
        torch.save({"a": torch.ones(2)}, path)
    elif kind == "truncated":
        SafetensorsCheckpointIO().save_checkpoint(TREE, path)
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "random":
        path.write_bytes(np.random.default_rng(0).bytes(500))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "safetensors of another kind":
        save_file({"a": torch.ones(2)}, path)
    elif kind == "a tensor too few":
        tree = json.dumps({"a": {"__tensor__": "5"}})
        save_file({"0": torch.ones(2)}, path, metadata={"checkpoint": tree})
    else:
        assert kind == "missing"


@pytest.mark.parametrize(
    "kind",
    [
        *("pickle", "truncated", "random", "empty", "missing"),
        *("safetensors of another kind", "a tensor too few"),
    ],
)
def test_junk_is_refused(kind, tmp_path):
    path = tmp_path / "bad.ckpt"
    _junk(kind, path)
    with pytest.raises(FormatError, match=r"bad\.ckpt: not a readable checkpoint.*--resume"):
        SafetensorsCheckpointIO().load_checkpoint(path)


# -- tables and configurations ----------------------------------------------------------------
def make_crystals(n, seed):
    """Return n rocksalt and CsCl crystals and an energy that depends on species and distance."""
    rng = np.random.default_rng(seed)
    crystals, energy = [], []
    for _ in range(n):
        pair = rng.choice([3, 11, 12, 8, 17, 26], 2, replace=False)
        a = rng.uniform(3.0, 4.0)
        crystals.append(Crystal(a * np.eye(3), pair, [[0, 0, 0], [0.5, 0.5, 0.5]]))
        energy.append(-0.05 * pair.sum() - np.cos(2 * a))
    return crystals, np.array(energy)


def write_tables(folder):
    """Write two tables with missing labels: energies in one, some of them with gaps; gaps."""
    for name, seed, n in (("energies", 0, 60), ("gaps", 1, 30)):
        crystals, energy = make_crystals(n, seed)
        gap = np.maximum(2 + energy, 0)
        frame = pd.DataFrame(
            {
                "lattice": [c.lattice.ravel() for c in crystals],
                "numbers": [c.numbers for c in crystals],
                "frac_coords": [c.frac_coords.ravel() for c in crystals],
                "split": np.array(["train"] * 4 + ["val", "test"])[np.arange(n) % 6],
                "source": np.array(["a", "b"])[np.arange(n) % 2],
            }
        )
        if name == "energies":
            frame["formation_energy_ev_per_atom"] = np.where(np.arange(n) % 7 == 0, np.nan, energy)
        frame["band_gap_ev"] = np.where(np.arange(n) % 5 == 0, gap, np.nan if n == 60 else gap)
        frame.to_parquet(folder / f"{name}.parquet")


def base_config():
    return {
        "name": "tiny",
        "sources": [
            {
                "table": "energies.parquet",
                "targets": ["formation_energy_ev_per_atom", "band_gap_ev"],
                "split_column": "split",
            },
            {"table": "gaps.parquet", "targets": ["band_gap_ev"], "split_column": "split"},
        ],
        "graph": {"cutoff_angstrom": 4.0},
        "network": {"n_layers": 2, "node_dim": 16, "edge_dim": 8, "basis_size": 10},
        "training": {"epochs": 4, "batch_size": 16, "learning_rate": 0.01, "fisher_samples": 5},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "card": {"licence": "CC0"},
        "seed": 1,
    }


def changed(**changes):
    """Return the basic configuration with some keys replaced (``part__key`` inside a part)."""
    config = base_config()
    for key, value in changes.items():
        *part, last = key.split("__")
        (config[part[0]] if part else config)[last] = value
    return config


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_tables(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_own_cache(tmp_path_factory):
    """Sums over threads differ in their last bits; bit-for-bit comparisons need one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MATXFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


def train(tables, folder, config, **options):
    """Run a configuration given as a dictionary; return the model."""
    path = tables / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return pretrain(read_config(path), folder / "model", run_folder=folder / "run", **options)


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):
    """Return (folder, model) of the basic configuration."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(tables, folder, base_config())


def held_out():
    crystals, energy = make_crystals(10, 7)
    graphs = [build_graph(c, GraphOptions(cutoff_angstrom=4.0)) for c in crystals]
    return PackedGraphs.pack(graphs).batch(np.arange(10)), energy


def history(folder, name):
    (path,) = (folder / "run").rglob("metrics.csv")
    return pd.read_csv(path)[name].dropna().to_numpy()


# -- training ---------------------------------------------------------------------------------
def test_training_learns(tables, tmp_path):
    folder = tmp_path
    model = train(tables, folder, changed(training__epochs=25, training__fisher_samples=0))
    loss = history(folder, "train_loss")
    assert len(loss) == 25
    assert loss[-1] < 0.5 * loss[0]
    assert history(folder, "val_loss").min() < 0.6 * history(folder, "val_loss")[0]
    graphs, energy = held_out()
    predicted = model.predict_graphs(graphs)["formation_energy_ev_per_atom"]
    spread = np.abs(energy - energy.mean()).mean()
    assert np.abs(predicted - energy).mean() < 0.5 * spread
    assert not (folder / "model" / "fisher.safetensors").exists()
    with pytest.raises(FormatError, match=r"comes without fisher\.safetensors; compute it"):
        load_model(folder / "model").fisher()


def test_saved_model_predicts_the_same(trained):
    folder, model = trained
    loaded = load_model(folder / "model")
    graphs, _ = held_out()
    ours, theirs = model.predict_graphs(graphs), loaded.predict_graphs(graphs)
    assert list(ours) == list(theirs) == ["formation_energy_ev_per_atom", "band_gap_ev"]
    for name in ours:
        assert np.array_equal(ours[name], theirs[name])
    assert (theirs["band_gap_ev"] >= 0).all()
    assert loaded.elements == {3, 11, 12, 8, 17, 26}
    assert loaded.backbone.graph_options == GraphOptions(cutoff_angstrom=4.0)
    assert not any(p.requires_grad for p in loaded.parameters())
    card = loaded.card
    assert card["licence"] == "CC0"
    assert card["name"] == "model"
    assert card["data"][0]["rows"] == {"test": 10, "train": 40, "val": 10}
    # Only rows with a label count.
    figures = card["figures"]
    assert figures["formation_energy_ev_per_atom"]["test"]["n"] == 9
    assert figures["band_gap_ev"]["test"]["unit"] == "eV"
    fisher = loaded.fisher()
    assert {key.split("/")[0] for key in fisher} == set(ours)
    assert all((value >= 0).all() for value in fisher.values())
    assert sum(float(value.sum()) for value in fisher.values()) > 0


def test_best_epoch_is_kept(trained):
    """The saved model is the one of the lowest validation loss, here recomputed from its card."""
    folder, _ = trained
    card = load_model(folder / "model").card
    best = history(folder, "val_loss").argmin()
    for name in ("formation_energy_ev_per_atom", "band_gap_ev"):
        logged = history(folder, f"val_mae/{name}")[best]
        # Clipping gaps at zero can only bring them closer to the truth.
        measured = card["figures"][name]["val"]["mae"]
        assert measured <= logged * (1 + 1e-4)
        if name != "band_gap_ev":
            assert measured == pytest.approx(logged, rel=1e-4)


def test_same_run_twice_is_bit_for_bit_the_same(trained, tables, tmp_path):
    folder, _ = trained
    train(tables, tmp_path, base_config())
    assert_same_weights(folder, tmp_path)


def assert_same_weights(first, second):
    one, other = (read_tensors(f / "model" / "model.safetensors") for f in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_resumed_equals_uninterrupted(trained, tables, tmp_path, repository):
    """A process killed in the middle of its third epoch; resumed here; the same to the last bit."""
    (tables / "config.yaml").write_text(yaml.safe_dump(base_config()))
    script = textwrap.dedent(
        """
        import os
        import signal
        import sys

        import torch

        from matxfer.pretraining.module import PretrainModule
        from matxfer.pretraining.run import pretrain
        from matxfer.pretraining.config import read_config

        torch.set_num_threads(1)
        step = PretrainModule.training_step

        def killed(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == (2, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch, batch_idx)

        PretrainModule.training_step = killed
        pretrain(read_config(sys.argv[1]), sys.argv[2] + "/model", run_folder=sys.argv[2] + "/run")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tables / "config.yaml"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "run" / "last.ckpt").is_file()
    assert not (tmp_path / "model").exists()
    state = SafetensorsCheckpointIO().load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert state["epoch"] == 1  # epochs 0 and 1 are done
    train(tables, tmp_path, base_config(), resume=True)
    # A run that began anew would end with the same weights: look at the epochs it went through.
    logs = sorted((tmp_path / "run").rglob("metrics.csv"), key=lambda p: p.stat().st_mtime_ns)
    assert set(pd.read_csv(logs[-1])["epoch"]) == {2, 3}
    assert_same_weights(trained[0], tmp_path)
    fisher = [read_tensors(f / "model" / "fisher.safetensors") for f in (trained[0], tmp_path)]
    assert all(torch.equal(fisher[0][k], fisher[1][k]) for k in fisher[0])


def test_resume_without_a_checkpoint_starts_and_without_resume_starts_again(
    trained, tables, tmp_path
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"of another time")
    with pytest.raises(FormatError, match=r"last\.ckpt: not a readable checkpoint"):
        train(tables, tmp_path, base_config(), resume=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(tables, tmp_path, base_config())
    assert_same_weights(trained[0], tmp_path)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    train(tables, other, base_config(), resume=True)
    assert_same_weights(trained[0], other)


CHANGES = {
    "task weights": {"training__task_weights": {"band_gap_ev": 0.1}},
    "seed": {"seed": 2},
    "cutoff": {"graph": {"cutoff_angstrom": 3.4}},
    "clip norm": {"training__clip_norm": 0.05},
    "loss": {"training__loss": "huber"},
    "squared loss": {"training__loss": "mse"},
    "average": {"training__ema_decay": 0.9},
    "angles": {"network__angular_dim": 2},
    "readout": {"network__readouts": {"band_gap_ev": "attention"}},
    "schedule": {"training__schedule": "trapezoid"},
    "sum": {"network__readouts": {"band_gap_ev": "sum"}},
    "extrema": {"network__readouts": {"band_gap_ev": "extrema"}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_options_change_the_result(change, trained, tables, tmp_path):
    config = changed(**CHANGES[change], training__fisher_samples=0)
    train(tables, tmp_path, config)
    with pytest.raises(AssertionError):
        assert_same_weights(trained[0], tmp_path)


def test_where_reads_some_rows_only(trained, tables, tmp_path):
    config = changed(training__epochs=1, training__fisher_samples=0)
    config["sources"][0]["where"] = {"source": ["a"]}
    model = train(tables, tmp_path, config)
    whole = trained[1].card["data"][0]["rows"]
    assert sum(model.card["data"][0]["rows"].values()) == 0.5 * sum(whole.values())
    assert model.card["data"][0]["where"] == {"source": ["a"]}
    config["sources"][0]["where"] = {"source": ["c"]}
    with pytest.raises(TableError, match=r"no row has 'c' in column 'source' to learn from"):
        train(tables, tmp_path / "b", config)


def test_patience_stops_early(tables, tmp_path):
    """With a rate that overshoots, the loss does not go on falling for 30 epochs."""
    options = {
        "training__learning_rate": 0.5,
        "training__epochs": 30,
        "training__fisher_samples": 0,
    }
    train(tables, tmp_path, changed(**options, training__patience=2))
    loss = history(tmp_path, "val_loss")
    assert len(loss) < 30
    assert len(loss) == loss.argmin() + 3


def test_report_only_leaves_rows_out(trained, tables, tmp_path):
    config = changed(training__epochs=1, training__fisher_samples=0)
    config["sources"][0]["report_only"] = {"source": ["a"]}
    model = train(tables, tmp_path, config)
    figure = model.card["figures"]["formation_energy_ev_per_atom"]
    full = trained[1].card["figures"]["formation_energy_ev_per_atom"]
    assert 0 < figure["val"]["n"] + figure["test"]["n"] < full["val"]["n"] + full["test"]["n"]
    assert model.card["data"][0]["rows"]["unused"] == 10
    assert model.card["data"][0]["rows"]["train"] == 40  # training rows stay


def test_row_weights_change_the_result(trained, tables, tmp_path):
    config = changed(training__fisher_samples=0)
    config["sources"][0]["row_weights"] = {"source": {"b": 0.1}}
    model = train(tables, tmp_path, config)
    with pytest.raises(AssertionError):
        assert_same_weights(trained[0], tmp_path)
    assert model.card["data"][0]["row_weights"] == {"source": {"b": 0.1}}
    # Weights that are equal for all are no weights.
    config["sources"][0]["row_weights"] = {"source": {"a": 1.0, "b": 1.0}}
    train(tables, tmp_path / "equal", config)
    assert_same_weights(trained[0], tmp_path / "equal")


def denoising_config(**changes):
    config = changed(training__fisher_samples=0, **changes)
    config["sources"].append({"table": "energies.parquet", "denoise_angstrom": 0.1})
    return config


def test_denoising_is_learnt_and_repeats_itself(tables, tmp_path):
    train(tables, tmp_path / "a", denoising_config(training__epochs=12))
    loss = history(tmp_path / "a", "train_denoise")
    assert loss[-1] < 0.75 * loss[0]
    train(tables, tmp_path / "b", denoising_config(training__epochs=12))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    train(tables, tmp_path / "c", denoising_config(training__denoise_weight=0.0))
    train(tables, tmp_path / "d", denoising_config())
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "c", tmp_path / "d")


def test_denoising_resumes_exactly(tables, tmp_path, monkeypatch):
    train(tables, tmp_path / "a", denoising_config())

    class KilledError(RuntimeError):
        pass

    step = PretrainModule.training_step

    def stop_in_epoch_2(self, batch, batch_idx):
        if self.current_epoch == 2:
            raise KilledError
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", stop_in_epoch_2)
    with pytest.raises(KilledError):
        train(tables, tmp_path / "b", denoising_config())
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = train(tables, tmp_path / "b", denoising_config(), resume=True)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    rows = pd.read_csv(tmp_path / "b" / "run" / "learning_curves.csv")
    assert rows.epoch.tolist() == [0, 1, 2, 3]
    assert model.card["training_device"] == "CPU, 1 threads"
    assert model.card["training_seconds"] > 0


def test_excluded_materials_are_not_trained_on(trained, tables, tmp_path):
    other = tables / "kept_out.parquet"
    pd.read_parquet(tables / "energies.parquet").iloc[:6].to_parquet(other)
    config = changed(training__fisher_samples=0)
    config["exclude"] = [{"table": other.name}]
    model = train(tables, tmp_path, config)
    rows = model.card["data"][0]["rows"]
    assert rows["excluded"] >= 5  # the sixth of each six rows is a test row, and stays
    assert rows["train"] < trained[1].card["data"][0]["rows"]["train"]
    assert rows["test"] == trained[1].card["data"][0]["rows"]["test"]
    with pytest.raises(AssertionError):
        assert_same_weights(trained[0], tmp_path)


def test_resident_graphs_make_the_same_batches():
    crystals, _ = make_crystals(12, 3)
    pack = PackedGraphs.pack([build_graph(c, GraphOptions()) for c in crystals] + [None])
    rows = np.array([7, 0, 12, 3, 3])
    here = pack.batch(rows)
    there = ResidentGraphs(pack, torch.device("cpu")).batch(rows)
    for name in ("z", "multiplicity", "edge_index", "edge_vector", "batch"):
        one, other = getattr(here, name), getattr(there, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert here.num_graphs == there.num_graphs
    assert not ResidentGraphs.fits(pack, torch.device("cpu"))


def test_learning_curves(trained):
    rows = pd.read_csv(trained[0] / "run" / "learning_curves.csv")
    assert rows.epoch.tolist() == [0, 1, 2, 3]
    assert {"train_loss", "val_loss", "learning_rate", "seconds"} < set(rows)
    assert np.allclose(rows.val_loss, history(trained[0], "val_loss"))
    assert np.allclose(rows.train_loss, history(trained[0], "train_loss"), rtol=0.05)
    assert "val_mae_formation_energy_ev_per_atom" in rows
    image = (trained[0] / "run" / "learning_curves.png").read_bytes()
    assert image.startswith(b"\x89PNG")


def test_a_loss_that_is_not_a_number_stops_the_run(tables, tmp_path, monkeypatch):
    step = PretrainModule.training_step

    def broken(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        if self.current_epoch == 1:
            self.last_losses[1] = float("nan")
            return loss * float("nan")
        return loss

    monkeypatch.setattr(PretrainModule, "training_step", broken)
    pattern = (
        r"the loss of band_gap_ev is nan in epoch 1, step 0; .*last\.ckpt\. Lower learning_rate"
    )
    with pytest.raises(TrainingError, match=pattern):
        train(tables, tmp_path, base_config())
    assert (tmp_path / "run" / "last.ckpt").exists()


def test_resuming_another_configuration_is_refused(tables, tmp_path):
    train(tables, tmp_path, changed(training__epochs=1, training__fisher_samples=0))
    for key, value in (("training__epochs", 2), ("network__node_dim", 24), ("seed", 9)):
        other = changed(**{"training__epochs": 1, "training__fisher_samples": 0} | {key: value})
        with pytest.raises(TrainingError, match=f"{key.replace('__', '.')} = .* now says {value}"):
            train(tables, tmp_path, other, resume=True)
    # A finished run only writes its model again.
    finished = changed(training__epochs=1, training__fisher_samples=3)
    model = train(tables, tmp_path, finished, resume=True)
    assert model.card["fisher"]["samples"] == 3


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        (2.5, r"energies\.parquet: every value of column 'constant_ev' .* is 2\.5"),
        (np.nan, r"no value"),
    ],
)
def test_columns_that_teach_nothing(values, pattern, tables, tmp_path):
    frame = pd.read_parquet(tables / "energies.parquet")
    frame["constant_ev"] = np.where(frame.split == "train", values, 1.0)
    folder = tmp_path / "tables"
    folder.mkdir()
    frame.to_parquet(folder / "energies.parquet")
    config = base_config()
    config["sources"] = [config["sources"][0] | {"targets": ["constant_ev"]}]
    with pytest.raises(TableError, match=pattern):
        train(folder, tmp_path, config)


@pytest.mark.parametrize(
    ("trainer", "pattern"),
    [
        ({"acceleratr": "cpu"}, "acceleratr"),
        ({"precision": "12-false"}, "12-false"),
        ({"logger": "Papyrus"}, "'logger' in trainer is 'Papyrus'"),
    ],
)
def test_trainer_options_that_lightning_refuses(trainer, pattern, tables, tmp_path):
    with pytest.raises(ConfigError, match=pattern):
        train(tables, tmp_path, changed(trainer=trainer))


# -- configurations that cannot be used -------------------------------------------------------
def read(folder, config):
    path = folder / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return read_config(path)


def test_a_good_configuration_is_read(tmp_path):
    config = read(tmp_path, base_config())
    assert config.folder == tmp_path
    assert config.graph == GraphOptions(cutoff_angstrom=4.0)
    assert config.training.learning_rate == 0.01
    assert config.training.weight_decay == 0.01  # a default
    assert [source.table for source in config.sources] == ["energies.parquet", "gaps.parquet"]
    assert dataclasses.is_dataclass(config)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"epochs": 3}, "unknown key 'epochs'"),
        ({"training__epoch": 3}, "unknown key 'epoch' in training; known are .*'epochs'"),
        ({"network__layers": 3}, "unknown key 'layers' in network"),
        ({"graph__cutoff": 3}, "unknown key 'cutoff' in graph"),
        ({"sources": [{"table": "a.csv", "target": ["x"]}]}, "unknown key 'target' in sources"),
        ({"sources": [{"targets": ["x"]}]}, "sources: .*'table'"),
        ({"sources": "a.csv"}, "'sources' is 'a.csv', not a list of tables"),
        ({"exclude": {"table": "a.csv"}}, "'exclude' is .*, not a list of tables"),
        ({"sources": []}, "'sources' is missing"),
        ({"network": 3}, "network: expected keys and values, found 3"),
        ({"training__learning_rate": "1e-3"}, r"'learning_rate' in training is '1e-3'.*1\.0e-3"),
        ({"training__epochs": "ten"}, "'epochs' in training is 'ten', not a whole number"),
        ({"training__batch_size": True}, "'batch_size' in training is True"),
        ({"seed": "abc"}, "'seed' in the top is 'abc'"),
        ({"training__epochs": 2.5}, "'epochs' in training is 2.5, not a whole number"),
        ({"sources": [{"table": "a.csv", "targets": "x_ev"}]}, r"'targets' .*not a list.*\[x_ev\]"),
        ({"training__task_weights": {"band_gap": 2}}, "'band_gap' in task_weights is not a target"),
    ],
    ids=str,
)
def test_configuration_errors_name_file_and_key(change, pattern, tmp_path):
    with pytest.raises(ConfigError, match=pattern) as caught:
        read(tmp_path, changed(**change))
    assert str(tmp_path / "config.yaml") in str(caught.value)


#: Values that make no sense, and what the message says that they must be.
NONSENSE = [
    *(({f"training__{key}": 0}, key, "must be at least 1") for key in ("epochs", "batch_size")),
    ({"training__epochs": None}, "epochs", "not a whole number"),
    ({"training__patience": 0}, "patience", "must be at least 1"),
    ({"training__patience": "soon"}, "patience", "not a whole number or null"),
    ({"training__learning_rate": math.nan}, "learning_rate", "must be positive"),
    ({"training__learning_rate": 0}, "learning_rate", "must be positive"),
    ({"training__learning_rate": math.inf}, "learning_rate", "must be positive"),
    ({"training__weight_decay": -0.1}, "weight_decay", "must not be negative"),
    ({"training__clip_norm": -1}, "clip_norm", "must not be negative"),
    ({"training__warmup_fraction": 1.0}, "warmup_fraction", r"must be in \[0, 1\)"),
    ({"training__ema_decay": 1}, "ema_decay", r"must be in \[0, 1\)"),
    ({"training__loss": "mape"}, "loss", r"must be one of .*'huber', 'mae', 'mse'"),
    ({"training__schedule": "linear"}, "schedule", r"must be one of .*'cosine', 'trapezoid'"),
    ({"training__force_weight": math.inf}, "force_weight", "must not be negative"),
    ({"training__fisher_samples": -1}, "fisher_samples", "must not be negative"),
    ({"training__denoise_weight": -1.0}, "denoise_weight", "must not be negative"),
    ({"training__task_weights": {"band_gap_ev": -1}}, "task_weights", "must not be negative"),
    ({"training__task_weights": {"band_gap_ev": "half"}}, "task_weights", "each with a number"),
    ({"training__task_weights": 1.0}, "task_weights", "not names, each with a number"),
    (
        {
            "training__task_weights": {
                "band_gap_ev": 0,
                "formation_energy_ev_per_atom": 0.0,
            }
        },
        "task_weights",
        "are all 0",
    ),
    *(
        ({f"network__{key}": 0}, key, "must be at least [12]")
        for key in ("n_layers", "node_dim", "edge_dim", "basis_size")
    ),
    ({"network__angular_dim": -1}, "angular_dim", "must not be negative"),
    ({"network__n_layers": True}, "n_layers", "not a whole number"),
    ({"network__readouts": {"band_gap_ev": "best"}}, "band_gap_ev", "must be one of"),
    ({"network__readouts": {"gap": "pooled"}}, "gap", "is not a target"),
    ({"network__readouts": ["pooled"]}, "readouts", "not names, each with text"),
    ({"network__kind": 3}, "kind", "not text"),
    ({"network__options": {"width": 3}}, "options", "those of another 'kind'"),
    ({"graph__cutoff_angstrom": 0}, "cutoff_angstrom", "must be positive"),
    ({"graph__cutoff_angstrom": math.nan}, "cutoff_angstrom", "must be positive"),
    ({"graph__symprec_angstrom": -1e-4}, "symprec_angstrom", "must be positive"),
    ({"graph__symmetry": "maybe"}, "symmetry", "not true or false"),
    ({"seed": -1}, "seed", r"must be in \[0, 4294967295\]"),
    ({"seed": 2**32}, "seed", r"must be in \[0, 4294967295\]"),
    ({"name": 3}, "name", r"not text \(put it in quotes\)"),
    ({"name": ""}, "name", "must be a file name"),
    ({"name": "../other"}, "name", "must be a file name"),
    ({"trainer": "gpu"}, "trainer", "not keys and values"),
    ({"card": ["CC0"]}, "card", "not keys and values"),
    ({"exclude": [{"table": 5}]}, "table", "not text"),
    ({"exclude": [{"table": "a.csv", "id_column": None}]}, "id_column", "not text"),
]
#: The same of a source that is right otherwise.
NONSENSE_OF_A_SOURCE = [
    ({"table": None}, "table", "not text"),
    ({"targets": [3]}, "targets", "not a list of text"),
    ({"targets": []}, "targets", "give 'targets', 'forces', or"),
    ({"denoise_angstrom": -0.1}, "denoise_angstrom", "must not be negative"),
    ({"denoise_angstrom": 0.1}, "denoise_angstrom", "and one of them only"),
    ({"forces": ["fx", "fy"]}, "forces", "not text or null"),
    ({"max_force_ev_per_a": -1}, "max_force_ev_per_a", "must be positive"),
    ({"max_sites": 0}, "max_sites", "must be at least 1"),
    ({"max_sites": 2.5}, "max_sites", "not a whole number or null"),
    ({"split_column": ["split"]}, "split_column", "not text or null"),
    ({"where": {"source": "a"}}, "where", r"each with a list \(write \{name: \[value\]\}\)"),
    ({"report_only": {"source": "a"}}, "report_only", "each with a list"),
    ({"row_weights": {"source": 0.5}}, "row_weights", "each with names, each with a number"),
    ({"row_weights": {"source": {"a": -1}}}, "row_weights", "must not be negative"),
    ({"row_weights": {"source": {2018: math.nan}}}, "row_weights", "must not be negative"),
]


def check_nonsense(config, key, words, tmp_path):
    with pytest.raises(ConfigError, match=words) as caught:
        read(tmp_path, config)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.yaml'}: ")
    assert key in message


@pytest.mark.parametrize(("change", "key", "words"), NONSENSE, ids=str)
def test_nonsense_is_refused(change, key, words, tmp_path):
    check_nonsense(changed(**change), key, words, tmp_path)


@pytest.mark.parametrize(("change", "key", "words"), NONSENSE_OF_A_SOURCE, ids=str)
def test_nonsense_of_a_source_is_refused(change, key, words, tmp_path):
    source = {"table": "gaps.parquet", "targets": ["band_gap_ev"]} | change
    check_nonsense(changed(sources=[base_config()["sources"][0], source]), key, words, tmp_path)


def test_every_option_is_checked():
    """Whatever a class of the configuration has, something wrong of it was tried above."""
    tried = {key.rpartition("__")[2] for change, _, _ in NONSENSE for key in change}
    for cls in (GraphOptions, NetworkConfig, TrainingConfig):
        assert {f.name for f in dataclasses.fields(cls)} <= tried
    tried = {key for change, _, _ in NONSENSE_OF_A_SOURCE for key in change}
    assert {f.name for f in dataclasses.fields(SourceConfig)} <= tried


def test_edges_of_the_ranges_are_allowed(tmp_path):
    config = changed(
        training__clip_norm=0,
        training__weight_decay=0,
        training__warmup_fraction=0.0,
        training__patience=1,
        training__denoise_weight=0,
        training__task_weights={"band_gap_ev": 0},
        network=None,  # a section with nothing in it
        seed=2**32 - 1,
        exclude=None,
    )
    config["sources"][0]["row_weights"] = {"source": {2018: 0}}
    config["sources"][0]["max_sites"] = None
    read_back = read(tmp_path, config)
    assert read_back.network == NetworkConfig()
    assert read_back.training.patience == 1
    # What is built in Python is checked as well.
    with pytest.raises(OptionError, match="'batch_size' in training is 0, but must be at least 1"):
        dataclasses.replace(read_back.training, batch_size=0)
    assert dataclasses.replace(read_back.training, batch_size=np.int64(8)).batch_size == 8


def test_unreadable_configurations(tmp_path):
    for text in ("a: [1, 2", "- a\n- b", "", "just text"):
        with pytest.raises(ConfigError, match=r"config\.yaml: "):
            read(tmp_path, text)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: not readable"):
        read_config(tmp_path / "nowhere.yaml")
    config = base_config()
    del config["name"]
    with pytest.raises(ConfigError, match=r"config\.yaml: the top: .*'name'"):
        read(tmp_path, config)


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ({"table": "lost.parquet", "targets": ["x"]}, r"lost\.parquet.*no such file"),
        ({"table": "gaps.parquet", "targets": ["x_ev"]}, "no column 'x_ev'; the columns are"),
        ({"table": "gaps.parquet", "targets": ["source"]}, "'source' is 'a', which is not a num"),
        (
            {"table": "gaps.parquet", "targets": ["band_gap_ev"], "split_column": "fold"},
            "no column 'fold'",
        ),
        (
            {"table": "gaps.parquet", "targets": ["band_gap_ev"], "split_column": "source"},
            "'source' holds none of",
        ),
        (
            {
                "table": "gaps.parquet",
                "targets": ["band_gap_ev"],
                "report_only": {"origin": ["a"]},
            },
            "no column 'origin'",
        ),
    ],
    ids=str,
)
def test_table_errors_name_the_table(source, pattern, tables, tmp_path):
    with pytest.raises(ValueError, match=pattern) as caught:
        train(tables, tmp_path, changed(sources=[source]))
    assert source["table"] in str(caught.value)


def test_no_training_rows(tables, tmp_path):
    frame = pd.read_parquet(tables / "gaps.parquet")
    frame["split"] = "test"
    frame.to_parquet(tables / "only_test.parquet")
    source = {"table": "only_test.parquet", "targets": ["band_gap_ev"], "split_column": "split"}
    with pytest.raises(TableError, match="no training row is usable"):
        train(tables, tmp_path, changed(sources=[source]))


# -- damaged models ---------------------------------------------------------------------------
@pytest.fixture
def copied(trained, tmp_path):
    folder = tmp_path / "copy"
    trained[1].save(folder)
    assert load_model(folder).name == "copy"
    return folder


def _edit_card(folder, **changes):
    write_json(folder / "card.json", read_json(folder / "card.json") | changes)


def _flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-50])


BROKEN = {
    "flipped bit": (_flip_a_bit, r"model\.safetensors: the checksum differs.*fetch"),
    "truncated weights": (lambda f: _cut(f / "model.safetensors"), r"model\.safetensors: the chec"),
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "truncated card": (lambda f: _cut(f / "card.json"), r"card\.json: not readable as JSON"),
    "list for a card": (lambda f: (f / "card.json").write_text("[1]"), "expected a JSON object"),
    "missing card": (lambda f: (f / "card.json").unlink(), "no model .*give the folder"),
    "other format": (lambda f: _edit_card(f, format=99), r"card\.json: format 99.*install"),
    "no format": (lambda f: _edit_card(f, format=None), r"card\.json: format None"),
    "no heads": (lambda f: _edit_card(f, heads=[]), r"card\.json: card and weights disagree"),
    "other architecture": (
        lambda f: _edit_card(f, architecture={"kind": "unheard of"}),
        "no installed package declares a backbone 'unheard of'",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_damaged_models_are_refused(damage, copied):
    break_it, pattern = BROKEN[damage]
    break_it(copied)
    with pytest.raises(FormatError, match=pattern) as caught:
        load_model(copied)
    assert str(copied) in str(caught.value)


def test_an_interrupted_save_leaves_the_old_weights(copied, monkeypatch):
    model = load_model(copied)

    def dies(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", dies)
    with pytest.raises(OSError, match="disk full"):
        model.save(copied)
    monkeypatch.undo()
    assert load_model(copied).checksum == model.checksum
