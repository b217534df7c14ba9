"""Settings of the process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

#: What computes, loaded before and after the setting, and how many threads each then uses.
CODE = """
import json, sys
import numpy
if {early}:
    import scipy.linalg
from matxfer.runtime import use_threads
use_threads({count})
import scipy.linalg, torch
from threadpoolctl import threadpool_info
print(json.dumps([torch.get_num_threads(), *(p["num_threads"] for p in threadpool_info())]))
"""


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_threads_are_those_of_every_library(early, count):
    """NumPy and SciPy each bring a BLAS of their own, torch an OpenMP."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(early=early, count=count)],
        capture_output=True, text=True, check=True,
        env={"PATH": "", "OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "3"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) >= 3
    assert set(found) == {count}
