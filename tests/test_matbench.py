"""Matbench v0.1: folds and ids of the benchmark, no test value seen, a submission of its layout."""

from __future__ import annotations

import gzip
import hashlib
import json
import runpy
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from matxfer.benchmark import matbench_play
from matxfer.benchmark.matbench import N_FOLDS, TASKS, file_of, log10_of, read_task
from matxfer.benchmark.matbench_files import checksum, results, write_submission
from matxfer.benchmark.matbench_play import play, predictions, run_of, scores
from matxfer.benchmark.matbench_report import notes_on, published_in
from matxfer.crystal import Crystal
from matxfer.data.table import TableError
from matxfer.errors import OptionError

PHONONS = TASKS["phonons"]
QUICK = {"strategy": "features", "features": "ridge"}

#: First digits of the SHA-256 of [[train ids, test ids] of each fold] as JSON, from the file
#: matbench_v0.1_validation.json of the package matbench 0.6.
OFFICIAL_FOLDS = {
    "jdft2d": "17a69288422d840b",
    "phonons": "10e3dbfbf4f11b2e",
    "dielectric": "d05ebee14a3adbe5",
    "log_gvrh": "207fa5464316e572",
    "log_kvrh": "8913f7a07c1542ee",
    "perovskites": "ba420626977eac85",
    "mp_gap": "25a1accc5980e4dc",
    "mp_e_form": "01bfb3923b87089a",
}


@pytest.fixture(scope="module")
def frame(crystal_frame):
    """Return 60 crystals with made-up values of some tasks."""
    rng = np.random.default_rng(3)
    values = 40.0 * crystal_frame["formation_energy_ev_per_atom"] + rng.normal(0, 1, 60) + 200
    return crystal_frame[["lattice", "numbers", "frac_coords"]].assign(
        last_phdos_peak_cm1=values,
        is_metal=crystal_frame["family"] == "fcc",
        shear_modulus_vrh_gpa=crystal_frame["bulk_modulus_vrh_gpa"] / 2,
    )


@pytest.fixture(scope="module")
def folder(frame, tmp_path_factory):
    root = tmp_path_factory.mktemp("matbench")
    for name in ("phonons", "mp_is_metal", "log_gvrh"):
        frame.to_parquet(root / f"matbench_{name}.parquet")
    return root


@pytest.fixture(scope="module")
def data(folder):
    return read_task(PHONONS, folder, stand_in=True)


def ran(base, data, options=QUICK, repeats=1, folds=range(N_FOLDS)):
    return [play(base, data, run_of(base, data, fold, options, repeats)) for fold in folds]


def with_runs(base, data, records):
    return [r | {"run": run_of(base, data, k, QUICK, 1)} for k, r in enumerate(records)]


# -- the benchmark's own ----------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(OFFICIAL_FOLDS))
def test_folds_and_ids_are_those_of_the_package(name):
    task = TASKS[name]
    ids = task.ids(task.rows)
    folds = [
        [[ids[k] for k in rows] for rows in parts] for parts in task.folds(np.zeros(task.rows))
    ]
    found = hashlib.sha256(json.dumps(folds).encode()).hexdigest()
    assert found[:16] == OFFICIAL_FOLDS[name]


def test_classes_are_stratified():
    labels = np.arange(1000) % 10 == 0
    parts = TASKS["mp_is_metal"].folds(labels.astype(float))
    assert [int(labels[test].sum()) for _, test in parts] == [20] * N_FOLDS
    assert TASKS["mp_is_metal"].ids(106113)[0] == "mb-mp-is-metal-000001"


