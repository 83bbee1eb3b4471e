"""`hb.lower`: a converted model whose integers stay integers between layers."""

from halfbyte.lowering.lower import lower
from halfbyte.lowering.model import LoweredModel, LoweredNode, LoweringReport

__all__ = ["LoweredModel", "LoweredNode", "LoweringReport", "lower"]
