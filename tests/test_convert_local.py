"""Files of one's own become tables: ASE databases, data frames in JSON, units checked."""

from __future__ import annotations

import gzip
import json
from functools import partial

import ase.db
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from matxfer.data.table import TableError, read_property_table
from matxfer.datasets.card import DatasetError
from matxfer.datasets.convert_local import convert_local
from matxfer.evaluation import evaluate
from matxfer.readers import load_table, read_file
from matxfer.transfer.finetune import finetune

TARGET = "debye_temperature_k"


@pytest.fixture(scope="module")
def database(table_crystals, crystal_frame, tmp_path_factory):
    """Return an ASE database of the 60 crystals; values with and without a unit in the name."""
    path = tmp_path_factory.mktemp("ase") / "mine.db"
    with ase.db.connect(path) as db:
        for k, crystal in enumerate(table_crystals):
            atoms = crystal.to_ase()
            atoms.calc = SinglePointCalculator(atoms, energy=-3.0 * len(atoms), magmom=0.5)
            pairs = {TARGET: float(crystal_frame[TARGET][k]), "gap": 0.1 * k, "who": "us",
                     "converged": True}  # fmt: skip
            if k == 7:
                pairs.pop("gap")
            data = {"n": np.float64(1.5 + k), "spectrum": np.arange(3), "gap": -1.0, "why": "x"}
            db.write(atoms, name=crystal.id, **pairs, data=data)
    return path


# -- ASE databases ----------------------------------------------------------------------------
def test_an_ase_database_becomes_a_table(database, crystal_frame, table_crystals, tmp_path):
    table = tmp_path / "t.parquet"
    found = convert_local(
        database, table, columns=["gap=band_gap_ev", "data.n=refractive_index:1", "data.gap=k:1"]
    )
    assert (found["rows"], found["failed"]) == (60, 0)
    assert found["values"] == {
        "band_gap_ev": 59, "refractive_index": 60, "k": 60, TARGET: 60, "energy_ev": 60,
        "total_magnetization_mub_per_cell": 60,
    }  # fmt: skip
    frame = pd.read_parquet(table)
    assert frame["material_id"].tolist() == [c.id for c in table_crystals]
    assert frame["energy_ev"].tolist() == [-3.0 * c.n_sites for c in table_crystals]
    np.testing.assert_allclose(frame[TARGET], crystal_frame[TARGET])
    np.testing.assert_allclose(frame["band_gap_ev"][[0, 6, 8]], [0, 0.6, 0.8])
    assert np.isnan(frame["band_gap_ev"][7])
    assert set(frame["who"]) == {"us"}
    assert set(found["left_out"]) == {"converged", "data.spectrum"}
    data = read_property_table(table, [TARGET])
    for ours, theirs in zip(data.crystals, table_crystals, strict=True):
        np.testing.assert_allclose(ours.lattice, theirs.lattice)
        assert ours.numbers.tolist() == theirs.numbers.tolist()
    meta = json.loads(pq.read_schema(table).metadata[b"matxfer_dataset"])
    assert meta["card"]["columns"][0] == {"source": "gap", "name": "band_gap_ev", "unit": "eV"}


def test_columns_without_a_unit_are_left_out_and_told(database, tmp_path):
    found = convert_local(database, tmp_path / "t.parquet")
    assert "gap=NAME_WITH_UNIT" in found["left_out"]["gap"]
    assert set(found["left_out"]) == {
        "gap",
        "converged",
        *(f"data.{k}" for k in ("gap", "n", "spectrum")),
    }
    found = convert_local(database, tmp_path / "t.parquet", columns=["converged=is_converged:1"])
    assert pd.read_parquet(tmp_path / "t.parquet")["is_converged"].tolist() == [1.0] * 60


def test_databases_in_json_are_read_too(database, tmp_path):
    path = tmp_path / "mine.json"
    with ase.db.connect(path) as db:
        for row in ase.db.connect(database).select(limit=5):
            db.write(row, name=row.name, gap=2.0)
    found = convert_local(path, tmp_path / "t.parquet", columns=["gap=band_gap_ev"])
    assert (found["rows"], found["values"]["band_gap_ev"]) == (5, 5)


