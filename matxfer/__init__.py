"""Transfer learning for crystals.

A graph network pretrained on large property databases, plugins that adapt its later layers to a
property of your own, and elastic weight consolidation that keeps what the source needs.
Names are imported on first use, so that ``import matxfer`` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matxfer.calculator import MatxferCalculator
    from matxfer.crystal import Crystal, CrystalError
    from matxfer.estimator.classifier import TransferClassifier
    from matxfer.estimator.fingerprint import StructureFingerprint
    from matxfer.estimator.regressor import TransferRegressor
    from matxfer.evaluation import evaluate
    from matxfer.graph import GraphOptions
    from matxfer.invariance.callback import DomainInvariance
    from matxfer.model import Model, available_models, load_model
    from matxfer.nn.backbone import Backbone
    from matxfer.potential.fit import finetune_potential
    from matxfer.prediction import predict
    from matxfer.pyg import CrystalGraph
    from matxfer.transfer.config import FinetuneConfig
    from matxfer.transfer.consolidate import consolidate
    from matxfer.transfer.ewc_callback import EWC
    from matxfer.transfer.finetune import finetune
    from matxfer.transfer.plugin import Plugin, load_plugin
    from matxfer.transfer.selection import rank_sources

__version__ = "0.1.0"

_HOME = {
    "EWC": "matxfer.transfer.ewc_callback",
    "Backbone": "matxfer.nn.backbone",
    "Crystal": "matxfer.crystal",
    "CrystalError": "matxfer.crystal",
    "CrystalGraph": "matxfer.pyg",
    "DomainInvariance": "matxfer.invariance.callback",
    "FinetuneConfig": "matxfer.transfer.config",
    "GraphOptions": "matxfer.graph",
    "MatxferCalculator": "matxfer.calculator",
    "Model": "matxfer.model",
    "Plugin": "matxfer.transfer.plugin",
    "StructureFingerprint": "matxfer.estimator.fingerprint",
    "TransferClassifier": "matxfer.estimator.classifier",
    "TransferRegressor": "matxfer.estimator.regressor",
    "available_models": "matxfer.model",
    "consolidate": "matxfer.transfer.consolidate",
    "evaluate": "matxfer.evaluation",
    "finetune": "matxfer.transfer.finetune",
    "finetune_potential": "matxfer.potential.fit",
    "load_model": "matxfer.model",
    "load_plugin": "matxfer.transfer.plugin",
    "predict": "matxfer.prediction",
    "rank_sources": "matxfer.transfer.selection",
}

__all__ = [
    "EWC",
    "Backbone",
    "Crystal",
    "CrystalError",
    "CrystalGraph",
    "DomainInvariance",
    "FinetuneConfig",
    "GraphOptions",
    "MatxferCalculator",
    "Model",
    "Plugin",
    "StructureFingerprint",
    "TransferClassifier",
    "TransferRegressor",
    "available_models",
    "consolidate",
    "evaluate",
    "finetune",
    "finetune_potential",
    "load_model",
    "load_plugin",
    "predict",
    "rank_sources",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'matxfer' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
