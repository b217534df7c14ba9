"""OPTIMADE providers: entries of every kind, and a local server with the faults that servers have.

The structures need no client; the rest is skipped where optimade[http-client] is not installed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from matxfer.crystal import CrystalError
from matxfer.data.table import read_property_table
from matxfer.datasets.card import DatasetError
from matxfer.datasets.columns import read_column, read_columns
from matxfer.datasets.download import Patience
from matxfer.datasets.optimade import fetch_optimade
from matxfer.datasets.optimade_structure import crystal_of_optimade
from matxfer.errors import ErrorKind

FILTER = 'elements HAS "Na" AND nelements=2'
QUICK = Patience(tries=2, pause_s=0.0, stall_s=1.0)


def attributes(a=5.6, **changes):
    """Return NaCl's primitive cell as providers send it; the species in another order."""
    cell = (a / 2 * (1 - np.eye(3))).tolist()
    return {
        "lattice_vectors": cell,
        "cartesian_site_positions": [[0, 0, 0], [a / 2, a / 2, a / 2]],
        "species": [
            {"name": "Cl", "chemical_symbols": ["Cl"], "concentration": [1.0]},
            {"name": "Na", "chemical_symbols": ["Na"], "concentration": [1.0]},
        ],
        "species_at_sites": ["Na", "Cl"],
        "chemical_formula_reduced": "ClNa",
        "last_modified": "2026-01-01T00:00:00Z",
        **changes,
    }


def mixed(*symbols, shares=(0.5, 0.5), name="Na"):
    other = {"name": "Cl", "chemical_symbols": ["Cl"], "concentration": [1.0]}
    return [other, {"name": name, "chemical_symbols": list(symbols), "concentration": list(shares)}]


# -- structures -------------------------------------------------------------------------------
def test_a_structure_keeps_lattice_species_and_places():
    crystal = crystal_of_optimade(attributes(), "x")
    assert crystal.numbers.tolist() == [11, 17]  # in the order of the sites, not of the species
    np.testing.assert_allclose(crystal.frac_coords, [[0, 0, 0], [0.5, 0.5, 0.5]], atol=1e-12)
    np.testing.assert_allclose(crystal.cart_coords, attributes()["cartesian_site_positions"])
    without = attributes()
    del without["species"]
    assert crystal_of_optimade(without).numbers.tolist() == [11, 17]
    named = attributes(
        species=[{"name": "Na1", "chemical_symbols": ["Na", "vacancy"], "concentration": [1, 0]},
                 {"name": "Cl1", "chemical_symbols": ["Cl"]}],
        species_at_sites=["Na1", "Cl1"],
    )  # fmt: skip
    assert crystal_of_optimade(named).numbers.tolist() == [11, 17]


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"species": mixed("Na", "K")}, ErrorKind.DISORDERED, "'Na' is Na 0.5, K 0.5"),
        ({"species": mixed("Na", "vacancy", shares=(0.9, 0.1))}, ErrorKind.DISORDERED, "vacancy"),
        ({"species": mixed("Na", shares=(0.9,))}, ErrorKind.DISORDERED, "Na 0.9"),
        ({"species": mixed("X", shares=(1.0,))}, ErrorKind.UNKNOWN_SPECIES, "species 'X'"),
        ({"species": mixed("vacancy", shares=(1.0,))}, ErrorKind.UNKNOWN_SPECIES, "vacancy"),
        ({"species": mixed("Na", name="K")}, ErrorKind.UNKNOWN_SPECIES, "'Na' of a site is not"),
        ({"species": mixed()}, ErrorKind.UNKNOWN_SPECIES, "no chemical symbols"),
        ({"species": None, "species_at_sites": ["Na", "Q"]}, ErrorKind.UNKNOWN_SPECIES, "'Q'"),
        ({"species_at_sites": None}, ErrorKind.EMPTY, "no species_at_sites"),
        ({"lattice_vectors": None}, ErrorKind.BAD_CELL, "lattice_vectors are missing"),
        ({"lattice_vectors": [[1, 0, 0], [0, 1, 0], [None] * 3]}, ErrorKind.BAD_CELL, "periodic"),
        ({"lattice_vectors": [[1, 0, 0]] * 3}, ErrorKind.BAD_CELL, "no volume"),
        ({"cartesian_site_positions": [[0, 0, 0]]}, ErrorKind.BAD_COORDINATES, "each of 2 sites"),
        ({"cartesian_site_positions": "x"}, ErrorKind.BAD_COORDINATES, "each of 2 sites"),
    ],
)  # fmt: skip
def test_structures_that_cannot_be_used_say_why(changes, kind, text):
    with pytest.raises(CrystalError, match=text) as error:
        crystal_of_optimade(attributes(**changes))
    assert error.value.kind == kind


