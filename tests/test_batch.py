"""Worker processes that die or hang, structures met twice, predictions kept, kinds of errors."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pandas as pd
import pytest

import matxfer.batch.known as known_module
import matxfer.prediction as prediction_module
from matxfer.batch.cache import PredictionCache, weights_of
from matxfer.batch.compute import predict_pack
from matxfer.batch.prepare import Preparation
from matxfer.batch.stream import predicted
from matxfer.batch.units import Plan, count_inputs
from matxfer.batch.work import Setup
from matxfer.batch.worker import one_thread_each
from matxfer.crystal import Crystal, CrystalError
from matxfer.data.packed import PackedGraphs
from matxfer.errors import ErrorKind, OptionError
from matxfer.graph import build_graph
from matxfer.model import Model
from matxfer.prediction import BatchOptions, Predictor, as_inputs, predict
from matxfer.readers import read_file


# -- hooks that reach a worker: pickled with the setup ----------------------------------------
class Trouble(Preparation):
    """Do something bad at the structures of a given number of atoms, or as it is keyed."""

    __slots__ = ()
    where = "graph"

    def key(self, entry):
        if self.where == "key":
            self.bad(entry.crystal)
        return super().key(entry)

    def graph(self, crystal):
        if self.where == "graph":
            self.bad(crystal)
        return super().graph(crystal)

    def bad(self, crystal):
        raise NotImplementedError


class Segfault(Trouble):
    __slots__ = ()

    def bad(self, crystal):
        if crystal.n_sites == 1:
            os.kill(os.getpid(), signal.SIGSEGV)


class Hang(Trouble):
    __slots__ = ()

    def bad(self, crystal):
        if crystal.n_sites == 1:
            time.sleep(600)


class KilledOnce(Trouble):
    """Die at the first try only, as if somebody else had killed the process."""

    __slots__ = ()

    def bad(self, crystal):
        flag = Path(self.structure_column)
        if crystal.n_sites == 8 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def setup_of(model, kind=Preparation, column=None):
    preparation = kind(model.backbone.graph_options, model.elements, column)
    return Setup(preparation, model, [], list(model.heads))


def rows_with(setup, crystals, chunk=6, **options):
    """Return ids, kinds and values of a run of some crystals."""
    plan = Plan(as_inputs(list(crystals)), chunk=chunk)
    ids, kinds, values = [], [], []
    for each in predicted(plan, setup, **({"workers": 1} | options)):
        ids += each.rows.ids
        kinds += each.rows.kinds
        values.append(each.values)
    return ids, kinds, np.concatenate(values)


@pytest.fixture(scope="module")
def plain(tiny_model, table_crystals):
    return rows_with(setup_of(tiny_model), table_crystals[:12], workers=0)


def test_a_crash_costs_one_row(tiny_model, table_crystals, plain):
    crystals = table_crystals[:12]
    lone = [c.n_sites == 1 for c in crystals]
    assert 3 < sum(lone) < 6
    keep = [k for k in range(12) if not lone[k] or k == 2]
    some = [crystals[k] for k in keep]
    setup = setup_of(tiny_model, Segfault)
    ids, kinds, values = rows_with(setup, some)
    assert ids == [c.id for c in some]
    assert kinds == [("worker_crash" if c.n_sites == 1 else None) for c in some]
    assert np.isnan(values).any(axis=1).tolist() == [kind is not None for kind in kinds]
    sound = [k for k, kind in enumerate(kinds) if kind is None]
    np.testing.assert_allclose(values[sound], plain[2][np.array(keep)[sound]], rtol=1e-5, atol=1e-5)


def test_a_crash_is_described(tiny_model, table_crystals):
    plan = Plan(as_inputs(table_crystals[2:3]), chunk=2)
    (each,) = predicted(plan, setup_of(tiny_model, Segfault), workers=1)
    assert "died while it was made a graph" in each.rows.errors[0]
    assert "SIGSEGV" in each.rows.errors[0]


def test_a_hang_costs_a_timeout(tiny_model, table_crystals):
    started = time.monotonic()
    ids, kinds, _ = rows_with(setup_of(tiny_model, Hang), table_crystals[:3], timeout_s=1.0)
    assert kinds == [None, None, "timeout"]
    assert ids == ["c0", "c1", "c2"]
    assert time.monotonic() - started < 60


def test_a_worker_killed_by_others_costs_nothing(tiny_model, table_crystals, plain, tmp_path):
    flag = tmp_path / "killed"
    setup = setup_of(tiny_model, KilledOnce, str(flag))
    ids, kinds, values = rows_with(setup, table_crystals[:12])
    assert flag.exists()
    assert kinds == [None] * 12
    np.testing.assert_array_equal(values, plain[2])  # to the last bit
    assert ids == plain[0]


class DiesOnArrival:
    """Ends the process that it is sent to."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_cannot_start(tiny_model, table_crystals):
    setup = replace(setup_of(tiny_model), preparation=DiesOnArrival())
    with pytest.raises(ValueError, match="worker processes die before they work"):
        rows_with(setup, table_crystals[:3])


