"""Whether a backbone keeps its promises: what the rest of matxfer relies on, checked one by one.

>>> from matxfer.nn.network import EdgeGatedNetwork
>>> from matxfer.testing import check_backbone
>>> "invariance under rotation" in check_backbone(EdgeGatedNetwork(2, 16, 8, 10))
True
"""

from matxfer.testing.conformance import ConformanceError, backbone_checks, check_backbone

__all__ = ["ConformanceError", "backbone_checks", "check_backbone"]
