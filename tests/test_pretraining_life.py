"""The life of a pretraining run: killed, resumed, moved, refused, diverging, drawn."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from types import SimpleNamespace

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch.optim.optimizer import register_optimizer_step_post_hook

import matxfer.pretraining.run as run_module
from matxfer.checkpoint import SafetensorsCheckpointIO
from matxfer.data.properties import property_of
from matxfer.data.table import TableError
from matxfer.files import read_json, read_tensors
from matxfer.pretraining.callbacks import (
    STEPS_BETWEEN_LOOKS,
    FiniteLoss,
    RunRecord,
    TrainingError,
    draw_learning_curves,
    error_column,
)
from matxfer.pretraining.config import ConfigError, read_config
from matxfer.pretraining.module import PretrainModule
from matxfer.pretraining.resume import is_finished
from matxfer.pretraining.run import pretrain

ENERGY, MODULUS = "formation_energy_ev_per_atom", "bulk_modulus_vrh_gpa"
H100 = "NVIDIA H100 80GB HBM3"
HERE = "CPU, 1 threads"


def base_config(**changes):
    """Return a small configuration, ``part__key`` replaced inside a part."""
    config = {
        "name": "tiny",
        "sources": [
            {"table": "crystals.parquet", "targets": [ENERGY, MODULUS], "split_column": "split"}
        ],
        "graph": {"cutoff_angstrom": 4.0},
        "network": {"n_layers": 2, "node_dim": 16, "edge_dim": 8, "basis_size": 10},
        "training": {"epochs": 4, "batch_size": 8, "learning_rate": 0.01, "fisher_samples": 0},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "seed": 1,
    }
    for key, value in changes.items():
        *part, last = key.split("__")
        (config[part[0]] if part else config)[last] = value
    return config


@pytest.fixture
def folder(crystal_table, tmp_path):
    """Return a folder with the table in it."""
    shutil.copy(crystal_table, tmp_path / "crystals.parquet")
    return tmp_path


def write_config(folder, config):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(folder, name="a", config=None, **options):
    """Train with run folder and model in ``folder/name``; return the model."""
    path = write_config(folder, config or base_config())
    where = folder / name
    return pretrain(read_config(path), where / "model", run_folder=where / "run", **options)


def command(folder, name, *words):
    """Start ``matxfer pretrain`` in a process of its own, on one thread."""
    where = folder / name
    script = folder / "command.py"  # a file, which the processes of a distributed run start again
    script.write_text("from matxfer.cli import main\n\nmain()\n")
    return subprocess.Popen(
        [sys.executable, str(script), "pretrain",
         str(folder / "config.yaml"), "-o", str(where / "model"),
         "--run-folder", str(where / "run"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip


def weights(folder, name):
    return read_tensors(folder / name / "model" / "model.safetensors")


def assert_same_weights(folder, one, other):
    first, second = weights(folder, one), weights(folder, other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def curves(folder, name):
    return pd.read_csv(folder / name / "run" / "learning_curves.csv")


def assert_same_curves(folder, one, other):
    first, second = curves(folder, one), curves(folder, other)
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"))
    assert (first.seconds > 0).all()


def checkpoint(folder, name):
    return SafetensorsCheckpointIO().load_checkpoint(folder / name / "run" / "last.ckpt")


class InterruptedHereError(RuntimeError):
    """Stands for whatever ends a process."""


def interrupt(monkeypatch, epoch, batch=0):
    """Let training end with an error at a step, until the patch is undone."""
    step = PretrainModule.training_step

    def stopping(self, labelled, batch_idx):
        if (self.current_epoch, batch_idx) == (epoch, batch):
            raise InterruptedHereError
        return step(self, labelled, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", stopping)


def train_until(monkeypatch, folder, name, epoch, config=None):
    with monkeypatch.context() as patch:
        interrupt(patch, epoch)
        with pytest.raises(InterruptedHereError):
            train(folder, name, config)


# -- killed and resumed -----------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_from_outside(folder):
    """The command, killed at a moment that nobody chose, and given again with --resume."""
    config = base_config(training__epochs=30)
    write_config(folder, config)
    whole = command(folder, "whole")
    assert whole.wait(timeout=120) == 0, whole.stderr.read()
    killed = command(folder, "killed")
    last = folder / "killed" / "run" / "last.ckpt"
    while not last.exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL  # and not finished before
    assert not (folder / "killed" / "model").exists()
    done = checkpoint(folder, "killed")["epoch"] + 1
    assert 0 < done < 30
    resumed = command(folder, "killed", "--resume")
    out, err = resumed.communicate(timeout=120)
    assert (resumed.returncode, err) == (0, "")
    assert "written" in out
    assert_same_weights(folder, "whole", "killed")
    assert_same_curves(folder, "whole", "killed")
    assert curves(folder, "killed").epoch.tolist() == list(range(30))
    # The second process went on and did not start again: its own log holds the rest only.
    logs = sorted((folder / "killed" / "run").rglob("metrics.csv"), key=os.path.getmtime)
    assert pd.read_csv(logs[-1])["epoch"].min() == done


#: Where a process dies, as patches that kill it in epoch 2.
MOMENTS = {
    "in the middle of an epoch": """
        step = PretrainModule.training_step
        def training_step(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == (2, 3):
                die()
            return step(self, batch, batch_idx)
        PretrainModule.training_step = training_step
    """,
    "a checkpoint half written": """
        def save_file(tensors, path, metadata):
            real_save(tensors, path, metadata)
            if path.name == ".last.ckpt.part" and '"epoch": 2' in metadata["checkpoint"]:
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                die()
        matxfer.checkpoint.save_file = save_file
    """,
    "between best and last": """
        def save_file(tensors, path, metadata):
            if path.name == ".last.ckpt.part" and '"epoch": 2' in metadata["checkpoint"]:
                die()
            real_save(tensors, path, metadata)
        matxfer.checkpoint.save_file = save_file
    """,
    "a row written and no checkpoint": """
        end = MovableCheckpoint.on_train_epoch_end
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 2:
                die()
            end(self, trainer, module)
        MovableCheckpoint.on_train_epoch_end = on_train_epoch_end
    """,
}
KILLED = """
import os, signal, sys
import torch
import matxfer.checkpoint
from matxfer.pretraining.callbacks import MovableCheckpoint
from matxfer.pretraining.config import read_config
from matxfer.pretraining.module import PretrainModule
from matxfer.pretraining.run import pretrain

torch.set_num_threads(1)
real_save = matxfer.checkpoint.save_file

def die():
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
pretrain(read_config(sys.argv[1]), sys.argv[2] + "/model", run_folder=sys.argv[2] + "/run")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_the_worst_moments(moment, folder, repository):
    train(folder, "whole")
    script = KILLED.format(patch=textwrap.dedent(MOMENTS[moment]))
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "config.yaml"), str(folder / "killed")],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoint(folder, "killed")["epoch"] == 1
    run_folder = folder / "killed" / "run"
    part = run_folder / ".last.ckpt.part"
    assert part.exists() == (moment == "a checkpoint half written")
    rows = curves(folder, "killed").epoch.tolist()
    assert rows == ([0, 1] if moment == "in the middle of an epoch" else [0, 1, 2])
    if moment == "between best and last":
        (run_folder / "learning_curves.csv").unlink()  # nor does a lost table lose epochs
    train(folder, "killed", resume=True)
    assert_same_weights(folder, "whole", "killed")
    assert_same_curves(folder, "whole", "killed")
    assert not list(run_folder.glob(".*"))


