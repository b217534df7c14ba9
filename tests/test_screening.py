"""Conditions, orders and the best of a stream, against pandas and plain Python."""

from __future__ import annotations

import random
import tracemalloc

import pandas as pd
import pytest

from matxfer.columns import CRYSTAL
from matxfer.errors import OptionError
from matxfer.screening import CHUNK, Condition, Screen

COLUMNS = ["id", "source", "frame", "formula", "n_sites", "gap_ev", "k_gpa__my-plugin", "error"]


def rows_of(n=60):
    rng = random.Random(3)
    rows = []
    for k in range(n):
        failed = k % 10 == 7
        rows.append({
            "id": f"s{k}", "source": "x", "frame": k, "formula": ("NaCl", "MgO", "Si")[k % 3],
            "n_sites": k % 7 + 1,
            "gap_ev": None if failed or k % 10 == 3 else round(rng.uniform(0, 5), 1),
            "k_gpa__my-plugin": float("nan") if k % 10 == 5 else None if failed else 10.0 * k,
            "error": "broken" if failed else None, CRYSTAL: f"crystal {k}",
        })  # fmt: skip
    return rows


def ids(rows):
    return [row["id"] for row in rows]


@pytest.mark.parametrize(
    ("condition", "query"),
    [
        ("gap_ev > 1 and n_sites <= 4", None),
        ("gap_ev > 1 or n_sites == 2", None),
        ("(gap_ev > 1) & (n_sites != 2)", None),
        ("1 < gap_ev <= 2.5", None),
        ("formula in ('NaCl', 'Si') and gap_ev > 2", None),
        ("formula not in ['Si']", None),
        ("formula == 'MgO'", None),
        ("`k_gpa__my-plugin` / 100 + 1 >= 2 ** 2 - -1", None),
        ("-gap_ev < -2 * 1.5", None),
        ("sqrt(gap_ev) > 1.5", "gap_ev > 2.25"),
        ("log10(`k_gpa__my-plugin`) > 2", "`k_gpa__my-plugin` > 100"),
        ("abs(gap_ev - 2) < 0.45", "gap_ev > 1.55 and gap_ev < 2.45"),
        ("not gap_ev > 1", "gap_ev <= 1"),  # what is missing is not greater, and not kept
    ],
)
def test_conditions_mean_what_pandas_makes_of_them(condition, query):
    frame = pd.DataFrame(rows_of())
    expected = frame[frame.error.isna()].query(query or condition).id.tolist()
    screen = Screen(COLUMNS, where=condition)
    assert ids(screen(rows_of())) == expected
    assert 0 < len(expected) < 54
    parts = screen.rejected, screen.undecided, screen.failed, screen.cut, screen.kept
    assert sum(parts) == screen.seen == 60
    assert screen.failed == 6
    assert screen.summary().startswith(f"kept {len(expected)} of 60 structures; left out: ")


def test_missing_values_are_counted_apart():
    screen = Screen(COLUMNS, where="gap_ev > 1")
    list(screen(rows_of()))
    assert screen.undecided == 6
    assert "6 lack a value that it needs, 6 could not be predicted" in screen.summary()
    screen = Screen(COLUMNS, where="gap_ev > 1 or n_sites < 100")  # decided without it
    list(screen(rows_of()))
    assert screen.undecided == 0


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "gap_ev.__class__ == 1", "gap_ev[0] > 1", "gap_ev",
        "1 > 0", "True", "gap_ev = 1", "gap_ev := 1", "lambda: 1", "[x for x in (1,)]", "",
        "(lambda: 1)() > gap_ev", "abs(x=1) > 1", "abs(*(1,)) > 1", "abs(1, 2) > 1", "exec('1')",
        "gap_ev > 1 & n_sites < 3", "formula > 1", "formula + 'x' == 'y'", "gap_ev is None",
        "gap_ev > 1 if 1 else 0", "n_sites and gap_ev", "n_sites in ()", "n_sites in formula",
        "sqrt > 1", "f'{gap_ev}' == 'x'", "gap_ev > 1j", "gap_ev > b'x'", "gap_ev > ...",
        "gap_ev > 1\x00", "gap_ev > '\ud800'", "(" * 500, "-" * 1900 + "gap_ev > 1",
        "9" * 1900 + " > gap_ev", "gap_ev > 1 " + " " * 3000, "gap_ev @ 2 > 1", "gap_ev // 2 > 1",
        "await gap_ev", "yield", "gap_ev > 1; 2", "`gap_ev", "``> 1", "not_a_column > 1",
    ],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text):
    with pytest.raises(OptionError, match="--filter"):
        Screen(COLUMNS, where=text)


