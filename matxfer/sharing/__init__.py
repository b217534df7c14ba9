"""Plugins to give away: one file for mail, the Hugging Face Hub, and what is checked on arrival."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matxfer.sharing.card import card_text
    from matxfer.sharing.exchange import pack, pull, push, unpack
    from matxfer.sharing.listing import Summary, find_plugins, summary
    from matxfer.sharing.verification import verify

_HOME = {
    "Summary": "matxfer.sharing.listing",
    "card_text": "matxfer.sharing.card",
    "find_plugins": "matxfer.sharing.listing",
    "pack": "matxfer.sharing.exchange",
    "pull": "matxfer.sharing.exchange",
    "push": "matxfer.sharing.exchange",
    "summary": "matxfer.sharing.listing",
    "unpack": "matxfer.sharing.exchange",
    "verify": "matxfer.sharing.verification",
}

__all__ = [
    "Summary",
    "card_text",
    "find_plugins",
    "pack",
    "pull",
    "push",
    "summary",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this room, and must start fast.
    if name not in _HOME:
        raise AttributeError(f"module 'matxfer.sharing' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