def test_ctrl_c_says_how_to_go_on(folder):
    write_config(folder, base_config(training__epochs=30))
    stopped = command(folder, "a")
    last = folder / "a" / "run" / "last.ckpt"
    while not last.exists():
        assert stopped.poll() is None, stopped.stderr.read()
        time.sleep(0.005)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert err.strip() == (
        "interrupted; the same command with --resume goes on after the last whole epoch"
    )
    assert not (folder / "a" / "model").exists()
    done = checkpoint(folder, "a")["epoch"] + 1
    assert 0 < done < 30
    model = train(folder, "a", base_config(training__epochs=30), resume=True)
    assert "figures" in model.card
    assert curves(folder, "a").epoch.tolist() == list(range(30))


def test_a_run_folder_has_one_run_at_a_time(folder, monkeypatch):
    write_config(folder, base_config(training__epochs=1000))
    first = command(folder, "a")
    try:
        last = folder / "a" / "run" / "last.ckpt"
        while not last.exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.005)
        with monkeypatch.context() as patch:
            patch.setattr(run_module, "load_sources", lambda *_: pytest.fail("read the tables"))
            with pytest.raises(TrainingError, match="another run is at work in this folder") as e:
                train(folder, "a", base_config(training__epochs=1000))
        assert str(folder / "a" / "run") in str(e.value)
        assert last.exists()
        train(folder, "b", base_config(training__epochs=1))  # another folder is free
    finally:
        first.kill()
        first.wait()
    train(folder, "a", base_config(training__epochs=1))  # a killed run holds nothing


