"""Where the shipped models lie; known without anything heavy, for the shell asks too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: What makes a folder that of a model.
CARD = "card.json"


def model_folders() -> list[Path]:
    """Return the folders that are searched for models by name."""
    package = Path(__file__).resolve().parent
    # In an installed package the weights lie inside it, in a checkout beside it.
    return [package / "pretrained", package.parent / "pretrained"]


def models_in(folders: Iterable[Path]) -> list[str]:
    """Return the names of the models that lie in folders, sorted."""
    return sorted({card.parent.name for root in folders for card in root.glob(f"*/{CARD}")})
