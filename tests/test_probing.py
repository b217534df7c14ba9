"""What the benchmark of probes computes itself."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from matxfer.crystal import Crystal


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    return importlib.import_module


def test_local_targets_of_rock_salt(benchmark):
    cell = 5.64 / 2 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    crystal = Crystal(cell, np.array([11, 17]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]))
    targets = benchmark("probing").quiet_targets(crystal)
    expected = [6, 2.82, 0, 3.16 - 0.93]
    np.testing.assert_allclose(targets[:, :4], [expected, expected], atol=1e-6)
    assert targets[:, 4].tolist() == [1, -1]


def test_ridge_probe_finds_a_linear_map(benchmark):
    rng = np.random.default_rng(0)
    x = 3 + rng.normal(size=(300, 5)) * [1, 10, 0.1, 1, 0]  # one feature never varies
    y = x @ [1, -2, 30, 0, 5] + 7
    parts = np.split(np.arange(300), [180, 240])
    r2, mae = benchmark("probing").ridge_probe(x, y, *parts)
    assert r2 > 1 - 1e-9
    assert mae < 1e-3
    noise, _ = benchmark("probing").ridge_probe(x, rng.normal(size=300), *parts)
    assert noise < 0.1


def test_parts_share_no_formula(benchmark):
    formulas = np.array([f"F{k % 40}" for k in range(100)])
    parts = benchmark("probing").parts_by_formula(formulas, seed=1)
    assert np.sum(parts, axis=0).tolist() == [1] * 100
    sets = [set(formulas[mask]) for mask in parts]
    assert [len(s) for s in sets] == [24, 8, 8]
    assert len(set.union(*sets)) == 40
