"""halfbyte: low-bit quantization for PyTorch with a C++ core.

    import halfbyte as hb
    report = hb.quantize_(model, hb.int8_dynamic())

`hb.plan` says what would happen, `hb.save` and `hb.load_` keep the result, `hb.verify` proves that its integers are right.
"""

from halfbyte import algorithms, formats, functional, nn, observers, ops, qat, search
from halfbyte._extension import (
    __version__,
    available_capabilities,
    cpu_capability,
)
from halfbyte.algorithms import AWQ, GPTQ, MSE, RTN, SmoothQuant
from halfbyte.compare import CompareReport, compare
from halfbyte.doctor import Doctor, doctor
from halfbyte.errors import FallbackError, FallbackWarning, FileFormatError, QuantizationError, VerificationError
from halfbyte.fallback import Fallback
from halfbyte.formats import (
    CodebookFormat,
    FloatFormat,
    Format,
    Granularity,
    IntFormat,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
)
from halfbyte.fusion import FusionReport, fuse_
from halfbyte.io import load_, save
from halfbyte.kernel_info import KernelInfo, kernel_info
from halfbyte.lowering import LoweredModel, LoweringReport, lower
from halfbyte.parts import register_module
from halfbyte.plan import Plan, PlanRow, Work
from halfbyte.planning import plan
from halfbyte.qat.prepare import prepare_qat_
from halfbyte.recipe import Recipe
from halfbyte.report import ModuleReport, Report
from halfbyte.schemes import (
    Scheme,
    bf16,
    codebook_weight_only,
    fp4_weight_only,
    fp16,
    int4_int8_dynamic,
    int4_int8_static,
    int4_weight_only,
    int8_attention,
    int8_dynamic,
    int8_static,
    int8_weight_only,
    int_static,
    int_weight_only,
    nf4_weight_only,
    ternary_weight_only,
)
from halfbyte.search import Allocation, SensitivityTable, measure_sensitivity
from halfbyte.streaming import quantize_checkpoint, without_weights
from halfbyte.verification import VerifyReport
from halfbyte.verify import verify
from halfbyte.workflow import calibrate, convert_, prepare_, quantize_

__all__ = [
    "AWQ",
    "GPTQ",
    "MSE",
    "RTN",
    "Allocation",
    "CodebookFormat",
    "CompareReport",
    "Doctor",
    "Fallback",
    "FallbackError",
    "FallbackWarning",
    "FileFormatError",
    "FloatFormat",
    "Format",
    "FusionReport",
    "Granularity",
    "IntFormat",
    "KernelInfo",
    "LoweredModel",
    "LoweringReport",
    "ModuleReport",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Plan",
    "PlanRow",
    "QuantizationError",
    "Recipe",
    "Report",
    "Scheme",
    "SensitivityTable",
    "SmoothQuant",
    "VerificationError",
    "VerifyReport",
    "Work",
    "__version__",
    "algorithms",
    "available_capabilities",
    "bf16",
    "calibrate",
    "codebook_weight_only",
    "compare",
    "convert_",
    "cpu_capability",
    "doctor",
    "formats",
    "fp4_weight_only",
    "fp16",
    "functional",
    "fuse_",
    "int4_int8_dynamic",
    "int4_int8_static",
    "int4_weight_only",
    "int8_attention",
    "int8_dynamic",
    "int8_static",
    "int8_weight_only",
    "int_static",
    "int_weight_only",
    "kernel_info",
    "load_",
    "lower",
    "measure_sensitivity",
    "nf4_weight_only",
    "nn",
    "observers",
    "ops",
    "plan",
    "prepare_",
    "prepare_qat_",
    "qat",
    "quantize_",
    "quantize_checkpoint",
    "register_module",
    "save",
    "search",
    "ternary_weight_only",
    "verify",
    "without_weights",
]
