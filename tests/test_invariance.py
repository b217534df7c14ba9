"""Domain-invariant features: distances, the reversed gradient, the callback, fine-tuning."""

from __future__ import annotations

import lightning as L  # noqa: N812 - its documented alias
import numpy as np
import pytest
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from matxfer.data.store import graph_store
from matxfer.domain.two_sample import mmd as mmd_of_labels
from matxfer.errors import MatxferError, OptionError
from matxfer.invariance.callback import DomainInvariance, crystal_means
from matxfer.invariance.distances import WIDTHS, DomainCritic, coral, mmd, ramp, reverse_gradient
from matxfer.pretraining.callbacks import TrainingError
from matxfer.pretraining.config import ConfigError, read_config
from matxfer.pretraining.module import PretrainModule
from matxfer.pretraining.run import pretrain
from matxfer.readers import crystals_of_table
from matxfer.runtime import quiet_lightning
from matxfer.transfer.finetune import finetune

TARGET = "debye_temperature_k"


# -- invariant features -------------------------------------------------------------------------
def two_batches(seed=0, n=9, m=7, d=4):
    rng = np.random.default_rng(seed)
    pair = rng.normal(size=(n, d)), 0.5 + 2 * rng.normal(size=(m, d))
    return [torch.from_numpy(x).requires_grad_() for x in pair]


def test_coral_is_that_of_numpy():
    source, target = two_batches()
    expected = np.cov(source.detach().T) - np.cov(target.detach().T)
    expected = (expected**2).sum() / (4 * 4**2)
    assert float(coral(source, target)) == pytest.approx(expected, rel=1e-9)
    assert float(coral(source, source + 3.0)) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(coral, (source, target))