def rising_loss(monkeypatch):
    """Make the first epoch the best one, whatever is learnt."""

    def on_validation_epoch_end(self):
        for name in self.model.heads:
            self.log(f"val_mae/{name}", 1.0)
        self.log("val_loss", float(1 + self.current_epoch))

    monkeypatch.setattr(PretrainModule, "on_validation_epoch_end", on_validation_epoch_end)


def test_a_moved_run_knows_its_best_epoch(folder, monkeypatch):
    rising_loss(monkeypatch)
    train(folder, "whole")
    train_until(monkeypatch, folder, "before", 2)
    (folder / "before").rename(folder / "after")
    train(folder, "after", resume=True)
    assert not (folder / "before").exists()
    assert_same_weights(folder, "whole", "after")
    best = SafetensorsCheckpointIO().load_checkpoint(folder / "after" / "run" / "best.ckpt")
    assert best["epoch"] == 0


def test_the_last_epoch_is_kept_even_if_it_is_not_the_best(folder, monkeypatch):
    rising_loss(monkeypatch)
    train_until(monkeypatch, folder, "a", 3)
    assert checkpoint(folder, "a")["epoch"] == 2


def test_resuming_without_the_best_epoch_is_refused(folder, monkeypatch):
    train_until(monkeypatch, folder, "a", 1)
    (folder / "a" / "run" / "best.ckpt").unlink()
    with pytest.raises(TrainingError, match=r"best\.ckpt: there is no such file.*copy both"):
        train(folder, "a", resume=True)


@pytest.mark.parametrize("patience", [None, 1])
def test_a_finished_run_is_only_written_again(patience, folder, monkeypatch):
    rising_loss(monkeypatch)
    config = base_config(training__patience=patience)
    train(folder, "a", config)
    assert is_finished(checkpoint(folder, "a"), 4)
    before, epochs = weights(folder, "a"), curves(folder, "a").epoch.tolist()
    assert epochs == ([0, 1, 2, 3] if patience is None else [0, 1])
    card = read_json(folder / "a" / "model" / "card.json")
    shutil.rmtree(folder / "a" / "model")
    half_written = folder / "a" / "run" / ".best.ckpt.part"
    half_written.write_bytes(b"of a process that was killed")
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    config["training"]["fisher_samples"] = 3  # of no weight
    config["card"] = {"licence": "CC0"}
    train(folder, "a", config, resume=True)
    after = weights(folder, "a")
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert (folder / "a" / "model" / "fisher.safetensors").exists()
    again = read_json(folder / "a" / "model" / "card.json")
    assert again["licence"] == "CC0"
    for key in ("figures", "training_seconds", "training_device"):
        assert again[key] == card[key]
    assert curves(folder, "a").epoch.tolist() == epochs
    assert not half_written.exists()


def test_an_unfinished_run_is_not_finished(folder, monkeypatch):
    config = base_config(training__patience=3)
    train_until(monkeypatch, folder, "a", 2, config)
    assert not is_finished(checkpoint(folder, "a"), 4)
    assert is_finished(checkpoint(folder, "a"), 2)


