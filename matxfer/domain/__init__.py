"""The domain gap: whether a target's structures and rules are those of a source; what to do."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matxfer.domain.diagnosis import Diagnosis, diagnose
    from matxfer.domain.weighing import weights_for
    from matxfer.domain.weights import ImportanceWeights, density_ratio

_HOME = {
    "Diagnosis": "matxfer.domain.diagnosis",
    "ImportanceWeights": "matxfer.domain.weights",
    "density_ratio": "matxfer.domain.weights",
    "diagnose": "matxfer.domain.diagnosis",
    "weights_for": "matxfer.domain.weighing",
}

__all__ = ["Diagnosis", "ImportanceWeights", "density_ratio", "diagnose", "weights_for"]


def __getattr__(name: str) -> Any:
    # On first use: the command line imports this room, and must start fast.
    if name not in _HOME:
        raise AttributeError(f"module 'matxfer.domain' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
