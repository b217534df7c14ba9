"""Folders of parts: whole or absent, gone on with exactly, shared by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import ase.io
import numpy as np
import pandas as pd
import pytest

import matxfer.campaign.parts as parts_module
import matxfer.prediction as prediction_module
from matxfer.campaign.manifest import CampaignError, differences
from matxfer.campaign.parts import Campaign, Stop
from matxfer.campaign.share import Share, share_of
from matxfer.errors import OptionError
from matxfer.prediction import BatchOptions, Predictor

HERE = BatchOptions(workers=0)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(prediction_module, "CHUNK", 4)
    monkeypatch.setattr(parts_module, "CHUNK", 4)


@pytest.fixture
def inputs(crystal_table, table_crystals, tmp_path):
    """Return 60 rows of a table and 10 CIF files, one of them broken: 70 rows, 9 parts of 8."""
    folder = tmp_path / "cifs"
    folder.mkdir()
    for k in range(10):
        ase.io.write(folder / f"f{k}.cif", table_crystals[k].to_ase())
    (folder / "f5.cif").write_text("no CIF")
    return [str(crystal_table), str(folder)]


def campaign(folder, model, inputs, **options):
    return Campaign(folder, Predictor(model), inputs, HERE, **({"part_size": 8} | options))


def frame_of(folder):
    """Return all rows, from the parts that the manifest names."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    names = [part["file"] for part in manifest["parts"]]
    assert sorted(names) == names == sorted(p.name for p in folder.glob("part-*"))
    frames = [pd.read_parquet(folder / name) for name in names]
    assert [len(frame) for frame in frames] == [part["rows"] for part in manifest["parts"]]
    return pd.concat(frames, ignore_index=True)


def same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.fixture
def whole(tiny_model, inputs, tmp_path):
    outcome = campaign(tmp_path / "whole", tiny_model, inputs).run()
    assert outcome.complete
    return frame_of(tmp_path / "whole")


def test_parts_hold_the_rows_of_a_plain_prediction(whole, tiny_model, inputs, tmp_path):
    rows = list(Predictor(tiny_model).rows(inputs, HERE))
    assert len(whole) == 70
    assert whole["id"].tolist() == [row["id"] for row in rows]
    assert whole["error_kind"].notna().sum() == 1
    np.testing.assert_array_equal(
        whole["band_gap_ev"], np.array([r["band_gap_ev"] for r in rows], dtype=float)
    )
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert [part["rows"] for part in manifest["parts"]] == [8] * 7 + [8, 6]
    assert manifest["errors"] == {"unreadable": 1}
    assert (manifest["rows"], manifest["failed"]) == (70, 1)
    assert manifest["settings"]["weights"]["model"]["sha256"] == tiny_model.checksum
    assert manifest["provenance"]["versions"]["matxfer"]


@pytest.mark.parametrize("row", [0, 3, 8, 31, 62, 69])
def test_an_interruption_and_going_on(row, whole, tiny_model, inputs, tmp_path):
    folder = tmp_path / "cut"
    seen = []

    def cut(each):
        seen.append(each["id"])
        if len(seen) > row:
            raise MemoryError

    with pytest.raises(MemoryError):
        campaign(folder, tiny_model, inputs).run(on_row=cut)
    done = sorted(p.name for p in folder.glob("part-*.parquet"))
    assert len(done) == row // 8  # whole parts only
    times = {name: (folder / name).stat().st_mtime_ns for name in done}
    outcome = campaign(folder, tiny_model, inputs, resume=True).run()
    assert (outcome.complete, outcome.found) == (True, len(done))
    assert outcome.rows == 70 - 8 * len(done)
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == times
    same(frame_of(folder), whole)


def test_a_damaged_part_is_done_again(whole, tiny_model, inputs, tmp_path):
    folder = tmp_path / "whole"
    (folder / "part-00002.parquet").write_bytes(b"PAR1 and nothing else")
    (folder / "part-00004.parquet").unlink()
    outcome = campaign(folder, tiny_model, inputs, resume=True).run()
    assert outcome.rows == 16
    same(frame_of(folder), whole)
    assert campaign(folder, tiny_model, inputs, resume=True).run().rows == 0


