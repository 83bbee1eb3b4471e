"""Quantizers whose scales are trained: published first values, gradients, and what no optimizer can break."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.formats import NF4_VALUES, CodebookFormat, IntFormat, PackedFormat, PerAxis, PerGroup, PerTensor
from halfbyte.qat import AbsoluteMeanWeight, LearnedActivation, LearnedWeight, PactActivation
from halfbyte.qat.learned import exponential_scale, positive_scale

SEQ = (-0.75, -0.25, 0.25, 0.75)
FORMATS: dict[str, PackedFormat] = {
    "int8 per channel": IntFormat(bits=8, narrow_range=True),
    "int4 per tensor": IntFormat(bits=4, granularity=PerTensor()),
    "int4 group": IntFormat(bits=4, symmetric=False, granularity=PerGroup(8), scale_dtype=torch.float16),
    "int2 group": IntFormat(bits=2, symmetric=False, granularity=PerGroup(8), scale_dtype=torch.bfloat16),
    "ternary": IntFormat(bits=2, narrow_range=True, granularity=PerAxis(0)),
    "binary": IntFormat(bits=1, granularity=PerGroup(8), scale_dtype=torch.float16),
    "binary per tensor": IntFormat(bits=1, granularity=PerTensor()),
    "seq": CodebookFormat(SEQ, PerGroup(8), torch.float16),
    "nf4": CodebookFormat(NF4_VALUES, PerGroup(8), torch.float16),
}
METHODS = [
    *((name, "learned") for name in FORMATS),
    ("int4 per tensor", "lsq"),
    ("int4 group", "lsq"),
    ("int8 per channel", "lsq+"),
    ("int4 group", "lsq+"),
    ("ternary", "seq"),
    ("seq", "seq"),
    ("binary", "binary"),
    ("binary per tensor", "binary"),
    ("ternary", "absmean"),
]


def weight_of(rows: int = 6, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.02


def initialized(name: str, method: str, weight: Tensor) -> hb.qat.WeightQuantizer:
    quantizer = hb.qat.weight_quantizer(FORMATS[name], (weight.shape[0], weight.shape[1]), method)
    quantizer.initialize(weight)
    return quantizer


@pytest.mark.parametrize("name, method", METHODS)
def test_training_sees_what_the_integers_stand_for(name: str, method: str) -> None:
    weight = weight_of().requires_grad_()
    quantizer = initialized(name, method, weight)
    with torch.no_grad():
        for parameter in quantizer.parameters():  # as after some training, a scale past zero among them
            parameter.mul_(torch.linspace(-0.5, 1.5, parameter.numel()).reshape(parameter.shape))
    stored = quantizer.codes(weight)
    assert stored.scale.dtype == FORMATS[name].scale_dtype
    expected = stored.dequantize(FORMATS[name].group_size(32))
    trained = quantizer(weight)
    fake = quantizer.fake(weight)
    value, pullback = fake.vjp(weight, *fake.tensors)
    for got in (trained, value, fake.quantize(weight, *fake.tensors)):
        assert torch.equal(got, expected)
    grad = torch.randn(6, 32)
    gradients = torch.autograd.grad(trained, [weight, *quantizer.parameters()], grad, retain_graph=True)
    of_tensors = torch.autograd.grad(
        trained, [weight, *(t for t in fake.tensors if t.requires_grad)], grad, allow_unused=True
    )
    assert torch.equal(gradients[0], pullback(grad)[0])
    assert of_tensors[0] is not None and all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize(
    "name, method, expected",
    [
        ("int4 per tensor", "lsq", lambda w: (2 * w.abs().mean() / math.sqrt(7)).reshape(1, 1)),
        (
            "int8 per channel",
            "lsq+",
            lambda w: (
                torch.stack([m + 3 * s for m, s in zip(w.mean(1).abs(), w.std(1, correction=0), strict=True)])[:, None]
                / 128
            ),
        ),
        ("seq", "seq", lambda w: w.reshape(6, 4, 8).abs().amax(-1)),
        ("ternary", "seq", lambda w: w.abs().amax(1, keepdim=True) / 1.5),
        ("binary", "binary", lambda w: w.reshape(6, 4, 8).abs().mean(-1)),
    ],
)
def test_first_scales_are_the_published_ones(name: str, method: str, expected: object) -> None:
    weight = weight_of()
    quantizer = initialized(name, method, weight)
    assert isinstance(quantizer, LearnedWeight) and callable(expected) and quantizer.scale is not None
    torch.testing.assert_close(quantizer.scale.detach(), expected(weight))


def test_first_scales_of_learned_are_those_of_ptq() -> None:
    weight, weight_format = weight_of(), FORMATS["int4 group"]
    codes = hb.MSE(weighting="none").round(weight, weight_format, None)
    ours = initialized("int4 group", "learned", weight).codes(weight)
    assert torch.equal(ours.codes, codes.codes) and torch.equal(ours.scale, codes.scale)
    assert ours.zero_point is not None and codes.zero_point is not None
    assert torch.equal(ours.zero_point, codes.zero_point)


def test_gptq_can_be_where_training_starts() -> None:
    weight, weight_format = weight_of(), FORMATS["int2 group"]
    found = hb.MSE(grid=8).round(weight, weight_format, None)
    quantizer = LearnedWeight(weight_format, (6, 32), "lsq")
    quantizer.load_codes(found)
    again = quantizer.codes(found.dequantize(8))
    assert torch.equal(again.codes, found.codes) and torch.equal(again.scale, found.scale)
    with pytest.raises(hb.QuantizationError, match=r"scales of shape \(6, 4\).*needs \(5, 4\)"):
        LearnedWeight(weight_format, (5, 32)).load_codes(found)


def test_starting_from_another_model_is_refused_before_anything_changes() -> None:
    scheme = hb.int_weight_only(4, group_size=16)
    float_model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    model = hb.prepare_qat_(copy.deepcopy(float_model), scheme, weights="learned")
    before = [p.detach().clone() for p in model.parameters()]
    half = copy.deepcopy(float_model)
    hb.quantize_(half, hb.Recipe(default=scheme, overrides={"1": None}), progress=False)
    with pytest.raises(hb.QuantizationError, match="1 is a Linear in the quantized model"):
        hb.qat.start_from_(model, half)
    other = copy.deepcopy(float_model)
    hb.quantize_(other, hb.int_weight_only(3, group_size=16), progress=False)
    with pytest.raises(hb.QuantizationError, match=r"0 has int3 group 16 asymmetric.*here it is int4"):
        hb.qat.start_from_(model, other)
    untrained = hb.prepare_qat_(copy.deepcopy(float_model), scheme)
    with pytest.raises(hb.QuantizationError, match="0 does not train its scale"):
        hb.qat.start_from_(untrained, other)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def lsq_plus(x: Tensor, scale: float, offset: float, qmin: int, qmax: int, grad: Tensor) -> tuple[float, float, Tensor]:
    """Equations 3 to 5 of arXiv:2004.09576 in float64, without the gradient's factor: of the scale, the offset and x."""
    # The zero point of our formats is an integer, so the offset that is used is a multiple of the scale.
    zero_point = round(qmin - offset / scale)
    v = x.double() / scale + zero_point
    low, high = v <= qmin, v >= qmax
    inside = ~(low | high)
    error = torch.where(
        inside, torch.round(v) - v, torch.where(low, float(qmin), float(qmax)) - (qmin - offset / scale)
    )
    # Of the clamped values, x_hat = (code - qmin) * scale + offset.
    of_scale = torch.where(inside, error, torch.where(low, 0.0, float(qmax - qmin)))
    return (
        float((grad.double() * of_scale).sum()),
        float(grad.double()[~inside].sum()),
        torch.where(inside, grad, 0),
    )


