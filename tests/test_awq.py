"""`hb.AWQ`: what scaling and clipping are worth, alone and before GPTQ, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from test_transforms import WIDTH, data, error, make, one_thread, quantize, same  # noqa: F401, the fixture runs by itself
from torch import nn

import halfbyte as hb
from halfbyte.algorithms import MSE
from halfbyte.errors import QuantizationError
from halfbyte.hessian import InputHessian

WEIGHT_ONLY = hb.int4_weight_only(32)


@pytest.mark.parametrize(
    ("scheme", "harm"), [(WEIGHT_ONLY, 1.2), (hb.int4_int8_dynamic(32), 1.8), (hb.int8_dynamic(), 10.0)]
)
def test_awq_recovers_planted_outliers(scheme: hb.Scheme, harm: float) -> None:
    original, clean = make(), make(outliers=1.0)
    errors = []
    for algorithms in ((), (hb.AWQ(),), (hb.AWQ(), hb.GPTQ())):
        model = copy.deepcopy(original)
        report = quantize(model, *algorithms, scheme=scheme, data=data(count=16))
        errors.append(error(model, original))
    quantize(clean, scheme=scheme, data=data(count=16))
    unharmed = error(clean, original)
    assert errors[0] > harm * unharmed
    assert errors[1] < 1.1 * unharmed
    assert errors[2] < 1.15 * unharmed
    assert {m.rounding for m in report.modules if m.plan.scheme is not None} == {"GPTQ"}
    assert all(r.change is not None and r.change < 1e-5 for r in report.transforms if not r.reason)


def test_both_published_forms_are_tried() -> None:
    model = make()
    report = quantize(model, hb.AWQ(), scheme=WEIGHT_ONLY)
    details = {r.detail for r in report.transforms if not r.reason}
    assert details and all(detail.startswith("|x|^") for detail in details)
    assert {m.rounding for m in report.modules if m.plan.scheme is not None} == {"AWQ"}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
def test_clipping_loses_no_more_than_min_max_or_mse(bits: int, symmetric: bool, group_size: int | None) -> None:
    weight_format = hb.int_weight_only(bits, group_size, symmetric).weight
    assert isinstance(weight_format, hb.IntFormat)
    weight_format = replace(weight_format, scale_dtype=torch.float32)
    torch.manual_seed(0)
    weight = torch.randn(40, 64)
    inputs = InputHessian("layer")
    inputs.update(torch.randn(500, 64) @ torch.randn(64, 64))
    size = weight_format.group_size(64)
    hessian = inputs.matrix()
    blocks = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, 64, size)])

    def loss(codes: hb.nn.packed_weight.WeightCodes) -> torch.Tensor:
        wrong = (codes.dequantize(size) - weight).double().view(40, -1, size)
        return torch.einsum("ogi,gij,ogj->og", wrong, blocks, wrong)

    ours = loss(hb.AWQ().round_layer("layer", weight, weight_format, inputs).codes)
    for other in (hb.RTN(), MSE()):
        theirs = loss(other.round(weight, weight_format, inputs.mean_square))
        assert bool((ours <= theirs * (1 + 1e-4)).all())
    assert ours.sum() < 0.98 * loss(hb.RTN().round(weight, weight_format, None)).sum() or bits == 8


def test_binary_and_tables_are_rounded_too() -> None:
    model = nn.Sequential(nn.Embedding(20, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8))
    batches = [torch.randint(0, 20, (4, 16)) for _ in range(2)]
    report = quantize(model, hb.AWQ(), scheme=hb.int_weight_only(1, 32), data=batches)
    assert {m.name: m.rounding for m in report.modules if m.plan.scheme is not None} == {"0": "AWQ", "2": "AWQ"}
    assert torch.isfinite(model(batches[0])).all()


def test_layers_in_other_formats_are_rounded_by_mse() -> None:
    model = make()
    recipe = hb.Recipe(default=WEIGHT_ONLY, overrides={"2": hb.nf4_weight_only(32)})
    report = hb.quantize_(model, recipe, data=data(), algorithms=[hb.AWQ()], progress=False)
    assert [m.rounding for m in report.modules if m.name == "2"] == ["AWQ"]


def test_channels_that_are_always_zero_do_no_harm() -> None:
    model = make()
    with torch.no_grad():
        model[0].norm.weight[:8] = 0.0  # type: ignore[union-attr, index, operator]
        model[0].norm.bias[:8] = 0.0  # type: ignore[union-attr, index, operator]
    original = copy.deepcopy(model)
    report = quantize(model, hb.AWQ(), scheme=WEIGHT_ONLY)
    assert not report.fallbacks
    assert error(model, original) < 0.1


@pytest.mark.parametrize("options", [{"grid": 0}, {"tokens": 0}, {"clip_grid": 0}, {"max_shrink": 1.0}])
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        hb.AWQ(**options)  # type: ignore[arg-type]


def test_float_schemes_and_prepare_are_refused() -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match="int4_weight_only"):
        quantize(model, hb.AWQ(), scheme=hb.bf16())
    with pytest.raises(QuantizationError, match="data="):
        hb.prepare_(model, WEIGHT_ONLY, algorithms=[hb.AWQ()])
    assert same(model, before)


def test_memory_is_refused_up_front() -> None:
    model = make()
    with pytest.raises(QuantizationError, match="max_memory="):
        quantize(model, hb.AWQ(), scheme=WEIGHT_ONLY, max_memory=300_000)
    assert quantize(model, hb.AWQ(), scheme=WEIGHT_ONLY, max_memory="4MB").transforms