def test_threads_of_workers(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with one_thread_each():
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert "MKL_NUM_THREADS" not in os.environ


# -- each structure once ----------------------------------------------------------------------
def counted_graphs(monkeypatch):
    built = []
    graph = Preparation.graph

    def counting(self, crystal):
        built.append(crystal.id)
        return graph(self, crystal)

    monkeypatch.setattr(Preparation, "graph", counting)
    return built


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_duplicates_are_computed_once(chunk, tiny_model, table_crystals, monkeypatch):
    monkeypatch.setattr(prediction_module, "CHUNK", chunk)
    overlap = Crystal(4 * np.eye(3), [11, 11], [[0, 0, 0], [0.02, 0, 0]], id="bad")
    first = [*table_crystals[:4], overlap]
    crystals = [*first, *(c.with_id(f"{c.id}-again") for c in first)]
    built = counted_graphs(monkeypatch)
    result = predict(crystals, model=tiny_model)
    assert built == [c.id for c in first]
    assert result["id"].tolist() == [c.id for c in crystals]
    names = [*tiny_model.heads, "error", "error_kind", "formula"]
    again = result[names][5:].reset_index(drop=True)
    pd.testing.assert_frame_equal(result[names][:5], again)
    assert again["error_kind"][4] == "overlapping_atoms"
    assert again["band_gap_ev"].notna().tolist() == [True] * 4 + [False]


def test_what_was_met_is_bounded(tiny_model, table_crystals, monkeypatch):
    monkeypatch.setattr(known_module, "HELD", 3)
    built = counted_graphs(monkeypatch)
    crystals = [*table_crystals[:3], table_crystals[2], *table_crystals[3:5], table_crystals[0]]
    rows_with(setup_of(tiny_model), crystals, chunk=1, workers=0)
    assert built == ["c0", "c1", "c2", "c3", "c4", "c0"]  # c2 was remembered, c0 forgotten


def test_parts_forget(tiny_model, table_crystals, monkeypatch):
    """A part is the same whatever has been computed before it."""
    built = counted_graphs(monkeypatch)
    entries = as_inputs([*table_crystals[:2], *table_crystals[:2]])
    plan = Plan(entries, chunk=2, part_size=2)
    units = list(predicted(plan, setup_of(tiny_model), workers=0))
    assert [u.unit.part for u in units] == [0, 1]
    assert built == ["c0", "c1"] * 2


# -- predictions kept -------------------------------------------------------------------------
@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "predictions"


def test_a_second_run_computes_nothing(cache_folder, tiny_model, table_crystals, monkeypatch):
    built = counted_graphs(monkeypatch)
    predictor = Predictor(tiny_model)
    keep, forget = BatchOptions(cache=True), BatchOptions()
    first = list(predictor.rows(as_inputs(table_crystals[:9]), keep))
    assert len(built) == 9
    second = list(predictor.rows(as_inputs(table_crystals[:10]), keep))
    assert built[9:] == ["c9"]
    assert second[:9] == first
    list(predictor.rows(as_inputs(table_crystals[:9]), forget))
    assert len(built) == 19
    assert len(list(cache_folder.glob("*.sqlite"))) == 1


def test_other_weights_have_another_cache(cache_folder, tiny_model):
    weights = weights_of(tiny_model, [])
    one = PredictionCache(weights, 4)
    other = PredictionCache({**weights, "model": {"name": "tiny", "sha256": "0"}}, 4)
    one.put([b"k" * 16], np.ones((1, 4)))
    assert other.get([b"k" * 16]) == {}
    # Another process may have it open.
    again = PredictionCache(weights, 4)
    again.put([b"l" * 16], np.full((1, 4), 2.5))
    np.testing.assert_array_equal(one.get([b"l" * 16, b"m" * 16])[b"l" * 16], np.full(4, 2.5))
    assert list(one.get([b"k" * 16])) == [b"k" * 16]
    one.close()
    assert one.get([b"k" * 16]) == {}


def test_a_damaged_cache_is_begun_again(cache_folder, tiny_model):
    weights = weights_of(tiny_model, [])
    cache = PredictionCache(weights, 1)
    cache.close()
    cache.path.write_bytes(b"this is no database" * 100)
    for name in ("-wal", "-shm"):
        cache.path.with_name(cache.path.name + name).unlink(missing_ok=True)
    cache = PredictionCache(weights, 1)
    cache.put([b"k" * 16], np.ones((1, 1)))
    assert len(cache.get([b"k" * 16])) == 1


def test_a_cache_that_fails_warns_and_stands_aside(tmp_path, tiny_model):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the cache is not used"):
        cache = PredictionCache(weights_of(tiny_model, []), 1, tmp_path / "file" / "inside")
    cache.put([b"k"], np.ones((1, 1)))
    assert cache.get([b"k"]) == {}


def test_the_cache_is_bounded(cache_folder, tiny_model):
    weights = weights_of(tiny_model, [])
    old = [PredictionCache({**weights, "n": k}, 1) for k in range(3)]
    for k, cache in enumerate(old):
        cache.put([b"k" * 16], np.ones((1, 1)))
        cache.close()
        os.utime(cache.path, (1000 + k, 1000 + k))
    size = old[0].path.stat().st_size
    new = PredictionCache(weights, 1, limit_bytes=int(2.5 * size))
    left = {path.name for path in cache_folder.glob("*.sqlite")}
    assert new.path.name in left
    assert old[0].path.name not in left
    full = PredictionCache(weights, 1, limit_bytes=1)
    full.put([b"f" * 16], np.ones((1, 1)))
    assert full.get([b"f" * 16]) == {}


def test_unsaved_weights_cannot_be_known(tiny_model):
    unsaved = Model(tiny_model.backbone, tiny_model.heads.values(), tiny_model.elements)
    with pytest.raises(OptionError, match="has not been saved"):
        weights_of(unsaved, [])


def test_the_cache_is_a_plain_table(cache_folder, tiny_model):
    cache = PredictionCache(weights_of(tiny_model, []), 2)
    cache.put([b"a" * 16], np.array([[1.5, -2.0]]))
    cache.close()
    ((key, value),) = sqlite3.connect(cache.path).execute("SELECT * FROM prediction").fetchall()
    assert key == b"a" * 16
    assert np.frombuffer(value).tolist() == [1.5, -2.0]


# -- units and batches ------------------------------------------------------------------------
def test_a_parquet_table_is_read_in_slices(crystal_frame, tiny_model, tmp_path):
    path = tmp_path / "t.parquet"
    frame = crystal_frame.copy()
    frame.at[7, "lattice"] = None
    frame.to_parquet(path, row_group_size=25)
    units = list(Plan([path], chunk=10))
    assert [len(list(u.entries(None, lambda _: None, {}))) for u in units] == [10, 10, 5] * 2 + [10]
    entries = [e for u in units for e in u.entries(None, lambda _: None, {})]
    expected = list(read_file(path))
    assert [(e.id, e.frame, e.source, e.crystal) for e in entries] == [
        (e.id, e.frame, e.source, e.crystal) for e in expected
    ]
    assert str(entries[7].error) == str(expected[7].error)
    # Only the wanted parts are read, and the borders stay where they were.
    some = list(Plan([path], chunk=10, part_size=20, wanted=lambda part: part == 1))
    assert [u.index for u in some] == [2, 3, 4]
    broken = {1: CrystalError("gave trouble", kind=ErrorKind.TIMEOUT)}
    names = [
        (e.id, e.error and e.error.kind) for e in some[0].entries(None, lambda _: None, broken)
    ]
    assert names == [("c20", None), ("c21", "timeout"), ("c22", None), ("c23", None), ("c24", None)]


def test_ids_of_a_table_without_ids(crystal_frame, tmp_path):
    crystal_frame.drop(columns="material_id").to_parquet(tmp_path / "t.parquet")
    units = list(Plan([tmp_path / "t.parquet"], chunk=7))
    ids = [e.id for u in units for e in u.entries(None, lambda _: None, {})]
    assert ids == [str(k) for k in range(60)]


def test_a_broken_file_among_small_ones(table_crystals, tmp_path):
    for k in range(3):
        ase.io.write(tmp_path / f"{k}.cif", table_crystals[k].to_ase())
    (unit,) = Plan([tmp_path], chunk=10)
    broken = {-2: CrystalError("gave trouble", kind=ErrorKind.WORKER_CRASH)}
    entries = list(unit.entries(None, lambda _: None, broken))
    assert [e.id for e in entries] == ["0", "1", "2"]
    assert [e.error and e.error.kind for e in entries] == [None, "worker_crash", None]
    told = []
    list(unit.entries(None, told.append, {}))
    assert set(told) == {-1, -2, -3}


def test_counts(table_crystals, crystal_table, tmp_path):
    ase.io.write(tmp_path / "a.cif", table_crystals[0].to_ase())
    assert count_inputs([tmp_path / "a.cif", crystal_table], 10**9) == 61
    assert count_inputs([crystal_table, tmp_path / "a.cif"], 10) == 60
    assert count_inputs(["cif:-"], 500) == 500


def test_large_and_small_cells_side_by_side(tiny_model, table_crystals):
    """A large cell has a batch to itself, whatever its place, and nobody's values change."""
    options = tiny_model.backbone.graph_options
    base = table_crystals[0]
    noisy = base.to_ase().repeat((5, 5, 5))
    noisy.rattle(0.01, seed=3)
    large = Crystal.from_ase(noisy)
    crystals = [*table_crystals[:5], large, *table_crystals[5:9]]
    pack = PackedGraphs.pack([build_graph(c, options) for c in crystals])
    assert pack.edges_per_graph.max() > 8000
    seen = []
    values = predict_pack(tiny_model, [], list(tiny_model.heads), pack, on_batch=seen.append)
    assert sorted(np.concatenate(seen).tolist()) == list(range(10))
    assert seen[-1].tolist() == [5]
    singly = predict_pack(tiny_model, [], list(tiny_model.heads), pack, singly=True)
    np.testing.assert_allclose(values, singly, rtol=1e-5, atol=1e-5)


def test_too_large(tiny_model, table_crystals):
    collapsed = Crystal(4 * np.eye(3), [11] * 2, [[0, 0, 0], [0.01, 0, 0]], id="collapsed")
    many = Crystal(9.0 * np.eye(3), [11] * 40, np.random.default_rng(0).random((40, 3)))
    options = BatchOptions(max_atoms=4)
    inputs = as_inputs([*table_crystals[:3], collapsed, many])
    rows = list(Predictor(tiny_model).rows(inputs, options))
    assert [row["error_kind"] for row in rows] == [
        "too_large", None, None, "overlapping_atoms", "too_large",
    ]  # fmt: skip
    assert "--max-atoms" in rows[0]["error"]


# -- kinds of errors --------------------------------------------------------------------------
KINDS = {
    "missing_file": lambda p: p / "nowhere.cif",
    "unsupported_format": lambda p: p / "notes.docx",
    "unreadable": lambda p: p / "prose.cif",
    "empty": lambda p: p / "empty.cif",
    "disordered": lambda p: p / "disordered.cif",
    "unknown_species": lambda p: p / "dummy.cif",
    "unknown_element": lambda p: p / "uranium.cif",
    "bad_cell": lambda p: p / "flat.cif",
    "bad_coordinates": lambda p: p / "nowhere_to_be.cif",
    "overlapping_atoms": lambda p: p / "overlap.cif",
}


def cif(sites, a=4.0, tags="label type_symbol fract_x fract_y fract_z occupancy"):
    cell = "".join(f"_cell_length_{x} {a if x == 'a' else 4.0}\n" for x in "abc")
    cell += "".join(f"_cell_angle_{x} 90\n" for x in ("alpha", "beta", "gamma"))
    columns = "".join(f"_atom_site_{tag}\n" for tag in tags.split())
    symmetry = "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'\n"
    return f"data_x\n{cell}{symmetry}loop_\n{columns}{sites}\n"


def test_every_kind_has_its_word(tiny_model, tmp_path):
    good = "Na1 Na 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1"
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "prose.cif").write_text("This is no CIF.")
    (tmp_path / "empty.cif").write_text("")
    (tmp_path / "disordered.cif").write_text(cif(good.replace("0.5 1", "0.5 0.5")))
    (tmp_path / "dummy.cif").write_text(cif(good.replace("Cl1 Cl", "Xx1 Xx")))
    (tmp_path / "uranium.cif").write_text(cif(good.replace("Na1 Na", "U1 U")))
    (tmp_path / "flat.cif").write_text(cif(good, a=0.0))
    (tmp_path / "nowhere_to_be.cif").write_text(cif(good.replace("0.5 0.5 0.5", "0.5 ? 0.5")))
    (tmp_path / "overlap.cif").write_text(cif(good.replace("0.5 0.5 0.5", "0.01 0 0")))
    (tmp_path / "good.cif").write_text(cif(good))
    paths = [*(path(tmp_path) for path in KINDS.values()), tmp_path / "good.cif"]
    result = predict(paths, model=tiny_model)
    assert result["error_kind"][:-1].tolist() == list(KINDS), result["error"].tolist()
    assert pd.isna(result["error_kind"].iloc[-1]), result["error"].iloc[-1]
    elsewhere = {"too_large", "timeout", "worker_crash", "relaxation_failed"}
    assert {str(kind) for kind in ErrorKind} == {*KINDS, *elsewhere}


def test_kinds_travel(tiny_model):
    import pickle

    error = CrystalError("odd", "mend it", kind=ErrorKind.DISORDERED)
    assert error.located("a.cif", 3).kind is ErrorKind.DISORDERED
    back = pickle.loads(pickle.dumps(error))
    assert (back.kind, str(back)) == (error.kind, str(error))
    assert CrystalError("odd").kind is ErrorKind.UNREADABLE
