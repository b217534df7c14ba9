"""Ways to retain the source: what each does to weights and to source predictions."""

from __future__ import annotations

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from matxfer.transfer.ewc import EWCPenalty
from matxfer.transfer.ewc_callback import EWC
from matxfer.transfer.finetune import finetune
from matxfer.transfer.retention import RETENTIONS_WITH_SOURCE

TARGET = "debye_temperature_k"
ENERGY = "formation_energy_ev_per_atom"


@pytest.fixture(scope="module")
def tune(tiny_model, crystal_table):
    def run(**options):
        options = {
            "freeze": 0, "epochs": 15, "patience": 15, "learning_rate": 1e-2, "batch_size": 16,
            "probe_first": False, **options,
        }  # fmt: skip
        return finetune(crystal_table, TARGET, model=tiny_model, split_column="split", **options)

    return run


def drift(plugin):
    entries = plugin.meta["retention"]["drift"].values()
    return np.array([entry["mean_absolute_drift"] for entry in entries])


@pytest.fixture(scope="module")
def free(tune):
    return tune()


@pytest.mark.parametrize("retain", ["ewc", "l2sp", "distill", "replay", "ewc+replay"])
def test_every_way_holds_the_source_predictions(retain, tune, free, crystal_frame):
    source = crystal_frame.drop(columns=[ENERGY, "bulk_modulus_vrh_gpa"])  # structures alone
    needs = {"source_data": source} if retain in RETENTIONS_WITH_SOURCE else {}
    weak, strong = (tune(retain=retain, strength=s, **needs) for s in (1e-6, 100.0))
    assert (drift(strong) < 0.6 * drift(free)).all()
    assert drift(weak).sum() > 1.2 * drift(strong).sum()


def test_replay_needs_structures(tune):
    with pytest.raises(ValueError, match=r"replay needs source structures: give a table.*ewc"):
        tune(retain="replay")


def test_replay_follows_labels_where_there_are_some(tune, crystal_frame):
    """Labels that differ from what the base says pull its predictions towards them."""
    shifted = crystal_frame.assign(**{ENERGY: -9.0})[
        ["material_id", "lattice", "numbers", "frac_coords", ENERGY]
    ]
    plugin = tune(retain="replay", strength=5.0, source_data=shifted)
    error = plugin.meta["retention"]["source_error"][ENERGY]
    assert error["n"] == 60
    assert error["after"] < 0.8 * error["before"]
    assert error["change"] == pytest.approx(error["after"] / error["before"] - 1)


def test_source_errors_of_frozen_layers_do_not_change(tune, crystal_frame):
    plugin = tune(freeze=3, source_data=crystal_frame)
    for entry in plugin.meta["retention"]["source_error"].values():
        assert entry["after"] == pytest.approx(entry["before"], rel=1e-6)
    assert drift(plugin).max() < 1e-6


def test_the_strongest_that_costs_nothing(tune):
    plugin = tune(retain="ewc", strength="auto", epochs=4)
    tried = {float(k): v for k, v in plugin.meta["val_mae_by_strength"].items()}
    limit = 1.02 * min(tried.values())
    assert plugin.meta["config"]["strength"] == max(s for s, mae in tried.items() if mae <= limit)


# -- the callback -----------------------------------------------------------------------------
class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, bias=False)
        nn.init.ones_(self.linear.weight)

    def training_step(self, batch, _):
        x, y = batch
        return (self.linear(x)[:, 0] - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(callbacks, **options):
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    data = DataLoader(TensorDataset(x, x @ torch.tensor([3.0, -1.0, 0.5])), 64)
    module = Line()
    trainer = L.Trainer(max_epochs=400, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
                        accelerator="cpu", **options)  # fmt: skip
    trainer.fit(module, data)
    return module.linear.weight.detach()[0], x


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1e6}])
def test_the_callback_finds_the_closed_form(options):
    """A ridge regression towards the anchor, one stiffness per weight, of somebody's module."""
    fisher = torch.tensor([[0.0, 0.5, 5.0]])
    found, x = fit([EWC({"linear.weight": fisher}, strength=2.0, sample_ratio=1.5)], **options)
    stiffness = torch.diag(2.0 * 1.5 / 2 * (fisher[0] + 1e-3 * fisher.mean()))
    gram = x.T @ x / len(x)
    target = gram @ torch.tensor([3.0, -1.0, 0.5])
    expected = torch.linalg.solve(gram + stiffness, target + stiffness @ torch.ones(3))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - fit([])[0]).abs().max() > 0.1


def test_gradients_are_those_of_the_penalty():
    module = nn.Linear(4, 2)
    penalty = EWCPenalty(
        module, {n: torch.rand_like(p) for n, p in module.named_parameters()}, 0.7, 3.0
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    penalty().backward()
    for parameter, gradient in penalty.gradients():
        torch.testing.assert_close(gradient, parameter.grad)
