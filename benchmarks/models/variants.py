"""The quantization recipes that the benchmarks compare, by the name of their row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

import halfbyte as hb

__all__ = ["VARIANTS", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One row: a scheme, the rounding to use, and whether that rounding looks at calibration data."""

    scheme: Callable[[], hb.Scheme]
    algorithms: Callable[[], tuple[hb.algorithms.Rounding, ...]] = tuple
    needs_data: bool = False

    def quantize_(self, model: nn.Module, data: Iterable[Tensor], *, float_patterns: tuple[str, ...] = ()) -> hb.Report:
        """Quantizes `model` in place; modules that match `float_patterns` stay in float."""
        recipe = hb.Recipe(default=self.scheme(), overrides=dict.fromkeys(float_patterns))
        return hb.quantize_(
            model,
            recipe,
            data=data if self.needs_data else None,
            algorithms=self.algorithms(),
            progress=False,
            on_fallback="allow",
        )


def _rtn() -> tuple[hb.algorithms.Rounding, ...]:
    return (hb.algorithms.RTN(),)


def _gptq() -> tuple[hb.algorithms.Rounding, ...]:
    return (hb.GPTQ(),)


def _mse() -> tuple[hb.algorithms.Rounding, ...]:
    return (hb.algorithms.MSE(),)


GROUP = 32
VARIANTS: dict[str, Variant] = {
    "bf16": Variant(hb.bf16),
    "int8_weight_only": Variant(hb.int8_weight_only),
    "int8_dynamic": Variant(hb.int8_dynamic),
    "int4 g32, min/max": Variant(lambda: hb.int4_weight_only(group_size=GROUP), _rtn),
    "int4 g32, MSE": Variant(lambda: hb.int4_weight_only(group_size=GROUP), _mse),
    "int4 g32, MSE + data": Variant(lambda: hb.int4_weight_only(group_size=GROUP), _mse, needs_data=True),
    "int4 g32, GPTQ": Variant(lambda: hb.int4_weight_only(group_size=GROUP), _gptq, needs_data=True),
    "NF4 g32, absmax": Variant(lambda: hb.nf4_weight_only(group_size=GROUP), _rtn),
    "NF4 g32, MSE": Variant(lambda: hb.nf4_weight_only(group_size=GROUP), _mse),
    "NF4 g32, GPTQ": Variant(lambda: hb.nf4_weight_only(group_size=GROUP), _gptq, needs_data=True),
    "FP4 g32, MSE": Variant(lambda: hb.fp4_weight_only(group_size=GROUP), _mse),
    "W4A8 g32, MSE": Variant(lambda: hb.int4_int8_dynamic(group_size=GROUP), _mse),
    "int3 g32, MSE": Variant(lambda: hb.int_weight_only(3, group_size=GROUP), _mse),
    "int3 g32, GPTQ": Variant(lambda: hb.int_weight_only(3, group_size=GROUP), _gptq, needs_data=True),
    "int2 g32, MSE": Variant(lambda: hb.int_weight_only(2, group_size=GROUP), _mse),
    "int2 g32, GPTQ": Variant(lambda: hb.int_weight_only(2, group_size=GROUP), _gptq, needs_data=True),
    "ternary g32": Variant(lambda: hb.ternary_weight_only(group_size=GROUP)),
    "binary g32": Variant(lambda: hb.int_weight_only(1, group_size=GROUP)),
}
