"""Random packed weights for the tests of the matrix operators, with the float64 matrices that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import halfbyte as hb


@dataclass(frozen=True)
class RandomWeight:
    """What the operators take, and `dense`, the float64 `[O, I]` they mean."""

    qweight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    codes: Tensor
    dense: Tensor
    bits: int
    group_size: int

    @property
    def kwargs(self) -> dict[str, int]:
        return {"bits": self.bits, "out_features": self.dense.shape[0], "group_size": self.group_size}


def random_weight(
    out_features: int,
    in_features: int,
    bits: int,
    *,
    group_size: int | None = None,
    zero_points: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RandomWeight:
    """Codes of the whole range, scales near 0.01."""
    generator = torch.Generator().manual_seed(seed)
    group_size = group_size or max(in_features, 1)
    groups = in_features // group_size
    u = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(groups, out_features, generator=generator) * 0.01 + 0.005).to(scale_dtype)
    zero_point = None
    if zero_points:
        zero_point = torch.randint(0, 2**bits, (groups, out_features), generator=generator, dtype=torch.uint8)
        centered = u.double() - _spread(zero_point, group_size)
        codes = u
    elif bits == 1:
        centered = u.double() * 2 - 1
        codes = u
    else:
        centered = u.double() - 2 ** (bits - 1)
        codes = centered.to(torch.int8)
    dense = centered * _spread(scale, group_size)
    qweight = hb.ops.pack(codes, bits, layout="tiles", group_size=group_size)
    return RandomWeight(qweight, scale, zero_point, codes, dense, bits, group_size)


def assert_accurate(
    y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None, *, tolerance: float = 1e-6
) -> None:
    """`y` is `x denseᵀ + bias` in float64, up to `tolerance` of the sum of the magnitudes that are added up."""
    exact = x.double() @ dense.double().t()
    magnitude = x.double().abs() @ dense.double().abs().t()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert (y.double() - exact).abs().le(tolerance * magnitude + 1e-6).all()


def _spread(qparam: Tensor, group_size: int) -> Tensor:
    """`[G, O]` to float64 `[O, I]`."""
    return qparam.t().double().repeat_interleave(group_size, dim=1)
