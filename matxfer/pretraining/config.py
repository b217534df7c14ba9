"""What a pretraining run is told: the YAML file as checked dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from matxfer.errors import MatxferError, OptionError
from matxfer.graph import GraphOptions
from matxfer.invariance.distances import METHODS as INVARIANT
from matxfer.nn.readout import READOUTS
from matxfer.options import (
    COUNT,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SEED,
    Range,
    check_choice,
    check_kinds,
    check_ranges,
)
from matxfer.pretraining.exclusion import ExcludeConfig

T = TypeVar("T")

#: More than in any configuration, few enough to be shown in a message.
_MAX_VALUES = 1000
LOSSES = ("huber", "mae", "mse")
SCHEDULES = ("cosine", "trapezoid")

#: What the numbers of each class must be.
_SOURCE: dict[str, Range] = {
    "denoise_angstrom": NOT_NEGATIVE,
    "max_force_ev_per_a": POSITIVE,
    "max_sites": COUNT,
    "row_weights": NOT_NEGATIVE,
}
EDGE_GATED = "edge_gated"
_NETWORK: dict[str, Range] = {
    **dict.fromkeys(("n_layers", "node_dim", "edge_dim"), COUNT),
    "basis_size": (lambda value: value >= 2, "must be at least 2"),
    "angular_dim": NOT_NEGATIVE,
}
_TRAINING: dict[str, Range] = {
    **dict.fromkeys(("epochs", "batch_size", "patience"), COUNT),
    "learning_rate": POSITIVE,
    **dict.fromkeys(("weight_decay", "clip_norm", "fisher_samples"), NOT_NEGATIVE),
    **dict.fromkeys(("task_weights", "denoise_weight", "force_weight"), NOT_NEGATIVE),
    **dict.fromkeys(("warmup_fraction", "ema_decay"), PART),
}


class ConfigError(MatxferError):
    """A configuration file that cannot be used: names the file and the key."""


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One table of source data.

    Parameters
    ----------
    table
        Parquet or CSV file, relative to the configuration file.
    targets
        Columns to learn, units in their names.
    split_column
        Column with ``train``, ``val``, ``test``; without one a seeded random split.
    where
        Column → allowed values: only these rows are read.
    report_only
        Column → allowed values: rows of val and test outside are left out of every figure.
    row_weights
        Column → value → weight of such training rows in the loss (default 1), for labels that
        are noisier than others.
    denoise_angstrom
        Above 0 the table, which then has no targets, teaches geometry without labels: atoms of
        the full cell are displaced by noise of this spread (in Å, per coordinate), and the
        network has to tell the displacements (Zaidi et al., ICLR 2023).
    forces
        Column of forces on the atoms of the full cell (a list of 3n numbers, row-major, in eV/Å),
        for a table that then has no targets. Structures whose forces cannot be read are error rows.
    max_force_ev_per_a
        Structures with a larger force on an atom are left out of the source; ``null``: none.
    max_sites
        Structures with more atoms in the cell are left out of the source; ``null``: none.
    """

    table: str
    targets: list[str] = field(default_factory=list)
    split_column: str | None = None
    where: dict[str, list[Any]] = field(default_factory=dict)
    report_only: dict[str, list[Any]] = field(default_factory=dict)
    row_weights: dict[str, dict[Any, float]] = field(default_factory=dict)
    denoise_angstrom: float = 0.0
    forces: str | None = None
    max_force_ev_per_a: float | None = None
    max_sites: int | None = None

    def __post_init__(self) -> None:
        place = f"sources ({self.table})"
        check_kinds(self, place)
        check_ranges(self, _SOURCE, place)
        if (bool(self.targets), self.denoise_angstrom > 0, self.forces is not None).count(
            True
        ) != 1:
            raise OptionError(
                f"source {self.table!r}: give 'targets', 'forces', or 'denoise_angstrom' above 0 "
                "for a table without labels, and one of them only (name the table twice to have "
                "two)"
            )
        if self.max_force_ev_per_a is not None and self.forces is None:
            raise OptionError(f"'max_force_ev_per_a' in {place} needs 'forces'")

    @property
    def needs_full_cell(self) -> bool:
        """Whether it teaches vectors, which symmetry-equivalent atoms do not share."""
        return not self.targets


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Shape of the network, see :class:`matxfer.nn.network.EdgeGatedNetwork`.

    Parameters
    ----------
    kind
        Another backbone, by the name under which its package declares it
        (:mod:`matxfer.nn.registry`); its shape is in ``options``, and the numbers are not used.
    options
        Arguments of that other backbone.
    readouts
        Target → kind of readout (:data:`matxfer.nn.readout.READOUTS`), where it is not the default.
    """

    kind: str = EDGE_GATED
    options: dict[str, Any] = field(default_factory=dict)
    n_layers: int = 4
    node_dim: int = 128
    edge_dim: int = 64
    basis_size: int = 40
    angular_dim: int = 0
    readouts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kinds(self, "network")
        check_ranges(self, _NETWORK, "network")
        if self.options and self.kind == EDGE_GATED:
            raise OptionError(
                f"'options' in network are those of another 'kind'; write {list(self.options)} "
                "beside it, or name the kind"
            )
        for target, kind in self.readouts.items():
            check_choice(f"readouts of {target}", kind, sorted(READOUTS), "network")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Optimisation.

    Parameters
    ----------
    epochs, batch_size
        Passes over the training rows; crystals per batch and device.
    learning_rate, weight_decay
        Of AdamW; the rate rises linearly over ``warmup_fraction`` of all steps.
    schedule
        How the rate falls to zero after that: ``cosine``, or ``trapezoid``: constant, and a line
        over the last fifth of all steps (Hägele et al., NeurIPS 2024).
    clip_norm
        Largest norm of the gradient; 0: any.
    loss
        ``mae``, ``huber`` (quadratic within 0.1 of the targets' spread) or ``mse``.
    task_weights
        Weight of each target in the loss (default 1).
    denoise_weight, force_weight
        Weights of the denoising loss and of the loss of the forces.
    ema_decay
        Above 0, what is validated and kept is an average of the weights over the steps with this
        decay per step (Polyak averaging).
    patience
        Stop after this many epochs without a better validation loss; ``null``: never.
    fisher_samples
        Training crystals that the Fisher information is averaged over; 0: none is computed.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_fraction: float = 0.03
    schedule: str = "cosine"
    clip_norm: float = 1.0
    loss: str = "mae"
    task_weights: dict[str, float] = field(default_factory=dict)
    denoise_weight: float = 1.0
    force_weight: float = 1.0
    ema_decay: float = 0.0
    patience: int | None = None
    fisher_samples: int = 1000

    def __post_init__(self) -> None:
        check_kinds(self, "training")
        check_ranges(self, _TRAINING, "training")
        check_choice("loss", self.loss, LOSSES, "training")
        check_choice("schedule", self.schedule, SCHEDULES, "training")


@dataclass(frozen=True, slots=True)
class InvariantConfig:
    """Structures of another domain, which the features of the last layer shall resemble.

    Parameters
    ----------
    table
        Table of structures without labels, relative to the configuration file.
    method, strength
        See :class:`matxfer.invariance.callback.DomainInvariance`.
    """

    table: str
    method: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_kinds(self, "invariant")
        check_choice("method", self.method, INVARIANT, "invariant")
        check_ranges(self, {"strength": NOT_NEGATIVE}, "invariant")


@dataclass(frozen=True, slots=True)
class PretrainConfig:
    """A whole pretraining run.

    Parameters
    ----------
    name
        Name of the model.
    sources
        Tables to learn from, all at once.
    graph, network, training
        See the classes.
    exclude
        Tables whose materials are kept out of training and validation.
    invariant
        See the class; ``None``: features are as the sources make them.
    trainer
        Passed to ``lightning.Trainer`` as it is (``precision``, ``accelerator``, ``devices``,
        ``strategy``, ``num_nodes``, …); ``logger`` may name a class of
        ``lightning.pytorch.loggers``.
    card
        Copied into the model's card (licence, citation, notes).
    seed
        Seed of initial weights, batch order and random splits.
    folder
        Folder of the configuration file, which table paths are relative to.
    """

    name: str
    sources: list[SourceConfig]
    graph: GraphOptions = field(default_factory=GraphOptions)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    exclude: list[ExcludeConfig] = field(default_factory=list)
    invariant: InvariantConfig | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    folder: Path = field(default_factory=Path)

    def __post_init__(self) -> None:
        check_kinds(self, "the top")
        check_ranges(self, {"seed": SEED}, "the top")
        # Runs and models lie in folders of that name.
        if not self.name.strip() or Path(self.name).name != self.name:
            raise OptionError(f"'name' in the top is {self.name!r}, but must be a file name")
        if not self.sources:
            raise OptionError("'sources' is missing or empty; name at least one table")
        targets = {name for source in self.sources for name in source.targets}
        for key, named in (
            ("task_weights", self.training.task_weights),
            ("readouts", self.network.readouts),
        ):
            if unknown := sorted(set(named) - targets):
                raise OptionError(
                    f"{unknown[0]!r} in {key} is not a target; these are {sorted(targets)}"
                )
        if targets and not any(self.training.task_weights.get(name, 1.0) for name in targets):
            raise OptionError("'task_weights' in training are all 0, and no epoch would be best")


def read_config(path: str | Path) -> PretrainConfig:
    """Read and check a configuration file.

    Raises
    ------
    ConfigError
        If the file is not there, is not YAML, or a key is unknown, missing or of the wrong type.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        size = _expanded_size(data, {})
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML ({error})") from error
    if size > _MAX_VALUES:
        raise ConfigError(f"{path}: its aliases (*name) expand to {size:.3g} values")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values at the top")
    try:
        parts: dict[str, Any] = {
            name: [_build(cls, item, name) for item in _list(data.pop(name, None), name)]
            for name, cls in (("sources", SourceConfig), ("exclude", ExcludeConfig))
        }
        for name, cls in _SECTIONS.items():
            parts[name] = _build(cls, data.pop(name, None) or {}, name)
        if (invariant := data.pop("invariant", None)) is not None:
            parts["invariant"] = _build(InvariantConfig, invariant, "invariant")
        return _build(PretrainConfig, {**data, **parts, "folder": path.parent}, "the top")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


_SECTIONS = {"graph": GraphOptions, "network": NetworkConfig, "training": TrainingConfig}


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list | None):
        raise ConfigError(f"{name!r} is {value!r}, not a list of tables (write - table: …)")
    return value or []


def _expanded_size(data: Any, known: dict[int, int]) -> int:
    """Return the number of values, aliases written out: eleven lines of YAML can mean 10¹⁰."""
    if not isinstance(data, dict | list):
        return 1
    if id(data) not in known:
        known[id(data)] = _MAX_VALUES + 1  # what holds itself has no end
        parts = data.values() if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_expanded_size(part, known) for part in parts)
    return known[id(data)]


def _build(cls: type[T], data: Any, place: str) -> T:
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: expected keys and values, found {data!r}")
    known = sorted(f.name for f in fields(cls))  # type: ignore[arg-type]
    if unknown := sorted(set(map(str, data)) - set(known)):
        raise ConfigError(f"unknown key {unknown[0]!r} in {place}; known are {known}")
    try:
        return cls(**data)
    except OptionError as error:
        raise ConfigError(str(error)) from None
    except TypeError as error:
        raise ConfigError(f"{place}: {error}") from None