def test_structures_are_those_of_the_clients_adapter():
    adapters = pytest.importorskip("optimade.adapters", reason="pip install 'matxfer[optimade]'")
    full = attributes(
        elements=["Cl", "Na"], nelements=2, elements_ratios=[0.5, 0.5], nsites=2,
        chemical_formula_descriptive="NaCl", chemical_formula_anonymous="AB",
        dimension_types=[1, 1, 1], nperiodic_dimensions=3, structure_features=[],
    )  # fmt: skip
    adapter = adapters.Structure({"id": "x", "type": "structures", "attributes": full})
    theirs, ours = adapter.as_pymatgen, crystal_of_optimade(full).to_pymatgen()
    assert theirs.matches(ours)
    assert [s.specie.symbol for s in theirs] == [s.specie.symbol for s in ours]


# -- columns ----------------------------------------------------------------------------------
def test_columns_and_units():
    column = read_column("_x_gap = band_gap_ev", {"_x_gap": "eV"})
    assert (column.source, column.name, column.unit) == ("_x_gap", "band_gap_ev", "eV")
    assert read_column("k=bulk_modulus_vrh_gpa:log10(GPa)").conversion()(2) == 100
    assert read_column("n=refractive_index:1").unit == ""
    assert read_column("n=refractive_index", {"n": ""}).unit == ""
    assert read_column("e=energy_ev").unit == "eV"


@pytest.mark.parametrize(
    ("text", "stated", "message"),
    [
        ("gap", {}, "write SOURCE=NAME"),
        ("=x_ev", {}, "write SOURCE=NAME"),
        ("gap=", {}, "write SOURCE=NAME"),
        ("gap=gap", {}, "in which unit"),
        ("gap=gap", {"gap": "eV"}, "is in eV, but the name 'gap' says no unit$"),
        ("gap=gap_mev", {"gap": "eV"}, "is in eV, but the name 'gap_mev' says meV"),
        ("gap=gap_ev:eV", {"gap": "meV"}, "the source states 'meV'"),
        ("gap=gap_ev:meV", {}, "is in meV"),
        ("gap=lattice:1", {}, "every table has"),
    ],
)
def test_columns_without_a_clear_unit_are_refused(text, stated, message):
    with pytest.raises(DatasetError, match=message):
        read_column(text, stated)


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(DatasetError, match="two columns would be called 'gap_ev'"):
        read_columns(["a=gap_ev", "b=gap_ev"])


# -- a provider -------------------------------------------------------------------------------
ENTRIES = [
    {"id": f"x-{k}", "type": "structures",
     "attributes": attributes(5.0 + 0.1 * k, _x_gap=1.0 + k, _x_deep={"e": {"per_atom": -k}})}
    for k in range(5)
]  # fmt: skip
ENTRIES[1]["attributes"]["species"] = mixed("Na", "K")
ENTRIES[2]["attributes"]["species"] = mixed("Na", name="K")
ENTRIES[3]["attributes"]["_x_gap"] = None


