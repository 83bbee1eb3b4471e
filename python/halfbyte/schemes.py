"""Schemes: what one module gets. Small functions give the ones people use; `Scheme` makes any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from halfbyte.formats import (
    FP4_VALUES,
    NF4_VALUES,
    CodebookFormat,
    FloatFormat,
    Format,
    Granularity,
    IntFormat,
    PerAxis,
    PerGroup,
    PerTensor,
    PerToken,
    format_from_dict,
)
from halfbyte.observers import MSE, Observer

_INT8_PER_TOKEN = {
    symmetric: IntFormat(bits=8, symmetric=symmetric, granularity=PerToken(), narrow_range=symmetric)
    for symmetric in (False, True)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A weight format and, for integer products, an activation format.

    Args:
        weight: Format of the weights.
        activation: Format of the inputs: per token, found at run time, or per tensor, found in calibration (*static*). None
            keeps them in floating point.
        observer: Finds the range of static activations; a prototype that has seen nothing. Not part of what the module
            computes: files do not hold it, and schemes that differ in it alone are equal.
        attention: Of the projections of `nn.MultiheadAttention`: its scores and its sum over values are INT8 products too, with
            scales found at run time (`hb.int8_attention`).

    Raises:
        ValueError: a combination that no kernel computes.
    """

    weight: Format
    activation: IntFormat | None = None
    observer: Observer | None = field(default=None, compare=False)
    attention: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weight, IntFormat | CodebookFormat):
            granularity = self.weight.granularity
            if not (
                isinstance(granularity, PerGroup)
                or granularity == PerAxis(0)
                or (granularity == PerTensor() and isinstance(self.weight, IntFormat))
            ):
                raise ValueError(
                    f"weights cannot be quantized {granularity}; use PerAxis(0), PerGroup(group_size) or, for integers, "
                    "PerTensor()"
                )
        if self.activation is not None and not isinstance(self.weight, IntFormat):
            raise ValueError(f"integer activations need integer weights, not {self.weight}")
        if (
            self.activation is not None
            and self.activation not in _INT8_PER_TOKEN.values()
            and not _has_static_kernel(self.activation)
        ):
            raise ValueError(
                f"activations in {self.activation} have no kernel; use 8 bits per token, or 2 to 8 bits per tensor"
            )
        if self.observer is not None and (not isinstance(self.observer, Observer) or self.observer.axis is not None):
            raise ValueError(f"observer={self.observer!r} does not observe whole tensors; use e.g. hb.observers.MSE()")

    @property
    def static(self) -> bool:
        """Whether scales of activations are found in calibration."""
        return self.activation is not None and self.activation.granularity == PerTensor()

    def __str__(self) -> str:
        return self._weight_and_activation() + (", int8 scores and values" if self.attention else "")

    def _weight_and_activation(self) -> str:
        if self.activation is None:
            return f"{self.weight}{'' if isinstance(self.weight, FloatFormat) else ', float activations'}"
        if not self.static:
            return f"{self.weight}, {'int8' if self.activation.symmetric else 'uint8'} activations"
        return (
            f"{self.weight}, static {'int' if self.activation.symmetric else 'uint'}{self.activation.bits} activations"
        )

    @property
    def asymmetric_rows(self) -> bool:
        """Whether a scale and a zero point of activations are found for each token at run time."""
        return self.activation is not None and not self.static and not self.activation.symmetric

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description; `Scheme.from_dict` reads it back."""
        activation = None if self.activation is None else self.activation.to_dict()
        fields: dict[str, object] = {"weight": self.weight.to_dict(), "activation": activation}
        return {**fields, "attention": True} if self.attention else fields

    @staticmethod
    def from_dict(fields: Mapping[str, object]) -> Scheme:
        """The scheme that `to_dict` described.

        Raises:
            ValueError: unknown or missing keys, or formats that this version does not know.
        """
        if set(fields) - {"attention"} != {"weight", "activation"}:
            raise ValueError(f"scheme has keys {sorted(fields)}, expected ['activation', 'weight']")
        weight, activation, attention = fields["weight"], fields["activation"], fields.get("attention", False)
        if not isinstance(attention, bool):
            raise ValueError(f"attention={attention!r} of a scheme is neither true nor false")
        if not isinstance(weight, Mapping) or not (activation is None or isinstance(activation, Mapping)):
            raise ValueError(f"not a scheme: {dict(fields)}")
        activation_format = None if activation is None else format_from_dict(activation)
        if not (activation_format is None or isinstance(activation_format, IntFormat)):
            raise ValueError(f"activations cannot be {activation_format}")
        return Scheme(weight=format_from_dict(weight), activation=activation_format, attention=attention)


def int8_dynamic(*, symmetric: bool = True) -> Scheme:
    """INT8 weights per output channel, INT8 activations per token: integer products, scales found at run time.

    Args:
        symmetric: Activations without a zero point; False: unsigned with one for each token, which uses all codes where inputs
            are one-sided, such as those that follow a ReLU, and costs a pass over the outputs. Convolutions have no such
            activations: theirs stay symmetric, which the plan says.

    Example:
        >>> str(int8_dynamic()), str(int8_dynamic(symmetric=False))
        ('int8 per channel, int8 activations', 'int8 per channel, uint8 activations')
    """
    return Scheme(weight=_int8_weight(PerAxis(0)), activation=_INT8_PER_TOKEN[symmetric])


def int8_weight_only() -> Scheme:
    """INT8 weights per output channel; activations stay in floating point."""
    return Scheme(weight=_int8_weight(PerAxis(0)))


def int4_weight_only(group_size: int = 128, symmetric: bool = False) -> Scheme:
    """4-bit weights in groups of `group_size` inputs; activations stay in floating point.

    Args:
        group_size: Inputs that share a scale (float16) and, unless symmetric, a zero point (8 bits).
        symmetric: No zero point.
    """
    return Scheme(weight=_low_bit_weight(4, group_size, symmetric))


def int_weight_only(bits: int, group_size: int | None = None, symmetric: bool | None = None) -> Scheme:
    """Weights of 1 to 8 bits; activations stay in floating point.

    Args:
        bits: 1 to 8. One bit is binary: ±scale.
        group_size: Inputs that share a scale; None for one scale per output channel.
        symmetric: No zero points; None takes symmetric at 8 bits and 1 bit, asymmetric between.

    Example:
        >>> str(int_weight_only(3, group_size=32))
        'int3 group 32 asymmetric, float activations'
    """
    if symmetric is None:
        symmetric = bits in (1, 8)
    return Scheme(weight=_low_bit_weight(bits, group_size, symmetric))


def ternary_weight_only(group_size: int | None = None) -> Scheme:
    """Weights in {-scale, 0, +scale}, stored in 2 bits; needs training to be useful below a few billion parameters."""
    granularity, scale_dtype = _granularity(group_size)
    return Scheme(
        weight=IntFormat(bits=2, symmetric=True, granularity=granularity, narrow_range=True, scale_dtype=scale_dtype)
    )


def nf4_weight_only(group_size: int | None = 64) -> Scheme:
    """NormalFloat weights (QLoRA, arXiv:2305.14314): 4-bit codes of 16 quantiles of a normal distribution.

    Args:
        group_size: Inputs that share a scale (float16); None for one scale (float32) per output channel.

    Example:
        >>> str(nf4_weight_only())
        'nf4 group 64, float activations'
    """
    return codebook_weight_only(NF4_VALUES, group_size)


def fp4_weight_only(group_size: int | None = 32) -> Scheme:
    """4-bit floating-point weights, e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, times the scale of a group.

    Args:
        group_size: Inputs that share a scale (float16); None for one scale (float32) per output channel.
    """
    return codebook_weight_only(FP4_VALUES, group_size)


def codebook_weight_only(values: Sequence[float], group_size: int | None = 64) -> Scheme:
    """Weights from a codebook of one's own, times a scale; activations stay in floating point.

    The scale of a group is its largest magnitude over that of the values; `algorithms=[hb.MSE()]` searches for a better one.

    Args:
        values: 2 to 16 numbers in increasing order.
        group_size: Inputs that share a scale (float16); None for one scale (float32) per output channel.

    Example:
        >>> str(codebook_weight_only([-1, -0.5, -0.2, 0, 0.2, 0.5, 1], group_size=32))
        'codebook of 7 group 32, float activations'
    """
    granularity, scale_dtype = _granularity(group_size)
    return Scheme(weight=CodebookFormat(tuple(values), granularity, scale_dtype))


def int4_int8_dynamic(group_size: int = 128, symmetric: bool = False, *, symmetric_activations: bool = True) -> Scheme:
    """W4A8: 4-bit weights in groups, INT8 activations per token, integer products.

    Args:
        group_size: Inputs that share a scale (float16) and, unless symmetric, a zero point (8 bits).
        symmetric: Weights without a zero point.
        symmetric_activations: As `symmetric` of `int8_dynamic`.
    """
    weight = _low_bit_weight(4, group_size, symmetric)
    return Scheme(weight=weight, activation=_INT8_PER_TOKEN[symmetric_activations])


def int8_static(*, per_channel: bool = True, symmetric: bool = False, observer: Observer | None = None) -> Scheme:
    """INT8 weights and INT8 activations whose scales are found in calibration: integer products, nothing searched at run time.

    Needs calibration data.

    Args:
        per_channel: One weight scale per output channel; False: one for the whole weight.
        symmetric: Activations without a zero point; False: unsigned with one, which uses all codes for one-sided inputs.
        observer: How ranges of activations are found; default `hb.observers.MSE()`.

    Example:
        >>> str(int8_static())
        'int8 per channel, static uint8 activations'
    """
    weight = _int8_weight(PerAxis(0) if per_channel else PerTensor())
    return Scheme(weight=weight, activation=_static(8, symmetric), observer=MSE() if observer is None else observer)


def int4_int8_static(
    group_size: int | None = None, *, symmetric: bool = False, observer: Observer | None = None
) -> Scheme:
    """W4A8 with static activations: symmetric 4-bit weights, INT8 activations whose scales are found in calibration.

    Args:
        group_size: Inputs that share a weight scale; None: one for each output channel.
        symmetric, observer: As for `int8_static`.
    """
    observer = MSE() if observer is None else observer
    return Scheme(weight=_low_bit_weight(4, group_size, True), activation=_static(8, symmetric), observer=observer)


def int_static(
    weight_bits: int,
    activation_bits: int,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
    observer: Observer | None = None,
) -> Scheme:
    """Weights and activations of any width, activations with scales found in calibration or training.

    Activations of fewer bits than 8 take the INT8 kernels, whose inputs are clipped first: they cost accuracy and gain no speed
    here, and are for models that other hardware will run, or that are trained for them (`prepare_qat_`).

    Args:
        weight_bits: 1 to 8, symmetric.
        activation_bits: 2 to 8.
        group_size: Inputs that share a weight scale; None: one for each output channel.
        symmetric, observer: As for `int8_static`.

    Example:
        >>> str(int_static(4, 4))
        'int4 per channel, static uint4 activations'
    """
    observer = MSE() if observer is None else observer
    weight = _low_bit_weight(weight_bits, group_size, True)
    return Scheme(weight=weight, activation=_static(activation_bits, symmetric), observer=observer)


def int8_attention(scheme: Scheme) -> Scheme:
    """A scheme whose `nn.MultiheadAttention` modules compute scores and the sum over values as INT8 products, too.

    Queries, keys, values and attention weights get their scales at run time, one for each token. Other modules are quantized as
    by `scheme` itself.

    Args:
        scheme: What the projections get.

    Example:
        >>> model = nn.TransformerEncoderLayer(64, nhead=4, batch_first=True).eval()
        >>> plan = hb.plan(model, hb.int8_attention(hb.int8_dynamic()))
        >>> str(plan.rows[0].scheme)
        'int8 per channel, int8 activations, int8 scores and values'
    """
    return replace(scheme, attention=True)


def bf16() -> Scheme:
    """bfloat16 weights and products: half the bytes, no calibration, the range of float32."""
    return Scheme(weight=FloatFormat(dtype=torch.bfloat16))


def fp16() -> Scheme:
    """float16 weights and products: half the bytes, more precision than bfloat16, overflow past 65,504."""
    return Scheme(weight=FloatFormat(dtype=torch.float16))


def _static(bits: int, symmetric: bool) -> IntFormat:
    return IntFormat(bits=bits, symmetric=symmetric, granularity=PerTensor())


def _has_static_kernel(activation: IntFormat) -> bool:
    return activation.bits >= 2 and activation.granularity == PerTensor() and not activation.narrow_range


def _int8_weight(granularity: Granularity) -> IntFormat:
    return IntFormat(bits=8, symmetric=True, granularity=granularity, narrow_range=True)


def _granularity(group_size: int | None) -> tuple[Granularity, torch.dtype]:
    # A float16 scale a group costs 16/group_size bits a weight, half of float32's; per channel the scales are few.
    return (PerAxis(0), torch.float32) if group_size is None else (PerGroup(group_size), torch.float16)


def _low_bit_weight(bits: int, group_size: int | None, symmetric: bool) -> IntFormat:
    granularity, scale_dtype = _granularity(group_size)
    return IntFormat(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity,
        narrow_range=symmetric and bits == 8,
        scale_dtype=scale_dtype,
    )