def test_mmd_is_the_mean_of_double_loops():
    source, target = two_batches()
    x, y = source.detach().numpy(), target.detach().numpy()
    both = np.concatenate([x, y])
    distances = [np.linalg.norm(a - b) for k, a in enumerate(both) for b in both[k + 1 :]]
    median = np.sort(distances)[(len(distances) - 1) // 2]  # torch's: the lower of two
    found = 0.0
    for width in WIDTHS:

        def kernel(a, b, width=width):
            return np.exp(-((a - b) ** 2).sum() / (2 * (width * median) ** 2))

        own = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        other = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
        found += own + other - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert float(mmd(source, target)) == pytest.approx(found / 3, rel=1e-9)
    # The slope is finite where two crystals are equal.
    source.data[0] = source.data[1]
    mmd(source, target).backward()
    assert bool(source.grad.isfinite().all())


def test_mmd_with_one_width_is_that_of_the_diagnosis(monkeypatch):
    source, target = two_batches(n=8, m=8)
    monkeypatch.setattr("matxfer.invariance.distances.WIDTHS", (1.0,))
    both = np.concatenate([source.detach(), target.detach()])
    label = (np.arange(16) >= 8)[:, None].astype(float)
    rng = np.random.default_rng(0)
    scale = float(mmd(source, target)) / mmd_of_labels(both, label, rng)[0]
    assert scale == pytest.approx(1, abs=0.05)  # medians of 120 distances: lower one, mean of two


def test_the_reversed_gradient_by_hand():
    """A linear critic: d/dx of softplus(w x) is σ(w x) w, and the features get it times -λ."""
    x = torch.tensor([[0.3], [-0.7]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[1.5]], dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.softplus(reverse_gradient(x, 0.4) @ w).mean()
    loss.backward()
    guess = 1 / (1 + np.exp(-1.5 * x.detach().numpy()))
    np.testing.assert_allclose(x.grad, -0.4 * guess * 1.5 / 2)
    np.testing.assert_allclose(w.grad, [[(guess * x.detach().numpy()).mean()]])


def test_the_critic_is_a_cross_entropy():
    torch.manual_seed(0)
    critic, (source, target) = DomainCritic(4).double(), two_batches()
    with torch.no_grad():
        told = [torch.sigmoid(critic.net(x)[:, 0]) for x in (source, target)]
    expected = -torch.log(1 - told[0]).mean() - torch.log(told[1]).mean()
    loss = critic(source, target, 0.3)
    assert float(loss) == pytest.approx(float(expected))
    slow = torch.autograd.grad(
        torch.nn.functional.softplus(critic.net(source)[:, 0]).mean(), source
    )[0]
    loss.backward()
    torch.testing.assert_close(source.grad, -0.3 * slow)


def test_the_ramp():
    assert (ramp(0.0), ramp(-1.0)) == (0, 0)
    assert ramp(0.1) == pytest.approx(np.tanh(0.5))
    assert ramp(1.0) == ramp(2.0) == pytest.approx(np.tanh(5.0))


class Linear(L.LightningModule):
    """A user's own module: two inputs, one of which alone tells the domains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        )
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch, _):
        x, y = batch
        return (self.head(self.encoder(x))[:, 0] - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def planted_domains(seed=0):
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(256, 2)), rng.normal(size=(256, 2))
    target[:, 1] = 1.5 + 0.3 * target[:, 1]
    rows = [torch.from_numpy(x).float() for x in (source, target)]
    data = torch.utils.data.TensorDataset(rows[0], rows[0][:, 0])
    return data, rows


def fitted(*callbacks, epochs=20, **options):
    data, rows = planted_domains()
    module = Linear()
    order = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(data, 32, shuffle=True, generator=order)
    with quiet_lightning():
        trainer = L.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            **options,
        )  # fmt: skip
        trainer.fit(module, loader)
    return module, rows


def encoded(module, batch):
    return module.encoder(batch[0])


def apart(module, rows):
    """Return how well a linear classifier tells the domains by the features, from the library."""
    with torch.no_grad():
        features = [module.encoder(x).numpy() for x in rows]
    x, label = np.concatenate(features), np.repeat([0, 1], [256, 256])
    return roc_auc_score(label, LogisticRegression(C=10).fit(x, label).decision_function(x))


@pytest.mark.parametrize(("method", "strength"), [("grl", 1.0), ("coral", 30.0), ("mmd", 3.0)])
def test_the_callback_brings_domains_together(method, strength):
    """On any module; what is learnt stays learnt, for the distinguishing input is of no use."""
    data, rows = planted_domains()
    target = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows[1]), 32)
    callback = DomainInvariance(method, target, encoded, strength)
    plain, _ = fitted()
    module, _ = fitted(callback)

    def distance(found):
        with torch.no_grad():
            pair = [found.encoder(x) for x in rows]
        # Coral looks at covariances alone.
        return float(coral(*pair)) if method == "coral" else float(mmd(*pair))

    assert distance(module) < 0.5 * distance(plain)
    if method != "coral":
        assert apart(module, rows) < apart(plain, rows)
    with torch.no_grad():
        error = (module.head(module.encoder(data.tensors[0]))[:, 0] - data.tensors[1]).abs().mean()
    assert float(error) < 0.4, "of a mean of 0.8"
    assert len(callback.history) == 20 * 8


def test_the_callback_changes_nothing_at_strength_zero():
    _, rows = planted_domains()
    none = DomainInvariance("mmd", [[rows[1][:32]]], encoded, 0.0)
    plain, still = fitted(epochs=2)[0], fitted(none, epochs=2)[0]
    for a, b in zip(plain.parameters(), still.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gathered_gradients_are_those_of_the_mean():
    """With two batches per step the term counts by half, as the loss does."""
    _, rows = planted_domains()
    gradients = []

    class Spy(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, _optimizer):
            gradients.append([p.grad.clone() for p in pl_module.encoder.parameters()])

    class Still(Linear):
        def training_step(self, batch, _):
            return 0 * self.head(self.encoder(batch[0])).sum()

    def run_once(gather):
        data, _ = planted_domains()
        callback = DomainInvariance("coral", lambda _: [rows[1][:32]], encoded, 10.0)
        loader = torch.utils.data.DataLoader(data, 32)
        trainer = L.Trainer(
            max_steps=2, callbacks=[callback, Spy()], logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=gather,
        )  # fmt: skip
        module = Still()
        trainer.fit(module, loader)
        return callback

    run_once(2)
    # By hand: the second step, at half of the ramp, on batches 2 and 3.
    assert any(float(g.abs().max()) > 0 for g in gradients[1])
    assert all(float(g.abs().max()) == 0 for g in gradients[0])  # the ramp starts from nothing


def test_callback_options():
    with pytest.raises(OptionError, match="method is 'wasserstein'"):
        DomainInvariance("wasserstein", [], encoded)
    with pytest.raises(OptionError, match="strength is -1"):
        DomainInvariance("mmd", [], encoded, -1)
    with pytest.raises(OptionError, match="no batch of target structures"):
        fitted(DomainInvariance("mmd", [], encoded), epochs=1)
    with pytest.raises(OptionError, match=r"features are of shape \(1, 4\)"):
        fitted(DomainInvariance("mmd", [[torch.zeros(1, 2)]], encoded), epochs=1)


def test_a_critic_goes_on_from_a_checkpoint():
    _, rows = planted_domains()
    callback = DomainInvariance("grl", [[rows[1][:32]]], encoded)
    assert callback.state_dict() == {}
    fitted(callback, epochs=2)
    kept = callback.state_dict()
    again = DomainInvariance("grl", [[rows[1][:32]]], encoded)
    again.load_state_dict(kept)
    critic, optimizer = again._critic(torch.zeros(2, 4))
    for a, b in zip(critic.parameters(), callback.critic.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.state_dict()["state"][0]["step"] == 16 * 5


@pytest.mark.parametrize(
    ("method", "strength", "share"), [("grl", 3.0, 0.9), ("coral", 300.0, 0.8), ("mmd", 3.0, 0.8)]
)
def test_finetuning_with_invariant_features(method, strength, share, tiny_model, crystal_frame):
    """The distance of the last layer's features to those of other structures becomes smaller."""
    family = crystal_frame["family"].to_numpy()
    own, other = crystal_frame[family != "fcc"], crystal_frame[family == "fcc"]
    options = {"model": tiny_model, "split_column": "split", "freeze": 0, "epochs": 12,
               "learning_rate": 5e-3, "layer_decay": 1.0, "batch_size": 16, "patience": 12,
               "probe_first": False, "average": 0.9}  # fmt: skip

    def distance(plugin):
        pair = []
        for frame in (own, other):
            graphs = graph_store(
                [e.crystal for e in crystals_of_table(frame, "<data frame>")],
                tiny_model.backbone.graph_options,
            ).graphs
            batch = graphs.batch(np.arange(len(graphs)))
            with torch.no_grad():
                node = torch.nn.functional.layer_norm(plugin.nodes(batch)[-1], (16,))
                pair.append(torch.stack([
                    (node * batch.multiplicity[:, None])[batch.batch == k].sum(0)
                    / batch.multiplicity[batch.batch == k].sum()
                    for k in range(len(graphs))
                ]))  # fmt: skip
        return float(coral(*pair)) if method == "coral" else float(mmd(*pair))

    plain = finetune(own, TARGET, **options)
    alike = finetune(
        own, TARGET, invariant=method, invariant_strength=strength, invariant_for=other, **options
    )
    assert distance(alike) < share * distance(plain)
    assert f"{method} {strength:g}" in alike.meta["chosen"]
    weaker = finetune(
        own, TARGET, invariant=method, invariant_strength=strength / 3, invariant_for=other,
        **options,
    )  # fmt: skip
    assert alike.meta["figures"]["val"]["mae"] != weaker.meta["figures"]["val"]["mae"]


def test_invariance_that_cannot_be(tiny_model, crystal_frame, table_crystals):
    options = {"model": tiny_model, "split_column": "split"}
    with pytest.raises(OptionError, match="coral needs structures to be predicted"):
        finetune(crystal_frame, TARGET, invariant="coral", **options)
    with pytest.raises(OptionError, match="need a method: grl, coral or mmd"):
        finetune(crystal_frame, TARGET, invariant_for=table_crystals, **options)
    for own in ({"freeze": 3}, {"features": "ridge"}, {"correction": "offset"}):
        with pytest.raises(OptionError, match="layers that are trained"):
            finetune(
                crystal_frame, TARGET, invariant="mmd", invariant_for=table_crystals, **own,
                **options,
            )  # fmt: skip
    with pytest.raises(OptionError, match=r"at least 10 usable structures.*there are 3 of 3"):
        finetune(
            crystal_frame, TARGET, invariant="mmd", invariant_for=table_crystals[:3], **options
        )
    with pytest.raises(OptionError, match="invariant is 'dann'"):
        finetune(crystal_frame, TARGET, invariant="dann", **options)
    with pytest.raises(OptionError, match="invariant_strength is -1"):
        finetune(crystal_frame, TARGET, invariant="mmd", invariant_strength=-1, **options)


# -- pretraining ------------------------------------------------------------------------------
def pretraining(folder, name, *, resume=False, epochs=4, **invariant):
    """Pretrain a small network; return it."""
    config = {
        "name": "tiny",
        "sources": [
            {"table": "own.parquet", "targets": ["bulk_modulus_vrh_gpa"], "split_column": "split"}
        ],
        "graph": {"cutoff_angstrom": 4.0},
        "network": {"n_layers": 2, "node_dim": 16, "edge_dim": 8, "basis_size": 10},
        "training": {"epochs": epochs, "batch_size": 8, "learning_rate": 0.01, "ema_decay": 0.0,
                     "fisher_samples": 0, "schedule": "trapezoid"},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }  # fmt: skip
    if invariant:
        config["invariant"] = {"table": "other.parquet", **invariant}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    where = folder / name
    return pretrain(
        read_config(path), where / "model", run_folder=where / "run", resume=resume
    )  # fmt: skip


@pytest.fixture
def tables(crystal_frame, tmp_path):
    """Return a folder with a table of compounds, and one of elements."""
    fcc = crystal_frame["family"] == "fcc"
    crystal_frame[~fcc].to_parquet(tmp_path / "own.parquet")
    crystal_frame[fcc].drop(columns=[TARGET, "split"]).to_parquet(tmp_path / "other.parquet")
    return tmp_path


@pytest.mark.parametrize(("method", "strength"), [("grl", 1.0), ("coral", 300.0)])
def test_pretraining_with_invariant_features(method, strength, tables, crystal_frame):
    """The option changes the weights, is in the card, and a run that is resumed ends the same."""
    plain = pretraining(tables, "plain")
    alike = pretraining(tables, "alike", method=method, strength=strength)
    first, second = (dict(m.state_dict()) for m in (plain, alike))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    told = alike.card["invariant"]
    assert (told["method"], told["strength"], told["rows"]) == (method, strength, 20)
    assert "invariant" not in plain.card
    if method == "coral":  # has nothing of its own to go on with
        return

    epochs = []
    with pytest.MonkeyPatch.context() as patch:
        original = PretrainModule.on_train_epoch_start

        def dying(self):
            epochs.append(self.current_epoch)
            if self.current_epoch == 2:
                raise RuntimeError("killed")
            original(self)

        patch.setattr(PretrainModule, "on_train_epoch_start", dying)
        with pytest.raises(RuntimeError, match="killed"):
            pretraining(tables, "cut", method=method, strength=strength)
    assert epochs == [0, 1, 2]
    table = (tables / "other.parquet").read_bytes()
    crystal_frame[:30].to_parquet(tables / "other.parquet")
    with pytest.raises(TrainingError, match=r"invariant_table\.sha256"):
        pretraining(tables, "cut", resume=True, method=method, strength=strength)
    (tables / "other.parquet").write_bytes(table)
    again = dict(
        pretraining(tables, "cut", resume=True, method=method, strength=strength).state_dict()
    )
    assert all(torch.equal(again[name], second[name]) for name in second)


def test_pretraining_brings_the_domains_together(tables, crystal_frame):
    fcc = (crystal_frame["family"] == "fcc").to_numpy()

    def distance(model):
        pair = []
        for part in (crystal_frame[~fcc], crystal_frame[fcc]):
            crystals = [entry.crystal for entry in crystals_of_table(part, "<data frame>")]
            graphs = graph_store(crystals, model.backbone.graph_options).graphs
            batch = graphs.batch(np.arange(len(graphs)))
            with torch.no_grad():
                pair.append(crystal_means(model.backbone(batch).node, batch))
        return float(mmd(*pair))

    plain = pretraining(tables, "plain", epochs=12)
    alike = pretraining(tables, "alike", epochs=12, method="mmd", strength=3.0)
    assert distance(alike) < 0.7 * distance(plain)


def test_pretraining_options(tables):
    with pytest.raises(ConfigError, match="'method' in invariant is 'dann'"):
        pretraining(tables, "a", method="dann")
    with pytest.raises(ConfigError, match="unknown key 'strenght' in invariant"):
        pretraining(tables, "a", method="mmd", strenght=1.0)
    with pytest.raises(ConfigError, match="'strength' in invariant is -1"):
        pretraining(tables, "a", method="mmd", strength=-1.0)
    (tables / "other.parquet").unlink()
    with pytest.raises(MatxferError, match=r"other\.parquet"):
        pretraining(tables, "a", method="mmd")


def test_another_method_is_not_the_run_to_resume(tables):
    pretraining(tables, "a", epochs=1, method="mmd")
    with pytest.raises(TrainingError, match=r"training\.invariant\.strength = 1\.0"):
        pretraining(tables, "a", resume=True, epochs=1, method="mmd", strength=2.0)
    with pytest.raises(TrainingError, match=r"training\.invariant\.method = 'mmd'"):
        pretraining(tables, "a", resume=True, epochs=1)
