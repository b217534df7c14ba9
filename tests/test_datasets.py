"""Public datasets: their cards, the download against a faulty server, the way into our tables."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import socket
import sys
import threading
import time
import types
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure

from matxfer.data.properties import unit_of
from matxfer.data.table import read_property_table
from matxfer.datasets import split_json
from matxfer.datasets.card import (
    Column,
    DatasetError,
    available_datasets,
    find_card,
    read_card,
)
from matxfer.datasets.convert import convert
from matxfer.datasets.download import Patience, download, download_folder
from matxfer.datasets.fetch import fetch_dataset
from matxfer.datasets.materials_project import fetch_materials_project

QUICK = Patience(tries=3, pause_s=0.0, stall_s=0.4)


def structure_of(k):
    if k % 2:
        return Structure(Lattice.cubic(4.0 + 0.1 * k), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    return Structure(
        Lattice.hexagonal(3.0 + 0.1 * k, 5.0), ["Zn", "O"], [[0, 0, 0], [0.3, 0.6, 0.4]]
    )


def matbench_bytes(n=6, column="last phdos peak", values=None, index=None):
    """Return a file as matminer's ``store_dataframe_as_json`` writes it, of made-up content."""
    values = [100.0 * (k + 1) for k in range(n)] if values is None else values
    frame = {
        "index": list(range(n)) if index is None else index,
        "columns": ["structure", column],
        "data": [[structure_of(k).as_dict(), values[k]] for k in range(n)],
    }
    return gzip.compress(json.dumps(frame).encode(), mtime=0)


def card_of(data, name="matbench_phonons", **changes):
    return replace(find_card(name), sha256=hashlib.sha256(data).hexdigest(), rows=6, **changes)


# -- cards ------------------------------------------------------------------------------------
def test_cards_are_those_of_the_list_of_sources(repository):
    path = repository.parent / "shared" / "dataset_sources.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; the cards are compared with it where it is")
    sources = json.loads(path.read_text())
    assert available_datasets() == sorted(sources)
    for name, source in sources.items():
        card = find_card(name)
        assert (card.url, card.sha256, card.file_type, card.rows) == (
            source["url"], source["sha256"], source["file_type"], source["num_entries"],
        )  # fmt: skip
        assert {*card.source_columns, *card.other_columns} == set(source["columns"])
        assert set(card.doi) == {doi.rstrip(".") for doi in source["doi"]}


def test_every_card_names_units_and_terms():
    assert len(available_datasets()) >= 24
    for name in available_datasets():
        card = find_card(name)
        assert card.columns, name
        assert card.licence, name
        assert card.url.startswith("https://")
        for column in card.columns:
            assert column.unit.removeprefix("log10(").removesuffix(")") == unit_of(column.name)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (Column("e", "band_gap_ev", "meV"), "is in meV, but the name 'band_gap_ev' says eV"),
        (Column("e", "band_gap_ev", ""), "is in no unit"),
        (Column("n", "refractive_index", "eV"), "says no unit"),
        (Column("k", "refractive_index", "log10()"), "says no unit"),
    ],
)
def test_units_that_disagree_are_refused(column, text):
    with pytest.raises(DatasetError, match=text):
        column.conversion()


def test_logarithms_become_values():
    assert Column("k", "bulk_modulus_vrh_gpa", "log10(GPa)").conversion()(2.0) == 100.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "not readable as a dataset card"),
        ("title = 'x'", "not readable as a dataset card"),
        (None, "not readable as a dataset card"),
    ],
)
def test_damaged_cards_are_refused(tmp_path, text, message):
    path = tmp_path / "own.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_card(path)


def test_unknown_dataset_names_what_is_near():
    with pytest.raises(
        DatasetError, match=r"no dataset 'PHONON'; there are .*matbench_phonons"
    ) as e:
        find_card("PHONON")
    assert "castelli" not in str(e.value)


