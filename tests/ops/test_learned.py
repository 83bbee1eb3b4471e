"""fake_quantize_learned: its gradients against PyTorch's operators and their definition in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import halfbyte as hb
from halfbyte import functional
from halfbyte._extension import available_capabilities, set_cpu_capability

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# shape, axis, group_size: every granularity, runs that are short, long and cut, columns that do not fill a vector
CASES = (
    ((1000,), None, None),
    ((3, 4097), None, None),
    ((), None, None),
    ((5, 100), 0, None),
    ((3, 9001), 0, None),
    ((6, 40, 3, 3), 1, None),
    ((4, 5, 7, 9), 1, None),
    ((700, 37), 1, None),
    ((300, 1030), -1, None),
    ((2000, 3), -1, None),
    ((8, 96), None, 32),
    ((8, 96), None, 8),
    ((8, 96), None, 1),
    ((5, 77), None, 77),
)


def gradients(
    x: Tensor, scale: Tensor, zero_point: Tensor, grad: Tensor, **options: int | float | str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result and the three gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, scale, zero_point)]
    y = hb.ops.fake_quantize_learned(*leaves, **options)  # type: ignore[arg-type]
    y.backward(grad)
    found = [leaf.grad for leaf in leaves]
    assert all(
        g is not None and g.shape == leaf.shape and g.dtype == leaf.dtype for g, leaf in zip(found, leaves, strict=True)
    )
    return y.detach(), *found  # type: ignore[return-value]


def defined_gradients(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grad: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: int | None,
    group_size: int | None,
    estimator: str = "rounded",
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, summed in float64; codes in float32, as the contract has them.

    "lsq": equations 3 to 5 of arXiv:1902.08153, and the offset's of arXiv:2004.09576. "pact": section 3 of arXiv:1805.06085.
    """

    def spread(qparam: Tensor) -> Tensor:
        return functional.broadcast_qparams(qparam, x, axis=axis, group_size=group_size).expand(x.shape)

    def gather(values: Tensor) -> Tensor:
        if group_size is not None:
            return values.reshape(*scale.shape, group_size).sum(-1)
        if axis is not None:
            return values.movedim(axis, 0).reshape(x.shape[axis], -1).sum(1)
        return values.sum().reshape(scale.shape)

    zero = spread(zero_point.round().clamp(qmin, qmax))
    ratio = x.float() * spread(1 / scale)
    rounded = torch.round(ratio) + zero
    by_code = (rounded >= qmin) & (rounded <= qmax)
    inside = by_code if estimator == "rounded" else (ratio > qmin - zero) & (ratio < qmax - zero)
    code = (rounded.clamp(qmin, qmax) - zero).double()
    upstream = grad.double() * grad_factor
    grad_scale = gather(upstream * torch.where(inside, 0 if estimator == "pact" else code - ratio.double(), code))
    grad_zero_point = gather(torch.where(inside, 0.0, -upstream * spread(scale).double()))
    return torch.where(inside, grad, 0), grad_scale, grad_zero_point


