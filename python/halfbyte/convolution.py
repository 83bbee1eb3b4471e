"""Convolutions as matrix products: sizes, the weight as a matrix, the inputs as its rows; in plain torch.

A weight `[O, C/groups, *kernel]` is the matrix `[O, I]`, `I = taps * C/groups`, inputs in the order (tap, channel). That of a
transposed convolution, `[C, O/groups, *kernel]`, is the matrix of the same shape: row `o` holds what makes output `o`. Packing,
scales, groups of inputs and rounding algorithms know this matrix and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ConvModule = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
CONV_TYPES: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvGeometry:
    """Everything about a convolution but its numbers. Tuples have one entry a spatial dimension.

    Attributes:
        in_channels, out_channels, groups: As in `nn.Conv2d`.
        kernel_size, stride, dilation: As in `nn.Conv2d`.
        padding: Before the first and after the last input, all befores first: (top, left, bottom, right).
        output_padding: Of transposed convolutions, else zeros.
        transposed: Whether it is the adjoint of a convolution, as `nn.ConvTranspose2d`.
        padding_mode: What the padding holds: "zeros", "reflect", "replicate" or "circular".
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        dims = len(self.kernel_size)
        lists = {"stride": self.stride, "dilation": self.dilation, "output_padding": self.output_padding}
        for name, values in lists.items():
            if len(values) != dims:
                raise ValueError(
                    f"{name}={values} has {len(values)} entries; kernel_size={self.kernel_size} needs {dims}"
                )
        if not 1 <= dims <= 3 or len(self.padding) != 2 * dims:
            raise ValueError(f"padding={self.padding} does not have two entries for each of 1 to 3 dimensions")
        if min((*self.kernel_size, *self.stride, *self.dilation, self.groups)) < 1 or min(self.padding) < 0:
            raise ValueError(f"{self} has a size that is not positive, or negative padding")
        for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if channels % self.groups:
                raise ValueError(f"groups={self.groups} does not divide {name}={channels}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={self.padding_mode!r} is unknown; use one of {', '.join(PADDING_MODES)}")

    @staticmethod
    def of(module: ConvModule) -> ConvGeometry:
        """Of one of torch's convolution modules."""
        dims = len(module.kernel_size)
        if module.padding == "same":
            totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            padding = (*(t // 2 for t in totals), *(t - t // 2 for t in totals))
        elif isinstance(module.padding, str):  # "valid"
            padding = (0,) * (2 * dims)
        else:
            padding = (*module.padding, *module.padding)
        return ConvGeometry(
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=padding,
            dilation=tuple(module.dilation),
            output_padding=tuple(module.output_padding),
            groups=module.groups,
            transposed=module.transposed,
            padding_mode=module.padding_mode,
        )

    @property
    def dims(self) -> int:
        """Spatial dimensions: 1, 2 or 3."""
        return len(self.kernel_size)

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)` of the weight's matrix."""
        return self.out_channels, prod(self.kernel_size) * (self.in_channels // self.groups)

    @property
    def float_type(self) -> type[nn.Module]:
        """torch's class of convolutions of this kind."""
        return CONV_TYPES[self.dims - 1 + (3 if self.transposed else 0)]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight of torch's module."""
        if self.transposed:
            return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def padding_before(self) -> tuple[int, ...]:
        """Padding before the first input of each dimension."""
        return self.padding[: self.dims]

    @property
    def padding_after(self) -> tuple[int, ...]:
        """Padding after the last input of each dimension."""
        return self.padding[self.dims :]

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Spatial sizes of the output for those of the input."""
        result = []
        for d, n in enumerate(size):
            reach = self.dilation[d] * (self.kernel_size[d] - 1) + 1
            padding = self.padding_before[d] + self.padding_after[d]
            if self.transposed:
                result.append((n - 1) * self.stride[d] - padding + reach + self.output_padding[d])
            else:
                result.append((n + padding - reach) // self.stride[d] + 1)
        return tuple(result)

    def weight_matrix(self, weight: Tensor) -> Tensor:
        """`[O, I]` from a module's weight."""
        if self.transposed:  # [groups, C/groups, O/groups, *kernel]
            weight = self._swap_in_groups(weight)
        return weight.movedim(1, -1).reshape(self.shape)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """A module's weight from `[O, I]`."""
        channels = self.in_channels // self.groups
        weight = matrix.reshape(self.out_channels, *self.kernel_size, channels).movedim(-1, 1)
        if self.transposed:
            weight = self._swap_in_groups(weight)
        return weight.contiguous()

    def _swap_in_groups(self, weight: Tensor) -> Tensor:
        """Outputs before inputs, or back, in every group of a transposed convolution's weight."""
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1)

    def padded(self, x: Tensor) -> tuple[Tensor, ConvGeometry]:
        """The input with all padding but symmetric zeros in place, and what is left to do."""
        before, after = self.padding_before, self.padding_after
        if self.padding_mode == "zeros" and before == after:
            return x, self
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        pairs = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
        return F.pad(x, pairs, mode=mode), replace(self, padding=(0,) * (2 * self.dims), padding_mode="zeros")

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """torch's own convolution of `x` `[N, C, ...]`; of any dtype that torch takes."""
        x, left = self.padded(x)
        return torch.convolution(
            x,
            weight,
            bias,
            left.stride,
            left.padding_before,
            left.dilation,
            left.transposed,
            left.output_padding,
            left.groups,
        )

    def rows(self, x: Tensor) -> Tensor:
        """What each output is the product of: `[groups, N * output pixels, I]`, inputs in the order of the weight's matrix.

        Taps outside the input read 0.
        """
        x, left = self.padded(x)
        taps, channels = prod(self.kernel_size), x.shape[1]
        if self.dims <= 2 and not self.transposed:
            two = (lambda values: (1, *values)) if self.dims == 1 else (lambda values: values)
            zero = (lambda values: (0, *values)) if self.dims == 1 else (lambda values: values)
            image = x.unsqueeze(2) if self.dims == 1 else x
            columns = F.unfold(
                image, two(left.kernel_size), two(left.dilation), zero(left.padding_before), two(left.stride)
            )
        else:  # every channel convolved with each unit kernel
            units = torch.eye(taps, dtype=x.dtype, device=x.device).view(taps, 1, *self.kernel_size)
            if self.transposed:
                units = units.transpose(0, 1)
            kernels = units.repeat(channels, *(1 for _ in units.shape[1:]))
            every = replace(left, in_channels=channels, out_channels=channels * taps, groups=channels)
            columns = every.convolve(x, kernels).flatten(2)
        columns = columns.reshape(x.shape[0], self.groups, channels // self.groups, taps, -1)
        return columns.permute(1, 0, 4, 3, 2).reshape(self.groups, -1, self.shape[1])

    def with_output_size(self, size: Sequence[int], output_size: Sequence[int]) -> ConvGeometry:
        """The geometry whose output padding gives `output_size` for inputs of `size`, as `nn.ConvTranspose2d` takes it.

        Raises:
            ValueError: no output padding does.
        """
        wanted = tuple(output_size)[-self.dims :]
        smallest = replace(self, output_padding=(0,) * self.dims).output_size(size)
        padding = tuple(w - s for w, s in zip(wanted, smallest, strict=False))
        if (
            not self.transposed
            or len(padding) != self.dims
            or not all(0 <= p < s for p, s in zip(padding, self.stride, strict=True))
        ):
            raise ValueError(f"output_size={tuple(output_size)} cannot come of an input of size {tuple(size)} ({self})")
        return replace(self, output_padding=padding)

    def description(self) -> str:
        """As torch's modules print themselves."""
        same = self.padding_before == self.padding_after
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        if any(self.padding):
            parts.append(f"padding={self.padding_before if same else self.padding}")
        if max(self.dilation) > 1:
            parts.append(f"dilation={self.dilation}")
        if any(self.output_padding):
            parts.append(f"output_padding={self.output_padding}")
        if self.groups > 1:
            parts.append(f"groups={self.groups}")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join(parts)

    def float_module(self, *, bias: bool) -> ConvModule:
        """torch's module of this geometry, on the meta device."""
        before, after = self.padding_before, self.padding_after
        common = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": before if before == after else "same",
            "dilation": self.dilation,
            "groups": self.groups,
            "bias": bias,
            "padding_mode": self.padding_mode,
            "device": "meta",
        }
        if self.transposed:
            common["output_padding"] = self.output_padding
        module = self.float_type(self.in_channels, self.out_channels, **common)
        assert isinstance(module, ConvModule)
        return module

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @staticmethod
    def from_dict(description: Mapping[str, object]) -> ConvGeometry:
        """The geometry that `to_dict` described.

        Raises:
            ValueError: unknown or missing keys, or values that make no convolution.
        """
        names = {field.name for field in fields(ConvGeometry)}
        if set(description) != names:
            raise ValueError(f"a convolution has keys {sorted(description)}, expected {sorted(names)}")
        values: dict[str, object] = {}
        for name, value in description.items():
            of_field = tuple(value) if isinstance(value, list) else value
            integers = (
                of_field if isinstance(of_field, tuple) else () if isinstance(of_field, str | bool) else (of_field,)
            )
            if any(isinstance(n, bool) or not isinstance(n, int) for n in integers):
                raise ValueError(f"a convolution has {name}={value!r}")
            values[name] = of_field
        kinds = {"transposed": bool, "padding_mode": str, "in_channels": int, "out_channels": int, "groups": int}
        if any(type(values[name]) is not kinds.get(name, tuple) for name in names):
            raise ValueError(f"not a convolution: {dict(description)}")
        return ConvGeometry(**values)  # type: ignore[arg-type]