def test_offset_and_scale_of_activations_are_those_of_lsq_plus() -> None:
    asymmetric = IntFormat(bits=4, symmetric=False, granularity=PerTensor())
    quantizer = LearnedActivation(asymmetric, name="x", method="lsq")
    x = torch.randn(16, 10, requires_grad=True)
    quantizer.fake(x)
    with torch.no_grad():
        assert quantizer.scale is not None and quantizer.offset is not None
        quantizer.scale.fill_(0.25)
        quantizer.offset.fill_(-1.5)
    grad = torch.randn(16, 10)
    quantizer.fake(x)(x).backward(grad)
    of_scale, of_offset, of_x = lsq_plus(x.detach(), 0.25, -1.5, 0, 15, grad)
    factor = 1 / math.sqrt(10 * 7.5)
    assert x.grad is not None and torch.equal(x.grad, of_x)
    assert quantizer.scale.grad is not None and quantizer.offset.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(factor * of_scale, rel=1e-4)
    assert quantizer.offset.grad.item() == pytest.approx(factor * of_offset, rel=1e-4)


def test_first_batch_sets_the_range_and_later_ones_do_not() -> None:
    symmetric = LearnedActivation(IntFormat(bits=4, granularity=PerTensor()), name="x", method="lsq")
    unsigned = IntFormat(bits=8, symmetric=False, granularity=PerTensor())
    asymmetric = LearnedActivation(unsigned, name="x", method="lsq")
    x = torch.rand(64, 10) * 3 - 0.5
    for quantizer in (symmetric, asymmetric):
        with pytest.raises(hb.QuantizationError, match="the range of x was never observed"):
            quantizer.qparams()
        quantizer.fake(torch.full((2, 2), torch.nan))
        assert not quantizer.ready
        quantizer.fake(x)
        quantizer.fake(100 * x)
        assert quantizer.ready
    assert symmetric.qparams()[0].item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(7))
    scale, zero_point = asymmetric.qparams()
    assert scale.item() == pytest.approx((x.max() - x.min()).item() / 255)
    assert zero_point.item() == round(-x.min().item() / scale.item()) - 128


