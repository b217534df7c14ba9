"""The command line: what it prints where, its exit codes, and how little it loads."""

from __future__ import annotations

import csv
import io
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

import matxfer.cli
import matxfer.model
from matxfer.evaluation import evaluate
from matxfer.prediction import LEADING_COLUMNS, TRAILING_COLUMNS, predict
from matxfer.readers import read_file
from matxfer.transfer.finetune import finetune

TARGET = "debye_temperature_k"
HEAVY = ("torch", "pymatgen", "ase", "lightning", "torch_geometric", "pandas", "pyarrow", "numpy")


def python(code, *words, **environment):
    """Run a new Python process."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True, text=True, check=False, env=os.environ | environment, timeout=120,
    )  # fmt: skip


def loaded(code, names, *words):
    """Return which of the packages a piece of code has imported, in a new process."""
    report = f"print('LOADED', *[n for n in {names!r} if n in sys.modules], file=sys.stderr)"
    wrapped = f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\n{report}"
    result = python(wrapped, *words)
    last = result.stderr.strip().splitlines()[-1].split()
    assert last[0] == "LOADED", result.stderr
    return last[1:], result


@pytest.fixture(scope="module")
def plugins(crystal_table, tiny_model, tmp_path_factory):
    """Return the folders of two plugins, of a new property and of one that the base knows."""
    root = tmp_path_factory.mktemp("plugins")
    for target, name in ((TARGET, "debye"), ("bulk_modulus_vrh_gpa", "bulk")):
        finetune(crystal_table, target, root / name, model=tiny_model, split_column="split",
                 strategy="finetune", epochs=1)  # fmt: skip
    return root / "debye", root / "bulk"


@pytest.fixture
def cifs(table_crystals, tmp_path):
    folder = tmp_path / "cifs"
    folder.mkdir()
    for k in (0, 1):
        ase.io.write(folder / f"good{k}.cif", table_crystals[k].to_ase())
    (folder / "zbad.cif").write_text("no CIF at all, but an Ångström")
    return folder


# -- how little is loaded ---------------------------------------------------------------------
def test_import_is_light():
    found, result = loaded("import matxfer; matxfer.__version__; dir(matxfer)", HEAVY)
    assert result.returncode == 0
    assert found == []


def test_the_package_runs_as_a_module():
    words = (sys.executable, "-m", "matxfer", "--help")
    result = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert "finetune" in result.stdout


def test_help_takes_less_than_a_second():
    seconds = []
    for words in (["--help"], ["predict", "--help"], ["finetune", "--help"]):
        started = time.perf_counter()
        found, result = loaded("from matxfer.cli import main; main()", HEAVY, *words)
        seconds.append(time.perf_counter() - started)
        assert result.stdout.lstrip().startswith("Usage")
        assert found == []
    # The best of three: the machine may be busy.
    assert min(seconds) < 1.0


def test_predict_loads_no_training_library(tiny_model_folder, plugins, cifs):
    names = ("torch_geometric", "lightning", "torch._dynamo", "pymatgen", "torch")
    good = [cifs / "good0.cif", cifs / "good1.cif"]  # for a bad CIF pymatgen is asked too
    words = ("predict", *good, "--model", tiny_model_folder, "--plugin", plugins[0])
    found, result = loaded("from matxfer.cli import main; main()", names, *words)
    assert len(result.stdout.splitlines()) == 3
    assert found == ["torch"]


# -- predict ----------------------------------------------------------------------------------
def test_predict_screens(run, tiny_model_folder, cifs, tmp_path):
    words = ("predict", cifs, "--model", tiny_model_folder)
    _, out, _ = run(*words)
    rows = [row for row in csv.DictReader(io.StringIO(out)) if not row["error"]]
    best = max(rows, key=lambda row: float(row["band_gap_ev"]))
    code, out, err = run(*words, "--sort-by", "band_gap_ev:desc", "--top", "1",
                         "--columns", "id,band_gap_ev")  # fmt: skip
    assert code == 0
    assert list(csv.DictReader(io.StringIO(out))) == [
        {"id": best["id"], "band_gap_ev": best["band_gap_ev"]}
    ]
    assert "kept 1 of 3 structures; left out: 1 could not be predicted, 1 come after" in err
    code, out, err = run(*words, "--filter", f"id == '{rows[0]['id']}' and n_sites > 0")
    assert [row["id"] for row in csv.DictReader(io.StringIO(out))] == [rows[0]["id"]]
    for option in (("--filter", "gap > 1"), ("--sort-by", "gap"), ("--columns", "gap")):
        code, out, err = run(*words, *option)
        assert code == 2
        assert "'gap'" in err
        assert "band_gap_ev" in err
    code, out, err = run(*words, "--top", "3")
    assert (code, out) == (2, "")


@pytest.mark.parametrize("name", ["best.extxyz", "best.db"])
def test_predict_writes_structures(run, tiny_model_folder, cifs, tmp_path, name):
    code, _, err = run("predict", cifs, "--model", tiny_model_folder, "-o", name,
                       "--sort-by", "band_gap_ev:desc", "--top", "1")  # fmt: skip
    assert code == 0
    (entry,) = read_file(tmp_path / name)
    stem = entry.id if name.endswith("db") else ase.io.read(tmp_path / name).info["id"]
    original = ase.io.read(cifs / f"{stem}.cif")
    assert entry.crystal.volume_angstrom3 == pytest.approx(original.get_volume(), rel=1e-5)
    assert "kept 1 of 3" in err


def test_predict_reads_standard_input(tiny_model_folder, cifs, run):
    command = [sys.executable, "-c", "from matxfer.cli import main; main()", "predict", "-",
               "--input-format", "cif", "--model", str(tiny_model_folder)]  # fmt: skip
    text = (cifs / "good0.cif").read_bytes() + (cifs / "good1.cif").read_bytes()
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert [row["source"] for row in rows] == ["cif:-", "cif:-"]
    assert all(row["band_gap_ev"] for row in rows)
    for words in (("-",), ("-", "-", "--input-format", "cif"), ("x.cif", "--input-format", "cif"),
                  ("-", "--input-format", "exe")):  # fmt: skip
        code, _, err = run("predict", *words)
        assert code == 2
        assert "input" in err


def test_predict_into_a_pipe(run, tiny_model_folder, plugins, cifs, table_crystals, tiny_model):
    code, out, err = run("predict", cifs, "--model", tiny_model_folder,
                         "--plugin", plugins[0], "--plugin", plugins[1])  # fmt: skip
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    ends = ("", "_std", "_lo", "_hi", "_ood")
    own = [f"{name}{end}" for name in (TARGET, "bulk_modulus_vrh_gpa__bulk") for end in ends]
    assert list(rows[0]) == [*LEADING_COLUMNS, *tiny_model.heads, *own, *TRAILING_COLUMNS]
    assert [row["id"] for row in rows] == ["good0", "good1", "zbad"]
    expected = predict(table_crystals[:2], plugins, model=tiny_model)
    for name in (*tiny_model.heads, *own):
        found = [float(row[name]) for row in rows[:2]]
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-5)
        assert rows[2][name] == ""
    assert rows[0]["error"] == rows[1]["error"] == ""
    assert rows[2]["error"]
    assert err.strip() == (
        "1 of 3 structures could not be predicted (1 unreadable); see the column 'error'"
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_predict_into_a_file(suffix, run, tiny_model_folder, cifs, tmp_path):
    path = tmp_path / f"out.{suffix}"
    code, out, _ = run("predict", cifs / "good0.cif", cifs / "zbad.cif", "-o", path,
                       "--model", tiny_model_folder)  # fmt: skip
    assert (code, out) == (0, "")
    read = {"csv": pd.read_csv, "parquet": pd.read_parquet,
            "jsonl": lambda p: pd.read_json(p, lines=True)}[suffix]  # fmt: skip
    frame = read(path)
    assert frame["id"].tolist() == ["good0", "zbad"]
    assert frame["band_gap_ev"].notna().tolist() == [True, False]


def test_predict_on_a_terminal(run, tiny_model_folder, cifs, monkeypatch):
    monkeypatch.setattr("rich.console.Console.width", 200)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, out, _ = run("predict", cifs, "--model", tiny_model_folder)
    assert code == 0
    assert "good0" in out
    assert "," not in out.splitlines()[0]


def test_exit_code_1_if_nothing_could_be_predicted(run, tiny_model_folder, cifs, tmp_path):
    model = ("--model", tiny_model_folder)
    code, out, err = run("predict", cifs / "zbad.cif", tmp_path / "none.cif", *model)
    assert code == 1
    assert len(list(csv.DictReader(io.StringIO(out)))) == 2
    assert "2 of 2 structures" in err
    (tmp_path / "empty").mkdir()
    code, out, err = run("predict", tmp_path / "empty", *model)
    assert code == 1
    assert len(out.splitlines()) == 1
    assert "no structures" in err
    assert run("predict", cifs, *model)[0] == 0


# -- errors -----------------------------------------------------------------------------------
BASE = ("--model", "MODEL")
ERRORS = {
    "missing model": (("predict", "x.cif", "--model", "nowhere"), "no model 'nowhere': give"),
    "bad output": (("predict", "x.cif", "-o", "out.xlsx", *BASE), "cannot write 'xlsx'; use one"),
    "missing plugin": (("predict", "x.cif", "--plugin", "p", *BASE), "p/plugin.json: not readable"),
    "missing table": (("evaluate", "none.csv", "--target", "a_ev", *BASE), "a_ev"),
    "missing column": (
        ("finetune", "TABLE", "--target", "hardness_gpa", *BASE),
        "no column 'hardness_gpa'; the columns are",
    ),
    "missing split": (
        ("finetune", "TABLE", "--target", TARGET, "--split-column", "fold", *BASE),
        "no column 'fold'; the columns are",
    ),
    "bad depth": (("finetune", "TABLE", "--target", TARGET, "--freeze", "9", *BASE), "depth 9"),
    "bad retention": (
        ("finetune", "TABLE", "--target", TARGET, "--retain", "l2", *BASE),
        "retain is 'l2', but must be one of",
    ),
    "bad rate": (
        ("finetune", "TABLE", "--target", TARGET, "--learning-rate", "-1", *BASE),
        "learning_rate is -1.0, but must be positive",
    ),
    "bad seed": (
        ("finetune", "TABLE", "--target", TARGET, "--seed", "-1", *BASE),
        "seed is -1, but must not be negative",
    ),
    "bad readout": (
        ("finetune", "TABLE", "--target", TARGET, "--readout", "sum", *BASE),
        "unknown readout 'sum'; known are",
    ),
    "unknown target": (
        ("evaluate", "TABLE", "--target", TARGET, *BASE),
        "does not predict 'debye_temperature_k'",
    ),
    "bad where": (
        ("evaluate", "TABLE", "--target", "band_gap_ev", "--where", "family", *BASE),
        "--where 'family': write COLUMN=VALUE",
    ),
    "bad configuration": (("pretrain", "none.yaml"), "none.yaml"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, run, tiny_model_folder, crystal_table):
    words, message = ERRORS[case]
    if case == "missing table":
        message = "does not predict 'a_ev'"
    places = {"MODEL": tiny_model_folder, "TABLE": crystal_table}
    code, out, err = run(*[places.get(word, word) for word in words])
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_errors_of_many_lines_become_one(run, tiny_model_folder, plugins, tmp_path):
    """PyTorch lists every tensor that does not fit on a line of its own."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(plugins[0] / "plugin.safetensors")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "plugin.json").write_bytes((plugins[0] / "plugin.json").read_bytes())
    save_file({"head.x": tensors["head.scaler.mean"]}, tmp_path / "p" / "plugin.safetensors")
    code, _, err = run("predict", "x.cif", "--plugin", tmp_path / "p", "--model", tiny_model_folder)
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["predict"],
        ["predict", "a.cif", "--colour", "red"],
        ["finetune"],
        ["finetune", "a.csv", "--target", "x_ev", "--epochs", "many"],
        ["unknown"],
    ],
)
def test_wrong_usage(words, run):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "Usage" in err


