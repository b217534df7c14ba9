"""``matxfer benchmark``: what is run, what is kept, and what the tables say, on tiny data."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import matxfer.cli
from matxfer.benchmark import curves, plane, records, summary
from matxfer.benchmark.bench import Bench, source_errors
from matxfer.benchmark.tasks import DataFolder
from matxfer.benchmark.transfer import frozen, named, retained, variants
from matxfer.data.table import TableError
from matxfer.errors import OptionError
from matxfer.transfer.finetune import finetune

TARGET = "debye_temperature_k"
ARRAYS = ["material_id", "lattice", "numbers", "frac_coords"]


@pytest.fixture(scope="module")
def folder(crystal_frame, tmp_path_factory):
    """Return a folder of data tables: two small tasks, two source tables, published results."""
    root = tmp_path_factory.mktemp("shared") / "data"
    (root / "small_tasks").mkdir(parents=True)
    frame, n = crystal_frame[ARRAYS], len(crystal_frame)
    parts = np.array(["train"] * 7 + ["val", "test", "test"])[np.arange(n) % 10]
    for k, name in enumerate(("toy_debye", "toy_other")):
        rng = np.random.default_rng(k)
        splits = {f"split_{s}": parts[rng.permutation(n)] for s in (0, 1)}
        task = frame.assign(formula=[f"T{i}" for i in range(n)], n_sites=1, **splits)
        task[TARGET] = crystal_frame[TARGET] * (1 + k)
        task.to_parquet(root / "small_tasks" / f"{name}.parquet")
    source = frame.assign(
        formula=[f"T{i}" if i < 6 else f"S{i}" for i in range(n)],
        split=np.array(["train", "test"])[np.arange(n) % 2],
    )
    source.assign(
        formation_energy_ev_per_atom=crystal_frame["formation_energy_ev_per_atom"],
        band_gap_ev=np.where(np.arange(n) % 3, 1.5, np.nan),
        structure_source=["crysxpp" if i % 5 else "mp2025" for i in range(n)],
    ).to_parquet(root / "mp_formation_energy.parquet")
    source.assign(
        bulk_modulus_vrh_gpa=crystal_frame["bulk_modulus_vrh_gpa"],
        shear_modulus_vrh_gpa=crystal_frame["bulk_modulus_vrh_gpa"] / 2,
        source=["matcalc" if i % 4 else "mp_legacy" for i in range(n)],
    ).to_parquet(root / "mp_elasticity.parquet")
    published = {"methods": {"good": "", "bad": ""},
                 "tasks": {"toy_debye": {"good": 1e-9, "bad": 1e9, "unit": "K"}}}  # fmt: skip
    (root.parent / "published_results.json").write_text(json.dumps({"small_tasks": published}))
    return root


@pytest.fixture
def bench(tiny_model, folder):
    return Bench(tiny_model, DataFolder(folder), epochs=15)


@pytest.fixture
def run(run, folder, tiny_model_folder):
    """Return a function that runs ``matxfer benchmark``: (exit code, stdout, stderr)."""

    def call(command, *words, data=folder):
        common = ["--data", data, "--model", tiny_model_folder, "--threads", 1, "-o", "out"]
        common += ["--tasks", "toy_debye", "--epochs", 15]
        return run("benchmark", command, *common, *words)

    return call


def lines():
    return [json.loads(line) for line in Path("out/runs.jsonl").read_text().splitlines()]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -- the command ------------------------------------------------------------------------------
def test_transfer(run, tiny_model, folder, tmp_path):
    names = "auto,scratch,features,0 frozen,0 frozen + EWC"
    code, out, err = run("transfer", "--variants", names, "--splits", "0,1")
    assert code == 0
    assert "10 runs, 0 of them" in err
    assert len(lines()) == 10
    assert out.rstrip() == (tmp_path / "out" / "transfer.md").read_text().rstrip()
    header = next(line for line in out.splitlines() if line.startswith("| task"))
    cells = [cell.strip() for cell in header.split("|")[1:-1]]
    assert cells == ["task", "unit", "splits", *names.split(","), "good", "bad"]
    # The figures are those of a fine-tuning by hand.
    record = next(r for r in lines() if r["run"]["options"].get("retain") == "ewc")
    assert record["run"]["options"] == retained("ewc", 1.0, 0) | {"epochs": 15}
    plugin = finetune(
        folder / "small_tasks" / "toy_debye.parquet", TARGET, model=tiny_model,
        split_column="split_0", seed=0, strategy="finetune", freeze=0, retain="ewc", epochs=15,
    )  # fmt: skip
    assert record["test"] == pytest.approx(plugin.meta["figures"]["test"]["mae"], rel=1e-6)
    assert record["val"] == pytest.approx(plugin.meta["figures"]["val"]["mae"], rel=1e-6)
    assert record["coverage"] == plugin.meta["figures"]["test"]["coverage"]
    # Runs differ where their options do, and by split.
    tried = [r for r in lines() if r["run"]["options"]["strategy"] != "auto"]
    by_split = [[r["test"] for r in tried if r["run"]["split"] == split] for split in (0, 1)]
    assert len(set(by_split[0])) == 4
    assert all(a != b for a, b in zip(*by_split, strict=True))

    code, out, err = run("transfer", "--variants", names, "--splits", "0,1", "--json")
    assert "10 runs, 10 of them" in err
    result = json.loads(out)
    assert set(result["test_mae"]["toy_debye"]) == set(names.split(","))
    assert result["against_published"] == {"good": [0, 1], "bad": [1, 1]}
    assert result["mean_ranks"] == {"good": 1, "auto": 2, "bad": 3}


def test_a_killed_benchmark_goes_on(run, monkeypatch, tmp_path):
    words = ["transfer", "--variants", "features,readouts", "--splits", "0,1"]
    run(*words)
    path = tmp_path / "out" / "runs.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # the last of four lines is cut off
    measured = []
    measure = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda *a: measured.append(a[1]) or measure(*a))
    code, _, err = run(*words)
    assert code == 0
    assert "1 line(s) cannot be read" in err
    assert "4 runs, 3 of them" in err
    assert len(measured) == 1
    again = records.Records(path).read()
    assert again[-1]["run"] == json.loads(whole.splitlines()[-1])["run"]
    before, after = json.loads(whole.splitlines()[-1]), again[-1]
    assert after["test"] == before["test"]
    assert "cannot be read" in run(*words)[2]  # said again, but nothing is run
    assert len(measured) == 1


def test_curves(run, tmp_path):
    words = ["--variants", "readouts,scratch", "--splits", "0", "--shares", "50,100"]
    code, out, _ = run("curves", *words)
    assert code == 0
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = read_csv(tmp_path / "out" / "curves.csv")
    assert [(r["variant"], r["share"], r["train_rows"]) for r in rows] == [
        ("scratch", "0.5", "21"), ("scratch", "1.0", "42"),
        ("readouts", "0.5", "21"), ("readouts", "1.0", "42"),
    ]  # fmt: skip
    assert len({r["test_mae"] for r in rows}) == 4
    assert f"| {'50%':<5}" in out
    # With all rows it is a run of the transfer table, and is not run again.
    assert "1 runs, 1 of them" in run("transfer", "--variants", "readouts", "--splits", "0")[2]


def test_plane(run, tiny_model, tmp_path):
    words = ["--methods", "ewc,l2sp,replay,freezing", "--strengths", "0,10,1000", "--json"]
    code, out, _ = run("plane", *words)
    assert code == 0
    assert (tmp_path / "out" / "plane.png").read_bytes().startswith(b"\x89PNG")
    points = {(r["method"], r["strength"]): r for r in json.loads(out)["rows"]}
    assert set(points) == {
        *((way, s) for way in ("ewc", "l2sp", "replay") for s in (0, 10, 1000)),
        *(("freezing", depth) for depth in range(tiny_model.backbone.n_layers + 1)),
    }
    assert len(lines()) == len(points) - 3  # they start from one point
    free = points["freezing", 0]
    assert points["ewc", 0]["test_mae"] == points["l2sp", 0]["test_mae"] == free["test_mae"]
    assert points["freezing", tiny_model.backbone.n_layers]["source_change"] == 0
    # Every setting has an effect, on the target and on the source.
    for what in ("test_mae", "source_change"):
        assert len({p[what] for p in points.values()}) == len(lines())
    changes = [v for k, v in free.items() if k.startswith("change_")]
    assert len(changes) == 4
    assert free["source_change"] == pytest.approx(np.mean(changes))
    assert len(read_csv(tmp_path / "out" / "plane.csv")) == len(points)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transfer", "--variants", "magic"], "--variants: 'magic' is not among"),
        (["transfer", "--variants", ","], "write names with commas"),
        (["transfer", "--tasks", "nowhere"], "--tasks: 'nowhere' is not among ['toy_debye'"),
        (["transfer", "--splits", "x"], "write numbers with commas"),
        (["transfer", "--splits", "7", "--variants", "features"], "no column 'split_7'"),
        (["transfer", "--threads", "0"], "must be at least 1"),
        (["curves", "--shares", "0,50"], "write percent of the rows, from 1 to 100"),
        (["plane", "--strengths", "1,-2"], "--strengths '1,-2': write numbers"),
        (["plane", "--methods", "ewc,prayer"], "--methods: 'prayer'"),
    ],
)
def test_wrong_options(run, words, message):
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""


def test_no_data(run, tmp_path):
    code, _, err = run("transfer", data=tmp_path / "nowhere")
    assert code == 2
    assert "there is no folder 'small_tasks' in it; give the folder" in err
    assert "--data or $MATXFER_DATA" in err


def test_data_folder_of_the_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MATXFER_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "argv", ["matxfer", "benchmark", "transfer"])
    with pytest.raises(SystemExit):
        matxfer.cli.main()
    assert f"{tmp_path / 'elsewhere'}: there is no folder" in capsys.readouterr().err


def test_no_published_results(run, folder, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "data").symlink_to(folder)
    assert DataFolder(tmp_path / "alone" / "data").published  # beside the real folder
    bare = tmp_path / "bare" / "data"
    bare.mkdir(parents=True)
    for path in folder.iterdir():
        (bare / path.name).symlink_to(path)
    code, out, err = run("transfer", "--variants", "features", "--splits", "0", data=bare)
    assert code == 0
    assert "no published results in" in err
    assert "put the file there" in err
    header = next(line for line in out.splitlines() if line.startswith("| task"))
    assert "good" not in header
    (bare / "published_results.json").write_text('{"small_tasks": ')
    with pytest.raises(TableError, match=r"published_results\.json: not a file of published"):
        _ = DataFolder(bare).published


# -- data -------------------------------------------------------------------------------------
def test_thinned_training_rows_are_nested(folder):
    task = DataFolder(folder).task("toy_debye")
    words = task.frame["split_0"].to_numpy()

    def kept(share, seed=0):
        found = task.thinned("split_0", share, seed)["split_0"].to_numpy()
        assert (found == words)[words != "train"].all()
        assert set(found[words == "train"]) <= {"train", "unused"}
        return set(np.flatnonzero(found == "train"))

    assert [len(kept(share)) for share in (0.1, 0.25, 0.5, 1)] == [4, 10, 21, 42]
    assert kept(0.1) < kept(0.25) < kept(0.5) < kept(1)
    assert kept(0.5, seed=1) != kept(0.5)
    assert (task.frame["split_0"].to_numpy() == words).all()  # the table itself is untouched


def test_source_rows(folder):
    data = DataFolder(folder)
    tables = {
        name: pd.read_parquet(folder / f"{name}.parquet")
        for name in ("mp_formation_energy", "mp_elasticity")
    }
    for part in ("test", "train"):
        energies, moduli = tables.values()
        ids = [
            *energies[(energies.split == part) & (energies.structure_source == "crysxpp")
                      & energies.formula.str.startswith("S")].material_id,
            *moduli[(moduli.split == part) & (moduli.source == "matcalc")
                    & moduli.formula.str.startswith("S")].material_id,
        ]  # fmt: skip
        assert list(data.source_rows(part, 1000).material_id) == ids
    few = [list(data.source_rows("test", 5, seed).material_id) for seed in (0, 0, 1)]
    assert len(few[0]) == 10
    assert few[0] == few[1] != few[2]
    with pytest.raises(TableError, match="no blind row with structure_source in"):
        data.source_rows("blind", 5)


def test_source_tables_are_needed(folder, tmp_path):
    (tmp_path / "small_tasks").symlink_to(folder / "small_tasks")
    with pytest.raises(TableError, match=r"mp_formation_energy.parquet: not there, but"):
        DataFolder(tmp_path).source_rows("test", 5)


def test_unknown_task(folder):
    with pytest.raises(OptionError, match=r"no task 'x'; choose among .*'toy_debye', 'toy_other'"):
        DataFolder(folder).task("x")


# -- a run ------------------------------------------------------------------------------------
def test_forgetting_is_what_finetune_reports(bench, tiny_model):
    task = bench.data.task("toy_debye")
    plugin = finetune(
        task.path, TARGET, model=tiny_model, split_column="split_0", freeze=1, epochs=15,
        source_data=bench.data.source_rows("test", 1000),
    )  # fmt: skip
    expected = plugin.meta["retention"]["source_error"]
    assert set(expected) == set(tiny_model.heads)
    assert any(abs(entry["change"]) > 1e-3 for entry in expected.values())
    found = source_errors(plugin, bench.held_out)
    assert found == expected
    assert bench.measure(bench.run("toy_debye", 0, frozen(1)))["source"] == expected
    held_out = set(bench.data.source_rows("test", 1000).material_id)
    assert not set(bench.rehearsal.material_id) & held_out


def test_validation_errors_by_epoch_are_on_the_scale_of_the_target(bench):
    """Their smallest is the validation MAE, up to the rounding of the weights."""
    record = bench.measure(bench.run("toy_debye", 0, frozen(2)))
    assert min(record["val_errors"]) == pytest.approx(record["val"], rel=2e-3)


def test_a_run_says_what_it_depends_on(tiny_model, folder):
    data = DataFolder(folder)
    plain, short = Bench(tiny_model, data), Bench(tiny_model, data, epochs=3)
    run = plain.run("toy_debye", 1, frozen(2))
    assert run["options"] == frozen(2)
    assert run["weights"] == tiny_model.checksum[:12]
    assert short.run("toy_debye", 1, frozen(2))["options"] == {**frozen(2), "epochs": 3}
    assert named(plain, [{"run": run}])[0]["variant"] == "2 frozen"
    assert named(short, [{"run": run}]) == []
    assert named(plain, [{"run": {**run, "share": 0.5}}]) == []
    assert len({json.dumps(o, sort_keys=True) for o in variants(3).values()}) == 10


# -- raw results ------------------------------------------------------------------------------
def test_records(tmp_path):
    told = []
    kept = records.Records(tmp_path / "new" / "runs.jsonl", told.append)
    other = records.Records(kept.path)
    assert kept.read() == []
    kept.append({"run": {"a": 1, "b": 2}, "test": 0.1})
    other.append({"run": {"b": 2, "a": 1}, "test": 0.2})  # the same run: the first one counts
    other.append({"run": {"a": 2}, "test": 0.3})
    assert [r["test"] for r in kept.read()] == [0.1, 0.3]
    with kept.path.open("a") as file:
        file.write('{"run": {"a": 3}, "te')  # killed while it wrote
    kept.append({"run": {"a": 4}, "test": 0.4})
    assert [r["test"] for r in kept.read()] == [0.1, 0.3, 0.4]
    assert kept.find({"a": 3}) is None
    assert len(told) == 1
    assert "1 line(s) cannot be read" in told[0]


def test_a_run_that_appears_meanwhile_is_not_done_again(tmp_path):
    kept = records.Records(tmp_path / "runs.jsonl")
    done = []

    def measure(run):
        done.append(run["k"])
        if run["k"] == 0:  # another process is faster with the next one
            records.Records(kept.path).append({"run": {"k": 1}, "test": 5})
        return {"test": run["k"]}

    found = records.complete(kept, [{"k": k} for k in (0, 1, 2)], measure)
    assert done == [0, 2]
    assert [r["test"] for r in found] == [0, 5, 2]


CHILD = """
import sys
from pathlib import Path
from matxfer.benchmark.records import Claims, Records
path = Path(sys.argv[1])
with Claims(path).claim({"k": 0}, wait=False) as ours:
    print(ours, flush=True)
    word = sys.stdin.readline()
    if word == "done\\n":
        Records(path).append({"run": {"k": 0}, "test": 7})
