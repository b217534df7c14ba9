"""How a plugin is trained, as one checked object."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matxfer.errors import OptionError

RETENTION = ("none", "ewc")


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """How a plugin is trained.

    Parameters
    ----------
    freeze
        Number K of frozen layers, 0 … L.
    retain, strength
        ``"none"``, or ``"ewc"`` with strength λ (1: the full posterior of the source).
    epochs, patience, batch_size
        At most so many passes; stop after ``patience`` passes without a better validation error.
    learning_rate, layer_decay, head_learning_rate
        Rate of the last layer; factor per layer below it; rate of the readout.
    weight_decay
        On the readout.
    readout
        Kind of readout; default: that of the property.
    transform
        Scale on which the target is fitted; default: that of the property.
    seed
        Of initial weights, batch order and, without a split column, the split.
    """

    freeze: int = 2
    retain: str = "none"
    strength: float = 1.0
    epochs: int = 100
    patience: int = 20
    batch_size: int = 32
    learning_rate: float = 5e-4
    layer_decay: float = 0.7
    head_learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    readout: str | None = None
    transform: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.retain not in RETENTION:
            raise OptionError(f"retain is {self.retain!r}, but must be one of {RETENTION}")
        for name in ("epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, but must be at least 1")
        for name in ("learning_rate", "layer_decay", "head_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}, but must be positive")
        for name in ("strength", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)}, but must not be negative")
