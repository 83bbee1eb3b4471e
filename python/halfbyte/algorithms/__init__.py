"""Algorithms that turn float weights into better integers. A *rounding* chooses the integers of each layer."""

from halfbyte.algorithms.adaround import AdaRound
from halfbyte.algorithms.gptq import GPTQ
from halfbyte.algorithms.rounding import MSE, RTN, HessianRounding, RoundedLayer, Rounding, default_rounding

__all__ = ["GPTQ", "MSE", "RTN", "AdaRound", "HessianRounding", "RoundedLayer", "Rounding", "default_rounding"]