def test_resume_with_nothing_to_resume_says_so(folder):
    write_config(folder, base_config(training__epochs=1))
    process = command(folder, "a", "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    last = folder / "a" / "run" / "last.ckpt"
    assert err == f"{last}: no checkpoint to resume from; starting anew\n"
    assert "written" in out


# -- another configuration --------------------------------------------------------------------
CHANGES = {
    "network width": ({"network__node_dim": 24}, r"network\.node_dim = 16, .* now says 24"),
    "seed": ({"seed": 2}, r"seed = 1, .* now says 2"),
    "epochs": ({"training__epochs": 9}, r"training\.epochs = 4, .* now says 9"),
    "a target less": (
        {"sources": [{"table": "crystals.parquet", "targets": [ENERGY], "split_column": "split"}]},
        rf"sources\.0\.targets\.1 = '{MODULUS}', .* now says 'nothing'",
    ),
    "another split": (
        {"sources": [{"table": "crystals.parquet", "targets": [ENERGY, MODULUS]}]},
        r"sources\.0\.split_column = 'split', .* now says None",
    ),
    "precision": (
        {"trainer": {"accelerator": "cpu", "precision": "bf16-mixed"}},
        r"trainer\.precision = '32-true', .* now says 'bf16-mixed'",
    ),
    "steps": (
        {"trainer": {"accelerator": "cpu", "accumulate_grad_batches": 2}},
        r"trainer\.accumulate_grad_batches = 'nothing', .* now says 2",
    ),
    "cutoff": ({"graph": {"cutoff_angstrom": 3.5}}, r"graph\.cutoff_angstrom = 4\.0"),
}


@pytest.fixture(scope="module")
def interrupted(crystal_table, tmp_path_factory):
    """Return a folder with a run that was interrupted in its third epoch."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copy(crystal_table, folder / "crystals.parquet")
    with pytest.MonkeyPatch.context() as patch:
        train_until(patch, folder, "a", 2)
    return folder


@pytest.fixture
def cut_off(interrupted, tmp_path):
    """Return a copy of it that a test may go on with."""
    shutil.copytree(interrupted, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_is_refused(change, cut_off, monkeypatch):
    changes, pattern = CHANGES[change]
    # Before tables are read: graphs of a large one take minutes.
    monkeypatch.setattr(run_module, "load_sources", lambda *_: pytest.fail("read the tables"))
    before = (cut_off / "a" / "run" / "last.ckpt").read_bytes()
    with pytest.raises(TrainingError, match=pattern) as caught:
        train(cut_off, "a", base_config(**changes), resume=True)
    assert str(cut_off / "a" / "run" / "last.ckpt") in str(caught.value)
    assert "set it back, or start anew without --resume" in str(caught.value)
    assert (cut_off / "a" / "run" / "last.ckpt").read_bytes() == before


def test_all_that_differs_is_named(cut_off):
    changes = {"seed": 5, "network__edge_dim": 12, "training__batch_size": 4, "training__epochs": 5}
    with pytest.raises(TrainingError) as caught:
        train(cut_off, "a", base_config(**changes), resume=True)
    for key in ("network.edge_dim", "seed", "training.batch_size", "(and 1 more)"):
        assert key in str(caught.value)


def test_another_table_is_refused(cut_off):
    frame = pd.read_parquet(cut_off / "crystals.parquet")
    frame.loc[3, ENERGY] += 0.25
    frame.to_parquet(cut_off / "crystals.parquet")
    with pytest.raises(TrainingError, match=r"tables\.0\.sha256 = '\w{64}', .* now says '\w{64}'"):
        train(cut_off, "a", resume=True)


def test_another_number_of_processes_is_refused(cut_off, monkeypatch):
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda _: 4))
    with pytest.raises(TrainingError, match=r"processes = 1, .* now says 4"):
        train(cut_off, "a", resume=True)


def test_what_shapes_nothing_may_differ(cut_off, tmp_path):
    """Names, places, devices and notes; the table has another name in another folder."""
    train(cut_off, "whole")
    (cut_off / "crystals.parquet").rename(cut_off / "same.parquet")
    source = base_config()["sources"][0] | {"table": "same.parquet"}
    trainer = {"accelerator": "auto", "devices": 1, "log_every_n_steps": 3}
    config = base_config(name="other", sources=[source], trainer=trainer, card={"note": "x"})
    train(cut_off, "a", config, resume=True)
    assert_same_weights(cut_off, "whole", "a")


def test_a_checkpoint_that_says_nothing_of_its_run_is_refused(cut_off):
    io, path = SafetensorsCheckpointIO(), cut_off / "a" / "run" / "last.ckpt"
    state = io.load_checkpoint(path)
    del state["callbacks"][RunRecord.__qualname__]
    io.save_checkpoint(state, path)
    with pytest.raises(TrainingError, match="does not say which configuration"):
        train(cut_off, "a", resume=True)


# -- seconds and devices ----------------------------------------------------------------------
def as_if_on_another_machine(folder, name, seconds):
    io, path = SafetensorsCheckpointIO(), folder / name / "run" / "last.ckpt"
    state = io.load_checkpoint(path)
    record = state["callbacks"][RunRecord.__qualname__]
    assert record["devices"] == [HERE]
    assert 0 < record["seconds"] < 60
    record |= {"seconds": seconds, "devices": [H100]}
    io.save_checkpoint(state, path)


def test_seconds_add_up_over_pieces_and_machines(cut_off):
    as_if_on_another_machine(cut_off, "a", 5000.0)
    started = time.monotonic()
    model = train(cut_off, "a", resume=True)
    assert 5000 < model.card["training_seconds"] < 5000 + time.monotonic() - started
    assert model.card["training_device"] == f"{H100}; then {HERE}"
    # What only writes the model has not trained it.
    as_if = checkpoint(cut_off, "a")["callbacks"][RunRecord.__qualname__]
    assert as_if["devices"] == [H100, HERE]
    assert train(cut_off, "a", resume=True).card["training_device"] == f"{H100}; then {HERE}"


def test_a_run_finished_elsewhere_was_trained_there(folder):
    train(folder, "a")
    as_if_on_another_machine(folder, "a", 77.5)
    model = train(folder, "a", resume=True)
    assert model.card["training_seconds"] == 77.5
    assert model.card["training_device"] == H100
    assert read_json(folder / "a" / "model" / "card.json")["training_device"] == H100


def test_time_between_the_pieces_does_not_count(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("matxfer.pretraining.callbacks.time.monotonic", lambda: clock.now)
    trainer = SimpleNamespace(world_size=1)
    module = SimpleNamespace(device=torch.device("cpu"))
    first = RunRecord({"seed": 0})
    clock.now = 150  # graphs are built
    first.on_train_start(trainer, module)
    clock.now = 170
    kept = first.state_dict()
    assert kept == {"identity": {"seed": 0}, "seconds": 20.0, "devices": [HERE]}
    clock.now = 1000  # killed, and resumed
    second = RunRecord({"seed": 0})
    second.load_state_dict(kept)
    assert second.seconds == 20
    clock.now = 1005
    second.on_train_start(SimpleNamespace(world_size=4), module)
    clock.now = 1012
    assert second.state_dict()["seconds"] == 27
    clock.now = 2000  # figures and Fisher information are computed
    assert second.seconds == 27
    assert second.device == f"{HERE}; then 4 × {HERE}"


# -- losses that are not finite, gradients that are clipped -------------------------------------
def test_a_run_that_diverges_stops(folder):
    config = base_config(training__learning_rate=1e30, training__loss="mse")
    with pytest.raises(TrainingError) as caught:
        train(folder, "a", config)
    message = str(caught.value)
    assert ENERGY in message or MODULUS in message
    for word in ("in epoch 0, step", "no epoch had been finished", "learning_rate", "32-true"):
        assert word in message
    assert not (folder / "a" / "model").exists()
    assert not (folder / "a" / "run" / "last.ckpt").exists()


def test_the_step_itself_is_the_last(folder, monkeypatch):
    step, seen = PretrainModule.training_step, []

    def broken(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        seen.append((self.current_epoch, batch_idx))
        if seen[-1] == (1, 2):
            self.last_losses[1] = math.inf
            return loss * math.inf
        return loss

    monkeypatch.setattr(PretrainModule, "training_step", broken)
    pattern = rf"the loss of {MODULUS} is inf in epoch 1, step 2; the epochs before are kept in "
    with pytest.raises(TrainingError, match=pattern) as caught:
        train(folder, "a")
    last = folder / "a" / "run" / "last.ckpt"
    assert str(last) in str(caught.value)
    assert seen[-1] == (1, 2)
    state = checkpoint(folder, "a")
    assert state["epoch"] == 0
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert curves(folder, "a").epoch.tolist() == [0]
    assert not (folder / "a" / "model").exists()


def test_weights_spoilt_by_the_last_step_are_not_kept(folder, monkeypatch):
    """The loss of the step was finite, its update was not."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 5):
            self.model.heads[ENERGY].readout.requires_grad_(False)
            for parameter in self.model.heads[ENERGY].readout.parameters():
                parameter.fill_(math.nan)

    monkeypatch.setattr(PretrainModule, "on_train_batch_end", on_train_batch_end)
    pattern = rf"the validation loss of {ENERGY} is nan after epoch 1; .*last\.ckpt\. Lower"
    with pytest.raises(TrainingError, match=pattern):
        train(folder, "a")
    state = checkpoint(folder, "a")
    assert state["epoch"] == 0
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert curves(folder, "a").epoch.tolist() == [0]


def fake_run(world_size):
    trainer = SimpleNamespace(world_size=world_size, current_epoch=3, sanity_checking=False)
    module = SimpleNamespace(
        last_losses=torch.ones(3),
        model=SimpleNamespace(heads=dict.fromkeys("abc")),
        denoiser=None,
        force_readout=None,
        all_gather=lambda tensor: torch.stack([tensor] * world_size),
    )
    return trainer, module


@pytest.mark.parametrize("look", ["in time", "at the end of the epoch"])
def test_between_looks_the_first_bad_property_is_remembered(look, tmp_path):
    """As on an accelerator: nothing is read in between, and by then all losses are nan."""
    trainer, module = fake_run(world_size=2)
    guard = FiniteLoss(tmp_path)
    guard.on_train_epoch_start(trainer, module)
    for step in range(STEPS_BETWEEN_LOOKS - 1):
        module.last_losses = torch.ones(3)
        if step == 7:
            module.last_losses[1] = math.inf
        if step > 7:
            module.last_losses[:] = math.nan
        outputs = {"loss": module.last_losses.sum()}
        guard.on_train_batch_end(trainer, module, outputs, None, step)
    last_step = (trainer, module, outputs, None, STEPS_BETWEEN_LOOKS - 1)
    looks = {
        "in time": lambda: guard.on_train_batch_end(*last_step),
        "at the end of the epoch": lambda: guard.on_validation_start(trainer, module),
    }
    with pytest.raises(TrainingError, match="the loss of b is inf in epoch 3, step 7; no epoch"):
        looks[look]()
    # A new epoch counts anew.
    guard.on_train_epoch_start(trainer, module)
    guard.on_train_epoch_end(trainer, module)


def test_all_processes_stop_together(tmp_path):
    """This process is fine, another one is not."""
    trainer, module = fake_run(world_size=2)
    never = 2**62
    module.all_gather = lambda tensor: torch.stack([tensor, torch.tensor([never, never, 4, 4])])
    guard = FiniteLoss(tmp_path)
    for step in range(STEPS_BETWEEN_LOOKS - 1):
        guard.on_train_batch_end(trainer, module, {"loss": torch.tensor(1.0)}, None, step)
    with pytest.raises(TrainingError, match="the loss of c is not a number in epoch 3, step 4"):
        guard.on_train_epoch_end(trainer, module)


def test_a_denoising_loss_is_named(tmp_path):
    trainer, module = fake_run(world_size=1)
    module.denoiser = object()
    with pytest.raises(TrainingError, match="the loss of denoising is nan in epoch 3, step 5"):
        FiniteLoss(tmp_path).on_train_batch_end(
            trainer, module, {"loss": torch.tensor(math.nan)}, None, 5
        )


def test_rates_of_a_trapezoid(folder):
    schedule = {"training__schedule": "trapezoid", "training__epochs": 10}
    train(folder, "a", base_config(**schedule, training__warmup_fraction=0.1))
    rates = curves(folder, "a").learning_rate.to_numpy()  # of the last step of each epoch
    assert rates[:8] == pytest.approx(0.01)
    # Six steps an epoch, sixty in all, of which the last twelve fall by one twelfth each.
    assert rates[8:] == pytest.approx([0.01 * 7 / 12, 0.01 * 1 / 12])
    train(folder, "b", base_config(training__epochs=10, training__warmup_fraction=0.1))
    cosine = curves(folder, "b").learning_rate.to_numpy()
    assert (np.diff(cosine[1:]) < 0).all()


def gradient_norms(folder, name, clip_norm):
    norms = []

    def note(optimizer, args, kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.ravel() for g in gradients if g is not None]).norm()))

    hook = register_optimizer_step_post_hook(note)
    try:
        train(folder, name, base_config(training__clip_norm=clip_norm, training__epochs=2))
    finally:
        hook.remove()
    return np.array(norms)


