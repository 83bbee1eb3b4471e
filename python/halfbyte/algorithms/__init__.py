"""Algorithms that turn float weights into better integers.

A *transform* changes the float model, so that it computes the same and is easier to quantize; a *rounding* chooses the
integers of each layer.
"""

from halfbyte.algorithms.adaround import AdaRound
from halfbyte.algorithms.awq import AWQ
from halfbyte.algorithms.bias import BiasCorrection, InputMean
from halfbyte.algorithms.equalization import CrossLayerEqualization
from halfbyte.algorithms.gptq import GPTQ
from halfbyte.algorithms.rotation import Rotation
from halfbyte.algorithms.rounding import MSE, RTN, HessianRounding, RoundedLayer, Rounding, default_rounding
from halfbyte.algorithms.smoothquant import SmoothQuant
from halfbyte.algorithms.transform import Transform, TransformContext, TransformRecord

__all__ = [
    "AWQ",
    "GPTQ",
    "MSE",
    "RTN",
    "AdaRound",
    "BiasCorrection",
    "CrossLayerEqualization",
    "HessianRounding",
    "InputMean",
    "Rotation",
    "RoundedLayer",
    "Rounding",
    "SmoothQuant",
    "Transform",
    "TransformContext",
    "TransformRecord",
    "default_rounding",
]