# -- conversion -------------------------------------------------------------------------------
def test_a_matbench_file_becomes_a_table(tmp_path):
    path, table = tmp_path / "m.json.gz", tmp_path / "m.parquet"
    path.write_bytes(matbench_bytes())
    done = convert(find_card("matbench_phonons"), path, table, {"verified": False})
    assert (done.rows, done.failed, done.values) == (6, 0, {"last_phdos_peak_per_cm": 6})
    data = read_property_table(table, ["last_phdos_peak_per_cm"])
    np.testing.assert_array_equal(data.values["last_phdos_peak_per_cm"], 100 * np.arange(1, 7))
    for k, crystal in enumerate(data.crystals):
        expected = structure_of(k)
        np.testing.assert_allclose(crystal.lattice, expected.lattice.matrix)
        np.testing.assert_allclose(crystal.frac_coords, expected.frac_coords)
        assert crystal.numbers.tolist() == list(expected.atomic_numbers)
        assert crystal.id == f"matbench_phonons-{k}"
    meta = json.loads(pq.read_schema(table).metadata[b"matxfer_dataset"])
    assert meta["card"]["doi"][0] == "10.1038/s41524-020-00406-3"
    assert meta["verified"] is False


def test_rows_that_cannot_be_used_keep_their_place(tmp_path):
    disordered = Structure(Lattice.cubic(4.0), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]]).as_dict()
    good = structure_of(1).as_dict()
    evil = good | {"@module": "os", "@class": "system"}
    frame = {
        "columns": ["log10(K_VRH)", "structure"],
        "data": [
            [2.0, good], [1.0, disordered], ["many", good], [None, good], [float("nan"), good],
            [3.0], [1000.0, good], [1.5, None], [0.0, evil], [True, good],
        ],
        "index": [],
    }  # fmt: skip
    path, table = tmp_path / "m.json", tmp_path / "m.parquet"
    path.write_text(json.dumps(frame))
    done = convert(find_card("matbench_log_kvrh"), path, table)
    frame = pd.read_parquet(table)
    name = "bulk_modulus_vrh_gpa"
    missing = [v is None or math.isnan(v) for v in frame[name]]
    assert missing == [False, False, True, True, True, True, True, False, False, True]
    np.testing.assert_allclose(frame[name][[0, 1, 7, 8]], [100, 10, 10**1.5, 1])
    assert frame["lattice"].isna().tolist() == [False, True, *[False] * 3, True, False, True,
                                                False, False]  # fmt: skip
    errors = frame["error"].tolist()
    assert [k for k, e in enumerate(errors) if isinstance(e, str)] == [1, 2, 5, 6, 7, 9]
    for k, words in {1: "disorder", 2: "'many' is not a number", 5: "does not have 2 cells",
                     6: "not finite", 7: "there is no structure", 9: "'True'"}.items():  # fmt: skip
        assert words in errors[k], k
    assert (done.rows, done.failed, done.values[name]) == (10, 6, 4)
    assert len(done.errors) == 5
    assert done.errors[0].startswith("row 1 (matbench_log_kvrh-1): ")


def test_sets_without_structures_keep_ids_and_text(tmp_path):
    columns = ["formula", "expt_gap", "likely_mpid"]
    frame = {"index": ["a", "b"], "columns": columns,
             "data": [["NaCl", 8.5, "mp-22862"], ["Si", 1.1, None]]}  # fmt: skip
    path, table = tmp_path / "e.json", tmp_path / "e.parquet"
    path.write_text(json.dumps(frame))
    convert(find_card("expt_gap_kingsbury"), path, table)
    found = pd.read_parquet(table)
    assert list(found.columns) == ["material_id", "formula", "expt_band_gap_ev", "likely_mpid",
                                   "error"]  # fmt: skip
    assert found["material_id"].tolist() == ["expt_gap_kingsbury-a", "expt_gap_kingsbury-b"]
    assert found["likely_mpid"][0] == "mp-22862"
    assert pd.isna(found["likely_mpid"][1])


