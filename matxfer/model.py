"""A pretrained model: backbone, heads of the source properties, card; found by name or path."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from matxfer.files import (
    MODEL_FORMAT,
    FormatError,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
)
from matxfer.html import card, facts, table
from matxfer.nn.bounds import DISAGREEMENTS, bounded_by
from matxfer.nn.head import PropertyHead
from matxfer.nn.registry import MODELS, MissingPackageError, build_backbone, declared, folder_of
from matxfer.shipped import CARD, model_folders, models_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.nn.backbone import BackboneModule, Features

_log = logging.getLogger(__name__)
DEFAULT_MODEL = "mp-base"
WEIGHTS_FILE, _FISHER = "model.safetensors", "fisher.safetensors"


class Model(nn.Module):
    """A backbone with one head per source property.

    Parameters
    ----------
    backbone
        The network under the heads.
    heads
        One head per property; their order is the order of the columns of a prediction.
    elements
        Atomic numbers seen in training.
    card
        Everything else that is known of the model: data, figures, licence, command.

    Examples
    --------
    >>> import matxfer
    >>> model = matxfer.load_model("mp-small")
    >>> model
    Model('mp-small', formation_energy_ev_per_atom, band_gap_ev, bulk_modulus_vrh_gpa, \
    shear_modulus_vrh_gpa; 192,784 parameters)
    >>> model.backbone.n_layers, len(model.elements), model.has_fisher
    (3, 89, True)
    >>> round(model.card["figures"]["band_gap_ev"]["test"]["mae"], 3)
    0.191
    """

    def __init__(
        self,
        backbone: BackboneModule,
        heads: Iterable[PropertyHead],
        elements: Iterable[int] = (),
        card: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads: dict[str, PropertyHead] = nn.ModuleDict(  # type: ignore[assignment]
            {head.prop.name: head for head in heads}
        )
        self.elements = frozenset(int(z) for z in elements)
        self.card = card or {}
        self.folder: Path | None = None

    @property
    def name(self) -> str:
        """Name from the card."""
        return str(self.card.get("name", "unnamed"))

    @property
    def checksum(self) -> str:
        """SHA-256 of the weights file that the model was read from, ``""`` if none."""
        return str(self.card.get("sha256", ""))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def predict_graphs(self, graphs: GraphLike) -> dict[str, NDArray[np.float64]]:
        """Return every source property of each graph, in its unit, shape (B,)."""
        return self.predict_features(self.backbone(graphs), graphs)

    def predict_features(
        self, features: Features, graphs: GraphLike
    ) -> dict[str, NDArray[np.float64]]:
        """Return every source property from features of the last layer."""
        return {name: head.values(features.node, graphs) for name, head in self.heads.items()}

    @property
    def has_fisher(self) -> bool:
        """Whether the model came with its Fisher information."""
        return self.folder is not None and (self.folder / _FISHER).exists()

    def fisher(self) -> dict[str, torch.Tensor]:
        """Return the shipped Fisher information (see :mod:`matxfer.fisher`).

        Raises
        ------
        FormatError
            If the model came without one.
        """
        if self.folder is None or not self.has_fisher:
            raise FormatError(
                f"model {self.name!r} comes without {_FISHER}; compute it with "
                "matxfer.fisher.fisher_diagonal, or choose a retention that needs none"
            )
        # Kept in half the bytes: a stiffness needs no more than bfloat16's three digits.
        stored = read_tensors(self.folder / _FISHER)
        return {name: value.float() for name, value in stored.items()}

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.parameters())
        return f"Model({self.name!r}, {', '.join(self.heads)}; {size:,} parameters)"

    def _repr_html_(self) -> str:
        size = sum(p.numel() for p in self.parameters())
        config = self.backbone.config()
        about = facts(
            {
                "parameters": size,
                "elements": len(self.elements),
                "layers": self.backbone.n_layers,
                "cutoff": f"{config['graph']['cutoff_angstrom']:g} Å",
                "Fisher information": self.has_fisher,
                "weights": f"{self.checksum[:12]}…" if self.checksum else None,
            }
        )
        rows = []
        for name, head in self.heads.items():
            test = (self.card.get("figures") or {}).get(name, {}).get("test") or {}
            error, unit = headline_figure(test) if test.get("n") else (None, head.prop.unit)
            rows.append((name, head.readout.kind, error, unit, test.get("n")))
        head_row = ("property", "readout", "test MAE", "unit", "n")
        return card(f"Model {self.name}", about, table(head_row, rows, "Source properties"))

    # -- files --------------------------------------------------------------------------------
    def save(self, folder: str | Path, fisher: dict[str, torch.Tensor] | None = None) -> None:
        """Write ``model.safetensors``, ``card.json`` and, if given, ``fisher.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS_FILE, self.state_dict())
        if fisher is not None:
            kept = {name: value.to(torch.bfloat16) for name, value in fisher.items()}
            write_tensors(folder / _FISHER, kept)
        self.card = {
            "format": MODEL_FORMAT,
            "name": folder.name,
            "architecture": self.backbone.config(),
            "heads": [head.to_json() for head in self.heads.values()],
            "elements": sorted(self.elements),
            **{k: v for k, v in self.card.items() if k not in _DERIVED},
            "sha256": sha256(folder / WEIGHTS_FILE),
        }
        write_json(folder / CARD, self.card)
        self.folder = folder


_DERIVED = ("format", "name", "architecture", "heads", "elements", "sha256")


