"""The scikit-learn face: estimators and a transformer whose samples are crystal structures.

They are imported on first use: the featurizer imports matminer where that is installed, and the
report of a plugin has no use for scikit-learn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matxfer.estimator.classifier import TransferClassifier
    from matxfer.estimator.featurizer import FingerprintFeaturizer
    from matxfer.estimator.fingerprint import StructureFingerprint
    from matxfer.estimator.regressor import TransferRegressor

_HOME = {
    "FingerprintFeaturizer": "matxfer.estimator.featurizer",
    "StructureFingerprint": "matxfer.estimator.fingerprint",
    "TransferClassifier": "matxfer.estimator.classifier",
    "TransferRegressor": "matxfer.estimator.regressor",
}

__all__ = [
    "FingerprintFeaturizer",
    "StructureFingerprint",
    "TransferClassifier",
    "TransferRegressor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
