"""Quantization-aware training: what `hb.prepare_qat_` puts into a model, and the switches of a prepared one."""

from halfbyte.qat.control import freeze_batchnorm, freeze_observers, scale_parameters, set_enabled
from halfbyte.qat.distill import DistilledStage, distill_
from halfbyte.qat.functions import FakeQuantize
from halfbyte.qat.learned_activation import LearnedActivation, PactActivation
from halfbyte.qat.learned_weight import AbsoluteMeanWeight, LearnedWeight
from halfbyte.qat.modules import QATModule
from halfbyte.qat.quantizer_base import WeightQuantizer
from halfbyte.qat.quantizers import activation_quantizer, weight_quantizer
from halfbyte.qat.start import start_from_
from halfbyte.qat.state import Schedule

__all__ = [
    "AbsoluteMeanWeight",
    "DistilledStage",
    "FakeQuantize",
    "LearnedActivation",
    "LearnedWeight",
    "PactActivation",
    "QATModule",
    "Schedule",
    "WeightQuantizer",
    "activation_quantizer",
    "distill_",
    "freeze_batchnorm",
    "freeze_observers",
    "scale_parameters",
    "set_enabled",
    "start_from_",
    "weight_quantizer",
]
