"""Elastic weight consolidation as a Lightning callback, for any module, not only ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L  # noqa: N812 - its documented alias
import torch

from matxfer.transfer.ewc import EWCPenalty

if TYPE_CHECKING:
    from torch import Tensor


class EWC(L.Callback):
    """Holds the weights of a module where they are when a fit starts, each by its stiffness.

    Adds the gradient of the penalty (:class:`EWCPenalty`), λ (N/n) (F + floor)(θ - θ*), to that of
    the loss, before gradients are clipped; the module's own loss needs no change::

        trainer = L.Trainer(callbacks=[EWC(fisher, strength=1.0, sample_ratio=N / n)])
        trainer.fit(module, loader)

    Parameters
    ----------
    fisher
        Mean Fisher information per source sample, by the names of the module's trainable
        parameters (:mod:`matxfer.fisher` says how it is measured).
    strength
        λ; 1 is the full posterior of the source, 0 no penalty.
    sample_ratio
        N/n, source samples over target samples.

    Raises
    ------
    ValueError
        When the fit starts, if a trainable parameter has no Fisher information of its shape, or λ
        is negative.

    Examples
    --------
    A layer of any Lightning module, held to where it is in proportion to ``fisher``:

    >>> import lightning as L, torch
    >>> from matxfer import EWC
    >>> class Line(L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(1, 1, bias=False)
    ...         self.layer.weight.data.fill_(1.0)
    ...     def training_step(self, batch, _):
    ...         return (self.layer(batch) - 3 * batch).square().mean()
    ...     def configure_optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), 0.1)
    >>> def fitted(fisher):
    ...     module, rows = Line(), torch.ones(8, 1)
    ...     trainer = L.Trainer(
    ...         max_epochs=20, logger=False, enable_checkpointing=False,
    ...         enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    ...         callbacks=[EWC({"layer.weight": torch.full((1, 1), fisher)}, 1.0)],
    ...     )
    ...     trainer.fit(module, torch.utils.data.DataLoader(rows, 8))
    ...     return round(float(module.layer.weight), 1)
    >>> fitted(0.0), fitted(4.0)
    (3.0, 1.7)
    """

    def __init__(
        self, fisher: dict[str, Tensor], strength: float = 1.0, sample_ratio: float = 1.0
    ) -> None:
        self.fisher, self.strength, self.sample_ratio = fisher, strength, sample_ratio
        self.penalty: EWCPenalty | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Anchor the weights."""
        self.penalty = EWCPenalty(pl_module, self.fisher, self.strength, self.sample_ratio)
        self.penalty.to(pl_module.device)

    def on_before_optimizer_step(self, *_: Any) -> None:
        """Add the gradient of the penalty once per step, however many batches it gathers."""
        assert self.penalty is not None, "a fit has started"
        for parameter, gradient in self.penalty.gradients():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient)
