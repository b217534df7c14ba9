"""Training checkpoints without pickle: tensors as safetensors, everything else as JSON.

Lightning hands a nested dictionary; tensors are taken out of it by their path, tuples and
non-string keys are marked, and the rest is plain JSON. One file holds both (the JSON travels in
the safetensors header), so a checkpoint is there whole or not at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from matxfer.files import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


class SafetensorsCheckpointIO(CheckpointIO):
    """Lightning checkpoint plugin that writes and reads safetensors only."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ARG002 - Lightning's signature
    ) -> None:
        """Write the checkpoint beside its place and rename it."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        tree = _flatten(checkpoint, tensors)
        temporary = target.with_name(f".{target.name}.part")
        save_file(tensors, temporary, metadata={"checkpoint": json.dumps(tree)})
        temporary.replace(target)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = None,  # noqa: ARG002
        weights_only: bool | None = None,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Read a checkpoint back.

        Raises
        ------
        FormatError
            If the file is missing or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tree = json.loads(file.metadata()["checkpoint"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            restored: dict[str, Any] = _restore(tree, tensors)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise FormatError(
                f"{path}: not a readable checkpoint ({error}); start again without --resume"
            ) from error
        return restored

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint file."""
        Path(path).unlink(missing_ok=True)


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:  # noqa: PLR0911 - one per type
    """Replace tensors by references and mark what JSON cannot say."""
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: key}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _flatten(item, tensors) for key, item in value.items()}
        return {_ITEMS: [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_flatten(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_flatten(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item"):  # NumPy scalars
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _restore(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_restore(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(_restore(item, tensors) for item in tree[_TUPLE])
    if _ITEMS in tree:
        return {_restore(k, tensors): _restore(v, tensors) for k, v in tree[_ITEMS]}
    return {key: _restore(item, tensors) for key, item in tree.items()}
