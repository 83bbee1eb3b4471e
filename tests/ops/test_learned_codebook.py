"""fake_quantize_codebook and fake_quantize_binary: gradients against the papers' formulas in float64, at range edges too."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte import functional
from halfbyte._extension import available_capabilities, set_cpu_capability
from halfbyte.formats import FP4_VALUES, NF4_VALUES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEQ = (-0.75, -0.25, 0.25, 0.75)
TERNARY = (-2 / 3, 0.0, 2 / 3)
CASES = (
    ((1000,), 1000),
    ((3, 4097), 4097),
    ((8, 96), 32),
    ((8, 96), 8),
    ((40, 3), 1),
    ((2, 5, 77), 77),
    ((2, 9001), 9001),
)


def make_case(shape: tuple[int, ...], group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    groups = (*shape[:-1], shape[-1] // group_size)
    return x, torch.rand(groups, generator=generator) + 0.3, grad


def gradients(y: Tensor, x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    y.backward(grad)
    assert x.grad is not None and scale.grad is not None
    return x.grad, scale.grad


def ratios(x: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """In float32, as the contract has them."""
    return x.float() * functional.broadcast_qparams(1 / scale, x, axis=None, group_size=group_size)


def gathered(values: Tensor, scale: Tensor, group_size: int) -> Tensor:
    return values.reshape(*scale.shape, group_size).sum(-1)


def seq(
    x: Tensor, scale: Tensor, grad: Tensor, group_size: int, levels: float, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Stretched elastic quantization of arXiv:2502.02631 in float64: entries, and gradients of x and of the scale."""
    v = ratios(x, scale, group_size).double()
    entry = (
        torch.ceil(v.clamp(-0.99, 0.99) * levels - shift - 0.5) + shift
    ) / levels  # halves go down, as in codebooks
    inside = v.abs() <= torch.tensor(0.99).double()
    last = (levels - 0.5) / levels if shift else 1 / levels
    error = torch.where(inside, entry - v, v.sign() * last)
    return entry, torch.where(inside, grad, 0), gathered(grad.double() * error, scale, group_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, group_size", CASES)
@pytest.mark.parametrize("values, levels, shift", [(SEQ, 2.0, 0.5), (TERNARY, 1.5, 0.0)])
def test_two_bits_and_ternary_are_seq(
    values: tuple[float, ...], levels: float, shift: float, shape: tuple[int, ...], group_size: int, dtype: torch.dtype
) -> None:
    x, scale, grad = make_case(shape, group_size, dtype)
    leaves = x.requires_grad_(), scale.requires_grad_()
    y = hb.ops.fake_quantize_codebook(*leaves, values, group_size=group_size, clip=0.99, grad_factor=0.5)
    found = gradients(y, *leaves, grad)
    with torch.no_grad():
        entry, grad_x, grad_scale = seq(x, scale, grad, group_size, levels, shift)
        entries = torch.tensor(values)
        codes = functional.quantize_codebook(x, scale, entries, group_size=group_size)
        assert torch.allclose(entries[codes.long()].double(), entry, atol=1e-6)
        expected = functional.dequantize_codebook(codes, scale, entries, group_size=group_size)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(found[0], grad_x)
    torch.testing.assert_close(found[1], 0.5 * grad_scale.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("values", [NF4_VALUES, FP4_VALUES, (-1.0, 2.0)])
def test_any_codebook_passes_half_a_step_past_its_ends(values: tuple[float, ...]) -> None:
    x, scale, grad = make_case((6, 64), 32, torch.float32)
    x *= 4
    leaves = x.requires_grad_(), scale.requires_grad_()
    found = gradients(hb.ops.fake_quantize_codebook(*leaves, values, group_size=32), *leaves, grad)
    with torch.no_grad():
        v, entries = ratios(x, scale, 32), torch.tensor(values)
        entry = entries[functional.quantize_codebook(x, scale, entries, group_size=32).long()].double()
        inside = (v >= 1.5 * values[0] - 0.5 * values[1]) & (v <= 1.5 * values[-1] - 0.5 * values[-2])
        grad_scale = gathered(grad.double() * torch.where(inside, entry - v.double(), entry), scale, 32)
    assert torch.equal(found[0], torch.where(inside, grad, 0))
    torch.testing.assert_close(found[1], grad_scale.float(), rtol=1e-5, atol=1e-4)
    direct = hb.ops.fake_quantize_codebook_gradients(grad, x.detach(), scale.detach(), values, group_size=32)
    assert all(torch.equal(a, b) for a, b in zip(found, direct, strict=True))


def test_seq_at_the_ends_of_the_range() -> None:
    # 0.99 is inside, what follows it is not; a half, a midpoint, belongs to the lower entry.
    x = torch.tensor([0.99, 1.0, -0.99, -1.25, 0.5, 0.0, torch.inf], requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    y = hb.ops.fake_quantize_codebook(x, scale, SEQ, group_size=7, clip=0.99)
    assert y.tolist() == [0.75, 0.75, -0.75, -0.75, 0.25, -0.25, 0.75]
    grad_x, grad_scale = gradients(y, x, scale, torch.ones(7))
    assert grad_x.tolist() == [1, 0, 1, 0, 1, 1, 0]
    assert grad_scale.item() == pytest.approx(-0.24 + 0.75 + 0.24 - 0.75 - 0.25 - 0.25 + 0.75)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, group_size", CASES)
def test_binary_is_the_sign_with_a_clipped_gradient(
    shape: tuple[int, ...], group_size: int, dtype: torch.dtype
) -> None:
    x, scale, grad = make_case(shape, group_size, dtype)
    leaves = x.requires_grad_(), scale.requires_grad_()
    y = hb.ops.fake_quantize_binary(*leaves, group_size=group_size, grad_factor=0.5)
    found = gradients(y, *leaves, grad)
    with torch.no_grad():
        sign = torch.where(x >= 0, 1.0, -1.0)
        spread = functional.broadcast_qparams(scale, x, axis=None, group_size=group_size)
        assert torch.equal(y, (sign * spread).to(dtype))
        assert torch.equal(found[0], torch.where(ratios(x, scale, group_size).abs() <= 1, grad, 0))
        grad_scale = 0.5 * gathered(grad.double() * sign, scale, group_size)
    torch.testing.assert_close(found[1], grad_scale.float(), rtol=1e-5, atol=1e-4)


def test_binary_at_the_ends_of_the_range() -> None:
    x = torch.tensor([0.0, -0.0, 0.5, -0.5, 0.625, -1e-45, -torch.inf], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    y = hb.ops.fake_quantize_binary(x, scale, group_size=7)
    assert y.tolist() == [0.5, 0.5, 0.5, -0.5, 0.5, -0.5, -0.5]
    grad_x, grad_scale = gradients(y, x, scale, torch.ones(7))
    assert grad_x.tolist() == [1, 1, 1, 1, 0, 1, 0]
    assert grad_scale.item() == 1


@pytest.mark.parametrize("binary", [False, True])
def test_nan_stays_and_reaches_the_gradient_of_its_scale_alone(binary: bool) -> None:
    x = torch.randn(4, 100)
    x[1, 5] = torch.nan
    leaves = x.requires_grad_(), torch.full((4, 1), 0.5, requires_grad=True)
    y = (
        hb.ops.fake_quantize_binary(*leaves, group_size=100)
        if binary
        else hb.ops.fake_quantize_codebook(*leaves, SEQ, group_size=100)
    )
    assert y.isnan().nonzero().tolist() == [[1, 5]]
    grad_x, grad_scale = gradients(y, *leaves, torch.ones(4, 100))
    assert grad_scale.isnan().flatten().tolist() == [False, True, False, False]
    assert grad_x[1, 5] == 0 and bool(grad_x.isfinite().all())


@pytest.mark.parametrize("shape, group_size", CASES)
def test_bits_do_not_depend_on_threads_or_level(
    shape: tuple[int, ...], group_size: int, restore_threads: None, restore_level: None
) -> None:
    x, scale, grad = make_case((*shape[:-1], 40 * shape[-1]), group_size, torch.float32)
    results = []
    for level, threads in itertools.product(available_capabilities(), (1, 2, 4)):
        set_cpu_capability(level)
        torch.set_num_threads(threads)
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        y = hb.ops.fake_quantize_codebook(*leaves, NF4_VALUES, group_size=group_size)
        results.append((y.detach(), *gradients(y, *leaves, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_non_contiguous_and_empty_input() -> None:
    x, scale = torch.randn(32, 8), torch.rand(8, 2) + 0.5
    expected = hb.ops.fake_quantize_codebook(x.t().contiguous(), scale, SEQ, group_size=16)
    assert torch.equal(hb.ops.fake_quantize_codebook(x.t(), scale, SEQ, group_size=16), expected)
    leaves = torch.empty(0, 8, requires_grad=True), torch.empty(0, 2, requires_grad=True)
    hb.ops.fake_quantize_codebook(*leaves, SEQ, group_size=4).sum().backward()
    assert leaves[0].grad is not None and leaves[0].grad.shape == (0, 8)


def test_opcheck() -> None:
    x, scale = torch.randn(4, 64, requires_grad=True), torch.full((4, 2), 0.5, requires_grad=True)
    op, values = torch.ops.halfbyte, torch.tensor(SEQ)
    torch.library.opcheck(op.fake_quantize_codebook.default, (x, scale, values, 32, False, -1.0, 1.0, 0.5))
    plain = torch.randn(4, 64), torch.randn(4, 64), torch.full((4, 2), 0.1), torch.tensor([-1.0, 1.0])
    torch.library.opcheck(op.fake_quantize_codebook_backward.default, (*plain, 32, True, -1.0, 1.0, 1.0))


def test_compiles_to_one_graph() -> None:
    def loss(x: Tensor, scale: Tensor) -> Tensor:
        y = hb.ops.fake_quantize_codebook(x, scale, SEQ, group_size=25)
        return (y * hb.ops.fake_quantize_binary(x, scale, group_size=25)).sum()

    inputs = torch.randn(4, 50), torch.full((4, 2), 0.7)
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(10, requires_grad=True)
    y = hb.ops.fake_quantize_codebook(x, torch.ones(1), SEQ, group_size=10)
    (grad,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fake_quantize_codebook has no second derivative"):
        grad.sum().backward()


def test_arguments_are_checked() -> None:
    x, scale = torch.randn(4, 6), torch.ones(4, 2)
    quantize = hb.ops.fake_quantize_codebook
    with pytest.raises(ValueError, match=r"scale has shape \(4, 2\).*needs \(4, 1\)"):
        quantize(x, scale, SEQ, group_size=6)
    with pytest.raises(ValueError, match="group_size=4 does not divide"):
        quantize(x, scale, SEQ, group_size=4)
    with pytest.raises(ValueError, match="values has 1 entries"):
        quantize(x, scale, (1.0,), group_size=3)
    with pytest.raises(ValueError, match="not finite and increasing"):
        quantize(x, scale, (1.0, 0.5), group_size=3)
    with pytest.raises(ValueError, match="not finite and increasing"):
        quantize(x, scale, (1.0, torch.nan), group_size=3)
    with pytest.raises(ValueError, match=r"clip=-1\.0 is not positive"):
        quantize(x, scale, SEQ, group_size=3, clip=-1.0)
    with pytest.raises(ValueError, match="grad_factor=inf"):
        hb.ops.fake_quantize_binary(x, scale, group_size=3, grad_factor=torch.inf)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        hb.ops.fake_quantize_binary(x.double(), scale, group_size=3)
