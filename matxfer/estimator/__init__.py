"""The scikit-learn face: estimators and a transformer whose samples are crystal structures.

``FingerprintFeaturizer`` is imported on first use: it imports matminer where that is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matxfer.estimator.classifier import TransferClassifier
from matxfer.estimator.fingerprint import StructureFingerprint
from matxfer.estimator.regressor import TransferRegressor

if TYPE_CHECKING:
    from matxfer.estimator.featurizer import FingerprintFeaturizer

__all__ = [
    "FingerprintFeaturizer",
    "StructureFingerprint",
    "TransferClassifier",
    "TransferRegressor",
]


def __getattr__(name: str) -> Any:
    if name != "FingerprintFeaturizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from matxfer.estimator.featurizer import FingerprintFeaturizer

    return FingerprintFeaturizer
