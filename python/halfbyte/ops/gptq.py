"""Hessians of layer inputs, and rounding with error feedback (GPTQ, Frantar et al. 2023, arXiv:2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.checks import FLOAT_DTYPES, check_bits, check_codebook_entries, check_float, check_group_size

__all__ = ["cross_hessian_update_", "gptq_polish", "gptq_round", "hessian_matrix", "hessian_tiles", "hessian_update_"]

_PANEL = 48  # kPanelWidth of gptq.h

_hessian_update_ = torch.ops.halfbyte.hessian_update_.default
_hessian_matrix = torch.ops.halfbyte.hessian_matrix.default
_cross_hessian_update_ = torch.ops.halfbyte.cross_hessian_update_.default
_gptq_round = torch.ops.halfbyte.gptq_round.default
_gptq_polish = torch.ops.halfbyte.gptq_polish.default


def hessian_tiles(features: int) -> Tensor:
    """A sum of `x x^T` before its first token, for `hessian_update_`.

    Only the lower triangle is kept, as 48 by 48 tiles in float64 (`gptq.h` has the order): the bytes of one full float32
    matrix. Two of them may be added, and all-reduced.

    Args:
        features: Inputs of the layer.

    Returns:
        Zeros, `[tiles, 48, 48]` float64.

    Example:
        >>> import halfbyte as hb
        >>> hb.ops.hessian_tiles(100).shape
        torch.Size([6, 48, 48])
    """
    if features < 1:
        raise ValueError(f"features={features} is not positive")
    panels = -(-features // _PANEL)
    return torch.zeros(panels * (panels + 1) // 2, _PANEL, _PANEL, dtype=torch.float64)


def hessian_update_(tiles: Tensor, x: Tensor) -> None:
    """Adds the outer products of some tokens: a symmetric rank-k update, half the work of `H.addmm_(x.T, x)`.

    Products are summed in float32 over 4096 tokens at most and then in float64, so millions of tokens do not drift. The
    result does not depend on the number of threads; the levels from avx2 up give equal bits, the scalar one
    has no fused multiply-add and differs in the last bits.

    Args:
        tiles: What `hessian_tiles(I)` gives, with what was added before.
        x: `[N, I]`, one row a token; float32, bfloat16 or float16.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> tiles, x = hb.ops.hessian_tiles(3), torch.tensor([[1.0, 2.0, 0.0]])
        >>> hb.ops.hessian_update_(tiles, x)
        >>> hb.ops.hessian_matrix(tiles, 3)[1]
        tensor([2., 4., 0.], dtype=torch.float64)
    """
    check_float(x, "x")
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; use [tokens, features] (x.flatten(0, -2) makes it)")
    _check_tiles(tiles, x.shape[1])
    _hessian_update_(tiles, x.detach())


def cross_hessian_update_(matrix: Tensor, y: Tensor, x: Tensor) -> None:
    """Adds `y^T x` of some tokens, summed as `hessian_update_` does.

    Args:
        matrix: `[I, I]` float64, contiguous.
        y, x: `[N, I]`, one row a token; both float32, bfloat16 or float16.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> matrix = torch.zeros(2, 2, dtype=torch.float64)
        >>> hb.ops.cross_hessian_update_(matrix, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]))
        >>> matrix
        tensor([[3., 0.],
                [6., 0.]], dtype=torch.float64)
    """
    check_float(x, "x")
    if y.dtype is not x.dtype:
        raise TypeError(f"y has dtype {y.dtype} and x {x.dtype}; use one dtype for both")
    if x.dim() != 2 or y.shape != x.shape:
        raise ValueError(f"y has shape {tuple(y.shape)} and x {tuple(x.shape)}; use [tokens, features] for both")
    if matrix.dtype is not torch.float64:
        raise TypeError(f"matrix has dtype {matrix.dtype}; use float64")
    if matrix.shape != (x.shape[1], x.shape[1]) or not matrix.is_contiguous():
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; use a contiguous one, {(x.shape[1], x.shape[1])}")
    _cross_hessian_update_(matrix, y.detach(), x.detach())


def hessian_matrix(tiles: Tensor, features: int) -> Tensor:
    """The sum as a full matrix.

    Args:
        tiles: What `hessian_update_` added to.
        features: Inputs of the layer.

    Returns:
        `[features, features]` float64, symmetric.

    Raises:
        TypeError: Wrong dtype.
        ValueError: `tiles` does not belong to that many features.

    Example:
        >>> import halfbyte as hb
        >>> hb.ops.hessian_matrix(hb.ops.hessian_tiles(2), 2).shape
        torch.Size([2, 2])
    """
    _check_tiles(tiles, features)
    matrix: Tensor = _hessian_matrix(tiles, features)
    return matrix


def gptq_round(
    weight: Tensor,
    factor: Tensor,
    *,
    bits: int,
    symmetric: bool,
    narrow_range: bool = False,
    group_size: int,
    order: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    importance: Tensor | None = None,
    grid: int = 80,
    max_shrink: float = 0.8,
    scale_dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounds a weight column by column; each column makes up for the errors of those before it.

    Equal to textbook GPTQ. With `factor` the upper triangular R of the reversed Cholesky factorisation `H = R R^T`, the
    feedback needs no inverse of H: `R^-1` is the textbook's upper factor of `H^-1`.

    Args:
        weight: `[O, I]`, finite.
        factor: `[I, I]` float32, upper triangular with a positive diagonal, rows and columns in the order of `order`.
        bits: 1 to 8; one symmetric bit is binary, `w = ±scale`.
        symmetric: Signed codes without zero point.
        narrow_range: Symmetric only: leaves out the lowest code.
        group_size: Inputs that share a scale; divides I.
        order: `[I]`, the columns in the order in which to round them; None: as they are.
        scale, zero_point: `[O, I / group_size]`, given scales and zero points (static groups). None: each group's are
            searched for when its first column comes up, on the weights as they are by then; `order` must then keep the
            columns of a group together.
        importance: `[I]`, weights of squared errors in that search; None: all ones.
        grid, max_shrink: Of the search, as in `search_qparams`.
        scale_dtype: What the scales will be stored as; they are rounded to it.
        codebook: `[n]` float32, increasing values to round to, as in `search_qparams`; codes are uint8 then.

    Returns:
        `(codes, scale, zero_point, loss)`: `[O, I]` int8 for symmetric formats, else uint8 (binary: uint8, 0 is -scale);
        `[O, I / group_size]` in `scale_dtype`; the same in int32; `[O]` float32, `e H e^T` of each row's error e.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes or options do not fit, or `order` is not a permutation.

    Example:
        >>> import torch, halfbyte as hb
        >>> codes, scale, zero_point, loss = hb.ops.gptq_round(
        ...     torch.randn(4, 32), torch.eye(32), bits=4, symmetric=False, group_size=16
        ... )
        >>> codes.shape, scale.shape
        (torch.Size([4, 32]), torch.Size([4, 2]))
    """
    check_float(weight, "weight")
    check_bits(bits)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; use a matrix [outputs, inputs]")
    inputs = weight.shape[1]
    check_group_size(group_size, inputs, "weight")
    shape = (weight.shape[0], inputs // group_size)
    if narrow_range and (not symmetric or bits == 1):
        raise ValueError("narrow_range=True needs symmetric=True and at least 2 bits")
    if factor.dtype is not torch.float32:
        raise TypeError(f"factor has dtype {factor.dtype}; use float32")
    if factor.shape != (inputs, inputs):
        raise ValueError(f"factor has shape {tuple(factor.shape)}; the weight needs {(inputs, inputs)}")
    if (scale is None) != (zero_point is None):
        raise ValueError("scale and zero_point go together; give both or none")
    if scale is not None and zero_point is not None:
        check_float(scale, "scale")
        if scale.shape != shape or zero_point.shape != shape:
            raise ValueError(
                f"scale has shape {tuple(scale.shape)} and zero_point {tuple(zero_point.shape)}; use {shape}"
            )
        scale, zero_point = scale.detach().float(), zero_point.to(torch.int32)
    if importance is not None:
        check_float(importance, "importance")
        if importance.shape != (inputs,):
            raise ValueError(f"importance has shape {tuple(importance.shape)}; use {(inputs,)}")
        importance = importance.detach().float()
    if grid < 1 or not 0 <= max_shrink < 1:
        raise ValueError(f"grid={grid}, max_shrink={max_shrink}: use grid >= 1 and max_shrink in [0, 1)")
    if scale_dtype not in FLOAT_DTYPES:
        raise TypeError(f"scale_dtype={scale_dtype} is not supported; use float32, bfloat16 or float16")
    check_codebook_entries(codebook)
    order = _checked_order(order, inputs, group_size, apart=scale is not None)
    codes, found_scale, found_zero, loss = _gptq_round(
        weight.detach(), factor, order, scale, zero_point, importance, bits, symmetric, narrow_range, group_size, grid,
        max_shrink, scale_dtype, codebook,
    )  # fmt: skip
    if symmetric and bits > 1 and codebook is None:
        codes = codes.view(torch.int8)
    return codes, found_scale.to(scale_dtype), found_zero, loss


def gptq_polish(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    bits: int,
    symmetric: bool,
    narrow_range: bool = False,
    group_size: int,
    sweeps: int = 4,
    refit: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lowers `(w - w_hat) H (w - w_hat)^T` of rounded rows by coordinate descent.

    A sweep gives every column in turn the best code given all others, and then every group the scale that is best for its
    codes and, if that is better, a zero point one higher or lower. Nothing is accepted that makes the error larger. Ends when
    a sweep changes nothing. (QuantEase, Behdin et al. 2023, arXiv:2309.01885, with scales.)

    Args:
        weight: `[O, I]`, finite: the target.
        hessian: `[I, I]` float32, symmetric, with a positive diagonal.
        codes, scale, zero_point: As `gptq_round` gives them; scales are kept as `scale.dtype` stores them.
        bits, symmetric, narrow_range, group_size: As in `gptq_round`.
        sweeps: At most.
        refit: Change scales and zero points too.

    Returns:
        New `(codes, scale, zero_point)`.

    Raises:
        TypeError: Wrong dtype.
        ValueError: Shapes or options do not fit.

    Example:
        >>> import torch, halfbyte as hb
        >>> weight, h = torch.randn(4, 32), torch.eye(32)
        >>> options = {"bits": 3, "symmetric": False, "group_size": 16}
        >>> rounded = hb.ops.gptq_round(weight, h, **options)[:3]
        >>> codes, scale, zero_point = hb.ops.gptq_polish(weight, h, *rounded, **options)
    """
    check_float(weight, "weight")
    check_float(scale, "scale")
    check_bits(bits)
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; use a matrix [outputs, inputs]")
    inputs = weight.shape[1]
    check_group_size(group_size, inputs, "weight")
    if narrow_range and (not symmetric or bits == 1):
        raise ValueError("narrow_range=True needs symmetric=True and at least 2 bits")
    if hessian.dtype is not torch.float32:
        raise TypeError(f"hessian has dtype {hessian.dtype}; use float32")
    if hessian.shape != (inputs, inputs):
        raise ValueError(f"hessian has shape {tuple(hessian.shape)}; the weight needs {(inputs, inputs)}")
    wanted = torch.int8 if symmetric and bits > 1 else torch.uint8
    if codes.dtype is not wanted:
        raise TypeError(f"codes has dtype {codes.dtype}; use {wanted}")
    shape = (weight.shape[0], inputs // group_size)
    if codes.shape != weight.shape or scale.shape != shape or zero_point.shape != shape:
        raise ValueError(
            f"codes has shape {tuple(codes.shape)}, scale {tuple(scale.shape)} and zero_point {tuple(zero_point.shape)}; "
            f"use {tuple(weight.shape)}, {shape} and {shape}"
        )
    if sweeps < 0:
        raise ValueError(f"sweeps={sweeps} is negative")
    new_codes, new_scale, new_zero = _gptq_polish(
        weight.detach(), hessian, codes.view(torch.uint8), scale.detach().float(), zero_point.to(torch.int32), bits,
        symmetric, narrow_range, group_size, sweeps, refit, scale.dtype,
    )  # fmt: skip
    return new_codes.view(wanted), new_scale.to(scale.dtype), new_zero


def _checked_order(order: Tensor | None, inputs: int, group_size: int, *, apart: bool) -> Tensor:
    if order is None:
        return torch.arange(inputs, dtype=torch.int32)
    if order.shape != (inputs,) or not torch.equal(order.sort().values.long(), torch.arange(inputs)):
        raise ValueError(f"order is not a permutation of the {inputs} columns")
    groups = (order // group_size).view(-1, group_size)
    if not apart and not bool((groups == groups[:, :1]).all()):
        raise ValueError("order takes groups apart, whose scales must then be given: pass scale and zero_point")
    return order.to(torch.int32)


def _check_tiles(tiles: Tensor, features: int) -> None:
    if tiles.dtype is not torch.float64:
        raise TypeError(f"tiles has dtype {tiles.dtype}; hessian_tiles({features}) makes it")
    panels = -(-features // _PANEL)
    if features < 1 or tiles.shape != (panels * (panels + 1) // 2, _PANEL, _PANEL) or not tiles.is_contiguous():
        raise ValueError(f"tiles has shape {tuple(tiles.shape)}; hessian_tiles({features}) makes it")


def _hessian_update_fake(tiles: Tensor, x: Tensor) -> None:
    return None


def _hessian_matrix_fake(tiles: Tensor, features: int) -> Tensor:
    return tiles.new_empty(features, features)


def _gptq_round_fake(
    weight: Tensor,
    factor: Tensor,
    order: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    importance: Tensor | None,
    bits: int,
    symmetric: bool,
    narrow_range: bool,
    group_size: int,
    grid: int,
    max_shrink: float,
    scale_dtype: torch.dtype,
    codebook: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (weight.shape[0], weight.shape[1] // group_size)
    return (
        weight.new_empty(weight.shape, dtype=torch.uint8),
        weight.new_empty(shape, dtype=torch.float32),
        weight.new_empty(shape, dtype=torch.int32),
        weight.new_empty(weight.shape[:1], dtype=torch.float32),
    )


def _cross_hessian_update_fake(matrix: Tensor, y: Tensor, x: Tensor) -> None:
    return None


def _gptq_polish_fake(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    symmetric: bool,
    narrow_range: bool,
    group_size: int,
    sweeps: int,
    refit: bool,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return codes.new_empty(codes.shape), scale.new_empty(scale.shape), zero_point.new_empty(zero_point.shape)


torch.library.register_fake("halfbyte::hessian_update_", _hessian_update_fake)
torch.library.register_fake("halfbyte::cross_hessian_update_", _cross_hessian_update_fake)
torch.library.register_fake("halfbyte::gptq_polish", _gptq_polish_fake)
torch.library.register_fake("halfbyte::hessian_matrix", _hessian_matrix_fake)
torch.library.register_fake("halfbyte::gptq_round", _gptq_round_fake)
