"""Cross-layer equalization and bias correction: what they promise of the float model, and what they recover."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.algorithms import BiasCorrection, CrossLayerEqualization


class Unequal(nn.Module):
    """Convolutions of every kind whose channels have ranges that differ by two orders of magnitude."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv2d(3, 16, 3)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.grouped = nn.Conv2d(16, 8, 1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.head = nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in (self.first, self.depthwise, self.grouped):
                factor = 10 ** (2 * torch.rand(layer.out_channels, generator=generator) - 1)
                layer.weight.mul_(factor.view(-1, 1, 1, 1))
                layer.bias.mul_(factor)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x))
        x = F.pad(self.activation(self.depthwise(x)), (1, 1, 1, 1))
        return self.head(self.activation(self.up(self.activation(self.grouped(x)))).mean((2, 3)))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(6)]


def error(model: nn.Module, scheme: hb.Scheme, algorithms: list[object]) -> tuple[float, hb.Report]:
    quantized = copy.deepcopy(model)
    report = hb.quantize_(quantized, scheme, batches(), algorithms, progress=False, on_fallback="allow")
    x = torch.randn(16, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(x)
        return float((quantized(x) - expected).norm() / expected.norm()), report


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


@pytest.mark.parametrize("activation", [F.relu, leaky], ids=["relu", "leaky relu"])
def test_equalization_recovers_what_one_scale_a_weight_loses(activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Unequal(activation).eval()
    scheme = hb.int8_static(per_channel=False)
    plain, _ = error(model, scheme, [hb.RTN()])
    equalized, report = error(model, scheme, [CrossLayerEqualization(), hb.RTN()])
    assert equalized < 0.5 * plain
    assert [(r.producer, r.consumers) for r in report.transforms] == [
        ("first", ("depthwise",)),
        ("depthwise", ("grouped",)),
        ("grouped", ("up",)),
        ("up", ("head",)),
    ]
    assert all(r.change < 1e-5 for r in report.transforms)


def test_relu6_is_scaled_only_where_its_values_stay_below() -> None:
    torch.manual_seed(0)
    model = Unequal(F.relu6).eval()
    with torch.no_grad():
        model.first.weight[0].mul_(100)  # reaches 6
    quantized = copy.deepcopy(model)
    report = hb.quantize_(
        quantized, hb.int8_static(per_channel=False), batches(), [CrossLayerEqualization()], progress=False
    )
    assert all(r.change is not None and r.change < 1e-5 for r in report.transforms)
    plain, _ = error(model, hb.int8_static(per_channel=False), [hb.RTN()])
    equalized, _ = error(model, hb.int8_static(per_channel=False), [CrossLayerEqualization(), hb.RTN()])
    assert equalized < plain


def test_layers_that_are_read_elsewhere_or_normalized_are_no_pair() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm, self.c = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            return self.c(self.norm(self.b(y) + y)).sigmoid()

    model = Residual().eval()
    _, report = error(model, hb.int8_static(), [CrossLayerEqualization()])
    assert [f.kind for f in report.fallbacks] == ["transform"] or report.transforms[0].reason.startswith(
        "no two layers"
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_bias_correction_removes_the_mean_error_of_each_output(per_channel: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(1),
        nn.Linear(800, 4),
    )
    data = [torch.rand(8, 3, 12, 12) for _ in range(4)]
    shifts = {}
    for name, algorithms in (("plain", [hb.RTN()]), ("corrected", [BiasCorrection(), hb.RTN()])):
        quantized = copy.deepcopy(model)
        hb.quantize_(
            quantized, hb.int_weight_only(4) if per_channel else hb.int4_int8_static(), data, algorithms, progress=False
        )
        with torch.no_grad():
            layer, x = quantized[2], model[1](model[0](torch.cat(data)))
            expected = model[2](x).mean((0, 2, 3))
            found = F.conv2d(x, layer.weight, layer.bias, groups=4).mean((0, 2, 3))
        shifts[name] = float((found - expected).abs().max())
    assert shifts["corrected"] < 1e-4 < shifts["plain"]


def test_bias_correction_weights_errors_by_the_variance_of_inputs_wherever_it_stands() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 16) * torch.rand(16) + 3 * torch.rand(16)
    seen = []

    class Record(hb.MSE):
        def round(self, weight, weight_format, importance):  # type: ignore[no-untyped-def]
            seen.append(importance)
            return super().round(weight, weight_format, importance)

    for algorithms in ([Record(), BiasCorrection()], [BiasCorrection(), Record()], [Record()]):
        model = nn.Sequential(nn.Linear(16, 8))
        hb.quantize_(model, hb.int4_weight_only(8), [x], algorithms, progress=False)
    torch.testing.assert_close(seen[0], x.var(0, correction=0), rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[0], seen[1])
    torch.testing.assert_close(seen[2], x.square().mean(0), rtol=1e-4, atol=1e-5)


def test_layers_without_a_bias_say_so_and_all_compose_in_one_list() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = [torch.randn(32, 8)]
    algorithms = [CrossLayerEqualization(), BiasCorrection(), hb.algorithms.AdaRound(steps=20)]
    quantized = copy.deepcopy(model)
    report = hb.quantize_(quantized, hb.int4_int8_static(), data, algorithms, progress=False, on_fallback="allow")
    assert [f.kind for f in report.fallbacks] == ["bias"]
    assert {m.rounding for m in report.modules if m.rounding} == {"AdaRound"}
    assert not torch.equal(quantized[2].bias, model[2].bias)


def test_a_failure_leaves_weights_and_biases_as_they_were() -> None:
    model = Unequal().eval()
    before = copy.deepcopy(model.state_dict())
    bad = [*batches(), torch.full((1, 3, 12, 12), torch.nan)]
    with pytest.raises(hb.QuantizationError, match="NaN"):
        hb.quantize_(model, hb.int8_static(), bad, [CrossLayerEqualization(), BiasCorrection()], progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(hb.QuantizationError, match="BiasCorrection"):
        hb.quantize_(model, hb.int8_weight_only(), algorithms=[BiasCorrection()])