def make_case(
    shape: tuple[int, ...], axis: int | None, group_size: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(math.prod(shape))
    x = (torch.randn(shape, generator=generator) * 2).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    qparams: tuple[int, ...] = () if axis is None else (shape[axis],)
    if group_size is not None:
        qparams = (*shape[:-1], shape[-1] // group_size)
    scale = torch.rand(qparams, generator=generator) * 0.4 + 0.05
    zero_point = torch.rand(qparams, generator=generator) * 20 - 10
    return x, scale, zero_point, grad


@pytest.mark.parametrize("estimator", ["rounded", "lsq", "pact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axis, group_size", CASES)
def test_gradients_equal_their_definition(
    shape: tuple[int, ...], axis: int | None, group_size: int | None, dtype: torch.dtype, estimator: str
) -> None:
    x, scale, zero_point, grad = make_case(shape, axis, group_size, dtype)
    options = {
        "qmin": -8,
        "qmax": 7,
        "axis": axis,
        "group_size": group_size,
        "estimator": estimator,
        "grad_factor": 0.25,
    }
    y, grad_x, grad_scale, grad_zero_point = gradients(x, scale, zero_point, grad, **options)  # type: ignore[arg-type]
    direct = hb.ops.fake_quantize_learned_gradients(grad, x, scale, zero_point, **options)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip((grad_x, grad_scale, grad_zero_point), direct, strict=True))
    expected = defined_gradients(x, scale, zero_point, grad, **options)  # type: ignore[arg-type]
    assert torch.equal(grad_x, expected[0])
    # Sums of up to a few thousand terms of about 1: float32 chains of 256 lose less than 1e-5 of their size.
    torch.testing.assert_close(grad_scale, expected[1].float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_zero_point, expected[2].float(), rtol=1e-5, atol=1e-4)
    codes = zero_point.round().clamp(-8, 7).int()
    assert torch.equal(y, hb.ops.fake_quantize(x, scale, codes, qmin=-8, qmax=7, axis=axis, group_size=group_size))


@pytest.mark.parametrize("zero_point", [0.0, 2.0, 3.4, 200.0])
def test_per_tensor_equals_pytorch(zero_point: float) -> None:
    # Zero points that PyTorch's backward rounds as its forward does, and no ties: it adds the zero point before it rounds.
    x, grad = torch.randn(50, 70), torch.randn(50, 70)
    x = (torch.round(x / 0.04) + torch.rand(50, 70) * 0.8 - 0.4) * 0.04
    leaves = [x.requires_grad_(), torch.tensor([0.04], requires_grad=True), torch.tensor([zero_point]).requires_grad_()]
    y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, 0, 255, 0.1)
    y.backward(grad)
    got = gradients(*leaves, grad, qmin=0, qmax=255, grad_factor=0.1)
    for ours, theirs in zip(got, (y, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_channel_equals_pytorch(axis: int) -> None:
    x, grad = torch.randn(6, 33, 10), torch.randn(6, 33, 10)
    channels = x.shape[axis]
    scale = torch.rand(channels) * 0.1 + 0.01
    zero_point = torch.arange(channels) % 5 * 2.0 - 4
    leaves = [tensor.requires_grad_() for tensor in (x, scale, zero_point)]
    y = torch._fake_quantize_learnable_per_channel_affine(*leaves, axis, -8, 7, 0.5)
    y.backward(grad)
    got = gradients(*leaves, grad, qmin=-8, qmax=7, axis=axis, grad_factor=0.5)
    for ours, theirs in zip(got, (y, *(leaf.grad for leaf in leaves)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero_point, rounded", [(-2.5, -2), (-3.0, -3), (2.5, 2), (3.5, 4), (-40.0, -8), (40.0, 7)])
def test_gradient_uses_the_zero_point_of_the_forward(zero_point: float, rounded: int) -> None:
    x = torch.linspace(-2, 2, 101)
    scale = torch.tensor(0.1)
    y, grad_x, *_ = gradients(x, scale, torch.tensor(zero_point), torch.ones(101), qmin=-8, qmax=7)
    assert torch.equal(y, hb.ops.fake_quantize(x, scale, torch.tensor(rounded), qmin=-8, qmax=7))
    code = torch.round(x * 10) + rounded
    assert torch.equal(grad_x, ((code >= -8) & (code <= 7)).float())


def test_values_at_the_ends_of_the_range() -> None:
    # scale 1, codes -2..1: 1.5 rounds to 2, outside; -2.5 rounds to -2, inside; 0.5 rounds to 0.
    x = torch.tensor([1.5, 1.25, -2.5, -2.75, 0.5, torch.inf, -torch.inf])
    _, grad_x, grad_scale, grad_zero_point = gradients(
        x, torch.tensor(1.0), torch.tensor(0.0), torch.ones(7), qmin=-2, qmax=1
    )
    assert grad_x.tolist() == [0, 1, 1, 0, 1, 0, 0]
    assert grad_scale.item() == 1 + (1 - 1.25) + (-2 + 2.5) - 2 + (0 - 0.5) + 1 - 2
    assert grad_zero_point.item() == -4


@pytest.mark.parametrize("estimator, grad_scale", [("lsq", 7 + 7 + 7 - 8 - 8 - 0.25), ("pact", 7 + 7 + 7 - 8 - 8)])
def test_published_estimators_at_the_ends_of_the_range(estimator: str, grad_scale: float) -> None:
    # v >= 7 and v <= -8 are outside for the papers, also where they round to 7 or -8.
    x = torch.tensor([7.0, 7.25, 7.75, -8.0, -8.25, 6.25])
    _, grad_x, of_scale, of_zero_point = gradients(
        x,
        torch.tensor(1.0),
        torch.tensor(0.0),
        torch.ones(6),
        qmin=-8,
        qmax=7,
        estimator=estimator,  # type: ignore[arg-type]
    )
    assert grad_x.tolist() == [0, 0, 0, 0, 0, 1]
    assert of_scale.item() == grad_scale
    assert of_zero_point.item() == -5


def test_nan_reaches_the_gradient_of_its_scale_alone() -> None:
    x = torch.randn(4, 100)
    x[1, 5] = torch.nan
    _, grad_x, grad_scale, grad_zero_point = gradients(
        x, torch.full((4,), 0.5), torch.zeros(4), torch.ones(4, 100), qmin=-8, qmax=7, axis=0
    )
    assert grad_scale.isnan().tolist() == [False, True, False, False]
    assert grad_x[1, 5] == 0 and grad_x.isfinite().all() and grad_zero_point.isfinite().all()


@pytest.mark.parametrize("shape, axis, group_size", CASES)
def test_bits_do_not_depend_on_threads_or_level(
    shape: tuple[int, ...], axis: int | None, group_size: int | None, restore_threads: None, restore_level: None
) -> None:
    x, scale, zero_point, grad = make_case(
        (*shape[:-1], *(40 * size for size in shape[-1:])), axis, group_size, DTYPES[0]
    )
    options = {"qmin": -8, "qmax": 7, "axis": axis, "group_size": group_size}
    results = []
    for level, threads in itertools.product(available_capabilities(), (1, 2, 4)):
        set_cpu_capability(level)
        torch.set_num_threads(threads)
        results.append(gradients(x, scale, zero_point, grad, **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_non_contiguous_input_and_gradient() -> None:
    x, grad = torch.randn(40, 30), torch.randn(40, 30)
    scale, zero_point = torch.full((30,), 0.1), torch.zeros(30)
    expected = gradients(x, scale, zero_point, grad, qmin=-8, qmax=7, axis=1)
    strided = x.t().contiguous().t(), scale, zero_point, grad.t().contiguous().t()
    for ours, theirs in zip(gradients(*strided, qmin=-8, qmax=7, axis=1), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "shape, axis, group_size", [((0, 4), 1, None), ((4, 0), 1, None), ((0, 8), None, 4), ((0,), None, None)]
)
def test_empty_input_gives_zero_gradients(shape: tuple[int, ...], axis: int | None, group_size: int | None) -> None:
    x, scale, zero_point, grad = make_case(shape, axis, group_size, torch.float32)
    _, grad_x, grad_scale, grad_zero_point = gradients(
        x, scale, zero_point, grad, qmin=-8, qmax=7, axis=axis, group_size=group_size
    )
    assert grad_x.shape == x.shape
    assert not grad_scale.any() and not grad_zero_point.any()


def test_half_precision_qparams_get_gradients_of_their_dtype() -> None:
    scale = torch.tensor(0.1, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(100, dtype=torch.bfloat16)
    hb.ops.fake_quantize_learned(x, scale, torch.tensor(0.0), qmin=-8, qmax=7).sum().backward()
    assert scale.grad is not None and scale.grad.dtype is torch.bfloat16


def test_training_the_scale_finds_a_better_one() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(4096), torch.tensor(1.0, requires_grad=True)

    def error() -> Tensor:
        return torch.square(hb.ops.fake_quantize_learned(x, scale, torch.tensor(0.0), qmin=-8, qmax=7) - x).mean()

    before = error().item()
    optimizer = torch.optim.SGD([scale], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.25 * before  # step 1 loses 1/12; the best 16 levels of a Gaussian lose 0.0115


def test_opcheck() -> None:
    x, scale = torch.randn(4, 64, requires_grad=True), torch.full((4,), 0.1, requires_grad=True)
    zero_point = torch.zeros(4, requires_grad=True)
    op = torch.ops.halfbyte
    torch.library.opcheck(op.fake_quantize_learned.default, (x, scale, zero_point, -8, 7, 0, None, 1, 0.5))
    plain = torch.randn(4, 64), torch.randn(4, 64), torch.full((4, 2), 0.1), torch.zeros(4, 2)
    torch.library.opcheck(op.fake_quantize_learned_backward.default, (*plain, -8, 7, None, 32, 2, 1.0))


def test_compiles_to_one_graph() -> None:
    def loss(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (hb.ops.fake_quantize_learned(x, scale, zero_point, qmin=-8, qmax=7, axis=0) * x).sum()

    inputs = torch.randn(4, 50), torch.full((4,), 0.1), torch.full((4,), 1.0)
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        function(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(10, requires_grad=True)
    y = hb.ops.fake_quantize_learned(x, torch.tensor(0.1), torch.tensor(0.0), qmin=-8, qmax=7)
    (grad,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fake_quantize_learned has no second derivative"):
        grad.sum().backward()


def test_arguments_are_checked() -> None:
    x, scale, zero = torch.randn(4, 6), torch.tensor(0.1), torch.tensor(0.0)
    with pytest.raises(TypeError, match=r"zero_point has dtype torch\.int32"):
        hb.ops.fake_quantize_learned(x, scale, torch.tensor(0, dtype=torch.int32), qmin=-8, qmax=7)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        hb.ops.fake_quantize_learned(x.double(), scale, zero, qmin=-8, qmax=7)
    with pytest.raises(ValueError, match=r"scale has shape \(3,\).*needs the shape \(4,\)"):
        hb.ops.fake_quantize_learned(x, torch.ones(3), torch.zeros(4), qmin=-8, qmax=7, axis=0)
    with pytest.raises(ValueError, match=r"zero_point has shape \(2,\).*needs one element"):
        hb.ops.fake_quantize_learned(x, scale, torch.zeros(2), qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="grad_factor=nan"):
        hb.ops.fake_quantize_learned(x, scale, zero, qmin=-8, qmax=7, grad_factor=math.nan)
    with pytest.raises(ValueError, match="estimator='ste' is unknown"):
        hb.ops.fake_quantize_learned(x, scale, zero, qmin=-8, qmax=7, estimator="ste")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grad has shape \(6, 4\)"):
        hb.ops.fake_quantize_learned_gradients(x.t(), x, scale, zero, qmin=-8, qmax=7)
    with pytest.raises(ValueError, match="qmin=7, qmax=-8"):
        hb.ops.fake_quantize_learned(x, scale, zero, qmin=7, qmax=-8)
    with pytest.raises(RuntimeError, match="zero_point is NaN"):
        hb.ops.fake_quantize_learned(x, scale, torch.tensor(math.nan), qmin=-8, qmax=7)
