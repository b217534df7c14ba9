"""What a careless table does: copies, leaks, units, text; each a message or a stated behaviour."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from matxfer.cli import main
from matxfer.crystal import Crystal, CrystalError
from matxfer.data.copies import copies_of, materials
from matxfer.data.table import TableError, random_split, read_property_table
from matxfer.transfer.finetune import finetune

TARGET = "debye_temperature_k"
NO_COPIES = {"copies": 0, "disagreeing": [], "leak": {"val": 0, "test": 0, "ids": []}}


@pytest.fixture(scope="module")
def tune(tiny_model):
    def run(table, target=TARGET, **options):
        options = {"split_column": "split", "features": "ridge", **options}
        return finetune(table, target, model=tiny_model, **options)

    return run


def repeated(frame, rows, **changes):
    """Return a table with some rows once more at its end, changed."""
    return pd.concat([frame, frame.iloc[rows].assign(**changes)], ignore_index=True)


# -- copies -------------------------------------------------------------------------------------
def test_materials_by_structure_or_id(table_crystals):
    a, b, c = table_crystals[:3]
    other = Crystal(a.lattice * 1.01, a.numbers, a.frac_coords, id="other")
    error = CrystalError("no structure", "mend it")
    rows = [a, b, a.with_id("x"), error, c.with_id(b.id), other, c.with_id(""), error]
    #       0  1  0 (structure)    2      1 (id)          3      1 (structure of row 4) 4
    assert materials(rows).tolist() == [0, 1, 0, 2, 1, 3, 1, 4]
    assert materials([]).tolist() == []


@pytest.mark.parametrize("seed", range(4))
def test_a_random_split_never_separates_copies(seed, crystal_frame):
    frame = repeated(repeated(crystal_frame, range(20)), range(5), material_id="new")
    data = read_property_table(frame, [TARGET], seed=seed)
    number = materials(data.crystals)
    assert len(np.unique(number)) < 60  # the id that five rows share joins their materials
    for k in np.unique(number):
        assert len(set(data.split[number == k])) == 1
    assert {part: (data.split == part).sum() for part in ("train", "val", "test")} == pytest.approx(
        {"train": 0.8 * 85, "val": 8.5, "test": 8.5}, abs=7
    )


def test_a_random_split_without_copies_is_a_permutation():
    """Splits of tables without copies are what they always were."""
    order = np.random.default_rng(3).permutation(50)
    split = random_split(np.arange(50), (0.8, 0.1, 0.1), 3)
    assert set(order[:40]) == set(np.flatnonzero(split == "train"))
    assert set(order[40:45]) == set(np.flatnonzero(split == "val"))
    assert (split == random_split(np.arange(50), (0.8, 0.1, 0.1), 3)).all()
    assert not (split == random_split(np.arange(50), (0.8, 0.1, 0.1), 4)).all()


def test_copies_that_agree_are_counted_in_silence(tune, crystal_frame):
    train = np.flatnonzero(crystal_frame["split"] == "train")[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plugin = tune(repeated(crystal_frame, train))
        clean = tune(crystal_frame)
    assert plugin.meta["data"]["copies"] == 4
    assert plugin.meta["data"]["rows"]["train"] == 52
    assert plugin.meta["data"]["disagreeing"] == []
    for key, value in {
        "copies": 0,
        "disagreeing": [],
        "leak": {"val": 0, "test": 0, "ids": []},
    }.items():
        assert clean.meta["data"][key] == value


def test_copies_that_disagree_are_named(tune, crystal_frame):
    train = np.flatnonzero(crystal_frame["split"] == "train")[:2]
    frame = repeated(crystal_frame, train)
    frame.loc[61, TARGET] += 5
    name = crystal_frame["material_id"][train[1]]
    value = crystal_frame[TARGET][train[1]]
    told = (
        rf"1 structure\(s\) .*disagree: {name} \({value:g} in row {train[1]}, .* in row 61\); all"
    )
    with pytest.warns(UserWarning, match=told):
        plugin = tune(frame)
    assert plugin.meta["data"]["disagreeing"] == [name]
    # Rounding is no disagreement.
    frame.loc[61, TARGET] = value * (1 + 1e-9)
    assert tune(frame).meta["data"]["disagreeing"] == []


def test_materials_in_two_parts_are_told(tune, crystal_frame):
    """Three training materials in test, one of them under another id; a val one in test too."""
    train = np.flatnonzero(crystal_frame["split"] == "train")
    val = np.flatnonzero(crystal_frame["split"] == "val")
    frame = repeated(crystal_frame, [*train[:3], val[0]], split="test")
    frame.loc[60, "material_id"] = "alias"
    frame = repeated(frame, train[3:5], split="val")
    told = (
        r"2 row\(s\) of val and 4 of test hold materials of an earlier part.*such as c\d.*flatter"
    )
    with pytest.warns(UserWarning, match=told):
        plugin = tune(frame)
    leak = plugin.meta["data"]["leak"]
    assert (leak["val"], leak["test"]) == (2, 4)
    assert leak["ids"][:2] == crystal_frame["material_id"][train[3:5]].tolist()
    assert "alias" in leak["ids"]
    # Rows that are left out leak nothing.
    frame.loc[frame.index[60:], TARGET] = np.nan
    assert tune(frame).meta["data"]["leak"] == NO_COPIES["leak"]


def test_a_random_split_leaks_nothing(tune, crystal_frame):
    frame = repeated(crystal_frame, range(30))
    plugin = tune(frame, split_column=None)
    assert plugin.meta["data"]["leak"] == NO_COPIES["leak"]
    assert plugin.meta["data"]["copies"] == 30


def test_rows_without_a_structure_are_no_copies(table_crystals):
    error = CrystalError("no structure", "mend it")
    crystals = [*table_crystals[:4], error, error]
    parts = {"train": np.array([0, 1]), "val": np.array([2]), "test": np.array([3])}
    facts = copies_of("t", crystals, np.arange(6.0), parts)
    assert facts == NO_COPIES


def test_warnings_reach_the_terminal_once(
    crystal_frame, tiny_model_folder, tmp_path, monkeypatch, capsys
):
    train = np.flatnonzero(crystal_frame["split"] == "train")[:2]
    repeated(crystal_frame, train, split="test", **{TARGET: 1.0}).to_parquet(tmp_path / "t.parquet")
    words = [
        "finetune",
        tmp_path / "t.parquet",
        "--target",
        TARGET,
        "--model",
        tiny_model_folder,
        "--split-column",
        "split",
        "--features",
        "ridge",
        "-o",
        tmp_path / "p",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["matxfer", *map(str, words)])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert "t.parquet: 2 structure(s) occur with values that disagree" in lines[0]
    assert "0 row(s) of val and 2 of test hold materials" in lines[1]
    assert "copies.py" not in captured.err
    assert json.loads(captured.out)["data"]["leak"]["test"] == 2


# -- values and rows ----------------------------------------------------------------------------
def test_fewer_than_ten_rows(tune, crystal_frame):
    """Nine training rows are refused, whatever else is there, and ten are enough."""
    train = crystal_frame.index[crystal_frame["split"] == "train"]
    few = crystal_frame.drop(index=train[9:])
    told = r"9 usable row\(s\) in 'train', but at least 10 are needed; check the split column"
    with pytest.raises(TableError, match=told):
        tune(few)
    assert tune(crystal_frame.drop(index=train[10:])).meta["data"]["rows"]["train"] == 10
    # Rows without a value or of elements that the base never saw do not count, and are told.
    frame = crystal_frame.drop(index=train[14:])
    frame.loc[train[:3], TARGET] = np.nan
    for row in (4, 7):  # CsCl rows
        frame.at[row, "numbers"] = np.full(2, 92)
    told = r"9 usable row.*\(left out: 3 no value, 2 element unknown to the model\)"
    with pytest.raises(TableError, match=told):
        tune(frame)


def test_too_few_validation_rows_for_intervals(tune, crystal_frame):
    """Intervals without an end would hold every value."""
    few, enough = (
        tune(crystal_frame.assign(split=["train"] * (54 - n) + ["val"] * n + ["test"] * 6))
        for n in (8, 9)
    )
    assert few.meta["figures"]["test"]["coverage"] is None
    assert "no 90% intervals: too few validation rows" in str(few.report)
    assert 0.0 <= enough.meta["figures"]["test"]["coverage"] <= 1.0
    assert "no 90% intervals" not in str(enough.report)


def test_a_small_table_without_a_split(tune, crystal_frame):
    with pytest.raises(TableError, match=r"8 usable row\(s\) in 'train', but at least 10"):
        tune(crystal_frame[:10], split_column=None)
    assert tune(crystal_frame[:13], split_column=None).meta["data"]["rows"]["train"] == 10


def test_a_constant_target(tune, crystal_frame):
    frame = crystal_frame.copy()
    frame.loc[frame["split"] == "train", TARGET] = 7.5
    told = rf"column '{TARGET}' is 7\.5 in all training rows; there is nothing to learn"
    with pytest.raises(TableError, match=told):
        tune(frame)


@pytest.mark.parametrize(
    ("cell", "told"),
    [("1.2 eV", r"row 7 of column .* is '1\.2 eV', which is not a number; correct it or leave it"),
     ("metal", r"row 7 of column .* is 'metal', which is not a number"),
     ("1,5", r"row 7 of column .* is '1,5', which is not a number")],
)  # fmt: skip
def test_text_targets(cell, told, tune, crystal_frame):
    frame = crystal_frame.astype({TARGET: object})
    frame.at[7, TARGET] = cell
    with pytest.raises(TableError, match=told):
        tune(frame)


def test_numbers_as_text_are_numbers_and_empty_cells_are_missing(tune, crystal_frame):
    as_text = crystal_frame.astype({TARGET: str})
    train = crystal_frame.index[crystal_frame["split"] == "train"]
    as_text.loc[train[0], TARGET] = None
    missing = crystal_frame.copy()
    missing.loc[train[0], TARGET] = np.inf
    first, second = tune(as_text).meta, tune(missing).meta
    assert first["data"]["rows_excluded"] == second["data"]["rows_excluded"] == {"no value": 1}
    assert first["figures"] == second["figures"]


def test_no_value_at_all(tune, crystal_frame):
    with pytest.raises(TableError, match=rf"no row has a value in \['{TARGET}'\]"):
        tune(crystal_frame.assign(**{TARGET: np.nan}))


# -- an interrupted run -------------------------------------------------------------------------
def test_an_interrupted_run_leaves_the_old_plugin(tune, crystal_frame, tmp_path, monkeypatch):
    tune(crystal_frame, output=tmp_path / "p")
    before = {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()}

    def stop(*_):
        raise KeyboardInterrupt

    for place in ("strategies.fit_features", "finetune.retention_of"):
        with monkeypatch.context() as patch:
            patch.setattr(f"matxfer.transfer.{place}", stop)
            with pytest.raises(KeyboardInterrupt):
                tune(crystal_frame, output=tmp_path / "p", seed=1, features="kernel_ridge")
        assert {path.name: path.read_bytes() for path in (tmp_path / "p").iterdir()} == before


@pytest.mark.parametrize("file", ["plugin.json", "plugin.safetensors"])
def test_a_file_is_written_whole_or_not_at_all(file, tune, crystal_frame, tmp_path, monkeypatch):
    """A full disk or a kill in the middle of a file leaves the one that was there."""
    from pathlib import Path

    tune(crystal_frame, output=tmp_path / "p")
    before = (tmp_path / "p" / file).read_bytes()

    original = Path.replace

    def full(self, target):
        if Path(target).name == file:
            raise OSError("no space left")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        tune(crystal_frame, output=tmp_path / "p", seed=1, features="kernel_ridge")
    assert (tmp_path / "p" / file).read_bytes() == before