# -- finetune, evaluate, models ---------------------------------------------------------------
def test_finetune_prints_one_json_object(tiny_model_folder, crystal_table, tmp_path):
    """In a process of its own, where Lightning would greet, warn and report."""
    folder = tmp_path / "new" / "plugin"
    result = python(
        "from matxfer.cli import main; main()", "finetune", crystal_table, "--target", TARGET,
        "--model", tiny_model_folder, "--split-column", "split", "-o", folder, "--json",
        "--freeze", 1, "--epochs", 2, "--batch-size", 16, "--seed", 3, "--retain", "ewc",
        "--strength", 0.25, "--patience", 7, "--learning-rate", 2e-3, "--layer-decay", 0.5,
        "--head-learning-rate", 3e-3, "--weight-decay", 0.02, "--readout", "atomwise",
        "--transform", "log",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    data = json.loads(result.stdout)
    assert data["plugin"] == str(folder)
    given = {
        "freeze": 1, "epochs": 2, "batch_size": 16, "seed": 3, "retain": "ewc", "strength": 0.25,
        "patience": 7, "learning_rate": 2e-3, "layer_decay": 0.5, "head_learning_rate": 3e-3,
        "weight_decay": 0.02, "readout": "atomwise", "transform": "log",
    }  # fmt: skip
    assert {k: v for k, v in data["config"].items() if k in given} == given
    assert data["config"]["strategy"] == "finetune"  # that is what a frozen depth belongs to
    assert {k: v for k, v in data.items() if k != "plugin"} == json.loads(
        (folder / "plugin.json").read_text()
    )
    assert data["figures"]["test"]["n"] == 6


def test_finetune_for_people(run, tiny_model_folder, crystal_table, tmp_path):
    code, out, err = run("finetune", crystal_table, "--target", TARGET, "--model",
                         tiny_model_folder, "--split-column", "split", "--epochs", 1)  # fmt: skip
    assert code == 0
    assert err.count("validation MAE") > 4  # auto says what it tries
    assert (tmp_path / "crystals-plugin" / "plugin.json").is_file()  # named after the table
    meta = json.loads((tmp_path / "crystals-plugin" / "plugin.json").read_text())
    assert f"chosen: {meta['chosen']}" in out
    best = min(meta["trials"], key=lambda trial: trial["val_mae"])
    assert meta["chosen"] == best["tried"]
    assert f"test  MAE {meta['figures']['test']['mae']:.4g} K" in out
    assert "--plugin crystals-plugin" in out
    assert "band_gap_ev" in out


def test_evaluate(run, tiny_model_folder, tiny_model, crystal_table, plugins):
    words = ["evaluate", crystal_table, "--target", TARGET, "--plugin", plugins[0],
             "--model", tiny_model_folder]  # fmt: skip
    code, out, err = run(*words, "--split-column", "split", "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    figures = json.loads(out)
    assert set(figures) >= {"mae", "rmse", "r2", "n", "unit"}
    assert figures == evaluate(
        crystal_table, TARGET, plugins[0], model=tiny_model, split_column="split"
    )
    where = ["--where", "family=fcc", "--where", " split = train", "--json"]
    assert json.loads(run(*words, *where)[1])["n"] == 16
    assert json.loads(run(*words, "--split-column", "split", "--split", "val", "--json")[1])[
        "n"] == 6  # fmt: skip
    code, out, _ = run(*words, "--split-column", "split")
    assert out.startswith(f"MAE {figures['mae']:.4g} K  RMSE {figures['rmse']:.4g} K  R² ")
    assert "n 6" in out


def test_evaluate_says_what_was_left_out(run, tiny_model_folder, crystal_frame, tmp_path):
    frame = crystal_frame.copy()
    frame.at[4, "numbers"] = np.full(2, 92)
    frame.to_parquet(tmp_path / "t.parquet")
    code, out, _ = run("evaluate", tmp_path / "t.parquet", "--target", "bulk_modulus_vrh_gpa",
                       "--model", tiny_model_folder)  # fmt: skip
    assert code == 0
    assert "left out: 1 rows, element unknown to the model" in out
    assert "mae_log10" in out


def test_models(run, tiny_model_folder, tiny_model, monkeypatch):
    monkeypatch.setattr(matxfer.model, "model_folders", lambda: [tiny_model_folder.parent])
    code, out, _ = run("models")
    assert code == 0
    parameters = sum(p.numel() for p in tiny_model.parameters())
    assert out.startswith(f"tiny: {parameters:,} parameters, 0.")
    assert all(name in out for name in tiny_model.heads)
    data = json.loads(run("models", "--json")[1])
    assert list(data) == ["tiny"]
    assert data["tiny"]["sha256"] == tiny_model.checksum
    code, out, _ = run("models", "tiny")
    assert code == 0
    assert tiny_model.checksum in out
    assert str(tiny_model_folder) in out
    assert json.loads(run("models", "tiny", "--json")[1]) == data["tiny"]
    code, _, err = run("models", "absent")
    assert code == 2
    assert "no model 'absent'" in err
    assert "tiny" in err
    # And a model is found by its name.
    code, out, _ = run("predict", "x.cif", "--model", "tiny")
    assert code == 1
    assert "band_gap_ev" in out.splitlines()[0]


def test_structure_column(run, tiny_model_folder, table_crystals, tmp_path):
    ase.io.write(tmp_path / "x.cif", table_crystals[2].to_ase())
    text = (tmp_path / "x.cif").read_text()
    pd.DataFrame({"relaxed": [text], "band_gap_ev": [1.0]}).to_csv(tmp_path / "t.csv")
    column = ("--structure-column", "relaxed", "--model", tiny_model_folder)
    assert run("predict", tmp_path / "t.csv", *column)[0] == 0
    code, out, _ = run("evaluate", "t.csv", "--target", "band_gap_ev", "--json", *column)
    assert (code, json.loads(out)["n"]) == (0, 1)
    code, _, err = run("predict", "t.csv", "--model", tiny_model_folder)
    assert code == 1
    assert "1 of 1" in err


# -- pretrain -----------------------------------------------------------------------------------
def test_the_example_of_pretrain_help_is_a_configuration(run, tmp_path):
    from matxfer.pretraining.config import read_config

    code, out, _ = run("pretrain", "--help")
    assert code == 0
    start = out.index("    name: mine")
    example = out[start : out.index("\n\n", start)]
    (tmp_path / "mine.yaml").write_text(example.replace("\n    ", "\n").removeprefix("    "))
    config = read_config(tmp_path / "mine.yaml")
    assert config.name == "mine"
    assert [source.denoise_angstrom for source in config.sources] == [0, 0.1, 0]
    for word in ("last.ckpt", "learning_curves.csv", "--resume", "GPU", "devices", "runs/NAME"):
        assert word in out


def interrupted(words, ready):
    """Press Ctrl-C, as a terminal does for all processes of a command, when a run is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from matxfer.cli import main; main()", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        ready(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err.strip()


def appears(path, wait):
    """Return a function that waits for a path, and then some seconds more."""

    def ready(_):
        for _ in range(600):
            if path.exists():
                break
            time.sleep(0.1)
        time.sleep(wait)

    return ready


def test_ctrl_c_in_training(tiny_model_folder, crystal_table, tmp_path):
    """Lightning would end the process without a word and with exit code 1."""
    words = ["finetune", crystal_table, "--target", TARGET, "--model", tiny_model_folder,
             "--freeze", 0, "--epochs", 100000, "--patience", 100000,
             "-o", tmp_path / "p"]  # fmt: skip
    # The folder is made just before the training starts.
    assert interrupted(words, appears(tmp_path / "p", 3)) == (130, "interrupted")


@pytest.fixture(scope="module")
def long_table(crystal_frame, tmp_path_factory):
    """Return a table that takes a while."""
    path = tmp_path_factory.mktemp("long") / "long.parquet"
    pd.concat([crystal_frame] * 400, ignore_index=True).to_parquet(path)
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_in_a_prediction_into_a_pipe(workers, tiny_model_folder, long_table):
    words = ["predict", long_table, "--model", tiny_model_folder, "--workers", workers]
    assert interrupted(words, lambda p: p.stdout.read(20000)) == (130, "interrupted")


def test_ctrl_c_in_a_prediction_into_a_file(tiny_model_folder, long_table, tmp_path):
    words = ["predict", long_table, "--model", tiny_model_folder, "-o", tmp_path / "out.csv"]
    part = tmp_path / "out.csv.part"
    expected = (130, f"interrupted; the rows so far are in {part}")
    assert interrupted(words, appears(part, 1)) == expected
    assert part.exists()
    assert not (tmp_path / "out.csv").exists()


def test_ctrl_c_in_an_evaluation(tiny_model_folder, long_table, tmp_path, monkeypatch):
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path / "cache"))
    words = ["evaluate", long_table, "--target", "bulk_modulus_vrh_gpa", "--model",
             tiny_model_folder]  # fmt: skip
    assert interrupted(words, lambda _: time.sleep(4)) == (130, "interrupted")