def test_a_plugin_is_made_of_an_ase_database(database, crystal_table, tiny_model):
    options = {"model": tiny_model, "strategy": "features", "features": "ridge"}
    of_database = finetune(database, TARGET, **options)
    of_table = finetune(crystal_table, TARGET, **options)
    mine, theirs = (p.meta["figures"]["test"]["mae"] for p in (of_database, of_table))
    assert mine == pytest.approx(theirs, rel=1e-3)  # the same rows, the same split
    assert of_database.head.prop.unit == "K"
    figures = evaluate(database, TARGET, of_database, model=tiny_model)
    assert figures["n"] == 60
    with pytest.raises(TableError, match="no column 'gup'"):
        finetune(database, "gup", **options)
    with pytest.raises(TableError, match="'us', which is not a number"):
        finetune(database, "who", **options)


def test_a_broken_row_keeps_its_place_and_reason(database, tmp_path):
    path = tmp_path / "broken.db"
    with ase.db.connect(path) as db:
        for k in range(4):
            atoms = bulk("NaCl", "rocksalt", a=5.6)
            if k == 1:
                atoms.positions[0, 0] = np.nan
            if k == 2:
                atoms.cell[:] = 0
            db.write(atoms, gap_ev=1.0 * k)
    found = convert_local(path, tmp_path / "t.parquet")
    assert (found["rows"], found["failed"]) == (4, 2)
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert frame["gap_ev"].tolist() == [0, 1, 2, 3]
    assert frame["error"].notna().tolist() == [False, True, True, False]
    table = read_property_table(path, ["gap_ev"])
    reasons = [entry.error.reason for entry in read_file(path) if entry.error]
    assert [c.reason for c in table.crystals[1:3]] == reasons
    (tmp_path / "empty.db").touch()
    (tmp_path / "none.db").write_text("not a database, only text")
    for name, text in (("empty.db", "the file is empty"), ("none.db", "no ASE database")):
        with pytest.raises(ValueError, match=text):
            load_table(tmp_path / name)
        with pytest.raises(ValueError, match=text):
            convert_local(tmp_path / name, tmp_path / "t.parquet")


# -- data frames ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain(table_crystals):
    """Return a data frame as matminer users have it: pymatgen's structures and values."""
    return pd.DataFrame(
        {
            "structure": [c.to_pymatgen() for c in table_crystals[:6]],
            "K_VRH": [10.0, 20.0, 30.0, 40.0, None, 60.0],
            "band_gap_ev": np.arange(6.0),
            "mpid": [f"mp-{k}" for k in range(6)],
            "is_metal": [True, False] * 3,
        }
    )


