"""What a pretraining run is told: the YAML file as checked dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from matxfer.errors import MatxferError
from matxfer.graph import GraphOptions
from matxfer.pretraining.exclusion import ExcludeConfig

T = TypeVar("T")

#: More than in any configuration, few enough to be shown in a message.
_MAX_VALUES = 1000
LOSSES = ("huber", "mae", "mse")


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
    report_only
        Column → allowed values: rows of val and test outside are left out of every figure.
    row_weights
        Column → value → weight of such training rows in the loss (default 1), for labels that
        are noisier than others.
    denoise_angstrom
        Above 0 the table, which then has no targets, teaches geometry without labels: atoms of
        the full cell are displaced by noise of this spread (in Å, per coordinate), and the
        network has to tell the displacements (Zaidi et al., ICLR 2023).
    max_sites
        Structures with more atoms in the cell are left out of the source; ``null``: none.
    """

    table: str
    targets: list[str] = field(default_factory=list)
    split_column: str | None = None
    report_only: dict[str, list[Any]] = field(default_factory=dict)
    row_weights: dict[str, dict[str, float]] = field(default_factory=dict)
    denoise_angstrom: float = 0.0
    max_sites: int | None = None

    def __post_init__(self) -> None:
        if bool(self.targets) == (self.denoise_angstrom > 0):
            raise ConfigError(
                f"source {self.table!r}: give 'targets', or 'denoise_angstrom' above 0 for a "
                "table without labels, and not both (name the table twice to have both)"
            )


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """Shape of the network, see :class:`matxfer.nn.network.EdgeGatedNetwork`.

    Parameters
    ----------
    readouts
        Target → kind of readout (:data:`matxfer.nn.readout.READOUTS`), where it is not the default.
    """

    n_layers: int = 4
    node_dim: int = 128
    edge_dim: int = 64
    basis_size: int = 40
    angular_dim: int = 0
    readouts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Optimisation.

    Parameters
    ----------
    epochs, batch_size
        Passes over the training rows; crystals per batch and device.
    learning_rate, weight_decay
        Of AdamW; the rate rises linearly over ``warmup_fraction`` of all steps and falls to zero
        along a cosine.
    clip_norm
        Largest norm of the gradient.
    loss
        ``mae``, ``huber`` (quadratic within 0.1 of the targets' spread) or ``mse``.
    task_weights
        Weight of each target in the loss (default 1).
    denoise_weight
        Weight of the denoising loss.
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
    clip_norm: float = 1.0
    loss: str = "mae"
    task_weights: dict[str, float] = field(default_factory=dict)
    denoise_weight: float = 1.0
    ema_decay: float = 0.0
    patience: int | None = None
    fisher_samples: int = 1000

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f"'loss' in training is {self.loss!r}; known are {sorted(LOSSES)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"'ema_decay' in training is {self.ema_decay}, not in [0, 1)")


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
    trainer: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    folder: Path = field(default_factory=Path)


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
        sources = [_build(SourceConfig, s, "sources") for s in data.pop("sources", None) or []]
        exclude = [_build(ExcludeConfig, e, "exclude") for e in data.pop("exclude", None) or []]
        if not sources:
            raise ConfigError("'sources' is missing or empty; name at least one table")
        parts: dict[str, Any] = {
            "graph": _build(GraphOptions, data.pop("graph", {}), "graph"),
            "network": _build(NetworkConfig, data.pop("network", {}), "network"),
            "training": _build(TrainingConfig, data.pop("training", {}), "training"),
        }
        targets = {name for source in sources for name in source.targets}
        for key, named in (
            ("task_weights", parts["training"].task_weights),
            ("readouts", parts["network"].readouts),
        ):
            if unknown := sorted(set(named) - targets):
                raise ConfigError(
                    f"{unknown[0]!r} in {key} is not a target; these are {sorted(targets)}"
                )
        return _build(
            PretrainConfig,
            {**data, **parts, "sources": sources, "exclude": exclude, "folder": path.parent},
            "the top",
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


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
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(data) - set(known)):
        raise ConfigError(f"unknown key {unknown[0]!r} in {place}; known are {sorted(known)}")
    for key, value in data.items():
        expected = str(known[key].type)
        numeric = expected in ("int", "float")
        if numeric and (isinstance(value, bool) or not isinstance(value, int | float)):
            # YAML reads 1e-3 as text; only 1.0e-3 is a number to it.
            raise ConfigError(f"{key!r} in {place} is {value!r}, not a number (write 1.0e-3)")
        if expected == "int" and not isinstance(value, int):
            raise ConfigError(f"{key!r} in {place} is {value!r}, not a whole number")
        if expected.startswith("list") and not isinstance(value, list):
            raise ConfigError(f"{key!r} in {place} is {value!r}, not a list (write [{value}])")
    try:
        return cls(**data)
    except TypeError as error:
        raise ConfigError(f"{place}: {error}") from None
