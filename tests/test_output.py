"""Files of predictions: structures out, provenance, and texts of strangers."""

from __future__ import annotations

import csv
import json

import ase.db
import ase.io
import numpy as np
import pyarrow.parquet as pq
import pytest

from matxfer.columns import CRYSTAL, printable
from matxfer.crystal import Crystal
from matxfer.errors import MatxferError, OptionError
from matxfer.output import holds_structures, print_table, write_rows
from matxfer.output_metadata import describe_prediction, sidecar_of, unit_of_column
from matxfer.output_structures import with_crystals
from matxfer.prediction import Predictor
from matxfer.readers import read, read_file

COLUMNS = [
    "id",
    "source",
    "frame",
    "formula",
    "n_sites",
    "band_gap_ev",
    "energy",
    "error_kind",
    "error",
]
FACTS = {"model": {"name": "m", "sha256": "abc"}, "plugins": [], "units": {"band_gap_ev": "eV"}}
EVIL = [
    '=HYPERLINK("http://x")', "+1+1", "-cmd|'/c calc'!A0", "@SUM(1)", "a\nb", "a\x1b[31mred",
    "\udcff.cif", "[/red]", "[bold]x", "=1", "-1", "+1e5", 'quote " comma ,', "\t=1", "\r=1",
    "tail ",
]  # fmt: skip


def rows_of(names=("a", "007", "x y"), failing=1):
    rows = []
    for k, name in enumerate(names):
        failed = k == failing
        crystal = Crystal((3 + k) * np.eye(3), [26, 8], [[0, 0, 0], [0.5, 0.5, 0.5]])
        rows.append({
            "id": name, "source": f"d/{name}", "frame": k, "formula": "FeO", "n_sites": 2,
            "band_gap_ev": None if failed else 1.5 + k, "energy": None if failed else -2.0,
            "error_kind": "unreadable" if failed else None, "error": "=broken" if failed else None,
            CRYSTAL: None if failed else crystal,
        })  # fmt: skip
    return rows


# -- structures -------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["out.extxyz", "out.db"])
def test_structures_out_and_in_again(tmp_path, name):
    path = tmp_path / name
    assert holds_structures(path)
    assert write_rows(rows_of(), COLUMNS, path, FACTS) == (3, 1)
    entries = list(read_file(path))
    assert [e.error for e in entries] == [None, None]
    for entry, row in zip(entries, [rows_of()[0], rows_of()[2]], strict=True):
        np.testing.assert_allclose(entry.crystal.lattice, row[CRYSTAL].lattice, atol=1e-6)
        np.testing.assert_allclose(entry.crystal.frac_coords, row[CRYSTAL].frac_coords, atol=1e-6)
    if name.endswith("db"):
        with ase.db.connect(path) as database:
            found = list(database.select("band_gap_ev>2"))
            assert [row.material_id for row in found] == ["x y"]
            assert found[0].data["source"] == "d/x y"
            assert found[0].get("predicted_energy") == -2.0  # 'energy' is ASE's own
            assert database.metadata["matxfer"] == FACTS
        assert [e.id for e in entries] == ["a", "x y"]
        assert not sidecar_of(path).exists()
    else:
        found = ase.io.read(path, ":")
        assert [a.info["id"] for a in found] == ["a", "x y"]
        assert [a.info["band_gap_ev"] for a in found] == [1.5, 3.5]
        assert json.loads(sidecar_of(path).read_text()) == FACTS
    # What could not be predicted is beside it.
    with (tmp_path / f"{name}.errors.csv").open(newline="") as file:
        (failure,) = csv.DictReader(file)
    assert (failure["id"], failure["error"]) == ("007", "'=broken")
    # Written again without failures, nothing old is left.
    assert write_rows(rows_of(failing=None), COLUMNS, path, FACTS) == (3, 0)
    assert len(list(read_file(path))) == 3
    assert not (tmp_path / f"{name}.errors.csv").exists()


def test_an_id_that_looks_like_a_number_stays_a_text(tmp_path):
    path = tmp_path / "out.db"
    write_rows(rows_of(failing=None), ["id", "band_gap_ev"], path)
    with ase.db.connect(path) as database:
        row = list(database.select())[1]
    assert row.data["id"] == "007"
    assert "material_id" not in row.key_value_pairs


def test_structures_need_rows_that_carry_them(tmp_path):
    rows = [{k: v for k, v in row.items() if k != CRYSTAL} for row in rows_of()]
    with pytest.raises(OptionError, match="carry"):
        write_rows(rows, COLUMNS, tmp_path / "a.extxyz")
    with pytest.raises(MatxferError, match="no structure to write"):
        write_rows(rows_of()[1:2], COLUMNS, tmp_path / "a.db")