def test_gradients_are_clipped(folder):
    clipped = gradient_norms(folder, "clipped", 0.05)
    free = gradient_norms(folder, "free", 1e9)
    assert len(clipped) == len(free) == 12
    assert clipped.max() <= 0.05 * (1 + 1e-4)
    assert free.max() > 0.5
    with pytest.raises(AssertionError):
        assert_same_weights(folder, "clipped", "free")


# -- tables that teach nothing ------------------------------------------------------------------
def changed_table(folder, **columns):
    frame = pd.read_parquet(folder / "crystals.parquet").assign(**columns)
    frame.to_parquet(folder / "crystals.parquet")


@pytest.mark.parametrize(
    ("columns", "pattern"),
    [
        (
            {ENERGY: -1.25},
            rf"crystals\.parquet: every value of column '{ENERGY}' in .* is -1\.25 \(48 values\)",
        ),
        (
            {ENERGY: np.nan},
            rf"crystals\.parquet: column '{ENERGY}' has no value in the 48 training rows; fill",
        ),
        (
            {MODULUS: -np.arange(60.0)},
            rf"no value of column '{MODULUS}' .* \(log10\): the largest of 48 is -0; correct",
        ),
        ({"split": ["train"] * 54 + ["test"] * 6}, "no validation row is usable"),
    ],
    ids=["constant", "empty", "off its scale", "no validation"],
)
def test_tables_that_teach_nothing(columns, pattern, folder):
    changed_table(folder, **columns)
    with pytest.raises(TableError, match=pattern):
        train(folder)


