"""What the benchmark of remedies makes of its records."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    return importlib.import_module("_remedy_tables")


def record(seed, pair, *tried):
    """Return a record of trials (name, verdict, without, with)."""
    keys = ("name", "verdict", "before", "after", "gain")
    trials = [
        dict(zip(keys, (*t, None if t[2] is None else t[2] - t[3]), strict=True)) for t in tried
    ]
    return {"pair": pair, "base": "base", "seed": seed, "tried": trials}


@pytest.fixture
def records():
    refused = ("weights", "refused", None, None)
    return [
        record(0, "A", ("correction (linear)", "helps", 2.0, 1.0), refused),
        record(1, "A", ("correction (elements)", "helps", 2.0, 1.5), refused),
        record(2, "A", ("correction (linear)", "harms", 2.0, 2.2), refused),
        record(0, "B", ("correction (offset)", "harms", 1.0, 1.2), ("weights", "helps", 1.0, 0.5)),
        record(1, "B", ("correction (offset)", "helps", 1.0, 0.8), ("weights", "harms", 1.0, 1.4)),
        record(0, "halves", ("weights", "harms", 1.0, 1.1)),
        record(0, "planted", ("weights", "helps", 1.0, 0.1)),
    ]


def test_a_pair_has_the_verdict_of_most_seeds(tables, records):
    found = {(o.pair, o.remedy): o for o in tables.outcomes(records)}
    assert found["A", "correction"].verdict == "helps"
    assert found["A", "weights"].verdict == "refused"
    assert found["B", "weights"].verdict == "no difference", "one seed each"
    assert found["A", "correction"].changes == pytest.approx([-0.5, -0.25, 0.1])
    # Mean -0.65/3; deviations from it -0.2833, -0.0333, 0.3167.
    row = found["A", "correction"].row()
    assert row[3:6] == ("2", "1.567", "-21.7% ± 30.1%")
    assert row[6:] == (2, "", 1, "")
    assert found["A", "weights"].row()[3:6] == ("–", "–", "–")


def test_controls_stand_apart(tables, records):
    sentence, (short, control, every) = tables.tables(
        tables.outcomes(records), ["planted"], "halves"
    )
    rows = {row[0]: row[1:] for row in short.rows}
    assert rows["correction"] == ("1 (3)", "1 (0)", "0 (2)", "0 (0)", "-21.7% (A)", "–")
    assert rows["weights"] == ("0 (1)", "1 (0)", "0 (1)", "1 (3)", "-5.0% (B)", "–")
    assert {row[0] for row in control.rows} == {"planted", "halves"}
    assert {row[0] for row in every.rows} == {"A", "B"}
    assert "Of 1 trials between random halves 0 say that a remedy helps and 1 that" in control.note
    assert "does not help here (of 2: 1 no difference, 1 refused)" in sentence
    assert "where rules differ (of 2: 1 help, 1 no difference)" in sentence
    assert "where they do not (of 0: none)" in sentence
