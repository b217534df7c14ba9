"""How a potential is trained, as one checked object."""

from __future__ import annotations

from dataclasses import dataclass

from matxfer.errors import OptionError
from matxfer.options import COUNT, NOT_NEGATIVE, PART, POSITIVE, check_choice, check_ranges

STRATEGIES, RETENTION = ("finetune", "scratch"), ("none", "ewc")


@dataclass(frozen=True, slots=True)
class PotentialConfig:
    """How a potential or a plugin of one is trained.

    Parameters
    ----------
    strategy
        ``"finetune"``: from the weights of the general potential; ``"scratch"``: the same network
        from random weights, for comparison.
    freeze
        Number K of frozen layers, 0 … L.
    retain, strength
        ``"ewc"`` holds the weights that the general potential needs, with λ.
    energy_weight, force_weight, stress_weight
        Weights in the loss of errors in eV/atom, eV/Å and eV/Å³.
    energy_delta, force_delta, stress_delta
        Errors beyond these count linearly, smaller ones with their square over this, same units.
    epochs, max_edges
        Passes, and neighbours of a batch.
    learning_rate, layer_decay, head_learning_rate
        Rate of the last layer, of each layer over the one above, of the energy's readout.
    average
        Decay per step of the running average of the weights that is kept; 0: none.
    weight_decay
        On the readout.
    warmup_fraction
        Part of the steps in which the rates rise.
    max_force_ev_per_a
        Frames with a larger force on an atom are left out of training.
    seed
        Of order and split.
    """

    strategy: str = "finetune"
    freeze: int = 0
    retain: str = "none"
    strength: float = 1.0
    energy_weight: float = 1.0
    force_weight: float = 1.0
    stress_weight: float = 3.0
    energy_delta: float = 0.005
    force_delta: float = 0.02
    stress_delta: float = 0.0005
    epochs: int = 60
    max_edges: int = 8000
    learning_rate: float = 1e-3
    layer_decay: float = 0.9
    head_learning_rate: float = 2e-3
    average: float = 0.99
    weight_decay: float = 1e-3
    warmup_fraction: float = 0.05
    max_force_ev_per_a: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("retain", self.retain, RETENTION)
        check_ranges(self, _RANGES)
        if self.strategy == "scratch" and (self.freeze or self.retain != "none"):
            raise OptionError(
                "random layers can neither be frozen nor held: drop freeze and retain"
            )


_RANGES = {
    **dict.fromkeys(("epochs", "max_edges"), COUNT),
    **dict.fromkeys(
        ("learning_rate", "layer_decay", "head_learning_rate", "energy_delta", "force_delta",
         "stress_delta", "max_force_ev_per_a"),
        POSITIVE,
    ),
    **dict.fromkeys(
        ("freeze", "strength", "energy_weight", "force_weight", "stress_weight", "weight_decay",
         "seed"), NOT_NEGATIVE,
    ),
    **dict.fromkeys(("average", "warmup_fraction"), PART),
}  # fmt: skip