def test_scores_are_those_of_scikit_learn():
    from sklearn import metrics

    rng = np.random.default_rng(0)
    truth, said = rng.normal(size=50), rng.normal(size=50)
    truth[3] = 0.0  # without a percentage
    found = scores(truth, said, classes=False)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(truth, said))
    assert found["rmse"] == pytest.approx(metrics.mean_squared_error(truth, said) ** 0.5)
    assert found["max_error"] == pytest.approx(metrics.max_error(truth, said))
    rest = np.arange(50) != 3
    expected = metrics.mean_absolute_percentage_error(truth[rest], said[rest])
    assert found["mape"] == pytest.approx(expected)
    label, probability = truth > 0, rng.uniform(size=50)
    found = scores(label.astype(float), probability, classes=True)
    assert found["rocauc"] == pytest.approx(found["balanced_accuracy"])
    assert found["f1"] == metrics.f1_score(label, probability > 0.5)


@pytest.mark.data
def test_the_shared_table_is_the_benchmarks(shared_data):
    data = read_task(PHONONS, shared_data)
    assert not data.stand_in
    assert data.ids[0] == "mb-phonons-0001"
    assert all(isinstance(c, Crystal) for c in data.crystals)


# -- local files ------------------------------------------------------------------------------
def test_other_rows_are_refused(folder, frame, tmp_path):
    with pytest.raises(OptionError, match=r"has 60 rows where the benchmark has 1265.*--stand-in"):
        read_task(PHONONS, folder)
    path = tmp_path / "matbench_phonons.parquet"
    with pytest.raises(OptionError, match="matxfer datasets fetch matbench_phonons"):
        read_task(PHONONS, tmp_path)
    values = frame["last_phdos_peak_cm1"]
    spread = (values - values.mean()).abs().mean()
    small = replace(PHONONS, rows=60, spread=spread)
    assert not read_task(small, folder).stand_in
    frame.assign(last_phdos_peak_cm1=values / 33.356).to_parquet(path)  # THz
    with pytest.raises(OptionError, match="unit or values are others"):
        read_task(small, tmp_path)
    frame.assign(last_phdos_peak_cm1=values.where(values.index != 7)).to_parquet(path)
    with pytest.raises(OptionError, match="row 7 has no value"):
        read_task(small, tmp_path, stand_in=True)
    frame.drop(columns="last_phdos_peak_cm1").to_parquet(path)
    with pytest.raises(OptionError, match=r"no column 'last_phdos_peak_per_cm' or 'last_ph"):
        read_task(small, tmp_path, stand_in=True)
    frame.head(9).to_parquet(path)
    with pytest.raises(OptionError, match="9 rows are too few"):
        read_task(PHONONS, tmp_path, stand_in=True)
    frame.assign(is_metal=2).to_parquet(tmp_path / "matbench_mp_is_metal.parquet")
    with pytest.raises(OptionError, match="true or false"):
        read_task(TASKS["mp_is_metal"], tmp_path, stand_in=True)


@pytest.mark.parametrize("name", ["phonons", "mp_is_metal", "log_gvrh"])
def test_published_files_and_tables_are_the_same(name, folder, table_crystals, tmp_path):
    task = TASKS[name]
    table = read_task(task, folder, stand_in=True)
    cells = [bool(v) for v in table.values] if task.classes else table.values.tolist()
    structures = [c.to_pymatgen().as_dict() for c in table_crystals]
    content = {
        "index": list(range(60)),
        "columns": ["structure", task.published],
        "data": [list(row) for row in zip(structures, cells, strict=True)],
    }
    path = tmp_path / f"{task.name}.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    assert file_of(task, tmp_path) == path
    published = read_task(task, tmp_path, stand_in=True)
    np.testing.assert_allclose(published.values, table.values)
    assert [c.formula for c in published.crystals] == [c.formula for c in table.crystals]


def test_moduli_are_in_the_benchmarks_logarithm(folder, frame):
    found = read_task(TASKS["log_gvrh"], folder, stand_in=True).values
    np.testing.assert_allclose(10**found, frame["shear_modulus_vrh_gpa"])
    assert np.isneginf(log10_of(np.zeros(1)))