def test_crystals_are_read_again_and_must_be_the_same(tmp_path):
    for k in (0, 1):
        ase.io.write(tmp_path / f"{k}.cif", rows_of()[2 * k][CRYSTAL].to_ase())
    (tmp_path / "2.cif").write_text("broken")
    inputs = [str(tmp_path)]
    rows = [{"source": e.source, "frame": e.frame} for e in read(inputs)]
    found = list(with_crystals(iter(rows), inputs))
    assert [row[CRYSTAL] is None for row in found] == [False, False, True]
    assert found[1][CRYSTAL].lattice[0, 0] == pytest.approx(5)
    (tmp_path / "0.cif").unlink()
    with pytest.raises(MatxferError, match="changed"):
        list(with_crystals(iter(rows), inputs))
    with pytest.raises(OptionError, match="standard input"):
        with_crystals(iter(rows), ["cif:-"])


# -- where it comes from ----------------------------------------------------------------------
def test_provenance_is_in_every_file(tmp_path, tiny_model):
    predictor = Predictor(tiny_model)
    facts = describe_prediction(tiny_model, [], predictor.columns, filter="n_sites > 1", top=None)
    assert facts["model"] == {"name": tiny_model.name, "sha256": tiny_model.checksum}
    assert facts["units"]["bulk_modulus_vrh_gpa"] == "GPa"
    assert "id" not in facts["units"]
    assert facts["filter"] == "n_sites > 1"
    assert "top" not in facts
    assert {"matxfer", "torch"} <= facts["versions"].keys()
    rows = [dict.fromkeys(predictor.columns) for _ in range(2)]
    for kind in ("csv", "jsonl", "parquet"):
        path = tmp_path / f"out.{kind}"
        write_rows(rows, predictor.columns, path, facts)
        if kind == "parquet":
            schema = pq.read_schema(path)
            assert json.loads(schema.metadata[b"matxfer"]) == facts
            assert schema.field("bulk_modulus_vrh_gpa").metadata == {b"unit": b"GPa"}
            assert schema.field("id").metadata is None
        else:
            assert json.loads(sidecar_of(path).read_text()) == facts
        write_rows(rows, predictor.columns, tmp_path / f"plain.{kind}")
        assert not sidecar_of(tmp_path / f"plain.{kind}").exists()
    again = tmp_path / "again.parquet"
    write_rows(rows, predictor.columns, again, facts)
    assert again.read_bytes() == (tmp_path / "out.parquet").read_bytes()  # no date in it


@pytest.mark.parametrize(
    ("column", "unit"),
    [("band_gap_ev", "eV"), ("band_gap_ev_std", "eV"), ("k_vrh_gpa__my_hi", "GPa"), ("ood", ""),
     ("k_gpa__a_ood", ""), ("k_gpa_lo", "GPa")],
)  # fmt: skip
def test_units_of_columns(column, unit):
    assert unit_of_column(column) == unit


# -- texts of strangers -----------------------------------------------------------------------
def test_csv_cells_are_no_formulas(tmp_path):
    path = tmp_path / "out.csv"
    write_rows(rows_of(EVIL, None), COLUMNS, path)
    with path.open(newline="") as file:
        found = [row["id"] for row in csv.DictReader(file)]
    assert found[:4] == [f"'{name}" for name in EVIL[:4]]
    assert found[4] == "a\nb"  # a quoted cell may hold it
    assert found[5] == "a\\x1b[31mred"
    assert found[6] == "\\udcff.cif"
    assert found[7:9] == EVIL[7:9]
    assert found[9:13] == ["'=1", "-1", "+1e5", 'quote " comma ,']  # numbers stay numbers
    assert found[13:] == ["\\t=1", "\\r=1", "tail "]
    assert not any(cell[0] in "=@" for cell in found)
    text = path.read_bytes()
    assert not set(text) & (set(range(32)) - {10})
    with path.open(newline="") as file:
        assert next(csv.DictReader(file))["energy"] == "-2"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.extxyz", "a.db"])
def test_odd_names_end_no_run(tmp_path, name):
    """File names may hold any bytes; a million rows must not be lost to one of them."""
    path = tmp_path / name
    assert write_rows(rows_of(EVIL, None), COLUMNS, path, FACTS) == (len(EVIL), 0)
    if name == "a.parquet":
        assert pq.read_table(path)["id"].to_pylist()[:6] == EVIL[:6]
    elif name == "a.jsonl":
        assert [json.loads(line)["id"] for line in path.read_text().splitlines()][:6] == EVIL[:6]
    elif holds_structures(path):
        assert len(list(read_file(path))) == len(EVIL)


def test_terminal_shows_names_as_they_are(capsys):
    print_table(rows_of(EVIL, 7), COLUMNS)
    shown = capsys.readouterr().out
    assert "[bold]x" in shown
    assert "d/[/red]" in shown
    assert "\x1b[31m" not in shown


def test_printable():
    assert printable("Ångström 1") == "Ångström 1"
    assert printable("a\nb\x00\u202e") == "a\\nb\\x00\\u202e"
    assert printable("a\nb", keep="\n") == "a\nb"