@pytest.mark.parametrize("symmetric", [False, True])
def test_first_range_of_learned_has_a_small_error(symmetric: bool) -> None:
    activation_format = IntFormat(bits=4, symmetric=symmetric, granularity=PerTensor())
    quantizer = LearnedActivation(activation_format, name="x")
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0)).relu()
    x[0, 0] = 12.0  # one element that is not worth a wide range
    error = (quantizer.fake(x)(x) - x).square().mean().item()
    widest = hb.ops.fake_quantize(
        x, torch.tensor(12 / activation_format.qmax), torch.tensor(0), qmin=0, qmax=activation_format.qmax
    )
    assert error < 0.7 * (widest - x).square().mean().item()


def test_steps_of_learned_are_relative_to_the_scale() -> None:
    scales = []
    for magnitude in (1e-5, 1.0, 1e5):
        quantizer = LearnedActivation(IntFormat(bits=4, symmetric=False, granularity=PerTensor()), name="x")
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(0)) * magnitude
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2, eps=0.0)
        for _ in range(20):
            optimizer.zero_grad()
            (quantizer.fake(x)(x) / magnitude).square().sum().backward()
            optimizer.step()
        scales.append(quantizer.qparams()[0].item() / magnitude)
    assert scales == pytest.approx([scales[1]] * 3, rel=1e-3)


def test_pact_learns_from_what_it_cuts_off() -> None:
    quantizer = PactActivation(IntFormat(bits=4, symmetric=False, granularity=PerTensor()), name="x")
    quantizer.fake(torch.tensor([[0.5, 3.75]]))
    assert quantizer.scale is not None and quantizer.scale.item() == 3.75  # alpha, 15 steps of 0.25
    x = torch.tensor([[3.75, 5.0, 3.74, 0.25, 0.0, -1.0]], requires_grad=True)
    grad = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 1e4, 1e5]])
    y = quantizer.fake(x)(x)
    torch.testing.assert_close(y[0, [0, 1, 5]], torch.tensor([3.75, 3.75, 0.0]))
    y.backward(grad)
    assert quantizer.scale.grad is not None and x.grad is not None
    assert quantizer.scale.grad.item() == pytest.approx(11.0)
    assert x.grad[0, :4].tolist() == [0, 0, 100, 1000] and x.grad[0, 5] == 0
    scale, zero_point = quantizer.qparams()
    assert scale.item() == 0.25 and zero_point.item() == -8
    with pytest.raises(ValueError, match="'pact' is for asymmetric formats"):
        PactActivation(IntFormat(bits=4, granularity=PerTensor()), name="x")


def test_absolute_mean_is_computed_from_the_weight() -> None:
    weight = weight_of().requires_grad_()
    quantizer = AbsoluteMeanWeight(FORMATS["ternary"], (6, 32))
    gamma = weight.detach().abs().mean(1, keepdim=True)
    y = quantizer(weight)
    torch.testing.assert_close(y, torch.clamp(torch.round(weight.detach() / gamma), -1, 1) * gamma)
    y.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones(6, 32))  # also of what is clamped
    assert not list(quantizer.parameters())