def written(frame, path, orient):
    """Write a frame with structures as dictionaries."""
    as_dicts = frame.assign(structure=[s.as_dict() for s in frame["structure"]])
    if orient == "lines":
        text = as_dicts.to_json(orient="records", lines=True)
    elif orient == "mapping":
        records = json.loads(as_dicts.to_json(orient="records"))
        text = json.dumps({f"row {k}": record for k, record in enumerate(records)})
    else:
        text = as_dicts.to_json(orient=orient)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("orient", ["split", "records", "columns", "index", "mapping", "lines"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_data_frames_in_json_become_tables(plain, table_crystals, tmp_path, orient, end):
    kind = "jsonl" if orient == "lines" else "json"
    path = written(plain, tmp_path / f"f.{kind}{end}", orient)
    columns = ["K_VRH=bulk_modulus_vrh_gpa", "is_metal=is_metal:1"]
    found = convert_local(path, tmp_path / "t.parquet", columns=columns, id_column="mpid")
    assert (found["rows"], found["failed"], found["left_out"]) == (6, 0, {})
    frame = pd.read_parquet(tmp_path / "t.parquet")
    assert frame["material_id"].tolist() == plain["mpid"].tolist()
    assert frame["is_metal"].tolist() == [1, 0] * 3
    np.testing.assert_allclose(frame["bulk_modulus_vrh_gpa"], plain["K_VRH"])
    np.testing.assert_allclose(frame["band_gap_ev"], plain["band_gap_ev"])
    assert frame["formula"].tolist() == [c.formula for c in table_crystals[:6]]


def test_data_frames_in_memory_and_other_tables(plain, crystal_table, tmp_path):
    table = tmp_path / "t.parquet"
    found = convert_local(plain, table, columns=["K_VRH=bulk_modulus_vrh_gpa:log10(GPa)"])
    assert found["values"]["bulk_modulus_vrh_gpa"] == 5
    assert pd.read_parquet(table)["bulk_modulus_vrh_gpa"][0] == 1e10
    found = convert_local(crystal_table, table)
    assert found["rows"] == 60
    assert "split" in pd.read_parquet(table).columns  # texts stay
    renamed = plain.rename(columns={"structure": "final"})
    assert convert_local(renamed, table, structure_column="final")["failed"] == 0


def test_rows_that_cannot_be_used_are_told(plain, tmp_path):
    records = [{"structure": s.as_dict(), "gap_ev": 1.0} for s in plain["structure"]]
    records[1]["gap_ev"] = "wide"
    records[2] = "text"
    del records[3]["structure"]
    records[4]["structure"]["sites"][0]["species"][0]["occu"] = 0.5
    path = tmp_path / "f.json"
    path.write_text(json.dumps(records))
    found = convert_local(path, tmp_path / "t.parquet")
    assert (found["rows"], found["failed"]) == (6, 4)
    told = pd.read_parquet(tmp_path / "t.parquet")["error"].tolist()
    for row, text in ((1, "'wide' is not a number"), (2, "a str where an object"),
                      (3, "there is no 'structure' (it has gap_ev)"), (4, "disorder")):  # fmt: skip
        assert text in told[row], told[row]
    lines = "\n".join(json.dumps(r) for r in records[:2]) + "\n{broken\n"
    (tmp_path / "f.jsonl").write_text(lines)
    found = convert_local(tmp_path / "f.jsonl", tmp_path / "t.parquet")
    assert (found["rows"], found["failed"]) == (3, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.json", '{"a": 1}', "neither a data frame in JSON nor a list"),
        ("f.json", "[1, 2", "not readable as JSON"),
        ("f.json", "", "not readable as JSON"),
        ("f.json", "[]", "there are no rows"),
        ("f.json", '{"columns": ["structure"], "data": [[1', "damaged or incomplete"),
        ("f.cif", "data_x", "not a file with structures and properties"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        convert_local(tmp_path / name, tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()


def test_options_that_make_no_sense(database, tmp_path):
    table = tmp_path / "t.parquet"
    for options, message in (
        ({"columns": ["gup=gap_ev"]}, "no column 'gup'; there are"),
        ({"columns": ["gap=gap"]}, "in which unit"),
        ({"columns": ["gap=k_ev", "data.gap=k_ev"]}, "two columns would be called 'k_ev'"),
        ({"columns": ["energy=energy_gpa"]}, "is in eV, but the name 'energy_gpa' says GPa"),
        ({"columns": ["gap=energy_ev"]}, "two columns would be called 'energy_ev'"),
        ({"id_column": "nix"}, "no column 'nix'"),
    ):
        with pytest.raises(DatasetError, match=message):
            convert_local(database, table, **options)
    with pytest.raises(DatasetError, match="no such file"):
        convert_local(tmp_path / "no.db", table)
    with pytest.raises(DatasetError, match=r"let its name end in \.parquet"):
        convert_local(database, tmp_path / "t.csv")
    convert_local(database, table)
    with pytest.raises(DatasetError, match="written over what is read"):
        convert_local(table, table)


# -- the command ------------------------------------------------------------------------------
def test_command(database, run, tmp_path):
    run = partial(run, "datasets", "convert")
    code, out, err = run(database, "--column", "gap=band_gap_ev")
    assert code == 0, err
    assert out.splitlines()[:2] == ["mine.parquet: 60 rows", "  band_gap_ev: 59 values"]
    assert "left out: data.n (no unit in its name" in err
    code, out, _ = run(database, "--json", "-o", "x.parquet")
    assert json.loads(out)["rows"] == 60
    code, _, err = run(database, "--column", "gap=gap_ev:meV")
    assert code == 2
    assert "is in meV, but the name 'gap_ev' says eV" in err
