"""A plugin: a head and the later layers of one base model, adapted to one property; its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from matxfer.errors import OptionError
from matxfer.files import (
    PLUGIN_FORMAT,
    FormatError,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from matxfer.model import Model, load_model
from matxfer.nn.head import PropertyHead
from matxfer.transfer.freezing import adaptable_copy, trainable_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from matxfer.data.batch import GraphLike
    from matxfer.nn.backbone import Features

_WEIGHTS, _META = "plugin.safetensors", "plugin.json"


class Plugin:
    """One property on top of a base model.

    Parameters
    ----------
    base
        The model it belongs to.
    depth
        Number of frozen layers, shared with the base.
    head
        Readout and scaler.
    meta
        What ``plugin.json`` says besides: provenance, figures, retention, elements seen.

    Attributes
    ----------
    backbone
        The base's first ``depth`` layers (the same memory) and layers of its own above them.
    """

    def __init__(
        self, base: Model, depth: int, head: PropertyHead, meta: dict[str, Any] | None = None
    ) -> None:
        self.base = base
        self.depth = depth
        self.head = head
        self.meta = meta or {}
        self.backbone = adaptable_copy(base.backbone, depth)
        self.folder: Path | None = None

    @property
    def name(self) -> str:
        """Name of the plugin's folder, or of its property while it has none."""
        return str(self.meta.get("name", self.head.prop.name))

    @property
    def target(self) -> str:
        """Column name of the property."""
        return self.head.prop.name

    def eval(self) -> Plugin:
        """Switch to prediction."""
        self.backbone.eval().requires_grad_(False)
        self.head.eval().requires_grad_(False)
        return self

    def features(self, graphs: GraphLike, prefix: Features | None) -> Features:
        """Return the last layer's features, from those after ``depth`` layers if given."""
        start = prefix if prefix is not None else self.backbone.embed(graphs)
        first = self.depth if prefix is not None else 0
        return self.backbone.run(graphs, start, first, self.backbone.n_layers)

    def changed_tensors(self) -> dict[str, Tensor]:
        """Return the backbone's tensors that differ from the base's, by name."""
        base = self.base.backbone.state_dict()
        own = self.backbone.state_dict()
        return {name: value for name, value in own.items() if not torch.equal(value, base[name])}

    def __repr__(self) -> str:
        return (
            f"Plugin({self.name!r}: {self.target} on {self.base.name!r}, "
            f"{self.depth} of {self.backbone.n_layers} layers frozen)"
        )

    # -- files --------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Write ``plugin.safetensors`` (head and changed layers) and ``plugin.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        tensors |= {f"backbone.{k}": v for k, v in self.changed_tensors().items()}
        write_tensors(folder / _WEIGHTS, tensors)
        prop = self.head.prop
        self.meta = {
            "format": PLUGIN_FORMAT,
            "name": folder.name,
            "base": {"name": self.base.name, "sha256": self.base.checksum},
            "frozen_depth": self.depth,
            "target": prop.name,
            "unit": prop.unit,
            "transform": prop.transform,
            "scaler": {
                "mean": float(self.head.scaler.mean),
                "std": float(self.head.scaler.std),
                "element_references": bool(self.head.scaler.reference.any()),
            },
            "head": self.head.to_json(),
            **{k: v for k, v in self.meta.items() if k not in _DERIVED},
        }
        write_json(folder / _META, self.meta)
        self.folder = folder


_DERIVED = (
    "format",
    "name",
    "base",
    "frozen_depth",
    "target",
    "unit",
    "transform",
    "scaler",
    "head",
)


def load_plugin(path: str | Path, model: Model | None = None) -> Plugin:
    """Load a plugin, and the base model that it names unless one is given.

    Raises
    ------
    FormatError
        If files are missing or damaged, or the base is not the one it was trained on.
    """
    folder = Path(path)
    meta = read_json(folder / _META, PLUGIN_FORMAT)
    try:
        base = model or load_model(meta["base"]["name"])
        if meta["base"]["sha256"] != base.checksum:
            raise FormatError(
                f"{folder}: trained on weights {meta['base']['sha256'][:12]}… of model "
                f"{meta['base']['name']!r}, but {base.name!r} has {base.checksum[:12]}…; load it "
                "with the model it was trained on, or fine-tune again"
            )
        with torch.random.fork_rng(devices=[]):  # loading must not disturb the caller's seeds
            head = PropertyHead.from_json(meta["head"], base.backbone.node_dim)
        plugin = Plugin(base, int(meta["frozen_depth"]), head, meta)
        tensors = read_tensors(folder / _WEIGHTS)
        head.load_state_dict(_under("head.", tensors))
        changed = _under("backbone.", tensors)
        allowed = {
            f"{name}.{key}"
            for name, block in trainable_blocks(plugin.backbone, plugin.depth)
            for key in block.state_dict()
        }
        renamed = {_block_name(key): key for key in changed}
        foreign = {key for key in tensors if not key.startswith(("head.", "backbone."))}
        if unknown := sorted(set(renamed) - allowed | foreign):
            raise ValueError(f"{unknown[0]} does not belong to the head or a trainable layer")
        plugin.backbone.load_state_dict(changed, strict=False)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{folder}: plugin.json and its weights disagree ({error}); fetch or train it again"
        ) from error
    plugin.folder = folder
    return plugin.eval()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _block_name(key: str) -> str:
    """Name a backbone tensor by its block, as ``blocks()`` does."""
    return key.replace("embedding.", "embed.", 1) if key.startswith("embedding.") else key


def column_names(model: Model, plugins: Iterable[Plugin]) -> list[str]:
    """Return the column of each plugin: its property, made unique where others have it too."""
    taken = set(model.heads)
    names = []
    for plugin in plugins:
        name = plugin.target
        if name in taken:
            name = f"{plugin.target}__{plugin.name}"
        if name in taken:
            raise OptionError(f"two plugins are called {plugin.name!r}; rename one's folder")
        taken.add(name)
        names.append(name)
    return names


def predict_all(
    model: Model, plugins: Iterable[Plugin], graphs: GraphLike
) -> list[NDArray[np.float64]]:
    """Predict the source properties and all plugins with one pass of the base network.

    Returns
    -------
    list of (B,) arrays
        First the model's properties in their order, then one array per plugin.
    """
    plugins = list(plugins)
    backbone = model.backbone
    state = backbone.embed(graphs)
    adapted: dict[int, Features] = {}
    for depth in range(backbone.n_layers + 1):
        for k, plugin in enumerate(plugins):
            if plugin.depth == depth:
                adapted[k] = plugin.features(graphs, state if depth > 0 else None)
        if depth < backbone.n_layers:
            state = backbone.run(graphs, state, depth, depth + 1)
    values = list(model.predict_features(state, graphs).values())
    values += [p.head.values(adapted[k].node, graphs) for k, p in enumerate(plugins)]
    return values