def test_a_full_disk(whole, tiny_model, inputs, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    write = parts_module.write_rows

    def full(rows, columns, path):
        if path.name == "part-00003.parquet":
            next(iter(rows))
            path.with_name(f"{path.name}.part").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return write(rows, columns, path)

    monkeypatch.setattr(parts_module, "write_rows", full)
    with pytest.raises(OSError, match="No space"):
        campaign(folder, tiny_model, inputs).run()
    monkeypatch.undo()
    monkeypatch.setattr(prediction_module, "CHUNK", 4)
    monkeypatch.setattr(parts_module, "CHUNK", 4)
    assert campaign(folder, tiny_model, inputs, resume=True).run().complete
    same(frame_of(folder), whole)


def test_a_wish_to_stop_ends_after_the_part(whole, tiny_model, inputs, tmp_path):
    folder, stop = tmp_path / "stopped", Stop()
    rows = []

    def wish(row):
        rows.append(row)
        stop.wished = len(rows) >= 11

    outcome = campaign(folder, tiny_model, inputs).run(stop=stop, on_row=wish)
    assert (outcome.stopped, outcome.complete, outcome.rows) == (True, False, 16)
    assert len(list(folder.glob("part-*.parquet"))) == 2
    assert campaign(folder, tiny_model, inputs, resume=True).run().complete
    same(frame_of(folder), whole)


# -- what must be the same --------------------------------------------------------------------
def test_begun_already(whole, tiny_model, inputs, tmp_path):
    with pytest.raises(CampaignError, match="begun already; go on with --resume"):
        campaign(tmp_path / "whole", tiny_model, inputs)
    (tmp_path / "whole" / "manifest.json").unlink()
    with pytest.raises(CampaignError, match="there are parts, but no"):
        campaign(tmp_path / "whole", tiny_model, inputs, resume=True)


def changes(tiny_model, inputs, tmp_path):
    """Yield what is changed, with what the refusal says."""
    folder = tmp_path / "other-model"
    model = type(tiny_model)(
        tiny_model.backbone, tiny_model.heads.values(), tiny_model.elements, dict(tiny_model.card)
    )
    next(iter(model.heads.values())).scaler.mean.add_(1.0)
    model.save(folder)
    next(iter(model.heads.values())).scaler.mean.sub_(1.0)
    yield {"model": model}, "weights.model.sha256 was"
    yield {"part_size": 12}, "options.shard_size was 8 and is 12"
    yield {"options": BatchOptions(max_atoms=5)}, "options.max_atoms was 10000 and is 5"
    yield {"inputs": inputs[:1]}, "inputs.files was 11 and is 1"
    yield {"inputs": inputs[::-1]}, "inputs.names was"


def test_changes_are_refused_by_name(whole, tiny_model, inputs, tmp_path):
    before = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    for change, message in changes(tiny_model, inputs, tmp_path):
        arguments = {"options": HERE, "part_size": 8, "model": tiny_model, "inputs": inputs}
        arguments |= change
        predictor = Predictor(arguments.pop("model"))
        with pytest.raises(CampaignError, match=message):
            Campaign(tmp_path / "whole", predictor, resume=True, **arguments)
    cif = tmp_path / "cifs" / "f3.cif"
    os.utime(cif, (1e9, 1e9))
    with pytest.raises(CampaignError, match=r"inputs\.times_of_change was"):
        campaign(tmp_path / "whole", tiny_model, inputs, resume=True)
    cif.write_text(cif.read_text() + "\n")
    with pytest.raises(CampaignError, match=r"inputs\.bytes was"):
        campaign(tmp_path / "whole", tiny_model, inputs, resume=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()} == before


def test_how_to_work_may_change(tiny_model, inputs, tmp_path):
    """Workers and time limits do not decide the rows."""
    campaign(tmp_path / "x", tiny_model, inputs)
    options = BatchOptions(workers=1, timeout_s=60)
    again = Campaign(
        tmp_path / "x", Predictor(tiny_model), inputs, options, part_size=8, resume=True
    )
    assert again.run().complete


def test_standard_input_is_refused(tiny_model, tmp_path):
    with pytest.raises(CampaignError, match="standard input"):
        campaign(tmp_path / "x", tiny_model, ["cif:-"])


def test_a_folder_among_its_inputs_is_refused(tiny_model, inputs, tmp_path):
    with pytest.raises(CampaignError, match="inside the input"):
        campaign(tmp_path / "cifs" / "out", tiny_model, inputs)
    assert not (tmp_path / "cifs" / "out").exists()


def test_differences():
    before = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "e": 0}
    now = {"a": 1, "b": {"c": [1, 3], "d": "x"}, "f": [0]}
    assert list(differences(before, now)) == [
        "b.c[1] was 2 and is 3", "e was 0 and is null", "f was null and is [0]",
    ]  # fmt: skip
    assert list(differences(before, before)) == []