def test_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("open('x', 'w')", "(open('x', 'w').write('y') or 1) > gap_ev"):
        with pytest.raises(OptionError):
            Screen(COLUMNS, where=text)
    assert list(tmp_path.iterdir()) == []
    # Large powers are floating point: no integers of a billion digits.
    assert list(Screen(COLUMNS, where="gap_ev > 10 ** 10 ** 10")(rows_of())) == []


def test_unknown_columns_name_the_known_ones():
    for option in ({"where": "gap > 1"}, {"sort_by": "gap:desc"}, {"columns": ["id", "gap"]}):
        with pytest.raises(OptionError, match=r"'gap'.*id, source.*gap_ev"):
            Screen(COLUMNS, **option)
    for option in ({"top": 3}, {"top": 0, "sort_by": "gap_ev"}):
        with pytest.raises(OptionError, match="--top"):
            Screen(COLUMNS, **option)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("column", ["gap_ev", "n_sites", "formula", "k_gpa__my-plugin"])
def test_orders(column, descending):
    """Stable, and what is missing comes last; the oracle is sorted()."""
    rows = rows_of()

    def missing(row):
        return row[column] is None or row[column] != row[column]

    present = [row for row in rows if not missing(row)]
    expected = sorted(present, key=lambda row: row[column], reverse=descending)
    order = f"{column}:{'desc' if descending else 'asc'}"
    screen = Screen(COLUMNS, sort_by=order)
    found = list(screen(rows_of()))
    assert ids(found) == ids(expected) + ids([row for row in rows if missing(row)])
    assert [row[CRYSTAL] for row in found] == [f"crystal {row['frame']}" for row in found]
    assert screen.summary() == ""
    usable = [row for row in expected if row["error"] is None]
    screen = Screen(COLUMNS, sort_by=order, top=7)
    assert ids(screen(rows_of())) == ids(usable)[:7]
    assert screen.cut == len(usable) - 7
    assert screen.failed + screen.undecided + screen.cut + screen.kept == 60
    assert Screen(COLUMNS, sort_by=column).order.descending is False


def test_all_of_it_together():
    screen = Screen(
        COLUMNS, where="n_sites > 3", sort_by="gap_ev:desc", top=5, columns=["id", "gap_ev"]
    )
    frame = pd.DataFrame(rows_of())
    expected = frame[(frame.n_sites > 3) & frame.error.isna()].nlargest(5, "gap_ev").id.tolist()
    assert ids(screen(rows_of())) == expected
    assert screen.columns == ["id", "gap_ev"]
    assert screen.choices() == {"filter": "n_sites > 3", "sort_by": "gap_ev:desc", "top": 5}
    assert "come after the first 5" in screen.summary()
    plain = Screen(COLUMNS)
    assert ids(plain(rows_of())) == ids(rows_of())  # failures too
    assert (plain.seen, plain.failed, plain.summary()) == (60, 6, "")


def test_the_best_of_a_stream_need_little_memory():
    def stream():
        for k in range(50_000):
            yield {
                "id": str(k),
                "gap_ev": float(k * 7919 % 50_000),
                "error": None,
                CRYSTAL: [0] * 50,
            }

    screen = Screen(["id", "gap_ev", "error"], where="gap_ev >= 0", sort_by="gap_ev:desc", top=10)
    tracemalloc.start()
    best = list(screen(stream()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row["gap_ev"] for row in best] == [49_999.0 - k for k in range(10)]
    assert peak < 5e6  # a chunk of 1024 rows; all of them are 40 MB


def test_rows_are_passed_on_chunk_by_chunk():
    taken = []

    def stream():
        for row in rows_of(5 * CHUNK):
            taken.append(row)
            yield row

    next(iter(Screen(COLUMNS, where="n_sites > 0")(stream())))
    assert CHUNK <= len(taken) < 2 * CHUNK  # those with errors are counted before
    assert Condition("n_sites > 0", COLUMNS).columns == ["n_sites"]