def test_ids_of_the_source_are_kept(tmp_path):
    card = find_card("jarvis_dft_3d")
    row = dict.fromkeys(card.source_columns, 1.0)
    row |= {"structure": structure_of(1).as_dict(), "jid": "JVASP-1", "mpid": "mp-1"}
    path, table = tmp_path / "j.json", tmp_path / "j.parquet"
    path.write_text(json.dumps({"columns": list(row), "index": [0], "data": [list(row.values())]}))
    convert(card, path, table)
    found = pd.read_parquet(table).iloc[0]
    assert (found["material_id"], found["mpid"], found["formula"]) == ("JVASP-1", "mp-1", "NaCl")
    assert found["dielectric_z_tbmbj"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"columns": ["a"], "data": [[1]]}', "no column 'last phdos peak'"),
        ('{"data": [[1]], "columns": []}', "rows come before the names"),
        ('{"a": 1}', "no data frame in split form"),
        ("{}", "no data frame in split form"),
        ('{"columns": ["last phdos peak", "structure"], "index": [0], "data": []}', "no rows"),
        ('{"columns": ["last phdos peak", "structure"], "data": [[1, null], [2, nu',
         "incomplete after 1 rows"),
        ('{"columns": ["last phdos peak", "structure"], "data": [[1, null] [2, null]]}',
         "incomplete after 1 rows"),
        ('{"columns": ["last phdos peak", "structure"], "data": [[1, null]', "incomplete after 1"),
        ('{"columns": ["last phdos peak", "structure"], "data": [' + "[" * 100000,
         "incomplete after 0"),
        ("[1]", "incomplete after 0 rows"),
        ("", "incomplete after 0 rows"),
    ],
)  # fmt: skip
def test_files_of_another_layout_are_refused_and_leave_nothing(tmp_path, text, message):
    path, table = tmp_path / "m.json", tmp_path / "m.parquet"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        convert(find_card("matbench_phonons"), path, table)
    assert str(path) in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_gzip_file_is_refused(tmp_path):
    path = tmp_path / "m.json.gz"
    path.write_bytes(matbench_bytes()[:-40])
    with pytest.raises(DatasetError, match="incomplete after"):
        convert(find_card("matbench_phonons"), path, tmp_path / "m.parquet")


def test_decompression_is_bounded(tmp_path):
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(b'{"columns": ["' + b"a" * (80 << 20), 9))
    with pytest.raises(DatasetError, match="decompression bomb"):
        convert(find_card("matbench_phonons"), path, tmp_path / "m.parquet")


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_pieces_do_not_change_what_is_read(tmp_path, monkeypatch, piece):
    """Rows are read alike wherever the text is cut; the oracle is the whole document."""
    frame = {"index": [0, 1, 2], "columns": ["a", "b"], "note": {"x": [1]},
             "data": [[12345, 'text, ] " \\'], [-1.5e-3, None], [7, [1, 2]]]}  # fmt: skip
    path = tmp_path / "f.json"
    path.write_text(json.dumps(frame, indent=1))
    monkeypatch.setattr(split_json, "_PIECE", piece)
    found = list(split_json.rows_of(path, ["a"]))
    assert found == [(str(k), dict(zip("ab", row, strict=True)))
                     for k, row in enumerate(frame["data"])]  # fmt: skip


