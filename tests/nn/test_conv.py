"""Quantized convolution modules: every kind of torch's, in every scheme, through the whole workflow."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb

KINDS = {
    "conv1d": (nn.Conv1d(8, 12, 3, padding=1), (8, 9)),
    "conv2d": (nn.Conv2d(8, 12, 3, stride=2, padding=1), (8, 7, 6)),
    "conv3d": (nn.Conv3d(4, 6, 2), (4, 4, 5, 3)),
    "first layer": (nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), (3, 16, 16)),
    "pointwise": (nn.Conv2d(24, 40, 1), (24, 5, 5)),
    "depthwise": (nn.Conv2d(20, 20, 3, padding=1, groups=20), (20, 6, 6)),
    "grouped": (nn.Conv2d(24, 36, 3, padding=1, groups=3), (24, 6, 6)),
    "dilated": (nn.Conv2d(8, 8, 3, padding=2, dilation=2), (8, 7, 7)),
    "same": (nn.Conv2d(8, 8, (2, 4), padding="same", dilation=(1, 3)), (8, 7, 7)),
    "valid": (nn.Conv2d(8, 8, 3, padding="valid"), (8, 7, 7)),
    "reflect": (nn.Conv2d(8, 8, 3, padding=2, padding_mode="reflect"), (8, 7, 7)),
    "replicate": (nn.Conv1d(8, 8, 3, padding=2, padding_mode="replicate"), (8, 7)),
    "circular": (nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular"), (8, 7, 7)),
    "transposed1d": (nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1), (8, 9)),
    "transposed2d": (nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (12, 5, 4)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, stride=2), (4, 3, 2, 4)),
}

SCHEMES = {
    "int8_dynamic": hb.int8_dynamic(),
    "int8_weight_only": hb.int8_weight_only(),
    "int4_weight_only": hb.int4_weight_only(8),
    "int3_weight_only": hb.int_weight_only(3),
    "binary": hb.int_weight_only(1),
    "int4_int8_dynamic": hb.int4_int8_dynamic(8),
    "nf4": hb.nf4_weight_only(8),
    "bf16": hb.bf16(),
}
# Relative errors of one layer with random weights and inputs; a wrong order of inputs gives about 1.4.
LARGEST_ERROR = {"int8_dynamic": 0.02, "int8_weight_only": 0.01, "bf16": 0.01, "binary": 0.8, "int3_weight_only": 0.3}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    module, shape = KINDS[request.param]
    return nn.Sequential(copy.deepcopy(module)), torch.randn(2, *shape)


def quantized(model: nn.Module, scheme: hb.Scheme, **more: object) -> nn.Module:
    model = copy.deepcopy(model)
    hb.quantize_(model, scheme, progress=False, on_fallback="allow", **more)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_is_near_that_of_the_float_module(kind: tuple[nn.Module, Tensor], scheme: str) -> None:
    model, x = kind
    expected, got = model(x), quantized(model, SCHEMES[scheme])(x)
    assert got.shape == expected.shape
    assert (got - expected).norm() / expected.norm() < LARGEST_ERROR.get(scheme, 0.15)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only"])
def test_verify_finds_nothing(kind: tuple[nn.Module, Tensor], scheme: str) -> None:
    model, x = kind
    report = hb.verify(quantized(model, SCHEMES[scheme]), [x])
    report.raise_if_failed()
    (module,) = report.modules
    assert module.rows > 0
    assert (module.integers > 0) == (scheme == "int8_dynamic")


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only", "bf16"])
def test_files_bring_back_the_same_module(kind: tuple[nn.Module, Tensor], scheme: str, tmp_path: Path) -> None:
    model, x = kind
    saved = quantized(model, SCHEMES[scheme])
    hb.save(saved, tmp_path / "model.safetensors")
    skeleton = copy.deepcopy(model).to("meta")
    loaded = hb.load_(skeleton, tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), saved(x))
    assert torch.equal(loaded[0].weight, saved[0].weight)
    hb.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_a_file_of_another_convolution_is_refused(tmp_path: Path) -> None:
    saved = quantized(nn.Sequential(nn.Conv2d(8, 8, 3, stride=2)), hb.int8_dynamic())
    hb.save(saved, tmp_path / "model.safetensors")
    for other in (nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, (9, 1), stride=2), nn.Linear(72, 8), nn.Conv1d(8, 8, 9)):
        with pytest.raises(hb.FileFormatError, match="'0'"):
            hb.load_(nn.Sequential(other), tmp_path / "model.safetensors")


def test_inputs_without_a_batch(kind: tuple[nn.Module, Tensor]) -> None:
    model, x = kind
    model = quantized(model, hb.int8_dynamic())
    assert torch.equal(model(x[1]), model(x)[1])


def test_transposed_convolutions_take_an_output_size() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, stride=2))
    x = torch.randn(1, 8, 4, 4)
    for size in ([9, 9], [10, 9], [1, 8, 9, 10]):
        expected = model[0](x, output_size=size)
        got = quantized(model, hb.int8_dynamic())[0](x, output_size=size)
        assert (got - expected).norm() / expected.norm() < 0.02
    with pytest.raises(ValueError, match="output_size"):
        quantized(model, hb.int8_dynamic())[0](x, output_size=[12, 9])


def test_wrong_inputs_are_named() -> None:
    model = quantized(nn.Sequential(nn.Conv2d(8, 8, 3)), hb.int8_dynamic())
    for x in (torch.randn(2, 7, 5, 5), torch.randn(5, 5)):
        with pytest.raises(ValueError, match="C=8"):
            model(x)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only", "int4_int8_dynamic", "fp16"])
def test_plan_counts_the_bytes_that_conversion_leaves(scheme: str) -> None:
    chosen = hb.fp16() if scheme == "fp16" else SCHEMES[scheme]
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.ConvTranspose2d(32, 8, 2))
    plan = hb.plan(model, chosen)
    assert [row.shape for row in plan.rows] == [(32, 144), (32, 9), (8, 128)]
    assert all("conv" in row.kernel for row in plan.rows) or scheme == "fp16"
    report = hb.quantize_(model, plan, progress=False, on_fallback="allow")
    assert report.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    info = hb.kernel_info(model)
    assert {m.operator for m in info.modules} <= {"conv_int8", "conv_weight_only", "torch conv"}


def test_one_weight_in_two_convolutions_is_stored_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, dilation=2, padding=2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = Shared(), torch.randn(1, 8, 6, 6)
    expected = model(x)
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    assert model.a.qweight is model.b.qweight
    assert (model(x) - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "grouped", "dilated", "conv1d", "transposed2d", "reflect"])
@pytest.mark.parametrize("algorithm", [hb.MSE(), hb.GPTQ()], ids=["MSE", "GPTQ"])
def test_calibration_lowers_the_error_of_outputs(name: str, algorithm: hb.algorithms.Rounding) -> None:
    torch.manual_seed(0)
    module, shape = KINDS[name]
    model = nn.Sequential(copy.deepcopy(module))
    # Channels of unequal size. For GPTQ neighbouring taps see nearly the same, as in images; MSE takes them as independent.
    ones = (1 for _ in shape[1:])
    sizes = torch.linspace(0.1, 2, shape[0]).reshape(-1, *ones)
    x = torch.randn(16, *shape)
    if isinstance(algorithm, hb.GPTQ):
        x = x * 0.3 + torch.randn(16, shape[0], *(1 for _ in shape[1:]))
    x = x * sizes
    expected = model(x)

    def error(candidate: nn.Module) -> float:
        return float((candidate(x) - expected).norm() / expected.norm())

    plain = error(quantized(model, hb.int_weight_only(3, symmetric=True), algorithms=[hb.RTN()]))
    better = error(quantized(model, hb.int_weight_only(3, symmetric=True), algorithms=[algorithm], data=[x]))
    assert better < plain


def test_copies_and_casts() -> None:
    model = quantized(nn.Sequential(nn.Conv2d(8, 8, 3)), hb.int8_dynamic())
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half[0].scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_compiled_module_gives_the_same_bits() -> None:
    model = quantized(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)), hb.int8_dynamic())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_static_activations(kind: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, x = kind
    static = quantized(model, hb.int8_static(), data=[x, x * 0.9])
    expected = model(x)
    assert (static(x) - expected).norm() / expected.norm() < 0.03
    hb.verify(static, [x]).raise_if_failed()
    hb.save(static, tmp_path / "model.safetensors")
    loaded = hb.load_(copy.deepcopy(model).to("meta"), tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), static(x))
