"""A plugin of a potential: its own layers above the frozen depth and its own energy per atom."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from matxfer.files import PLUGIN_FORMAT, POTENTIAL_KIND, FormatError
from matxfer.model import check_base
from matxfer.nn.bounds import DISAGREEMENTS
from matxfer.plugin_files import META, read_plugin, write_plugin
from matxfer.potential.model import Potential, load_potential
from matxfer.transfer.freezing import adaptable_copy, check_depth, trainable_blocks

if TYPE_CHECKING:
    from torch import Tensor

_DERIVED = ("format", "kind", "name", "base", "frozen_depth")


class PotentialPlugin:
    """A potential of one's own material on the frozen layers of a general one.

    Parameters
    ----------
    base
        The general potential.
    depth
        Number of frozen layers; they are the base's own memory.
    meta
        Everything else that is known: data, errors, provenance.

    Attributes
    ----------
    potential
        What it predicts with.
    """

    def __init__(self, base: Potential, depth: int, meta: dict[str, Any] | None = None) -> None:
        self.base, self.depth = base, check_depth(base.backbone, depth)
        self.meta = meta or {}
        self.folder: Path | None = None
        self.potential = Potential(
            adaptable_copy(base.backbone, depth),
            copy.deepcopy(base.head).requires_grad_(True),
            base.repulsion,
            base.elements | set(self.meta.get("elements", ())),
            {"name": self.name},
        )

    @property
    def name(self) -> str:
        """Name of its folder."""
        return str(self.meta.get("name", "unnamed"))

    def on_the_base_head(self) -> Potential:
        """Return the general potential as it is with the layers of this plugin."""
        base = self.base
        return Potential(
            self.potential.backbone, base.head, base.repulsion, base.elements, {"name": base.name}
        ).eval()

    def __repr__(self) -> str:
        return (
            f"PotentialPlugin({self.name!r} on {self.base.name!r}, "
            f"{self.depth} of {self.base.backbone.n_layers} layers frozen)"
        )

    # -- files --------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """Write ``plugin.safetensors`` (head and layers of its own) and ``plugin.json``."""
        folder = Path(folder)
        tensors = {f"head.{k}": v for k, v in self.potential.head.state_dict().items()}
        tensors |= {f"layers.{k}": v for k, v in self.own_layers().items()}
        meta = {
            "format": PLUGIN_FORMAT,
            "kind": POTENTIAL_KIND,
            "name": folder.name,
            "base": {"name": self.base.name, "sha256": self.base.checksum},
            "frozen_depth": self.depth,
            **{k: v for k, v in self.meta.items() if k not in _DERIVED},
        }
        self.meta = write_plugin(folder, meta, tensors)
        self.potential.card["name"] = folder.name
        self.folder = folder

    def own_layers(self) -> dict[str, Tensor]:
        """Return the tensors of the blocks above the frozen depth, by their name in a block."""
        return {
            f"{name}.{key}": value
            for name, block in trainable_blocks(self.potential.backbone, self.depth)
            for key, value in block.state_dict().items()
        }


def is_potential_plugin(path: str | Path) -> bool:
    """Say whether a folder or packed file holds a plugin of a potential."""
    try:
        return bool(read_plugin(path, [META]).facts().get("kind") == POTENTIAL_KIND)
    except FormatError:
        return False


def load_potential_plugin(path: str | Path, base: Potential | None = None) -> PotentialPlugin:
    """Load a plugin of a potential, and the general potential that it names unless one is given.

    Raises
    ------
    FormatError
        If files are missing or damaged, or the base is not the one it was trained on.
    """
    files = read_plugin(path)
    folder, meta = files.path, files.meta()
    if meta.get("kind") != POTENTIAL_KIND:
        raise FormatError(f"{folder}: is a plugin of a property, not of a potential")
    tensors = files.tensors(meta)
    try:
        base = base or load_potential(meta["base"]["name"])
        check_base(folder, meta["base"], base)
        plugin = PotentialPlugin(base, int(meta["frozen_depth"]), meta)
        head = {k[5:]: v for k, v in tensors.items() if k.startswith("head.")}
        plugin.potential.head.load_state_dict(head)
        own = plugin.own_layers()
        layers = {k[7:]: v for k, v in tensors.items() if k.startswith("layers.")}
        if set(layers) != set(own) or len(head) + len(layers) != len(tensors):
            raise ValueError("the tensors are not those of the head and the trainable layers")
        with torch.no_grad():
            for name, value in layers.items():
                if value.shape != own[name].shape:
                    raise ValueError(f"size mismatch for {name}")
                own[name].copy_(value)
    except DISAGREEMENTS as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(
            f"{folder}: plugin.json and its weights disagree ({error}); fetch or train it again"
        ) from error
    plugin.potential.eval().requires_grad_(False)
    plugin.folder = folder
    return plugin
