"""Transfer maps: what source models, frozen depths and layers are worth for target tables."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matxfer.probing.run import probe
    from matxfer.probing.transfer_map import TransferMap

_HOME = {"TransferMap": "matxfer.probing.transfer_map", "probe": "matxfer.probing.run"}

__all__ = ["TransferMap", "probe"]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this room, and must start fast.
    if name not in _HOME:
        raise AttributeError(f"module 'matxfer.probing' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
