"""Batch prediction: one row per input, in order, whatever the inputs, the workers, the chunks."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter as Multiset
from types import SimpleNamespace

import ase.io
import numpy as np
import pandas as pd
import pytest
import torch

import matxfer.output as output_module
import matxfer.prediction as prediction_module
from matxfer.crystal import Crystal, CrystalError
from matxfer.data.loader import edge_budget_batches
from matxfer.data.packed import PackedGraphs
from matxfer.data.properties import property_of
from matxfer.graph import build_graph
from matxfer.nn.ensemble import ReadoutEnsemble
from matxfer.nn.plugin_head import PluginHead
from matxfer.output import output_format, write_rows
from matxfer.prediction import LEADING_COLUMNS, TRAILING_COLUMNS, Predictor, as_inputs, predict
from matxfer.transfer.plugin import Plugin

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def expected(tiny_model, table_crystals):
    """Return the properties of each crystal of the table, each computed by itself."""
    options = tiny_model.backbone.graph_options
    rows = []
    for crystal in table_crystals:
        packed = PackedGraphs.pack([build_graph(crystal, options)])
        values = tiny_model.predict_graphs(packed.batch(np.array([0])))
        rows.append({name: float(v[0]) for name, v in values.items()})
    return pd.DataFrame(rows)


def overlapping():
    return Crystal(4 * np.eye(3), [11, 11], [[0, 0, 0], [0.02, 0, 0]], id="overlap")


def with_uranium():
    return Crystal(3.5 * np.eye(3), [92, 8], [[0, 0, 0], [0.5, 0.5, 0.5]], id="foreign")


@pytest.fixture
def mixed(table_crystals, crystal_frame, tmp_path):
    """Write files of every kind, good and bad; return the inputs and what their rows are.

    A row is (crystal of the table or None, what its error says or None, frame, id).
    """
    c = table_crystals
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    ase.io.write(tmp_path / "folder" / "a.cif", c[0].to_ase())
    (tmp_path / "folder" / "b.cif").write_text("this is no CIF\n")
    ase.io.write(tmp_path / "folder" / "inner" / "POSCAR", c[1].to_ase(), format="vasp")
    (tmp_path / "folder" / "notes.txt").write_text("not a structure")
    frames = [c[2].to_ase(), overlapping().to_ase(), c[3].to_ase(), with_uranium().to_ase()]
    ase.io.write(tmp_path / "many.xyz", frames, format="extxyz")
    frame = crystal_frame.iloc[4:7].copy()
    frame.at[5, "lattice"] = None
    frame.to_parquet(tmp_path / "rows.parquet")
    ase.io.write(tmp_path / "last.cif", c[8].to_ase())
    inputs = [
        tmp_path / "many.xyz",
        str(tmp_path / "folder"),
        tmp_path / "nowhere.cif",
        str(tmp_path / "rows.parquet"),
        str(tmp_path / "la*.cif"),
    ]
    rows = [
        (2, None, 0, "many:0"),
        (None, "overlap", 1, "many:1"),
        (3, None, 2, "many:2"),
        (None, "never seen the element(s) U", 3, "many:3"),
        (0, None, 0, "a"),
        (None, "", 0, "b"),
        (1, None, 0, "inner"),
        (None, "no such file", 0, "nowhere"),
        (4, None, 0, "c4"),
        (None, "lattice", 1, "c5"),
        (6, None, 2, "c6"),
        (8, None, 0, "last"),
    ]
    return inputs, rows


def check_rows(result, rows, expected, model):
    assert len(result) == len(rows)
    for (_, row), (crystal, error, frame, name) in zip(result.iterrows(), rows, strict=True):
        assert (row["id"], row["frame"]) == (name, frame)
        values = row[list(model.heads)].astype(float)
        if crystal is None:
            assert isinstance(row["error"], str)
            assert error in row["error"]
            assert row["source"] not in row["error"]  # the row says where
            assert values.isna().all()
        else:
            assert pd.isna(row["error"]), row["error"]
            np.testing.assert_allclose(values, expected.iloc[crystal], **CLOSE)


# -- rows -------------------------------------------------------------------------------------
def test_mixed_inputs_keep_their_rows_and_order(mixed, expected, tiny_model):
    inputs, rows = mixed
    result = predict(inputs, model=tiny_model)
    check_rows(result, rows, expected, tiny_model)
    assert list(result.columns) == [*LEADING_COLUMNS, *tiny_model.heads, *TRAILING_COLUMNS]
    assert result["source"].tolist()[:4] == [str(inputs[0])] * 4
    assert result["source"].tolist()[7:11] == [str(inputs[2])] + [inputs[3]] * 3
    # Formula and size of whatever could be read, even where nothing could be predicted.
    assert result["formula"][3] == "UO"
    assert result["n_sites"][3] == 2
    assert result["formula"].isna().tolist() == [k in (5, 7, 9) for k in range(12)]
    # The same in another order: the rows go with their inputs.
    again = predict(inputs[::-1], model=tiny_model)
    assert again["id"].tolist()[:1] == ["last"]
    assert again["id"].tolist()[-4:] == result["id"].tolist()[:4]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_give_the_same_rows(workers, mixed, tiny_model, monkeypatch):
    monkeypatch.setattr(prediction_module, "CHUNK", 2)
    inputs, _ = mixed
    inputs = [*inputs, *inputs]
    threads = torch.get_num_threads()
    here = list(Predictor(tiny_model).rows(inputs, workers=0))
    there = list(Predictor(tiny_model).rows(inputs, workers=workers))
    assert len(here) == 24
    assert there == here
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 12, 100])
def test_chunk_borders(chunk, mixed, expected, tiny_model, monkeypatch):
    monkeypatch.setattr(prediction_module, "CHUNK", chunk)
    inputs, rows = mixed
    check_rows(predict(inputs, model=tiny_model), rows, expected, tiny_model)


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_chunks_of_structures(chunk, table_crystals, expected, tiny_model, monkeypatch):
    monkeypatch.setattr(prediction_module, "CHUNK", chunk)
    result = predict(table_crystals[:20], model=tiny_model)
    assert result["id"].tolist() == [f"c{k}" for k in range(20)]
    np.testing.assert_allclose(result[list(tiny_model.heads)], expected[:20], **CLOSE)


def test_rows_come_as_they_are_computed(table_crystals, tiny_model, monkeypatch):
    """A long stream needs no more memory than a chunk, and shows its rows early."""
    monkeypatch.setattr(prediction_module, "CHUNK", 2)
    taken = []

    def entries():
        for k, entry in enumerate(as_inputs(table_crystals)):
            taken.append(k)
            yield entry

    rows = Predictor(tiny_model).rows(entries())
    assert next(rows)["id"] == "c0"
    assert len(taken) <= 4


def test_progress_counts_rows(table_crystals, tiny_model):
    steps = []
    predict(table_crystals[:5], model=tiny_model, on_progress=steps.append)
    assert sum(steps) == 5


# -- kinds of input ---------------------------------------------------------------------------
def _as_frame(crystals):
    return pd.DataFrame(
        {
            "id": [c.id for c in crystals],
            "lattice": [c.lattice.tolist() for c in crystals],
            "numbers": [c.numbers.tolist() for c in crystals],
            "frac_coords": [c.frac_coords.tolist() for c in crystals],
        }
    )


KINDS = {
    "crystals": lambda cs: cs,
    "tuple": tuple,
    "generator": lambda cs: (c for c in cs),
    "ase": lambda cs: [c.to_ase() for c in cs],
    "pymatgen": lambda cs: [c.to_pymatgen() for c in cs],
    "several libraries": lambda cs: [cs[0], cs[1].to_ase(), cs[2].to_pymatgen()],
    "data frame": _as_frame,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_structures(kind, table_crystals, expected, tiny_model):
    result = predict(KINDS[kind](table_crystals[:3]), model=tiny_model)
    np.testing.assert_allclose(result[list(tiny_model.heads)], expected[:3], **CLOSE)
    assert result["error"].isna().all()
    names = ["c0", "c1", "c2"] if kind in {"crystals", "tuple", "generator", "data frame"} else None
    if names:
        assert result["id"].tolist() == names
    elif kind in {"ase", "pymatgen"}:
        assert result["id"].tolist() == ["0", "1", "2"]


@pytest.mark.parametrize(
    "convert", [lambda c: c, Crystal.to_ase, Crystal.to_pymatgen], ids=["crystal", "ase", "pmg"]
)
def test_a_single_structure(convert, table_crystals, expected, tiny_model):
    result = predict(convert(table_crystals[4]), model=tiny_model)
    assert len(result) == 1
    np.testing.assert_allclose(result[list(tiny_model.heads)], expected[4:5], **CLOSE)


@pytest.mark.parametrize("kind", [str, lambda p: p, lambda p: [p], lambda p: iter([str(p)])])
def test_a_single_path(kind, table_crystals, expected, tiny_model, tmp_path):
    path = tmp_path / "x.cif"
    ase.io.write(path, table_crystals[3].to_ase())
    result = predict(kind(path), model=tiny_model)
    np.testing.assert_allclose(result[list(tiny_model.heads)], expected[3:4], **CLOSE)
    assert result["source"].tolist() == [str(path)]


@pytest.mark.parametrize("bad", [5, None, [5], [Crystal(np.eye(3) * 3, [11], [[0, 0, 0]]), "a.cif"],
                                 ["a.cif", Crystal(np.eye(3) * 3, [11], [[0, 0, 0]])]])  # fmt: skip
def test_what_is_no_structure(bad, tiny_model):
    with pytest.raises(TypeError, match=r"not iterable|give paths, .*not a mixture"):
        predict(bad, model=tiny_model)


def test_bad_structures_keep_their_rows(table_crystals, expected, tiny_model):
    molecule = ase.Atoms("NaCl", positions=[[0, 0, 0], [0, 0, 2.4]], pbc=True)  # without a cell
    disordered = table_crystals[0].to_pymatgen()
    disordered.replace_species({disordered[0].specie: {"Na": 0.5, "Li": 0.5}})
    structures = [molecule, disordered, overlapping(), with_uranium(), table_crystals[1]]
    result = predict(structures, model=tiny_model)
    words = ["no cell vector", "disordered site", "overlap", "never seen the element(s) U", None]
    for error, word in zip(result["error"], words, strict=True):
        assert pd.isna(error) if word is None else word in error
    assert "use a model" in result["error"][3]
    assert result["n_sites"].tolist()[2:] == [2, 2, table_crystals[1].n_sites]
    np.testing.assert_allclose(result[list(tiny_model.heads)][4:], expected[1:2], **CLOSE)


def test_nothing_to_predict(tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs in (tmp_path / "empty", [], iter([])):
        result = predict(inputs, model=tiny_model)
        assert len(result) == 0
        assert list(result.columns) == Predictor(tiny_model).columns
        assert all(result[name].dtype == np.float64 for name in tiny_model.heads)


def test_all_inputs_bad(tiny_model, tmp_path):
    result = predict(
        [tmp_path / "a.cif", tmp_path / "b.xyz", tmp_path / "c.docx"], model=tiny_model
    )
    assert result["error"].str.contains("no such file").all()
    assert all(result[name].dtype == np.float64 for name in tiny_model.heads)
    assert result[list(tiny_model.heads)].isna().all(axis=None)


def test_tables_without_structures(tiny_model, tmp_path):
    pd.DataFrame({"a": [1.0, 2.0]}).to_csv(tmp_path / "t.csv")
    result = predict(tmp_path / "t.csv", model=tiny_model)
    assert len(result) == 1
    assert "no structure columns" in result["error"][0]
    assert "structure_column" in result["error"][0]
    with pytest.raises(CrystalError, match="no structure columns"):
        predict(pd.DataFrame({"a": [1.0]}), model=tiny_model)


def test_structure_column(table_crystals, expected, tiny_model, tmp_path):
    ase.io.write(tmp_path / "x.cif", table_crystals[2].to_ase())
    frame = pd.DataFrame({"relaxed": [(tmp_path / "x.cif").read_text()], "cif": ["data_broken"]})
    frame.to_csv(tmp_path / "t.csv")
    for table in (frame, tmp_path / "t.csv"):
        result = predict(table, model=tiny_model, structure_column="relaxed")
        np.testing.assert_allclose(result[list(tiny_model.heads)], expected[2:3], **CLOSE)
        assert isinstance(predict(table, model=tiny_model)["error"][0], str)


def test_types_of_columns(mixed, tiny_model):
    result = predict(mixed[0], model=tiny_model)
    assert result["frame"].dtype == "Int64"
    assert result["n_sites"].dtype == "Int64"
    for name in tiny_model.heads:
        assert result[name].dtype == np.float64
    for name in ("id", "source", "formula", "error"):
        assert all(isinstance(v, str) or pd.isna(v) for v in result[name]), name


# -- models and plugins -----------------------------------------------------------------------
def make_plugin(model, target, name, depth):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        readout = ReadoutEnsemble("pooled", model.backbone.node_dim, 4)
        head = PluginHead(property_of(target), (model.backbone.n_layers,), readout)
        plugin = Plugin(model, depth, head, {"name": name})
    return plugin.eval()


def test_plugins_add_columns(table_crystals, expected, tiny_model, tiny_model_folder, tmp_path):
    first = make_plugin(tiny_model, "debye_temperature_k", "one", 1)
    second = make_plugin(tiny_model, "band_gap_ev", "two", 0)
    second.save(tmp_path / "two")
    plain = predict(table_crystals[:3], model=tiny_model)
    result = predict(table_crystals[:3], [first, tmp_path / "two"], model=tiny_model)
    columns = [*LEADING_COLUMNS, *tiny_model.heads, "debye_temperature_k", "band_gap_ev__two"]
    assert list(result.columns) == [*columns, *TRAILING_COLUMNS]
    pd.testing.assert_frame_equal(result[plain.columns], plain)  # the base is as it was
    for plugin in (first, second):
        name = "debye_temperature_k" if plugin is first else "band_gap_ev__two"
        packed = PackedGraphs.pack(
            [build_graph(c, tiny_model.backbone.graph_options) for c in table_crystals[:3]]
        )
        batch = packed.batch(np.arange(3))
        with torch.no_grad():
            values = plugin.head.values([plugin.backbone(batch).node], batch)
        np.testing.assert_allclose(result[name], values, **CLOSE)
    # One plugin need not be in a list, and the model may be a folder.
    single = predict(table_crystals[:3], tmp_path / "two", model=tiny_model_folder)
    pd.testing.assert_series_equal(single["band_gap_ev__two"], result["band_gap_ev__two"])


# -- batches ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("max_edges", "max_graphs"), [(100, 256), (30, 4), (10**6, 7), (1, 1)])
def test_edge_budget_batches(max_edges, max_graphs):
    edges = np.random.default_rng(5).integers(0, 60, 200)
    edges[[3, 77]] = 500  # above every budget: alone
    graphs = SimpleNamespace(edges_per_graph=edges)
    rows = np.random.default_rng(1).permutation(200)[:150]
    batches = list(edge_budget_batches(graphs, rows, max_edges, max_graphs))
    assert np.array_equal(np.concatenate(batches), rows)
    for k, batch in enumerate(batches):
        assert 1 <= len(batch) <= max_graphs
        assert len(batch) == 1 or edges[batch].sum() <= max_edges
        if k + 1 < len(batches):  # and no batch ends before it must
            with_next = edges[batch].sum() + edges[batches[k + 1][0]]
            assert with_next > max_edges or len(batch) == max_graphs
    assert list(edge_budget_batches(graphs, rows[:0])) == []


def test_company_does_not_change_a_prediction(table_crystals, expected, tiny_model, monkeypatch):
    together = predict(table_crystals, model=tiny_model)
    np.testing.assert_allclose(together[list(tiny_model.heads)], expected, **CLOSE)
    order = np.random.default_rng(0).permutation(60)
    shuffled = predict([table_crystals[k] for k in order], model=tiny_model)
    sorted_again = shuffled[list(tiny_model.heads)].to_numpy()[np.argsort(order)]
    np.testing.assert_allclose(sorted_again, expected, **CLOSE)


# -- files ------------------------------------------------------------------------------------
COLUMNS = [*LEADING_COLUMNS, "band_gap_ev", "thermal_conductivity", "error"]
ROWS = [
    ("Kochsalz, „rein“", "übung/NaCl.cif", 0, "NaCl", 2, 5.123456789, -1e-12, None),
    ('quote " and\nline', "b.xyz", 3, "MgO", 8, 1e20, 0.0, None),
    ("bad", "b.xyz", 4, None, None, None, None, "atoms 0 and 1 overlap; λ ≠ 0, see „there“"),
    ("007", "c.db", 12, "Fe", 1, 0.1 + 0.2, None, None),
]


def rows_of(values=ROWS):
    return [dict(zip(COLUMNS, row, strict=True)) for row in values]


def read_back(path):
    """Return the rows of a file, missing values as None."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    frame = pd.read_csv(path, dtype={"id": str, "frame": "Int64", "n_sites": "Int64"})
    return [
        {k: None if pd.isna(v) else v for k, v in row.items()} for row in frame.to_dict("records")
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_writers_round_trip(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, "_PARQUET_ROWS", 3)
    path = tmp_path / "new folder" / f"out.{suffix}"
    assert write_rows(iter(rows_of()), COLUMNS, path) == (4, 1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    back = read_back(path)
    assert [list(row) for row in back] == [COLUMNS] * 4
    for row, original in zip(back, rows_of(), strict=True):
        for column, value in original.items():
            if isinstance(value, float) and suffix == "csv":
                assert row[column] == pytest.approx(value, rel=1e-6)
            else:
                assert row[column] == value, column
                assert isinstance(row[column], type(value))


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_no_rows_leave_a_table_with_columns(suffix, tmp_path):
    path = tmp_path / f"out.{suffix}"
    assert write_rows([], COLUMNS, path) == (0, 0)
    if suffix == "jsonl":
        assert path.read_text() == ""
    else:
        frame = pd.read_csv(path) if suffix == "csv" else pd.read_parquet(path)
        assert list(frame.columns) == COLUMNS


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_an_interruption_leaves_a_part(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, "_PARQUET_ROWS", 1)
    path = tmp_path / f"out.{suffix}"

    def stream():
        yield from rows_of()[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(stream(), COLUMNS, path)
    assert [p.name for p in tmp_path.iterdir()] == [f"out.{suffix}.part"]
    partial = shutil.move(tmp_path / f"out.{suffix}.part", tmp_path / f"part.{suffix}")
    assert [row["id"] for row in read_back(partial)] == [row[0] for row in ROWS[:2]]
    # A file that was there before stays whole.
    write_rows(rows_of()[:1], COLUMNS, path)
    with pytest.raises(KeyboardInterrupt):
        write_rows(stream(), COLUMNS, path)
    assert len(read_back(path)) == 1


@pytest.mark.parametrize("name", ["out.xlsx", "out", "out.csv.gz"])
def test_unsupported_suffixes(name, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*use one of \.csv, \.parquet, \.jsonl"):
        write_rows(iter([]), COLUMNS, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_output_format():
    assert [output_format(f"A/B.{s}") for s in ("CSV", "parquet", "JsonL")] == [
        "csv",
        "parquet",
        "jsonl",
    ]


def test_predictions_in_files_equal_the_data_frame(mixed, tiny_model, tmp_path):
    inputs, _ = mixed
    frame = predict(inputs, model=tiny_model)
    predictor = Predictor(tiny_model)
    for suffix in ("csv", "parquet", "jsonl"):
        path = tmp_path / f"out.{suffix}"
        assert write_rows(predictor.rows(inputs), predictor.columns, path) == (12, 5)
        back = pd.DataFrame(read_back(path), columns=predictor.columns)
        assert back["id"].tolist() == frame["id"].tolist()
        assert Multiset(back["error"].isna()) == {True: 7, False: 5}
        for name in tiny_model.heads:
            np.testing.assert_allclose(back[name].astype(float), frame[name], rtol=1e-6)


def test_printed_table(table_crystals, tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(output_module, "_TABLE_ROWS", 3)
    monkeypatch.setenv("COLUMNS", "200")
    predictor = Predictor(tiny_model)
    rows = predictor.rows(as_inputs([*table_crystals[:2], overlapping(), *table_crystals[:4]]))
    assert output_module.print_table(rows, predictor.columns) == (7, 1)
    printed = capsys.readouterr().out
    assert "band_gap_ev" in printed
    assert "… and 4 more rows" in printed
    assert "overlap" in printed
    assert printed.count("c0") == 1
    value = next(predictor.rows(as_inputs([table_crystals[0]])))["band_gap_ev"]
    assert f"{value:.4g}" in printed
    assert not math.isnan(value)
