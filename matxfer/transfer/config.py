"""How a plugin is trained, as one checked object."""

from __future__ import annotations

from dataclasses import dataclass

from matxfer.invariance.distances import METHODS as INVARIANT
from matxfer.options import COUNT, NOT_NEGATIVE, PART, POSITIVE, check_choice, check_ranges
from matxfer.transfer.features import METHODS

STRATEGIES = ("auto", "features", "finetune", "scratch", "correction")
RETENTION = ("none", "ewc", "l2sp", "distill", "replay", "ewc+replay")
#: From the simplest on, see :mod:`matxfer.transfer.correction`: as the base says it; b; a and b;
#: r and b; all. ``"auto"`` chooses.
CORRECTIONS = ("none", "offset", "linear", "elements", "elements+linear")


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """How a plugin is trained.

    Parameters
    ----------
    strategy
        ``"features"``: a simple model on the fingerprints of the frozen network. ``"finetune"``:
        train a readout and the layers above the frozen depth. ``"scratch"``: the same network
        from random weights, for comparison. ``"correction"``: the base's own prediction, corrected
        by a few numbers. ``"auto"``: try them (but the last two), keep what is best on the
        validation rows. ``None``: the one that the other options belong to, else ``auto``.
    freeze
        Number K of frozen layers, 0 … L; ``None``: tried with ``auto``, else L (half of L with a
        retention or ``invariant``, which are of layers that are trained).
    layers
        Layers that the readout reads (0: the embedding); ``None``: all.
    readout
        ``"atomwise"``, ``"pooled"``, ``"extrema"`` or ``"statistics"``; default: that of the
        property.
    hidden_dim, members
        Width of the readouts' hidden layer, number of readouts.
    features
        Simple model: ``"ridge"``, ``"kernel_ridge"`` (the default), ``"gaussian_process"``,
        ``"forest"``.
    correction
        ``"offset"``, ``"elements"`` (a sum over the elements), ``"linear"`` (a map of the
        prediction), ``"elements+linear"``, or ``"auto"``, the default: the simplest that is nearly
        the best (see :mod:`matxfer.transfer.correction`).
    difference
        Learn the difference from the base model's own prediction, where it has a like property.
    retain, strength
        How the source is kept (see :mod:`matxfer.transfer.retention`) and how strongly; for ``ewc``
        and ``l2sp`` 1 is the full posterior of the source. ``"auto"``: the strongest whose
        validation error is within 2 % of the best.
    invariant, invariant_strength
        Make the features of trained layers resemble those of the structures to be predicted:
        ``"grl"``, ``"coral"``, ``"mmd"`` (see :mod:`matxfer.invariance.distances`) or ``"none"``,
        and how strongly.
    probe_first
        Train layers from where a readout alone ends: a random readout would bend them first, and
        more than it needs (Kumar et al., ICLR 2022).
    epochs, patience, batch_size
        At most so many passes (``None``: 12 of layers under a trained readout, 40 of other
        pretrained ones, 50 of random ones, 100 of a readout alone); stop after
        ``patience`` passes without a better validation error.
    learning_rate, layer_decay, head_learning_rate
        Rate of the last layer; factor per layer below it; rate of the readout.
    unfreeze_every
        Gradual unfreezing: one layer more, from the top, after so many epochs; 0: all at once.
    warmup_fraction
        Part of the steps in which the rates rise.
    average
        Decay per step of a running average of the weights, which is then what is kept; 0: none.
    weight_decay
        On the readout.
    transform
        Scale on which the target is fitted (see :class:`matxfer.data.properties.Property`);
        ``None``: that of the property; ``"auto"``: chosen on the validation rows.
    seed
        Of initial weights, batch order and, without a split column, the split.

    Examples
    --------
    >>> import matxfer
    >>> config = matxfer.FinetuneConfig(strategy="features", features="ridge", seed=1)
    >>> matxfer.finetune(
    ...     "solids.parquet", "bulk_modulus_gpa", model="mp-small", config=config
    ... ).meta["config"]["seed"]
    1
    >>> matxfer.FinetuneConfig(features="magic")
    Traceback (most recent call last):
    matxfer.errors.OptionError: 'features' is 'magic', but must be one of ...
    """

    strategy: str | None = None
    freeze: int | None = None
    layers: tuple[int, ...] | None = None
    readout: str | None = None
    hidden_dim: int = 32
    members: int = 4
    features: str | None = None
    correction: str | None = None
    difference: bool = True
    retain: str = "none"
    strength: float | str = 1.0
    invariant: str = "none"
    invariant_strength: float = 1.0
    probe_first: bool = True
    epochs: int | None = None
    patience: int = 20
    batch_size: int = 64
    learning_rate: float = 5e-4
    layer_decay: float = 0.7
    head_learning_rate: float = 1.5e-3
    unfreeze_every: int = 0
    warmup_fraction: float = 0.05
    average: float = 0.0
    weight_decay: float = 1e-2
    transform: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            unsaid = name in _MAY_BE_UNSAID and getattr(self, name) is None
            if not unsaid:
                check_choice(name, getattr(self, name), known)
        ranges = _RANGES if self.strength == "auto" else _RANGES | {"strength": NOT_NEGATIVE}
        check_ranges(self, ranges)

    @property
    def simple_model(self) -> str:
        """The simple model asked for, else kernel ridge."""
        return self.features or "kernel_ridge"

    def implied_strategy(self) -> str:
        """Return the strategy, or the one that the other options belong to."""
        if self.strategy is not None:
            return self.strategy
        if self.features is not None:
            return "features"
        if self.correction is not None:
            return "correction"
        plain = (self.freeze, self.retain, self.invariant) == (None, "none", "none")
        return "auto" if plain else "finetune"


_CHOICES = {
    "strategy": STRATEGIES,
    "features": METHODS,
    "correction": ("auto", *CORRECTIONS),
    "retain": RETENTION,
    "invariant": ("none", *INVARIANT),
}
_MAY_BE_UNSAID = ("strategy", "features", "correction")
_RANGES = {
    **dict.fromkeys(("epochs", "patience", "batch_size", "members", "hidden_dim"), COUNT),
    **dict.fromkeys(("learning_rate", "layer_decay", "head_learning_rate"), POSITIVE),
    **dict.fromkeys(("weight_decay", "seed", "unfreeze_every"), NOT_NEGATIVE),
    "invariant_strength": NOT_NEGATIVE,
    **dict.fromkeys(("warmup_fraction", "average"), PART),
}
