"""A plugin as one page: what it is, how good it is, where it came from; opens without a network."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matxfer.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this room, and must start fast.
    if name not in __all__:
        raise AttributeError(f"module 'matxfer.report' has no attribute {name!r}")
    return getattr(import_module("matxfer.report.page"), name)
