"""Domain-invariant features as a Lightning callback, for any module, not only ours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import torch

from matxfer.errors import OptionError
from matxfer.invariance.distances import METHODS, DomainCritic, coral, mmd, ramp
from matxfer.nn.ensemble import normalised_layers
from matxfer.nn.readout import pool
from matxfer.options import NOT_NEGATIVE, check_choice, check_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from matxfer.data.batch import GraphLike

#: Steps of the critic before each step of the features, which are to follow one that knows its
#: trade: in the few steps of a fine-tuning it could not keep up otherwise.
_CRITIC_STEPS, _CRITIC_RATE = 5, 2e-2


def crystal_means(node: Tensor, graphs: GraphLike) -> Tensor:
    """Return what our networks align: normalised node features (N, F), means of crystals (B, F)."""
    return pool(normalised_layers([node]), graphs, ("mean",))


class DomainInvariance(L.Callback):
    """Makes the features of unlabelled target batches resemble those of the batches trained on.

    Adds a distance of the two (:mod:`matxfer.invariance.distances`) to each loss; the module's own
    loss needs no change::

        def features(module, batch):
            return module.encoder(batch[0])  # (B, d)

        invariance = DomainInvariance("coral", target_loader, features, strength=100.0)
        trainer = L.Trainer(callbacks=[invariance])
        trainer.fit(module, loader)

    The strength rises from nothing to its value as the training goes on (Ganin et al. 2016).

    Parameters
    ----------
    method
        ``"grl"``, ``"coral"`` or ``"mmd"``.
    target
        Batches of target structures, such as a data loader, gone through again and again; or what
        gives the batch of a step.
    features
        Module and batch → features of its crystals, (B, d), with their gradient.
    strength
        λ; 0: no effect. The distance of ``coral`` is a small number where features are of the order
        of one, and needs some 100; of the others 0.1 to 1 is usual.
    seed
        Of the critic's first weights.

    Attributes
    ----------
    history
        The distance in each step, without λ; of ``grl`` the critic's cross entropy, which is
        2 log 2 where it cannot tell.

    Raises
    ------
    OptionError
        If an option is out of range; when the fit starts, if the precision is one that scales
        losses; at a step, if features are no matrix of two rows or more.

    Examples
    --------
    Batches whose features lie elsewhere are drawn to those of the target:

    >>> import lightning as L, matxfer, torch
    >>> class Line(L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.encoder, self.readout = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    ...     def training_step(self, batch):
    ...         return self.readout(self.encoder(batch[0])).square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.Adam(self.parameters(), 0.05)
    >>> def batches(shift):
    ...     data = torch.utils.data.TensorDataset(torch.randn(64, 4) + shift)
    ...     return torch.utils.data.DataLoader(data, batch_size=16)
    >>> callback = matxfer.DomainInvariance(
    ...     "mmd", batches(3.0), lambda module, batch: module.encoder(batch[0])
    ... )
    >>> trainer = L.Trainer(
    ...     max_epochs=20, callbacks=[callback], accelerator="cpu", logger=False,
    ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ... )
    >>> trainer.fit(Line(), batches(0.0))
    >>> len(callback.history)
    80
    >>> sum(callback.history[-4:]) < sum(callback.history[:4])
    True
    """

    def __init__(
        self,
        method: str,
        target: Iterable[Any] | Callable[[int], Any],
        features: Callable[[Any, Any], Tensor],
        strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.method, self.strength, self.seed = method, strength, seed
        check_choice("method", method, METHODS)
        check_ranges(self, {"strength": NOT_NEGATIVE})
        self.target, self.features = target, features
        self.history: list[float] = []
        self.critic: DomainCritic | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._waiting: dict[str, Any] = {}
        self._batch: Any = None
        self._batches: Iterator[Any] = iter(())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Refuse what cannot be done."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise OptionError(
                "domain invariance does not go with the precision 16-mixed, which scales losses; "
                "choose bf16-mixed or 32-true"
            )

    def on_train_batch_start(
        self,
        trainer: L.Trainer,  # noqa: ARG002 - Lightning's signature
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Keep the batch at hand."""
        self._batch = batch

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Add the distance to the loss, in place: one way back serves both."""
        if not self.strength:
            return
        there = pl_module.transfer_batch_to_device(
            self._next(trainer.global_step), pl_module.device, 0
        )
        with trainer.precision_plugin.train_step_context():
            pair = [self.features(pl_module, each).float() for each in (self._batch, there)]
        self._batch = None
        for found in pair:
            if found.dim() != 2 or len(found) < 2:
                raise OptionError(
                    f"features are of shape {tuple(found.shape)}, but must be (crystals, features) "
                    "of at least two crystals; make batches larger, or drop a last one of one row"
                )
        steps = float(trainer.estimated_stepping_batches)
        part = trainer.global_step / steps if math.isfinite(steps) and steps > 0 else 1.0
        strength = self.strength * ramp(part)
        if self.method == "grl":
            term = distance = self._taught(trainer, pair)(pair[0], pair[1], strength)
        else:
            distance = (coral if self.method == "coral" else mmd)(pair[0], pair[1])
            term = strength * distance
        self.history.append(float(distance.detach()))
        loss.add_((term / trainer.accumulate_grad_batches).to(loss.dtype))

    def _taught(self, trainer: L.Trainer, pair: list[Tensor]) -> DomainCritic:
        """Let the critic learn these features; its gradient is the mean of all processes."""
        critic, optimizer = self._critic(pair[0])
        source, target = (features.detach() for features in pair)
        for _ in range(_CRITIC_STEPS):
            optimizer.zero_grad()  # that of the features' step, too
            critic(source, target, 0.0).backward()
            for parameter in critic.parameters():
                parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
            optimizer.step()
        return critic

    def _next(self, step: int) -> Any:
        if callable(self.target):
            return self.target(step)
        found = next(self._batches, None)
        if found is None:
            self._batches = iter(self.target)
            found = next(self._batches, None)
        if found is None:
            raise OptionError("there is no batch of target structures")
        return found

    def _critic(self, features: Tensor) -> tuple[DomainCritic, torch.optim.Optimizer]:
        if self.critic is None or self._optimizer is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.critic = DomainCritic(features.shape[1])
            self.critic.to(features.device)
            self._optimizer = torch.optim.AdamW(
                self.critic.parameters(), lr=_CRITIC_RATE, betas=(0.5, 0.9), weight_decay=0.1
            )
            if self._waiting:
                self.critic.load_state_dict(self._waiting["critic"])
                self._optimizer.load_state_dict(self._waiting["optimizer"])
                self._waiting = {}
        return self.critic, self._optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        if self.critic is None or self._optimizer is None:
            return self._waiting
        return {
            "critic": self.critic.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept, once the number of features is known."""
        self._waiting = state_dict