# -- playing ----------------------------------------------------------------------------------
def test_a_fold_learns_from_its_training_rows_alone(tiny_model, data):
    run = run_of(tiny_model, data, 2, QUICK, 1)
    found = play(tiny_model, data, run)
    train, test = PHONONS.folds(data.values)[2]
    assert len(found["predictions"]) == len(test)
    other = data.values.copy()
    other[test] = 1.0
    again = play(tiny_model, replace(data, values=other), run)
    assert again["predictions"] == found["predictions"]
    assert again["scores"]["mae"] > found["scores"]["mae"]
    other = data.values.copy()
    other[train[0]] += 500.0
    assert play(tiny_model, replace(data, values=other), run)["predictions"] != found["predictions"]
    constant = np.abs(data.values[test] - np.median(data.values[train])).mean()
    assert found["scores"]["mae"] < constant


def test_options_repeats_and_folds_matter(tiny_model, data):
    (plain,) = ran(tiny_model, data, folds=[0])
    (mean,) = ran(tiny_model, data, repeats=3, folds=[0])
    assert len(mean["parameters"]["chosen"]) == len(mean["parameters"]["validation_mae"]) == 3
    assert mean["predictions"] != plain["predictions"]
    (forest,) = ran(tiny_model, data, QUICK | {"features": "forest"}, folds=[0])
    assert forest["predictions"] != plain["predictions"]
    (log,) = ran(tiny_model, data, QUICK | {"target_transform": "log"}, folds=[0])
    assert log["predictions"] != plain["predictions"]


def test_structures_that_cannot_be_used_are_told(tiny_model, data):
    train, test = PHONONS.folds(data.values)[0]
    crystals = list(data.crystals)
    foreign = Crystal(3 * np.eye(3), [79], [[0, 0, 0]])
    crystals[test[1]] = crystals[train[5]] = foreign
    (found,) = ran(tiny_model, replace(data, crystals=crystals), folds=[0])
    assert found["parameters"]["unusable_test_structures"] == 1
    assert found["predictions"][1] == np.median(data.values[train])
    notes = notes_on(tiny_model, [(data, [found])], {})
    assert any("1 test structure(s) cannot be used" in note for note in notes)


def test_moduli_and_classes_are_played(tiny_model, folder):
    moduli = read_task(TASKS["log_gvrh"], folder, stand_in=True)
    (found,) = ran(tiny_model, moduli, folds=[1])
    assert found["scores"]["mae"] < np.abs(moduli.values - np.median(moduli.values)).mean()
    classes = read_task(TASKS["mp_is_metal"], folder, stand_in=True)
    (found,) = ran(tiny_model, classes, {}, folds=[1])
    assert all(0 <= p <= 1 for p in found["predictions"])
    assert found["auc"] > 0.9
    with pytest.raises(OptionError, match="with all layers frozen, without strategy, features"):
        ran(tiny_model, classes, folds=[1])


# -- the submission ---------------------------------------------------------------------------
def hash_of_the_package(content):
    """Return what ``hash_dictionary`` of the package says, written down again."""

    def ordered(d):
        return {k: ordered(v) if isinstance(v, dict) else v for k, v in sorted(d.items())}

    return hashlib.sha256(json.dumps(ordered(content)).encode()).hexdigest()


def test_results_have_the_layout_of_the_package(tiny_model, data):
    records = with_runs(tiny_model, data, ran(tiny_model, data))
    found = json.loads(json.dumps(results([(data, records)], {"who": "we"})))
    said = found.pop("hash")
    assert said == hash_of_the_package(found) == checksum(found)
    assert set(found) == {"@module", "@class", "version", "benchmark_name", "tasks",
                          "user_metadata", "datestamp"}  # fmt: skip
    task = found["tasks"]["matbench_phonons"]
    assert task["dataset_name"] == "matbench_phonons"
    folds = task["results"]
    assert list(folds) == [f"fold_{k}" for k in range(N_FOLDS)]
    ids = [name for fold in folds.values() for name in fold["data"]]
    assert sorted(ids) == [f"mb-phonons-{k:02d}" for k in range(1, 61)]
    for fold in folds.values():
        assert set(fold) == {"data", "parameters", "scores"}
        truth = np.array([data.values[int(name[-2:]) - 1] for name in fold["data"]])
        error = np.abs(np.array(list(fold["data"].values())) - truth)
        assert fold["scores"]["mae"] == pytest.approx(error.mean())