def test_scales_are_positive_and_gradients_bounded_whatever_the_numbers() -> None:
    numbers = torch.tensor([0.1, -0.1, 0.0, torch.nan, torch.inf, -torch.inf, 1e-42, 1e30], requires_grad=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for scale in (positive_scale(numbers, dtype), exponential_scale(numbers, dtype)):
            assert bool((scale > 0).all()) and bool(scale.isfinite().all())
            assert torch.equal(scale.to(dtype).float(), scale)
    numbers.grad = None
    upstream = torch.tensor([1.0, 1.0, 1.0, torch.nan, torch.inf, -torch.inf, 1e38, -1e38])
    positive_scale(numbers).backward(upstream)
    assert numbers.grad is not None
    assert numbers.grad.tolist() == [1, -1, 1, 0, 0, 0, 2.0**40, -(2.0**40)]


@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "name, method", [("int4 group", "lsq"), ("int2 group", "learned"), ("seq", "seq"), ("binary", "binary")]
)
def test_a_rate_ten_times_too_high_leaves_no_nan(name: str, method: str, optimizer: str, steps: int) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(weight_of(4, 16))
    quantizer = hb.qat.weight_quantizer(FORMATS[name], (4, 16), method)
    quantizer.initialize(weight.detach())
    activations = LearnedActivation(IntFormat(bits=4, symmetric=False, granularity=PerTensor()), name="x")
    scales = [*quantizer.parameters(), *activations.parameters()]
    inputs = torch.randn(32, 8, 16)
    targets = inputs @ torch.randn(16, 4)
    activations.fake(inputs[0])
    optimizers = {
        "sgd": lambda: torch.optim.SGD([weight, *scales], lr=1.0, momentum=0.9),  # 0.1 learns
        "adam": lambda: torch.optim.Adam([weight, *scales], lr=0.3),  # 0.03 learns
    }
    step = optimizers[optimizer]()
    for i in range(steps):
        x = inputs[i % 32]
        loss = (activations.fake(x)(x) @ quantizer(weight).t() - targets[i % 32]).square().mean()
        step.zero_grad()
        loss.backward()
        step.step()
        if i % 100 == 0:
            with torch.no_grad():  # what is tested are the scales: the weights may run away
                weight.nan_to_num_(0.0).clamp_(-1e6, 1e6)
    assert all(bool(scale.isfinite().all()) for scale in scales)
    stored = quantizer.codes(weight.detach()).scale
    assert bool((stored > 0).all()) and bool(stored.isfinite().all())
    assert activations.qparams()[0] > 0


@pytest.mark.parametrize("activations", ["learned", "pact"])
def test_a_model_with_trained_ranges_converts_to_what_it_evaluates(activations: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    hb.prepare_qat_(model, hb.int8_static(), weights="learned", activations=activations)
    scales = list(hb.qat.scale_parameters(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.rand(8, 3, 8, 8).to(memory_format=torch.channels_last)
    before = [scale.detach().clone() for scale in scales]
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert len(scales) == (6 if activations == "pact" else 9)
    assert any(not torch.equal(a, b) for a, b in zip(before, scales, strict=True))
    copied = copy.deepcopy(model).eval()
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(copied(x), expected)
        hb.convert_(model, progress=False)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("weights", ["learned", "seq"])
def test_compiled_training_step_equals_eager(weights: str) -> None:
    x, results = torch.randn(16, 32), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        hb.prepare_qat_(model, hb.schemes.codebook_weight_only(SEQ, 8), weights=weights)
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        run(x).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    for eager, traced in zip(*results, strict=True):
        assert eager is not None
        torch.testing.assert_close(eager, traced)


def test_methods_that_do_not_fit_are_refused() -> None:
    for name, method, message in (
        ("binary", "lsq", "'lsq' does not quantize to binary"),
        ("int4 group", "seq", "'seq' does not quantize to int4"),
        ("seq", "binary", "'binary' does not quantize to codebook of 4"),
        ("int4 group", "absmean", "'absmean' is for ternary weights"),
        ("int4 group", "best", "weights='best' is unknown; use 'minmax'"),
    ):
        with pytest.raises(ValueError, match=message):
            hb.qat.weight_quantizer(FORMATS[name], (6, 32), method)
    with pytest.raises(ValueError, match="activations='best' is unknown"):
        hb.qat.activation_quantizer(IntFormat(bits=8, granularity=PerTensor()), "best")