# -- learning curves ----------------------------------------------------------------------------
def test_rows_of_the_curves(folder):
    train(folder)
    rows = curves(folder, "a")
    errors = ["val_mae_formation_energy_ev_per_atom", "val_mae_log10_bulk_modulus_vrh_gpa"]
    assert list(rows) == ["epoch", "train_loss", "val_loss", *errors, "learning_rate", "seconds"]
    (log,) = (folder / "a" / "run").rglob("metrics.csv")
    logged = pd.read_csv(log).groupby("epoch").first()
    for column, name in zip(errors, (ENERGY, MODULUS), strict=True):
        np.testing.assert_allclose(rows[column], logged[f"val_mae/{name}"], rtol=1e-6)
    # The rate of the last step of each epoch: 24 steps, none of them for warming up but the first.
    step = np.array([5, 11, 17, 23])
    expected = 0.01 * 0.5 * (1 + np.cos(np.pi * (step - 1) / 23))
    np.testing.assert_allclose(rows.learning_rate, expected, rtol=1e-6)


def test_names_of_errors_end_in_their_unit():
    assert error_column(property_of("band_gap_ev")) == "val_mae_band_gap_ev"  # clipped, linear
    assert error_column(property_of(MODULUS)) == f"val_mae_log10_{MODULUS}"