def test_the_package_finds_a_submission_valid(tiny_model, data, tmp_path):
    bench = pytest.importorskip(
        "matbench.bench", reason="pip install matbench to check against the package itself"
    )
    rng = np.random.default_rng(0)
    values = rng.normal(size=PHONONS.rows)
    whole = replace(data, values=values)
    records = [
        {
            "run": run_of(tiny_model, whole, fold, {}, 1),
            "predictions": rng.normal(size=len(test)).tolist(),
            "scores": scores(values[test], values[test] + 1, classes=False),
            "parameters": {"chosen": ["x"], "unusable_test_structures": 0},
        }
        for fold, (_, test) in enumerate(PHONONS.folds(values))
    ]
    write_submission(tmp_path, [(whole, records)], algorithm="a", authors="b", notes=["n"])
    text = gzip.decompress((tmp_path / "results.json.gz").read_bytes()).decode()
    found = bench.MatbenchBenchmark.from_dict(json.loads(text))
    assert found.is_valid
    assert found.is_recorded
    assert found.scores["matbench_phonons"]["mae"]["mean"] == pytest.approx(1.0)


def test_the_source_of_a_submission_does_the_same(
    tiny_model, tiny_model_folder, data, frame, tmp_path, monkeypatch
):
    records = with_runs(tiny_model, data, ran(tiny_model, data))
    write_submission(tmp_path, [(data, records)], algorithm="a", authors="b", notes=["n"])
    info = json.loads((tmp_path / "info.json").read_text())
    assert all(info[k] for k in ("authors", "algorithm", "algorithm_long", "bibtex_refs",
                                 "requirements", "notes"))  # fmt: skip
    source = (tmp_path / "run.py").read_text()
    assert "MODEL = 'tiny'" in source
    (tmp_path / "run.py").write_text(source.replace("'tiny'", repr(str(tiny_model_folder))))
    recorded, folds = {}, PHONONS.folds(data.values)
    structures = pd.Series([c.to_pymatgen() for c in data.crystals])

    class FakeTask:
        dataset_name, folds = "matbench_phonons", range(N_FOLDS)

        def load(self):
            self.loaded = True

        def get_train_and_val_data(self, fold):
            rows = folds[fold][0]
            return structures[rows], pd.Series(data.values)[rows]

        def get_test_data(self, fold, include_target):
            assert self.loaded
            assert not include_target
            return structures[folds[fold][1]]

        def record(self, fold, predicted, params):
            recorded[fold] = predicted

    class FakeBenchmark:
        def __init__(self, autoload, subset):
            assert subset == ["matbench_phonons"]
            self.tasks = [FakeTask()]

        def to_file(self, name):
            recorded["file"] = name

    module = types.ModuleType("matbench.bench")
    module.MatbenchBenchmark = FakeBenchmark
    monkeypatch.setitem(sys.modules, "matbench", types.ModuleType("matbench"))
    monkeypatch.setitem(sys.modules, "matbench.bench", module)
    runpy.run_path(str(tmp_path / "run.py"))
    assert recorded.pop("file") == "results.json"
    for fold, record in enumerate(records):
        np.testing.assert_allclose(recorded[fold], record["predictions"], rtol=1e-4)


# -- the command ------------------------------------------------------------------------------
@pytest.fixture
def run(run, tmp_path, folder, tiny_model_folder):
    def call(*words, where=folder):
        given = ["--data", where, "--model", tiny_model_folder, "--threads", 1, "-o", tmp_path]
        return run("benchmark", "matbench", *given, *words)

    return call


