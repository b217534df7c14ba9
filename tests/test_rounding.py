"""Weights in a plugin's file: eight bits per weight, and the same after every round trip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matxfer.transfer.rounding import TINY, kept, restored


@given(
    shape=st.sampled_from([(4, 16), (2, 3, 40), (1, 100), (7,), (3, 15), ()]),
    exponent=st.integers(-30, 4),
    spread=st.floats(0, 6),
    seed=st.integers(0, 1000),
)
def test_rounding_once_is_enough(shape, exponent, spread, seed):
    """Of any size, and with rows of very different sizes."""
    rng = np.random.default_rng(seed)
    rows = 10.0 ** rng.uniform(-spread, 0, (*shape[:-1], 1)) if shape else 1.0
    value = torch.tensor(rng.normal(size=shape) * rows * 10.0**exponent, dtype=torch.float32)
    stored = kept({"w": value})
    once = restored(stored)
    again = kept(once)
    assert list(stored) == list(again)
    assert all(torch.equal(stored[k], again[k]) for k in stored)
    assert torch.equal(restored(again)["w"], once["w"])
    if "w.step" in stored:
        # Half a step, and what the largest loses by the rounding of the step itself.
        row = value.abs().amax(-1, keepdim=True)
        assert ((once["w"] - value).abs() <= row * (0.5 / 127 + 2**-8) + TINY).all()


def test_rows_of_zeros_and_what_is_no_matrix():
    weights = {"w": torch.zeros(3, 20), "b": torch.linspace(-1, 1, 5), "s": torch.tensor(0.25)}
    weights["w"][1] = 2.0
    stored = kept(weights)
    assert stored["w"].dtype == torch.int8
    assert {k: v.dtype for k, v in stored.items() if k in "bs"} == dict.fromkeys("bs", torch.half)
    back = restored(stored)
    torch.testing.assert_close(back["w"], weights["w"], rtol=4e-3, atol=0)
    assert torch.equal(back["b"], weights["b"].half().float())
    assert restored({"n": torch.tensor([3], dtype=torch.int32)})["n"].dtype == torch.int32


def test_numbers_and_steps_belong_together():
    stored = kept({"w": torch.randn(3, 20)})
    with pytest.raises(ValueError, match="w has no steps of its shape"):
        restored({"w": stored["w"]})
    with pytest.raises(ValueError, match="w has no steps of its shape"):
        restored({**stored, "w.step": stored["w.step"][:2]})
    with pytest.raises(ValueError, match=r"w\.step has no numbers"):
        restored({"w.step": stored["w.step"]})
