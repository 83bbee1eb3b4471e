"""The default rounding of static schemes: errors that even out on the mean input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfbyte as hb
from halfbyte.algorithms import BiasCorrection, InputMean
from halfbyte.algorithms.evening import evened_out
from halfbyte.convolution import ConvGeometry

FORMATS = [
    hb.int8_static().weight,
    hb.int8_static(per_channel=False).weight,
    hb.int4_int8_static().weight,
    hb.int4_int8_static(16).weight,
    hb.int4_int8_dynamic(16).weight,
]


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_errors_on_the_mean_input_vanish_and_no_code_moves_by_more_than_one(weight_format: hb.IntFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator)
    mean = torch.rand(24, 64, generator=generator)
    nearest = hb.RTN().round(weight, weight_format, None)
    evened = evened_out(nearest, weight, weight_format, mean)
    group_size = weight_format.group_size(64)
    before, after = ((r.dequantize(group_size) - weight) for r in (nearest, evened))
    assert int((evened.codes.int() - nearest.codes.int()).abs().max()) == 1
    assert int(evened.codes.max()) <= weight_format.qmax
    assert int(evened.codes.min()) >= weight_format.qmin
    assert float((after * mean).sum(1).abs().max()) < 0.25 * float((before * mean).sum(1).abs().max())
    assert float(after.square().sum()) < 1.1 * float(before.square().sum())


def test_weights_that_are_codes_stay() -> None:
    weight = torch.tensor([[-127.0, 0.0, 3.0, 127.0]])
    rounded = hb.RTN().round(weight, hb.int8_static().weight, None)
    assert torch.equal(evened_out(rounded, weight, hb.int8_static().weight, torch.ones(1, 4)).codes, rounded.codes)


def test_static_schemes_lose_less_by_default_than_by_rounding_to_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU()).eval()
    images = [torch.rand(8, 3, 16, 16) for _ in range(4)]
    test = torch.rand(16, 3, 16, 16)
    errors = {}
    for name, algorithms in (("default", []), ("nearest", [hb.RTN()])):
        quantized = copy.deepcopy(model)
        report = hb.quantize_(quantized, hb.int4_int8_static(), images, algorithms, progress=False)
        assert not report.fallbacks
        errors[name] = float((quantized(test) - model(test)).norm())
    assert errors["default"] < 0.7 * errors["nearest"]


CONVOLUTIONS = [
    (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 7, 9)),
    (nn.Conv2d(4, 8, 3, stride=2), (2, 4, 8, 9)),
    (nn.Conv2d(4, 8, (3, 5), stride=(2, 3), padding=(2, 1), dilation=(2, 1), groups=2), (3, 4, 11, 12)),
    (nn.Conv2d(2, 2, 3, padding=5), (1, 2, 3, 3)),
    (nn.Conv2d(4, 4, 3, padding="same", groups=4), (2, 4, 6, 6)),
    (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 9)),
    (nn.Conv1d(4, 8, 5, padding=2, stride=2), (2, 4, 13)),
    (nn.Conv3d(2, 4, 3, padding=1), (2, 2, 5, 6, 7)),
    (nn.ConvTranspose2d(4, 8, 3, stride=2), (2, 4, 5, 6)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS, ids=str)
def test_means_of_what_taps_read_are_those_of_unfolded_inputs(conv: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    seen = InputMean()
    seen(conv, (x,))
    outputs = conv.out_channels
    expected = ConvGeometry.of(conv).rows(x.double()).mean(1)
    found = seen.of_rows(0, outputs, outputs)
    torch.testing.assert_close(found, expected.repeat_interleave(outputs // len(expected), 0), rtol=0, atol=1e-6)


def test_means_of_large_inputs_come_of_some_lines_and_of_many_batches_of_some() -> None:
    generator = torch.Generator().manual_seed(0)
    conv, seen = nn.Conv2d(8, 8, 3, padding=1), InputMean()
    gradient = torch.linspace(0, 1, 128)[:, None]
    batches = [torch.rand(2, 8, 128, 128, generator=generator) + gradient for _ in range(24)]
    for x in batches:
        seen(conv, (x,))
    unfolded = F.unfold(torch.cat(batches).mean(0, keepdim=True), 3, padding=1)
    expected = unfolded.view(8, 9, -1).mean(2).T.reshape(1, -1).double()
    torch.testing.assert_close(seen.of_rows(0, 1, 8), expected, rtol=0.02, atol=0)


def test_a_list_that_names_a_rounding_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(32, 16)), [torch.rand(64, 32)]
    biases = {}
    for name, algorithms in (("default", []), ("nearest", [hb.RTN()]), ("both", [BiasCorrection(), hb.RTN()])):
        quantized = copy.deepcopy(model)
        hb.quantize_(quantized, hb.int8_static(), data, algorithms, progress=False)
        biases[name] = quantized[0].bias
    assert torch.equal(biases["nearest"], model[0].bias)
    assert not torch.equal(biases["both"], model[0].bias)
    assert not torch.equal(biases["default"], model[0].bias)