def headline_figure(figures: dict[str, Any]) -> tuple[float, str]:
    """Return a property's error and its unit: of the logarithm where that is what was fitted."""
    for key, value in figures.items():
        if key.startswith("mae_log"):
            return float(value), key.removeprefix("mae_")
    return float(figures["mae"]), str(figures["unit"])


def available_models() -> list[str]:
    """Return the names of the shipped models.

    Examples
    --------
    >>> import matxfer
    >>> matxfer.available_models()[:4]
    ['mp-base', 'mp-base-strict', 'mp-potential', 'mp-small']
    """
    return models_in(model_folders())


def models_of_packages() -> list[str]:
    """Return the names of models that installed packages bring (:mod:`matxfer.nn.registry`)."""
    return sorted(set(declared(MODELS)) - set(available_models()))


def find_model(name_or_path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the card of a model, by name or by the path of its folder.

    Raises
    ------
    FormatError
        If there is no such model, or its card is damaged or of another version.
    MissingPackageError
        If it comes with a package that is not installed.
    """
    candidates = [root / str(name_or_path) for root in model_folders()]
    folder = next(
        (p for p in [Path(name_or_path), *candidates] if (p / CARD).is_file()),
        None,
    ) or folder_of(str(name_or_path))
    if folder is None:
        if (Path(name_or_path) / "plugin.json").is_file():
            raise FormatError(
                f"{name_or_path} is a plugin, not a model; matxfer consolidate makes a model of it"
            )
        raise FormatError(
            f"no model {str(name_or_path)!r}: give the folder of a model or one of "
            f"{[*available_models(), *models_of_packages()]}"
        )
    return folder, read_json(folder / CARD, MODEL_FORMAT)


def is_potential(card: dict[str, Any]) -> bool:
    """Say whether a card is that of a potential (:mod:`matxfer.potential`)."""
    return isinstance(card.get("potential"), dict)


def check_weights(folder: Path, card: dict[str, Any]) -> None:
    """Check that the weights of a model are there and are those that its card is about.

    Raises
    ------
    FormatError
        If they are not.
    """
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise FormatError(f"{weights}: there is no such file; fetch the model again")
    if card.get("sha256") != sha256(weights):
        raise FormatError(f"{weights}: the checksum differs from the card's; fetch the model again")


def check_base(folder: Path, named: dict[str, Any], base: Model) -> None:
    """Check that a model is the one that a plugin names as its base.

    Raises
    ------
    FormatError
        If its weights are others.
    """
    if named["sha256"] != base.checksum:
        raise FormatError(
            f"{folder}: trained on weights {named['sha256'][:12]}… of {named['name']!r}, but "
            f"{base.name!r} has {base.checksum[:12]}…; load it with the one it was trained on, or "
            "fine-tune again"
        )


def base_of(folder: Path, named: dict[str, Any]) -> str | Path:
    """Return the base that a plugin names: the model in whose folder it lies, or else by name."""
    card = folder.parent.parent / CARD
    lies_in = folder.parent.name == "plugins" and card.is_file()
    if lies_in and read_json(card).get("sha256") == named["sha256"]:
        return card.parent
    return str(named["name"])


def build_network(
    card: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[BackboneModule, list[PropertyHead]]:
    """Build what a card describes, with random weights, and no more than its weights can fill.

    Raises
    ------
    SizeError
        If it describes more.
    KeyError, TypeError, ValueError
        If the description lacks something or is of another network.
    """
    # Loading must not disturb the caller's seeds.
    described = {key: card[key] for key in ("architecture", "heads")}
    with torch.random.fork_rng(devices=[]), bounded_by(weights, described):
        backbone = build_backbone(card["architecture"])
        return backbone, [PropertyHead.from_json(h, backbone.node_dim) for h in card["heads"]]


@contextmanager
def disagreeing(folder: Path) -> Iterator[None]:
    """Tell what a card and its weights disagree in as one error of the files.

    Raises
    ------
    FormatError
        In place of the errors of what is built and filled.
    """
    try:
        yield
    except MissingPackageError:
        raise
    except DISAGREEMENTS as error:
        raise FormatError(
            f"{folder / CARD}: card and weights disagree ({error}); fetch or train the model again"
        ) from error


def load_model(name_or_path: str | Path = DEFAULT_MODEL) -> Model:
    """Load a model by the name of a shipped one or by the path of its folder.

    Raises
    ------
    FormatError
        If there is no such model, it is a potential, or its files are damaged or of another
        version.
    MissingPackageError
        If its backbone comes with a package that is not installed.

    Examples
    --------
    >>> import matxfer
    >>> list(matxfer.load_model("mp-small").heads)[:2]
    ['formation_energy_ev_per_atom', 'band_gap_ev']
    >>> matxfer.load_model("mp-large")
    Traceback (most recent call last):
    matxfer.files.FormatError: no model 'mp-large': give the folder of a model or one of ...
    """
    folder, card = find_model(name_or_path)
    if is_potential(card):  # its energies would lack the repulsion
        raise FormatError(
            f"{folder}: is a potential, which predicts energies, forces and stresses: use "
            "MatxferCalculator(model=…), matxfer relax or matxfer md; for a plugin of it give "
            "frames to matxfer finetune --model, and for properties a model of them"
        )
    check_weights(folder, card)
    weights = read_tensors(folder / WEIGHTS_FILE)
    with disagreeing(folder):
        backbone, heads = build_network(card, weights)
        model = Model(backbone, heads, card["elements"], card)
        model.load_state_dict(weights)
    model.folder = folder
    _log.info("model %s: %s, sha256 %s…", model.name, folder, model.checksum[:12])
    return model.eval().requires_grad_(False)