# -- download ---------------------------------------------------------------------------------
class Server:
    """A bounded server of one file on 127.0.0.1, with the fault that a path names."""

    def __init__(self, data):
        self.data, self.asked, self.stop = data, [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Range")))
                getattr(outer, self.path.strip("/").replace("-", "_"))(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def url(self, path):
        return f"http://127.0.0.1:{self.http.server_address[1]}/{path}"

    def close(self):
        self.stop.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(5)

    def send(self, request, *, upto=None, ranges=True, data=None):
        data = self.data if data is None else data
        start = 0
        if ranges and (asked := request.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                request.send_error(416)
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        request.wfile.write(data[start:upto])
        request.wfile.flush()
        request.close_connection = True

    def good(self, request):
        self.send(request)

    def cut(self, request):  # a third of the file at a time
        asked = request.headers.get("Range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        self.send(request, upto=start + len(self.data) // 3 + 1)

    def cut_always(self, request):
        self.send(request, upto=10, ranges=False)

    def cut_without_ranges(self, request):
        self.send(request, upto=100 if len(self.asked) == 1 else None, ranges=False)

    def other(self, request):
        self.send(request, data=b"another file" * 50)

    def missing(self, request):
        request.send_error(404)

    def challenge(self, request):
        request.send_response(202)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def other_part(self, request):  # ranges are not what they were asked for, once
        if request.headers.get("Range") is None and len(self.asked) > 1:
            self.send(request)
            return
        request.send_response(206 if request.headers.get("Range") else 200)
        if request.headers.get("Range"):
            request.send_header("Content-Range", f"bytes 0-9/{len(self.data)}")
        request.send_header("Content-Length", str(len(self.data)))
        request.end_headers()
        request.wfile.write(self.data[:50])

    def busy(self, request):
        if len(self.asked) < 3:
            request.send_error(503)
        else:
            self.send(request)

    def moved(self, request):
        request.send_response(302)
        request.send_header("Location", self.url("good"))
        request.end_headers()

    def endless(self, request):
        request.send_response(200)
        request.end_headers()
        for _ in range(200):
            request.wfile.write(bytes(1000))

    def hang(self, request):
        self.stop.wait(5)
        request.close_connection = True

    def drip(self, request):
        request.send_response(200)
        request.send_header("Content-Length", str(len(self.data)))
        request.end_headers()
        try:
            for k in range(100):
                request.wfile.write(self.data[k : k + 1])
                request.wfile.flush()
                if self.stop.wait(0.05):
                    return
        except OSError:
            pass


@pytest.fixture
def data():
    return matbench_bytes()


@pytest.fixture
def server(data, tmp_path, monkeypatch):
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = Server(data)
    yield found
    found.close()


def kept():
    return sorted(p.name for p in download_folder().iterdir() if not p.name.startswith("."))


@pytest.mark.parametrize(
    "path", ["good", "moved", "busy", "cut", "cut-without-ranges", "other-part"]
)
def test_download_survives(server, data, path):
    seen = []
    found = download(
        card_of(data, url=server.url(path)),
        patience=QUICK,
        on_bytes=lambda done, total: seen.append((done, total)),
    )
    assert found.read_bytes() == data
    assert kept() == ["matbench_phonons.json.gz"]
    assert seen[-1] == (len(data), len(data))
    asked = [r for p, r in server.asked if p != "/moved"]
    third = len(data) // 3 + 1
    expected = {
        "good": [None],
        "moved": [None],
        "busy": [None] * 3,
        "cut": [None, f"bytes={third}-", f"bytes={2 * third}-"],
        "cut-without-ranges": [None, "bytes=100-"],
        "other-part": [None, "bytes=50-", None],
    }
    assert asked == expected[path]


def test_a_second_call_asks_nobody(server, data):
    card = card_of(data, url=server.url("good"))
    download(card)
    download(card)
    assert len(server.asked) == 1
    # A damaged copy in the cache is noticed and replaced.
    (download_folder() / card.file_name).write_bytes(b"damaged")
    assert download(card).read_bytes() == data
    assert len(server.asked) == 2


def test_the_next_run_goes_on_after_a_cut(server, data):
    with pytest.raises(DatasetError, match=r"broke 1 times .*goes on from there"):
        download(card_of(data, url=server.url("cut")), patience=replace(QUICK, tries=1))
    assert kept() == ["matbench_phonons.json.gz.part"]
    assert download(card_of(data, url=server.url("good")), patience=QUICK).read_bytes() == data
    assert server.asked[-1] == ("/good", f"bytes={len(data) // 3 + 1}-")


@pytest.mark.parametrize("left", ["wrong start", "too long"])
def test_a_part_of_another_file_is_thrown_away(server, data, left):
    card = card_of(data, url=server.url("good"))
    download_folder().mkdir(parents=True)
    part = download_folder() / f"{card.file_name}.part"
    part.write_bytes(b"x" * (20 if left == "wrong start" else len(data) + 5))
    assert download(card, patience=QUICK).read_bytes() == data
    assert server.asked[-1] == ("/good", None)
    assert kept() == [card.file_name]


@pytest.mark.parametrize(
    ("path", "message", "asked"),
    [
        ("other", "does not have the checksum of the card", 1),
        ("missing", "answers HTTP 404", 1),
        ("challenge", "answers HTTP 202", 1),
        ("cut-always", "broke 3 times .*10 of .* bytes came", 3),
        ("hang", r"broke 3 times .*timed out", 3),
        ("drip", r"broke 3 times \(only \d+ bytes in 0 s", 3),
    ],
)
def test_faults_are_told(server, data, path, message, asked):
    started = time.monotonic()
    with pytest.raises(DatasetError, match=message) as error:
        download(card_of(data, url=server.url(path)), patience=QUICK)
    assert len(server.asked) == asked
    assert time.monotonic() - started < 4
    assert "matbench_phonons" in str(error.value)
    assert "matbench_phonons.json.gz" not in kept()


def test_time_limit(server, data):
    started = time.monotonic()
    patience = Patience(pause_s=0.0, stall_s=30, limit_s=0.3)
    with pytest.raises(DatasetError, match=r"not sent all in the 0.3 s allowed"):
        download(card_of(data, url=server.url("drip")), patience=patience)
    assert time.monotonic() - started < 2


def test_a_file_without_an_end_is_given_up(server, data, monkeypatch):
    monkeypatch.setattr("matxfer.datasets.download.MAX_FILE_BYTES", 100_000)
    with pytest.raises(DatasetError, match="which is not this dataset"):
        download(card_of(data, url=server.url("endless")), patience=QUICK)
    part = download_folder() / "matbench_phonons.json.gz.part"
    assert part.stat().st_size < 100_000


def test_offline_says_how_to_go_on(data, tmp_path, monkeypatch):
    monkeypatch.setenv("MATXFER_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    card = card_of(data, url=f"http://127.0.0.1:{port}/x")
    with pytest.raises(DatasetError, match=r"cannot be reached.*offline.*--from FILE"):
        download(card, patience=QUICK)


# -- the whole way ----------------------------------------------------------------------------
def card_file(folder, data, url):
    path = folder / "own.toml"
    path.write_text(
        f'title = "t"\ncollection = "c"\nlicence = "l"\nurl = "{url}"\nrows = 6\ndoi = []\n'
        f'sha256 = "{hashlib.sha256(data).hexdigest()}"\nfile_type = "json.gz"\n'
        'structure_column = "structure"\n[[columns]]\nsource = "last phdos peak"\n'
        'name = "last_phdos_peak_per_cm"\nunit = "1/cm"\n'
    )
    return path


def test_fetch_downloads_and_converts(server, data, tmp_path):
    card = card_file(tmp_path, data, server.url("cut"))
    found = fetch_dataset(str(card), tmp_path / "t.parquet", patience=QUICK)
    assert (found["rows"], found["failed"], found["verified"]) == (6, 0, True)
    meta = json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[b"matxfer_dataset"])
    assert meta["source_sha256"] == hashlib.sha256(data).hexdigest()
    assert meta["versions"]["python"]
    with pytest.raises(DatasetError, match=r"let its name end in \.parquet"):
        fetch_dataset(str(card), tmp_path / "t.csv")
    with pytest.raises(DatasetError, match="no such folder"):
        fetch_dataset(str(card), tmp_path / "nowhere" / "t.parquet")


def test_a_card_with_another_number_of_rows_is_told(data, tmp_path):
    card = card_file(tmp_path, data, "http://127.0.0.1:9/x")
    card.write_text(card.read_text().replace("rows = 6", "rows = 7"))
    local = tmp_path / "m.json.gz"
    local.write_bytes(data)
    with pytest.raises(DatasetError, match="has 6 rows where the card says 7"):
        fetch_dataset(str(card), tmp_path / "t.parquet", source=local)


@pytest.fixture
def run(run):
    return partial(run, "datasets")


def test_commands_list_and_info(run):
    code, out, _ = run("list")
    assert code == 0
    assert "matbench_phonons" in out
    assert "last_phdos_peak_per_cm" in out
    code, out, _ = run("list", "--json")
    assert set(json.loads(out)) == set(available_datasets())
    code, out, _ = run("info", "expt_gap_kingsbury")
    assert find_card("expt_gap_kingsbury").sha256 in out
    assert "no structures" in out
    assert run("info", "expt_gap_kingsbury", "--json")[1].startswith("{")
    code, _, err = run("info", "nothing")
    assert code == 2
    assert "no dataset 'nothing'" in err


def test_command_fetch_from_a_local_copy(run, tmp_path, data):
    local = tmp_path / "mine.json.gz"
    local.write_bytes(matbench_bytes(values=[1.0, "x", 3.0, 4.0, 5.0, 6.0]))
    code, _, err = run("fetch", "matbench_phonons", "--from", local)
    assert code == 2
    assert "take it as it is with --unverified" in err
    assert run("fetch", "matbench_phonons", "--from", tmp_path / "no")[0] == 2
    code, out, err = run("fetch", "matbench_phonons", "--from", local, "--unverified")
    assert code == 0, err
    assert out.splitlines() == ["matbench_phonons.parquet: 6 rows, 1 with an error",
                                "  last_phdos_peak_per_cm: 5 values"]  # fmt: skip
    assert "row 1 (matbench_phonons-1): last phdos peak: 'x' is not a number" in err
    assert "not the file of the card" in err
    assert (tmp_path / "matbench_phonons.parquet").is_file()
    card = card_file(tmp_path, data, "http://127.0.0.1:9/x")
    local.write_bytes(data)
    code, out, err = run("fetch", card, "--from", local, "-o", "own.parquet", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["verified"] is True


# -- Materials Project ------------------------------------------------------------------------
class RecordedClient:
    """Answers of our own making in the shape of mp-api's summary search without its models."""

    def __init__(self, answer):
        self.answer, self.asked = answer, {}
        self.materials = self.summary = self

    def search(self, fields, **criteria):
        self.asked = {"fields": fields, **criteria}
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_materials_project(tmp_path):
    first = {
        "material_id": "mp-22862", "formula_pretty": "NaCl", "structure": structure_of(1).as_dict(),
        "formation_energy_per_atom": -2.1, "energy_above_hull": 0.0, "band_gap": 5.0,
        "bulk_modulus": {"voigt": 25.0, "reuss": 23.0, "vrh": 24.0}, "shear_modulus": None,
        "total_magnetization": 0.0,
    }  # fmt: skip
    client = RecordedClient([first, first | {"material_id": "mp-2", "band_gap": "wide"}])
    found = fetch_materials_project(tmp_path / "t.parquet", client=client, chemsys="Na-Cl")
    assert client.asked["chemsys"] == "Na-Cl"
    assert set(first) == set(client.asked["fields"])
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert table["material_id"].tolist() == ["mp-22862", "mp-2"]
    assert table["bulk_modulus_vrh_gpa"].tolist() == [24.0, 24.0]
    assert table["shear_modulus_vrh_gpa"].isna().all()
    assert found["failed"] == 1
    assert "band_gap: 'wide' is not a number" in table["error"][1]
    data = read_property_table(tmp_path / "t.parquet", ["formation_energy_ev_per_atom"])
    assert data.crystals[0].formula == "NaCl"


def test_materials_project_says_what_is_wrong(tmp_path, monkeypatch):
    table = tmp_path / "t.parquet"
    with pytest.raises(DatasetError, match="say which materials"):
        fetch_materials_project(table)
    client = RecordedClient(RuntimeError("REST query failed"))
    with pytest.raises(DatasetError, match="REST query failed; check the criteria"):
        fetch_materials_project(table, client=client, chemsys="Xx")
    with pytest.raises(DatasetError, match="there are no rows"):
        fetch_materials_project(table, client=RecordedClient([]), chemsys="Xx")
    monkeypatch.setitem(sys.modules, "mp_api", None)
    with pytest.raises(DatasetError, match=r"pip install 'matxfer\[mp\]'"):
        fetch_materials_project(table, chemsys="Na-Cl")
    module = types.ModuleType("mp_api.client")
    module.MPRester = lambda *a, **k: RecordedClient([{"key": a, **k}, "text"])
    monkeypatch.setitem(sys.modules, "mp_api", types.ModuleType("mp_api"))
    monkeypatch.setitem(sys.modules, "mp_api.client", module)
    monkeypatch.delenv("MP_API_KEY", raising=False)
    with pytest.raises(DatasetError, match=r"there is no key; .*MP_API_KEY"):
        fetch_materials_project(table, chemsys="Na-Cl")
    monkeypatch.setenv("MP_API_KEY", "secret")
    found = fetch_materials_project(table, chemsys="Na-Cl")
    assert found["failed"] == 2
    assert b"secret" not in table.read_bytes()
