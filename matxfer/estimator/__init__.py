"""The scikit-learn face: estimators and a transformer whose samples are crystal structures."""

from __future__ import annotations

from matxfer.estimator.classifier import TransferClassifier
from matxfer.estimator.fingerprint import StructureFingerprint
from matxfer.estimator.regressor import TransferRegressor

__all__ = ["StructureFingerprint", "TransferClassifier", "TransferRegressor"]
