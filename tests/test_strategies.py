"""What ``auto`` tries and keeps, and the mean of two readouts as one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from matxfer.data.store import graph_store
from matxfer.data.table import read_property_table
from matxfer.transfer import strategies
from matxfer.transfer.activations import Activations
from matxfer.transfer.config import FinetuneConfig
from matxfer.transfer.features import COMPONENTS, principal_axes
from matxfer.transfer.finetune import finetune
from matxfer.transfer.report import predicted
from matxfer.transfer.task import make_task

TARGET = "debye_temperature_k"
L = 3


@pytest.fixture(scope="module")
def task(tiny_model, crystal_table):
    data = read_property_table(crystal_table, [TARGET], split_column="split")
    graphs = graph_store(data.crystals, tiny_model.backbone.graph_options).graphs
    return make_task(tiny_model, data, TARGET, graphs, Activations(tiny_model, graphs), None)


@pytest.mark.parametrize("rate", [1e-7, 2e-2])
def test_auto_keeps_the_best_on_the_validation_rows(rate, tiny_model, crystal_table):
    """Frozen layers first and their mean, then half of the layers freed; all if that helped.

    At the end the network from scratch, where what needs no pretraining is better than all that.
    """
    plugin = finetune(
        crystal_table, TARGET, model=tiny_model, split_column="split", strategy="auto", epochs=8,
        learning_rate=rate, batch_size=16,
    )  # fmt: skip
    trials = plugin.meta["trials"]
    errors = [trial["val_mae"] for trial in trials]
    assert plugin.meta["figures"]["val"]["mae"] == pytest.approx(min(errors), rel=1e-9)
    assert plugin.meta["chosen"] == trials[int(np.argmin(errors))]["tried"]
    layers = [k for k, trial in enumerate(trials) if ", ewc" in trial["tried"]]
    transfer = plugin.meta["transfer"]
    assert transfer["negative"] == ("scratch" in trials[-1]["tried"])
    assert layers[-1] == len(trials) - 1 - transfer["negative"]
    freed = [trials[k]["tried"].split(", ")[1] for k in layers]
    helped = errors[layers[0]] < min(errors[: layers[0]])
    assert freed == ["1 frozen", "0 frozen"][: 1 + helped]
    kinds = {trial["tried"].split(",")[0] for trial in trials}
    assert kinds - {"scratch"} == {"finetune", "features"}


def test_a_given_depth_is_the_only_one(tiny_model, crystal_table):
    plugin = finetune(
        crystal_table, TARGET, model=tiny_model, split_column="split", strategy="auto", epochs=2,
        freeze=2,
    )  # fmt: skip
    assert [t["tried"].split(", ")[1] for t in plugin.meta["trials"]] == ["2 frozen"]


def test_the_mean_of_two_readouts_is_the_mean_of_their_predictions(task):
    config = FinetuneConfig(strategy="finetune", freeze=L, epochs=5)
    trials = [
        strategies.run_strategy(task, replace(config, readout=kind))
        for kind in ("pooled", "extrema")
    ]
    joint = strategies._joint(task, trials)
    one, other, both = (
        predicted(task, trial.plugin, task.parts["test"])[0] for trial in (*trials, joint)
    )
    np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-4)
    best = min(trials, key=lambda trial: trial.error)
    assert joint.facts["mean_of"][0] == best.label
    assert strategies._joint(task, trials[:1]) is None


def test_layers_start_from_the_readout_that_was_trained(task):
    """With rates of next to nothing, what comes out is the probe."""
    config = FinetuneConfig(strategy="finetune", freeze=L, epochs=20, seed=3)
    probe = strategies.run_strategy(task, config)
    still = replace(config, freeze=1, epochs=1, learning_rate=1e-9, head_learning_rate=1e-9)
    started = strategies.run_strategy(task, still, None, probe.plugin.head)
    fresh = strategies.run_strategy(task, replace(still, probe_first=False))
    assert started.error == pytest.approx(probe.error, rel=1e-3)
    assert abs(fresh.error - probe.error) > 0.05 * probe.error


# -- principal axes of fingerprints -------------------------------------------------------------
@pytest.mark.parametrize("rows", [2, 30, 49, 50, 119, 121, 300])
@pytest.mark.parametrize("rank", [120, 7])
def test_principal_axes_against_a_decomposition_of_all(rows, rank):
    """More and fewer rows than features; fewer directions than components; a constant feature."""
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows + 20, rank)) @ rng.normal(size=(rank, 120))
    x[:, 5] = 3.0
    train = np.arange(rows)
    centre, axes = principal_axes(torch.from_numpy(x), train)
    scaled = np.delete(x, 5, axis=1)
    scaled = (scaled - scaled[:rows].mean(axis=0)) / scaled[:rows].std(axis=0)
    *_, s, vt = np.linalg.svd(scaled[:rows], full_matrices=False)
    size = min(COMPONENTS, rows - 1)
    there = min(size, rank)
    expected = scaled @ vt[:there].T / np.sqrt((s[:size] ** 2).sum() / (rows - 1) / size)
    found = (x - centre) @ axes
    assert axes.shape == (120, size)
    signs = np.sign((found[:, :there] * expected).sum(axis=0))
    np.testing.assert_allclose(found[:, :there], expected * signs, atol=1e-6)
    assert np.abs(found[:rows, there:]).max(initial=0.0) < 1e-6
    assert (axes[5] == 0).all()