# -- several processes ------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3, 11])
def test_shares_make_the_whole(size, whole, tiny_model, inputs, tmp_path):
    folder = tmp_path / "shared"
    outcomes = []
    for rank in reversed(range(size)):
        each = campaign(folder, tiny_model, inputs, share=Share(rank, size))
        outcomes.append(each.run())
    assert [o.complete for o in outcomes] == [False] * (size - 1) + [True]
    assert sum(o.rows for o in outcomes) == 70
    same(frame_of(folder), whole)


def test_another_number_of_processes_may_go_on(whole, tiny_model, inputs, tmp_path):
    folder = tmp_path / "shared"
    campaign(folder, tiny_model, inputs, share=Share(1, 3)).run()
    outcome = campaign(folder, tiny_model, inputs, resume=True).run()
    assert (outcome.found, outcome.complete) == (3, True)
    same(frame_of(folder), whole)


def test_shares_of_launchers():
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert share_of(environment=torchrun) == Share(1, 4)
    srun = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3"}
    assert share_of(environment=srun) == Share(2, 3)
    # A batch script that starts no tasks of its own is one process.
    assert share_of(environment={"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == Share()
    assert share_of(3, 5, torchrun) == Share(3, 5)
    assert share_of(environment={}) == Share()
    for rank, size in ((None, 4), (1, None), (4, 4), (-1, 2), (0, 0)):
        with pytest.raises(OptionError):
            share_of(rank, size, {})
    with pytest.raises(OptionError, match="RANK and WORLD_SIZE"):
        share_of(environment={"RANK": "one", "WORLD_SIZE": "4"})


# -- the command ------------------------------------------------------------------------------
def command(*words, launcher=(), **environment):
    code = "from matxfer.cli import main; main()"
    return subprocess.Popen(
        [*(launcher or (sys.executable,)), *([] if launcher else ["-c", code]), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
    )  # fmt: skip


@pytest.fixture
def table(table_crystals, crystal_frame, tmp_path):
    """Return a table of 1,500 different structures."""
    frame = pd.concat([crystal_frame] * 25, ignore_index=True)
    scale = np.linspace(0.9, 1.1, len(frame))
    frame["lattice"] = [
        s * np.asarray(cell) for s, cell in zip(scale, frame["lattice"], strict=True)
    ]
    frame["material_id"] = [f"m{k}" for k in range(len(frame))]
    frame.to_parquet(tmp_path / "many.parquet")
    return tmp_path / "many.parquet"


def test_killed_and_gone_on_with(table, tiny_model_folder, tmp_path):
    words = ("predict", table, "--model", tiny_model_folder, "--shard-size", 256)
    straight = command(*words, "-o", f"{tmp_path / 'one'}/")
    _, err = straight.communicate(timeout=120)
    assert straight.returncode == 0, err
    assert "1,500 rows in 6 parts" in err
    folder = tmp_path / "two"
    killed = command(*words, "-o", f"{folder}/", "--workers", 2)
    deadline = time.monotonic() + 120
    while not list(folder.glob("part-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate(timeout=60)
    assert 0 < len(list(folder.glob("part-*.parquet"))) < 6
    refused = command(*words, "-o", folder)
    assert "--resume" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 2
    resumed = command(*words, "-o", f"{folder}/", "--resume")
    _, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert "parts were there already" in err
    same(frame_of(folder), frame_of(tmp_path / "one"))


def test_ctrl_c_finishes_the_part(table, tiny_model_folder, tmp_path):
    folder = tmp_path / "out"
    words = ("predict", table, "--model", tiny_model_folder, "--shard-size", 300, "-o", folder)
    (tmp_path / "out").mkdir()
    process = command(*words)
    deadline = time.monotonic() + 60
    while not list(folder.glob("part-*.part")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "SIGINT: finishing the part in hand" in err
    assert "--resume goes on" in err
    done = len(list(folder.glob("part-*.parquet")))
    assert 1 <= done < 5
    assert not list(folder.glob("*.part"))
    again = command(*words, "--resume")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert frame_of(folder)["id"].tolist() == [f"m{k}" for k in range(1500)]


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "options"])
def test_two_processes(launcher, table, tiny_model_folder, tmp_path):
    folder = tmp_path / "out"
    words = [
        "predict",
        table,
        "--model",
        tiny_model_folder,
        "--shard-size",
        256,
        "-o",
        f"{folder}/",
    ]
    if launcher == "torchrun":
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--master-port", "29577", "--no-python", sys.executable,
                    "-c", "from matxfer.cli import main; main()")  # fmt: skip
        processes = [command(*words, launcher=torchrun)]
    elif launcher == "srun":
        variables = [{"SLURM_PROCID": str(k), "SLURM_STEP_NUM_TASKS": "2"} for k in range(2)]
        processes = [command(*words, **each) for each in variables]
    else:
        processes = [command(*words, "--rank", k, "--world-size", 2) for k in range(2)]
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    assert frame_of(folder)["id"].tolist() == [f"m{k}" for k in range(1500)]
    assert not list(folder.glob("*.part"))


def test_strict(inputs, tiny_model_folder, tmp_path):
    words = ("predict", *inputs, "--model", tiny_model_folder, "--strict")
    for output in (("-o", f"{tmp_path / 'dir'}/"), ("-o", tmp_path / "out.csv"), ()):
        process = command(*words, *output)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 3, err
        assert "f5.cif (frame 0): unreadable: " in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


WRONG = {
    "resume a file": (["--resume", "-o", "out.csv"], "--resume needs a folder"),
    "shards of a file": (["--shard-size", "5", "-o", "out.csv"], "--shard-size needs a folder"),
    "no shards": (["--shard-size", "0", "-o", "d/"], "give a positive number"),
    "rank alone": (["--rank", "0", "-o", "d/"], "go together"),
    "ranks into a file": (["--rank", "0", "--world-size", "2", "-o", "o.csv"], "needs a folder"),
    "engine": (["--engine", "spark", "-o", "d/"], "the engines are local, ray"),
    "ray into a file": (["--engine", "ray", "-o", "o.csv"], "--engine ray needs a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(case, inputs, tiny_model_folder, tmp_path, monkeypatch, capsys):
    import matxfer.cli

    monkeypatch.chdir(tmp_path)
    words, message = WRONG[case]
    argv = ["matxfer", "predict", *inputs, "--model", str(tiny_model_folder), *words]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        matxfer.cli.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_ray_is_asked_for_by_name(inputs, tiny_model_folder, tmp_path, monkeypatch, capsys):
    import matxfer.cli

    monkeypatch.setitem(sys.modules, "ray", None)
    argv = ["matxfer", "predict", *inputs, "--model", str(tiny_model_folder),
            "-o", f"{tmp_path / 'out'}/", "--engine", "ray"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stopped:
        matxfer.cli.main()
    assert stopped.value.code == 2
    assert "pip install 'matxfer[ray]'" in capsys.readouterr().err


def test_ray(whole, tiny_model_folder, inputs, tmp_path):
    """Two actors; units of the usual size there, which the tests' inputs do not fill."""
    pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.data", reason="Ray is not installed")
    folder = tmp_path / "ray"
    words = ("predict", *inputs, "--model", tiny_model_folder, "--shard-size", 30, "-o")
    # Ray's processes give way to all others, and on a busy machine never come to work.
    process = command(*words, f"{folder}/", "--engine", "ray", RAY_worker_niceness="0")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    one = tmp_path / "here"
    straight = command(*words, f"{one}/")
    assert straight.wait(timeout=120) == 0
    same(frame_of(folder), frame_of(one))
    assert frame_of(folder)["id"].tolist() == whole["id"].tolist()
