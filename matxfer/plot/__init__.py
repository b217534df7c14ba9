"""Figures for people: parity, residuals by element, curves, retention, trust, classes, maps, atoms.

Every function takes plain arrays, columns of a data frame, or what the package itself makes (a
plugin, a diagnosis, atoms with a calculator); draws on ``ax`` or on a new figure of one column of a
journal; and returns the axes. Matplotlib draws; the map of fingerprints can be a Plotly figure.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matxfer.plot.agreement import parity
    from matxfer.plot.atoms import contributions
    from matxfer.plot.classes import probabilities_by_class, reliability, roc
    from matxfer.plot.curves import learning_curve, training_curve
    from matxfer.plot.elements import periodic_table, residuals_by_element
    from matxfer.plot.maps import embedding_map
    from matxfer.plot.retention import forgetting, retention_plane
    from matxfer.plot.trust import calibration

_HOME = {
    "calibration": "matxfer.plot.trust",
    "contributions": "matxfer.plot.atoms",
    "embedding_map": "matxfer.plot.maps",
    "forgetting": "matxfer.plot.retention",
    "learning_curve": "matxfer.plot.curves",
    "parity": "matxfer.plot.agreement",
    "periodic_table": "matxfer.plot.elements",
    "probabilities_by_class": "matxfer.plot.classes",
    "reliability": "matxfer.plot.classes",
    "residuals_by_element": "matxfer.plot.elements",
    "retention_plane": "matxfer.plot.retention",
    "roc": "matxfer.plot.classes",
    "training_curve": "matxfer.plot.curves",
}

__all__ = [
    "calibration",
    "contributions",
    "embedding_map",
    "forgetting",
    "learning_curve",
    "parity",
    "periodic_table",
    "probabilities_by_class",
    "reliability",
    "residuals_by_element",
    "retention_plane",
    "roc",
    "training_curve",
]


def __getattr__(name: str) -> Any:
    # On first use: some of the rooms above draw nothing but need the colours.
    if name not in _HOME:
        raise AttributeError(f"module 'matxfer.plot' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