class Provider(BaseHTTPRequestHandler):
    """A provider whose first word of the path says what is wrong with it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, cut=0):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + cut))
        self.end_headers()
        self.wfile.write(data)
        if cut:
            self.wfile.flush()
            self.connection.close()

    def do_GET(self):  # noqa: C901
        url = urlparse(self.path)
        _, fault, _, *rest = url.path.split("/")
        endpoint, query = "/".join(rest), parse_qs(url.query)
        self.server.asked.append((endpoint, query))
        count = sum(1 for e, _ in self.server.asked if e == endpoint)
        if endpoint == "info":
            if fault == "other":
                self.answer(b"<html>no such thing</html>", 404)
                return
            self.answer({"data": {"type": "info", "id": "/", "attributes": {
                "api_version": "1.1.0", "available_licenses": ["CC-BY-4.0"]}},
                "meta": {"provider": {"name": "Example provider", "prefix": "x"}}})  # fmt: skip
            return
        if endpoint == "info/structures":
            properties = {"nsites": {"unit": "dimensionless"}, "_x_gap": {"unit": "eV"},
                          "_x_deep": {"unit": "inapplicable"}, "_x_odd": {}}  # fmt: skip
            self.answer({"data": {"properties": properties}, "meta": {}})
            return
        if fault == "refuses":
            told = {"errors": [{"title": "Bad Request", "detail": "no such operator"}]}
            self.answer(told, 400)
        elif fault == "broken" or (fault == "shaky" and count == 1):
            self.answer({"errors": [{"title": "Oops", "detail": "database down"}]}, 500)
        elif fault == "busy":
            self.answer({"errors": []}, 429)
        elif fault == "slow":
            time.sleep(3.0)
            self.answer({"data": []})
        elif fault == "cut" or (fault == "cutonce" and count == 2):
            self.answer(b'{"data": [', cut=1000)
        elif fault == "garbled":
            self.answer(b'{"data": [')
        elif fault == "late" and count == 2:
            self.answer({"errors": [{"title": "Oops", "detail": "late"}]}, 500)
        else:
            self.page(fault, query)

    def page(self, fault, query):
        offset = int(query.get("page_offset", ["0"])[0])
        entries = [] if fault == "none" else ENTRIES[offset : offset + 2]
        if fault == "twice":
            entries = [ENTRIES[0]] * 2 if offset else ENTRIES[:2]
        if fault == "bare":
            entries = [{"id": "b-1"}, "text", *entries]
        following = f"http://127.0.0.1:{self.server.server_port}/{fault}/v1/structures?page_offset="
        more = offset + 2 < len(ENTRIES) and fault not in {"none", "short"}
        link = following + str(0 if fault == "round" else offset + 2)
        returned = {"none": 0, "twice": None, "bare": None}.get(fault, len(ENTRIES))
        if fault == "twice" and offset:
            more = False
        meta = {"data_returned": returned} if returned is not None else {}
        if fault != "terse":
            meta["data_available"] = 1000
        nxt = ({"href": link} if offset else link) if more else None
        self.answer({"data": entries, "links": {"next": nxt}, "meta": meta})


@pytest.fixture(scope="module")
def provider():
    pytest.importorskip("optimade.client", reason="pip install 'matxfer[optimade]'")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    server.asked = []
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = lambda fault: f"http://127.0.0.1:{server.server_port}/{fault}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(provider, tmp_path):
    def call(fault, criteria=FILTER, **options):
        provider.asked.clear()
        options = {"patience": QUICK, **options}
        return fetch_optimade(
            provider.url(fault), tmp_path / "t.parquet", criteria=criteria, **options
        )

    return call


def test_entries_of_all_pages_become_rows(fetch, provider, tmp_path):
    columns = ["_x_gap=band_gap_ev", "_x_deep.e.per_atom=formation_energy_ev_per_atom"]
    found = fetch("well", columns=columns)
    assert (found["rows"], found["failed"], found["found"]) == (5, 2, 5)
    assert found["values"] == {"band_gap_ev": 4, "formation_energy_ev_per_atom": 5}
    table = pd.read_parquet(tmp_path / "t.parquet")
    assert table["material_id"].tolist() == [f"x-{k}" for k in range(5)]
    assert table["formula"].tolist() == ["NaCl", "ClNa", "ClNa", "NaCl", "NaCl"]
    assert "disordered: species 'Na' is Na 0.5, K 0.5" in table["error"][1]
    assert "species 'Na' of a site is not described" in table["error"][2]
    assert table["band_gap_ev"].tolist()[:3] == [1.0, 2.0, 3.0]
    assert np.isnan(table["band_gap_ev"][3])
    assert table["formation_energy_ev_per_atom"].tolist() == [0, -1, -2, -3, -4]
    data = read_property_table(tmp_path / "t.parquet", ["band_gap_ev"])
    assert data.crystals[4].lattice[0, 1] == pytest.approx(2.7)
    meta = json.loads(pq.read_schema(tmp_path / "t.parquet").metadata[b"matxfer_dataset"])
    assert meta["filter"] == FILTER
    assert meta["card"]["collection"] == "Example provider"
    assert meta["card"]["licence"] == "CC-BY-4.0"
    first = next(query for endpoint, query in provider.asked if endpoint == "structures")
    assert first["filter"] == [FILTER]
    assert {"_x_gap", "_x_deep", "species"} <= set(first["response_fields"][0].split(","))


def test_signs_in_a_filter_reach_the_provider(fetch, provider):
    criteria = 'chemical_formula_reduced="A&B#C+D%41"'
    fetch("well", criteria)
    assert [q["filter"] for e, q in provider.asked if "filter" in q] == [[criteria]]


def test_limit(fetch):
    found = fetch("well", limit=3)
    assert (found["rows"], found["found"]) == (3, 5)
    with pytest.raises(DatasetError, match="--limit is 0"):
        fetch("well", limit=0)


@pytest.mark.parametrize("fault", ["shaky", "cutonce", "terse"])
def test_faults_that_pass_cost_nothing(fetch, fault):
    assert fetch(fault)["rows"] == 5


def test_entries_that_are_none_keep_their_rows(fetch, tmp_path):
    assert fetch("bare", limit=4)["failed"] == 3
    assert "no attributes" in pd.read_parquet(tmp_path / "t.parquet")["error"][0]
    fetch("twice")
    told = pd.read_parquet(tmp_path / "t.parquet")["error"].tolist()
    assert "the provider sent 'x-0' before" in told[2]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other", "info cannot be had.*404"),
        ("refuses", "400.*Bad Request: no such operator"),
        ("broken", "500.*database down"),
        ("busy", "429.*too many requests"),
        ("slow", "[Tt]imed out"),
        ("cut", "structures cannot be had"),
        ("garbled", "Could not decode"),
        ("none", "there are no rows"),
        ("short", "sent 2 of the 5 structures"),
        ("round", "its pages go round"),
    ],
)
def test_faults_are_told_and_leave_nothing(fetch, tmp_path, fault, message):
    started = time.monotonic()
    with pytest.raises(DatasetError, match=message):
        fetch(fault)
    assert time.monotonic() - started < 20
    assert not list(tmp_path.iterdir())


def test_a_fault_on_a_later_page_leaves_nothing(fetch, tmp_path):
    with pytest.raises(DatasetError, match="late"):
        fetch("late", patience=Patience(tries=1, stall_s=1.0))
    assert not list(tmp_path.iterdir())


def test_time_limit(fetch):
    with pytest.raises(DatasetError, match="not done after 1e-09 s"):
        fetch("well", patience=Patience(limit_s=1e-9))


def test_requests_that_make_no_sense(fetch, tmp_path):
    for criteria, message in (
        ("", "say which structures"),
        ("elements HAS", "is no OPTIMADE filter"),
        ('elements HAS "Li" AND', "is no OPTIMADE filter"),
    ):
        with pytest.raises(DatasetError, match=message):
            fetch("well", criteria)
    for column, message in (
        ("_x_gip=band_gap_ev", "has no field '_x_gip'; of its own it has _x_deep, _x_gap"),
        ("_x_gap=gap_gpa", "is in eV, but the name 'gap_gpa' says GPa"),
        ("_x_odd=odd", "in which unit"),
    ):
        with pytest.raises(DatasetError, match=message):
            fetch("well", columns=[column])
    assert fetch("well", columns=["_x_odd=odd:1"])["values"] == {"odd": 0}
    with pytest.raises(DatasetError, match="optimade:https"):
        fetch_optimade("ftp://x", tmp_path / "t.parquet", criteria=FILTER)


def test_names_of_providers(monkeypatch, tmp_path, provider):
    import optimade.utils

    places = {"one": [provider.url("well")], "two": ["http://a/", "http://b"], "none": []}
    monkeypatch.setattr(
        optimade.utils,
        "get_all_databases",
        lambda include_providers: places[min(include_providers)],
    )
    monkeypatch.setattr(optimade.utils, "get_providers", lambda: [{"id": "one"}])
    table = tmp_path / "t.parquet"
    assert fetch_optimade("one", table, criteria=FILTER)["rows"] == 5
    with pytest.raises(DatasetError, match=r"several databases.*http://a, http://b"):
        fetch_optimade("two", table, criteria=FILTER)
    with pytest.raises(DatasetError, match="known are one"):
        fetch_optimade("none", table, criteria=FILTER)
    monkeypatch.setattr(optimade.utils, "get_providers", list)
    with pytest.raises(DatasetError, match="are you offline"):
        fetch_optimade("none", table, criteria=FILTER)


# -- the command ------------------------------------------------------------------------------
@pytest.fixture
def run(run):
    return partial(run, "datasets", "fetch")


def test_command(run, provider):
    name = f"optimade:{provider.url('well')}"
    words = ("--filter", FILTER, "--column", "_x_gap=band_gap_ev", "--limit", 4, "-o", "x.parquet")
    code, out, err = run(name, *words)
    assert code == 0, err
    assert out.splitlines() == ["x.parquet: 4 rows, 2 with an error", "  band_gap_ev: 3 values"]
    assert "the first 4 of 5 structures" in err
    assert "row 1 (x-1): disordered" in err
    code, out, err = run(name, *words, "--json")
    assert json.loads(out)["rows"] == 4
    code, _, err = run(name, "--filter", FILTER, "--from", "x.json")
    assert code == 2
    assert "--from: is of published files" in err


def test_command_without_client_or_sense(run, monkeypatch):
    code, _, err = run("matbench_phonons", "--filter", FILTER, "--limit", 3)
    assert code == 2
    assert "--filter, --limit: is of OPTIMADE providers" in err
    monkeypatch.setitem(sys.modules, "optimade.client", None)
    code, _, err = run("optimade:mp", "--filter", FILTER)
    assert code == 2
    assert "pip install 'matxfer[optimade]'" in err