def test_command_resumes_and_writes_a_submission(run, tmp_path, monkeypatch):
    words = ("--tasks", "matbench_phonons", "--strategy", "features", "--stand-in")
    code, out, err = run(*words, "--folds", "0,3")
    assert code == 0, err
    assert "2 of 5, stand-in" in out
    assert "no submission was written" in err
    assert not (tmp_path / "results.json.gz").exists()
    played = []
    monkeypatch.setattr(
        matbench_play, "play", lambda *a, real=play: played.append(a[2]["fold"]) or real(*a)
    )
    code, out, err = run(*words, "--authors", "A. Uthor", "--json")
    assert code == 0, err
    assert "5 folds, 2 of them in" in err
    assert "Not the benchmark's rows: matbench_phonons. Not to be submitted." in err
    assert played == [1, 2, 4]
    found = json.loads(out)["tasks"]["matbench_phonons"]
    whole = json.loads(gzip.decompress((tmp_path / "results.json.gz").read_bytes()))
    folds = whole["tasks"]["matbench_phonons"]["results"].values()
    assert found["mae"]["mean"] == pytest.approx(np.mean([f["scores"]["mae"] for f in folds]))
    assert "Not to be submitted" in json.loads((tmp_path / "info.json").read_text())["notes"]
    assert "# Matbench v0.1" in (tmp_path / "matbench.md").read_text()
    run(*words, "--repeats", "2")  # another run: all folds again
    assert played[3:] == [0, 1, 2, 3, 4]


def test_command_says_what_is_wrong(run, tmp_path):
    for words, text in (
        (("--tasks", "phonos"), "'phonos' is not among"),
        (("--folds", "5"), "there are 0, 1, 2, 3, 4"),
        (("--tasks", "jdft2d"), "there is no matbench_jdft2d.parquet"),
        (("--tasks", "phonons"), "its folds would be others"),
        (("--tasks", "log_gvrh"), "was pretrained on labels of log_gvrh"),
        (("--strategy", "none"), "must be one of"),
        (("--threads", "0"), "--threads is 0"),
    ):
        extra = () if "would be" in text else ("--stand-in",)
        code, _, err = run(*words, *extra)
        assert code == 2, err
        assert text in err
    code, _, err = run(where=tmp_path)
    assert code == 2
    assert "there is no task" in err


def test_tasks_that_the_base_has_seen_are_left_out_or_told(run):
    quick = ("--strategy", "features", "--stand-in", "--folds", "0")
    code, out, err = run(*quick)
    assert code == 0, err
    assert "left out" in err
    assert "matbench_log_gvrh" not in out
    code, out, err = run(*quick, "--tasks", "log_gvrh", "--seen-labels")
    assert code == 0, err
    assert "no measure of transfer" in err
    code, _, err = run("--tasks", "log_gvrh", "--strategy", "scratch", "--epochs", "1",
                       "--stand-in", "--folds", "0")  # fmt: skip
    assert code == 0, err
    assert "labels" not in err


def test_published_results_are_read_and_damage_is_told(tmp_path):
    assert published_in(tmp_path / "nothing" / "there") == {}
    (tmp_path / "published_results.json").write_text('{"matbench": {"tasks": {"phonons": {}}}}')
    assert published_in(tmp_path) == {"phonons": {}}
    (tmp_path / "published_results.json").write_text('{"other": 1}')
    with pytest.raises(TableError, match="holds no results of Matbench"):
        published_in(tmp_path)


def test_predictions_take_what_the_package_gives(tiny_model, data):
    train, test = PHONONS.folds(data.values)[0]
    structures = [data.crystals[k].to_pymatgen() for k in train]
    found, said = predictions(
        PHONONS, structures, data.values[train], [data.crystals[k].to_pymatgen() for k in test],
        fold=0, model=tiny_model, options=QUICK,
    )  # fmt: skip
    (record,) = ran(tiny_model, data, folds=[0])
    np.testing.assert_allclose(found, record["predictions"], rtol=1e-4)
    assert said["unusable_test_structures"] == 0