"""


@pytest.mark.parametrize(("word", "order"), [("done", [1, 2]), ("killed", [1, 2, 0])])
def test_two_processes_share_the_work(word, order, tmp_path):
    path, done = tmp_path / "runs.jsonl", []
    words = [sys.executable, "-c", CHILD, str(path)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"

    def measure(run):
        done.append(run["k"])
        if run["k"] == 2:
            other.stdin.write(f"{word}\n")
            other.stdin.flush()
        return {"test": run["k"]}

    found = records.complete(records.Records(path), [{"k": k} for k in (0, 1, 2)], measure)
    other.communicate(timeout=30)
    assert done == order
    assert [r["test"] for r in found] == [7 if word == "done" else 0, 1, 2]


# -- what the tables say ----------------------------------------------------------------------
def record(task, split, variant, test, change=0.0, gap=0.0):
    source = {"e": {"change": change}, "gap": {"change": gap}}
    return {"run": {"task": task, "split": split}, "variant": variant, "test": test,
            "source": source}  # fmt: skip


def test_summary_by_hand():
    found = [
        record("a", 0, "auto", 1.0), record("a", 1, "auto", 3.0),
        record("a", 0, "scratch", 2.0), record("a", 1, "scratch", 2.0),
        record("b", 0, "auto", 1.0), record("b", 0, "scratch", 4.0), record("b", 1, "auto", 9.0),
        record("c", 0, "auto", 3.0), record("c", 0, "scratch", 2.0),
        record("a", 0, "0 frozen", 1.0, 0.5, 0.1), record("a", 1, "0 frozen", 3.0, 0.7, 0.3),
        record("b", 0, "0 frozen", 2.0, 1.0, 0.0),
        record("a", 0, "0 frozen + EWC", 1.1, 0.02), record("b", 0, "0 frozen + EWC", 2.0, 0.04),
    ]  # fmt: skip
    published = {
        "a": {"x": 2.5, "y": 1.5},  # auto 2.0 is second
        "b": {"x": 5.0, "y": 6.0},  # auto 5.0 shares the first place with x
        "c": {"x": 1.0},  # y is unknown, so it does not rank
        "not run": {"z": 1.0},
    }
    results = summary.Results(found, published)
    assert results.methods == ["x", "y"]
    scratch = summary.against_scratch(results)
    assert scratch["tasks"]["a"] == {
        "splits": 2, "auto": 2.0, "scratch": 2.0, "gain": 0.0, "better_splits": 1}  # fmt: skip
    assert scratch["tasks"]["b"]["gain"] == 0.75  # of the split that both have
    assert scratch["better"] == 1
    assert scratch["mean_gain"] == pytest.approx((0 + 0.75 - 0.5) / 3)
    assert scratch["sign_splits"] == 1.0  # two of four
    assert summary.against_published(results) == {"x": (1, 3), "y": (1, 2)}
    ranks = summary.mean_ranks(results)
    assert ranks == {"x": (3 + 1.5) / 2, "y": (1 + 3) / 2, "auto": (2 + 1.5) / 2}
    kept = summary.retention(results)
    assert set(kept) == {"auto", "0 frozen", "0 frozen + EWC"}
    assert kept["0 frozen"]["change"] == pytest.approx({"e": (0.6 + 1.0) / 2, "gap": 0.1})
    assert kept["0 frozen"]["worst"] == pytest.approx({"e": 1.0, "gap": 0.2})
    assert [kept[v]["harmless"] for v in ("0 frozen", "0 frozen + EWC")] == [0, 2]
    assert kept["0 frozen"]["target"] is None
    assert kept["0 frozen + EWC"]["target"] == pytest.approx((0.1 + 0.0) / 2)


def test_paired_tests_by_hand():
    """Eight tasks all won: 2 of the 2^8 patterns of signs are as extreme, for either test."""
    found = [record(f"t{k}", 0, v, 1.0 + k * (v == "scratch") / 10 + (v == "scratch"))
             for k in range(8) for v in ("auto", "scratch")]  # fmt: skip
    scratch = summary.against_scratch(summary.Results(found, {}))
    assert scratch["better"] == 8
    expected = pytest.approx(2 / 2**8)
    assert scratch["wilcoxon_tasks"] == scratch["sign_splits"] == expected


def curve_row(variant, share, test, epochs=None, seconds=None, n=None):
    return {"task": "a", "unit": "eV", "variant": variant, "split": 0, "share": share,
            "train_rows": share * 100, "val_mae": 0, "test_mae": test, "seconds": 1,
            "seconds_per_epoch": 0.5, "epochs": n, "epochs_to_scratch": epochs,
            "seconds_to_scratch": seconds}  # fmt: skip


def test_curves_say_how_much_is_needed():
    assert curves.epochs_to_reach([3.0, 2.0, 1.0, 2.0], 2.0) == 2
    assert curves.epochs_to_reach([3.0, 2.0], 1.9) is None
    rows = [curve_row("auto", 0.1, 3.0), curve_row("auto", 0.5, 2.0),
            curve_row("auto", 1.0, 1.0, 2, 1.0, 9),
            curve_row("scratch", 0.1, 9.0), curve_row("scratch", 0.5, 4.0),
            curve_row("scratch", 1.0, 2.5, 7, 3.5, 20)]  # fmt: skip
    errors, match = curves.tables(rows)
    assert [row[-1] for row in errors.rows] == ["50%", "100%"]
    assert match.rows[0] == ("a", "auto", "1 of 1", "2", "1", "9", "0.5")
    assert match.rows[1][3] == "7"


def test_epochs_to_scratch(bench):
    def made(options, errors, test=1.0):
        return {"run": bench.run("toy_debye", 0, options), "val": 1, "test": test, "rows": 5,
                "seconds": 9, "seconds_per_epoch": 0.25, "val_errors": errors}  # fmt: skip

    known = variants(bench.last)
    found = [made(known["readouts"], [3.0, 1.4, 1.0]), made(known["features"], None),
             made(known["scratch"], [4.0, 2.0, 1.5, 1.6])]  # fmt: skip
    rows = {row["variant"]: row for row in curves.rows(bench, found)}
    assert rows["readouts"]["epochs_to_scratch"] == 2
    assert rows["readouts"]["seconds_to_scratch"] == 0.5
    assert rows["scratch"]["epochs_to_scratch"] == 3
    assert rows["features"]["epochs_to_scratch"] is None


def test_the_best_of_the_plane_is_chosen_on_validation_rows():
    def point(strength, val, test, change):
        return {"task": "a", "unit": "", "method": "ewc", "splits": 1, "strength": strength,
                "val_mae": val, "test_mae": test, "source_change": change,
                "source_change_worst": 2 * change, "seconds": 1}  # fmt: skip

    rows = [point(0, 1.0, 1.0, 2.0), point(0.1, 1.01, 1.3, 0.2), point(1, 1.019, 0.9, 0.1),
            point(10, 1.021, 0.1, 0.025), point(100, 1.5, 0.05, 0.0)]  # fmt: skip
    found = plane.best(rows, "a", "ewc")
    assert [found[k]["strength"] for k in ("free", "kept", "fitted")] == [0, 1, 10]
    assert plane.best(rows[:2], "a", "ewc")["fitted"] is None
    best, points = plane.tables(rows)
    assert best.rows == [("a", "ewc", "1", "+10.0% (+20.0%)", "-10.0%", "10", "-90.0%")]
    assert len(points.rows) == 5


def test_plane_runs_each_point_once(bench):
    found = plane.runs(bench, ["toy_debye"], plane.METHODS, [0, 1])
    assert len(found) == 2 * (1 + 5 + 5 + 3 + 3 + bench.last)
    assert len({json.dumps(run, sort_keys=True) for run in found}) == len(found)