def test_a_new_run_begins_new_curves(folder):
    train(folder)
    train(folder, config=base_config(training__epochs=1))
    assert curves(folder, "a").epoch.tolist() == [0]


ROWS = [
    {"epoch": float(k), "train_loss": 1.0 / (k + 1), "val_loss": 2.0 / (k + 1), "val_mae_x_ev": 0.1}
    for k in range(3)
]


def test_drawing_leaves_the_users_backend_alone(tmp_path):
    import matplotlib.pyplot as plt
    from matplotlib import get_backend

    before = get_backend()
    plt.switch_backend("svg")
    try:
        assert draw_learning_curves(ROWS, tmp_path / "curves.png")
        assert get_backend() == "svg"
        assert plt.get_fignums() == []
    finally:
        plt.switch_backend(before)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_without_matplotlib_there_is_the_table_and_one_word(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_learning_curves(ROWS, folder / "x.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(folder)
    said = [str(w.message) for w in caught if "matplotlib" in str(w.message)]
    assert len(said) == 1
    assert "learning_curves.png is not drawn; the numbers are in" in said[0]
    assert curves(folder, "a").epoch.tolist() == [0, 1, 2, 3]
    assert not (folder / "a" / "run" / "learning_curves.png").exists()


def test_the_picture_is_there_from_the_first_epoch(folder, monkeypatch):
    train_until(monkeypatch, folder, "a", 1)
    picture = folder / "a" / "run" / "learning_curves.png"
    early = picture.read_bytes()
    train(folder, "a", resume=True)
    assert picture.read_bytes() != early


# -- several processes ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gloo():
    """Skip where processes of one machine cannot reach each other (a closed sandbox)."""
    script = (
        "import torch.distributed as d; "
        "d.init_process_group('gloo', 'tcp://127.0.0.1:0', world_size=1, rank=0); d.barrier()"
    )
    tried = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    if tried.returncode:
        pytest.skip(f"gloo does not connect here: {tried.stderr.strip().splitlines()[-1]}")


@pytest.mark.usefixtures("gloo")
def test_two_processes_say_one_thing(folder):
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    config = base_config(trainer=trainer, training__epochs=2)
    write_config(folder, config)
    process = command(folder, "a", "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    card = json.loads(out)
    assert out.count("\n") == 1
    assert card["training_device"] == f"2 × {HERE}"
    assert curves(folder, "a").epoch.tolist() == [0, 1]
    assert checkpoint(folder, "a")["callbacks"]["RunRecord"]["identity"]["processes"] == 2


# -- trainer ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("trainer", "pattern"),
    [
        ({"acceleratr": "cpu"}, r"unknown key 'acceleratr' in trainer; known are .*'accelerator'"),
        ({"max_epochs": 3}, r"'max_epochs' in trainer cannot be set: write 'epochs' in training"),
        ({"callbacks": []}, r"'callbacks' in trainer cannot be set"),
        ({"enable_checkpointing": False}, r"'enable_checkpointing' in trainer cannot be set"),
        (
            {"accelerator": "cpu", "precision": "12-false"},
            r"^'precision': '12-false' in trainer: .*12-false",
        ),
        ({"accelerator": "cpu", "strategy": "telepathy"}, r"^'strategy': 'telepathy' in trainer: "),
        ({"accelerator": "abacus", "devices": 1}, r"^'accelerator': 'abacus' in trainer: "),
        ({"logger": "Papyrus"}, r"'logger' in trainer is 'Papyrus'; known are .*'CSVLogger'"),
        ({"accelerator": "cpu", "devices": -3}, r"'devices': -3 in trainer: |-3 in trainer: "),
    ],
    ids=lambda value: next(reversed(value), "") if isinstance(value, dict) else "",
)
def test_trainer_keys_that_cannot_be(trainer, pattern, folder):
    with pytest.raises(ConfigError, match=pattern):
        train(folder, config=base_config(trainer=trainer))
    assert not (folder / "a" / "run" / "last.ckpt").exists()


def test_a_mistake_in_trainer_keeps_the_checkpoint(cut_off):
    last = cut_off / "a" / "run" / "last.ckpt"
    before = last.read_bytes()
    with pytest.raises(ConfigError):
        train(cut_off, "a", base_config(trainer={"precision": "12-false"}))
    assert last.read_bytes() == before
