"""Mixtures of widths for GPTQ at a given number of bits per weight, found by the bit search on calibration text alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

import halfbyte as hb

KEPT_IN_FLOAT: Mapping[str, hb.Scheme | None] = {"model.embed_tokens": None, "lm_head": None}
SCHEMES = [
    *(hb.int_weight_only(bits, 64) for bits in (2, 3, 4, 5)),
    *(hb.int_weight_only(bits, 64, symmetric=True) for bits in (3, 4)),
    *(hb.int_weight_only(bits, 32) for bits in (2, 3, 4)),
]


def sensitivities(model: nn.Module, windows: Sequence[Tensor], cache: Path | None) -> hb.SensitivityTable:
    """What each scheme costs at each layer, rounded with MSE scales, around the middle one everywhere else."""
    data = [{"input_ids": window, "use_cache": False} for window in windows]
    return hb.measure_sensitivity(model, data, SCHEMES, around="quantized", cache=cache, progress=False)


def mixture(table: hb.SensitivityTable, weights: int, bits_per_weight: float) -> hb.Recipe:
    """The best mixture of at most that many bits over `weights` weights, all that is stored counted."""
    in_float = table.bytes_of({})
    rest = in_float - 4 * weights
    return table.allocate(max_bytes=rest + int(bits_per_weight * weights / 8), pins=KEPT_IN_FLOAT)
