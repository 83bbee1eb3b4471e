"""`hb.lower`: outputs equal to the converted model's bit for bit, what the report says, copies, and bad input."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmarks.models import backbones, vision
from torch import Tensor, nn

import halfbyte as hb


def images(batch: int = 4, channels: int = 3, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, x: Tensor, scheme: hb.Scheme | None = None) -> nn.Module:
    hb.quantize_(model.eval(), scheme or hb.int8_static(), [x], progress=False)
    return model


@torch.no_grad()
def assert_equal_bits(model: nn.Module, lowered: nn.Module, x: Tensor, batches: tuple[int, ...] = (1, 3)) -> None:
    for batch in batches:
        part = torch.cat([x] * batch)[:batch]
        assert torch.equal(lowered(part), model(part)), f"batch of {batch}"


class Op(nn.Module):
    """Convolution, what is tested, convolution."""

    def __init__(self, between: Callable[[Tensor], Tensor], out: int = 8, **options: int) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3, padding=1), between
        self.second = nn.Conv2d(out, 5, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.between(self.first(x)))
        return y


def both(x: Tensor) -> Tensor:
    return torch.cat([F.relu(x), F.max_pool2d(x, 3, 1, 1)], 1)


INTEGER: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "nothing": (lambda x: x, 8),
    "relu": (F.relu, 8),
    "relu6": (F.relu6, 8),
    "hardtanh": (lambda x: F.hardtanh(x, -0.3, 0.4), 8),
    "clamp": (lambda x: x.clamp(min=-0.2), 8),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), 8),
    "hardswish": (F.hardswish, 8),
    "hardsigmoid": (F.hardsigmoid, 8),
    "relu after relu6": (lambda x: F.relu(F.hardtanh(x, -1, 1)), 8),
    "dropout": (nn.Dropout(0.5).eval(), 8),
    "maximum": (lambda x: F.max_pool2d(x, 3, 2, 1), 8),
    "maximum, ceil": (lambda x: F.max_pool2d(F.relu(x), 2, 3, 1, ceil_mode=True), 8),
    "maximum, dilated": (lambda x: F.max_pool2d(x, 2, 1, dilation=2), 8),
    "average": (lambda x: F.avg_pool2d(F.relu(x), 3, 2, 1), 8),
    "average without padding": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), 8),
    "concatenation": (both, 16),
    "of itself": (lambda x: torch.cat([x, x], 1), 16),
    "residual": (lambda x: F.relu(x + F.max_pool2d(x, 3, 1, 1)), 8),
    "twice itself": (lambda x: x + x, 8),
    "padding": (lambda x: F.pad(x, (0, 1, 2, 0)), 8),
    "cropping": (lambda x: F.pad(x, (-1, 0, 0, -2)), 8),
    "slices": (lambda x: x[:, 2:6, ::2, 1:], 4),
    "padded channels": (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 4)), 15),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), 8),
    "nearest, odd": (lambda x: F.interpolate(x, size=(13, 21)), 8),
}


@pytest.mark.parametrize("name", INTEGER)
def test_integers_pass(name: str) -> None:
    torch.manual_seed(0)
    between, out = INTEGER[name]
    model = converted(Op(between, out), images())
    lowered = hb.lower(model, images())
    assert not lowered.report.floats, lowered.report
    assert lowered.report.programs == 1
    assert_equal_bits(model, lowered, images(seed=1))


FLOAT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "silu": (F.silu, "last bits are torch's own"),
    "sigmoid": (torch.sigmoid, "last bits are torch's own"),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, 7), "order that is torch's own"),
    "product": (lambda x: x * 0.5, "no integer form"),
    "sum with a number": (lambda x: x + 1, "not two tensors of one shape"),
    "reflection": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "does not pad with zeros"),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "no integer form"),
    "steep leaky relu": (lambda x: F.leaky_relu(x, 1.5), "negative_slope=1.5"),
}


@pytest.mark.parametrize("name", FLOAT)
def test_unknown_operators_stay_and_are_listed(name: str) -> None:
    torch.manual_seed(0)
    between, reason = FLOAT[name]
    model = converted(Op(between), images())
    lowered = hb.lower(model, images())
    assert any(reason in node.reason for node in lowered.report.floats), lowered.report
    assert sum(node.kind == "integer" for node in lowered.report.nodes) == 2
    assert reason in str(lowered.report)
    for x in (images(seed=1), images(seed=1).contiguous(memory_format=torch.channels_last)):
        assert_equal_bits(model, lowered, x.contiguous())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_layouts(layout: torch.memory_format, bits: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(12, 24, 3, groups=12), nn.ReLU()
    )
    model.append(nn.AdaptiveAvgPool2d(2)).append(nn.Conv2d(24, 6, 1))
    converted(model, images(), hb.int8_static() if bits == 8 else hb.int4_int8_static())
    example = images().contiguous(memory_format=layout)
    lowered = hb.lower(model, example)
    assert_equal_bits(model, lowered, images(seed=3).contiguous(memory_format=layout))


def test_one_value_in_several_forms() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.relu(self.first(x))
            a, b = self.a(y), self.b(y + 0 * y)
            return self.c(F.relu(a + y)) + b, y

    torch.manual_seed(0)
    model = Model().eval()
    hb.prepare_(model, hb.int8_static())
    hb.calibrate(model, [images()], progress=False)
    hb.convert_(model, progress=False)
    model.a.act_scale.mul_(1.5)
    lowered = hb.lower(model, images())
    with torch.no_grad():
        for found, expected in zip(lowered(images(2)), model(images(2)), strict=True):
            assert torch.equal(found, expected)


class Perceptron(nn.Module):
    """Linear layers on images, on rows and on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)
        self.first, self.second, self.last = nn.Linear(128, 40), nn.Linear(40, 40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = F.relu(self.mix(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2).flatten(1)
        x = F.relu(self.first(x))
        return self.last(F.hardtanh(self.second(x) + x))


def test_linear_layers() -> None:
    torch.manual_seed(0)
    model = converted(Perceptron(), images())
    lowered = hb.lower(model, images())
    assert not lowered.report.floats, lowered.report
    assert_equal_bits(model, lowered, images(seed=1))


def test_convolutions_over_one_and_three_dimensions() -> None:
    torch.manual_seed(0)
    for conv, pool, size in ((nn.Conv1d, nn.MaxPool1d, (30,)), (nn.Conv3d, nn.MaxPool3d, (6, 7, 8))):
        x = torch.randn(2, 3, *size)
        model = converted(nn.Sequential(conv(3, 6, 3), nn.ReLU(), pool(2), conv(6, 4, 2)), x)
        lowered = hb.lower(model, x)
        assert not lowered.report.floats
        assert_equal_bits(model, lowered, x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2": lambda: backbones.MobileNetV2(0.25, 10),
    "ResNet-50": lambda: backbones.ResNet50(8, 10),
    "U-Net": lambda: backbones.UNet(8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    x = images(4, size=48)
    model = backbones.backbone(NETWORKS[name], x)
    hb.fuse_(model, x)
    converted(model, x)
    lowered = hb.lower(model, x[:1])
    assert {node.operator for node in lowered.report.floats} <= {
        "aten.adaptive_avg_pool2d",
        "aten.flatten.using_ints",
        "aten.dropout",
    }
    assert lowered.report.programs <= 2
    assert_equal_bits(model, lowered, images(4, size=48, seed=1), (1, 4))


@pytest.mark.parametrize("name", vision.NAMES)
def test_trained_networks(shared_data: Path, name: str) -> None:
    data = vision.load_data(shared_data, name, images=5, calibration=8)
    model = vision.load_float(shared_data, name)
    hb.fuse_(model, data.calibration[:2])
    converted(model, data.calibration)
    lowered = hb.lower(model, data.calibration[:2])
    assert {node.operator for node in lowered.report.floats} <= {"aten.mean.dim", "aten.pad"}
    assert_equal_bits(model, lowered, data.images, (1, 5))


def test_every_level(level: str) -> None:
    torch.manual_seed(0)
    model = converted(backbones.UNet(8), images())
    assert_equal_bits(model, hb.lower(model, images()), images(), (2,))


def test_every_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    model = converted(Op(both, 16), images(size=40))
    assert_equal_bits(model, hb.lower(model, images(size=40)), images(size=40), (2,))


def test_the_model_stays_and_shares_its_weights() -> None:
    model = converted(Op(F.relu), images())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lowered = hb.lower(model, images())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    pointers = {tensor.data_ptr() for tensor in lowered.state_dict().values()}
    assert {model.first.qweight.data_ptr(), model.second.qweight.data_ptr(), model.first.bias.data_ptr()} <= pointers


def test_copies_pickles_and_compiles() -> None:
    torch.manual_seed(0)
    model = converted(Op(F.silu), images())
    lowered = hb.lower(model, images())
    file = io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    for other in (copy.deepcopy(lowered), torch.load(file, weights_only=False)):
        assert_equal_bits(model, other, images(seed=1))
        assert str(other.report) == str(lowered.report)
    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    assert_equal_bits(model, compiled, images(seed=1))


def test_operator() -> None:
    model = converted(Op(F.relu), images())
    (program,) = (m for m in hb.lower(model, images()).modules() if type(m).__name__ == "Program")
    constants = [program._buffers[name] for name in program._names]
    arguments = ([images(2)], constants, program.steps, program.numbers, program.arena, program.outputs)
    torch.library.opcheck(torch.ops.halfbyte.run_program.default, arguments)


def test_damaged_programs_are_errors() -> None:
    model = converted(Op(both, 16), images())
    (program,) = (m for m in hb.lower(model, images()).modules() if type(m).__name__ == "Program")
    constants = [program._buffers[name] for name in program._names]
    generator = torch.Generator().manual_seed(0)
    damaged = [program.steps[:end] for end in range(len(program.steps))]
    for _ in range(300):
        steps = program.steps.clone()
        at = int(torch.randint(len(steps), (1,), generator=generator))
        steps[at] = int(torch.randint(-3, 3000, (1,), generator=generator)) << int(steps[at] % 3 * 20)
        damaged.append(steps)
    for steps in damaged:
        try:  # what still fits may run
            hb.ops.run_program(
                [images(1)], constants, steps, program.numbers, arena=program.arena, outputs=program.outputs
            )
        except RuntimeError as error:
            assert str(error)


def test_empty_batch_and_fixed_batch() -> None:
    model = converted(Op(F.relu), images())
    assert hb.lower(model, images())(images(0)).shape == (0, 5, 14, 14)
    fixed = hb.lower(model, images(3), dynamic_batch=False)
    assert torch.equal(fixed(images(3)), model(images(3)))


def test_keyword_arguments_and_nested_results() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, shift: Tensor, *, again: bool = False) -> dict[str, object]:
            y = F.relu(self.first(x)) + shift
            return {"y": [self.second(y)], "again": again}

    x, shift = torch.randn(4, 8), torch.randn(4, 8)
    model = Model().eval()
    hb.quantize_(model, hb.int8_static(), [(x, shift)], progress=False)
    lowered = hb.lower(model, {"x": x, "shift": shift, "again": True})
    found = lowered(x=x[:2], shift=shift[:2], again=True)
    assert found["again"] is True
    assert torch.equal(found["y"][0], model(x[:2], shift[:2])["y"][0])
    with pytest.raises(ValueError, match="lowered for True"):
        lowered(x=x, shift=shift, again=False)


def test_bad_input_to_lower() -> None:
    model = converted(Op(F.relu), images())
    with pytest.raises(TypeError, match=r"give an nn\.Module"):
        hb.lower("model", images())
    with pytest.raises(hb.QuantizationError, match=r"has no layer with static INT8"):
        hb.lower(nn.Linear(4, 4).eval(), torch.ones(1, 4))
    with pytest.raises(hb.QuantizationError, match=r"first .* is in training mode"):
        trained = copy.deepcopy(model)
        trained.first.train()
        hb.lower(trained, images())
    with pytest.raises(TypeError, match="example_inputs is a int"):
        hb.lower(model, 3)
    with pytest.raises(hb.QuantizationError, match="does not run on example_inputs"):
        hb.lower(model, torch.ones(2, 5))
    with pytest.raises(hb.QuantizationError, match="empty batch"):
        hb.lower(model, images(0))
    with pytest.raises(hb.QuantizationError, match="meta device"):
        hb.lower(copy.deepcopy(model).to("meta"), images())


def test_models_that_cannot_be_traced() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    model = Branch().eval()
    hb.quantize_(model, hb.int8_static(), [torch.ones(2, 8)], progress=False)
    with pytest.raises(hb.QuantizationError, match=r"torch.export cannot trace the model \("):
        hb.lower(model, torch.ones(2, 8))


def test_bad_input_to_a_lowered_model() -> None:
    lowered = hb.lower(converted(Op(F.relu), images()), images())
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 9, 9\); the model was lowered for \[N, 3, 16, 16\]"):
        lowered(images(2, size=9))
    with pytest.raises(TypeError, match=r"dtype torch\.float64"):
        lowered(images().double())
    with pytest.raises(TypeError, match="lowered for"):
        lowered(images(), images())
    with pytest.raises(RuntimeError, match="no gradients"):
        lowered(images().requires_grad_())
    with pytest.raises(RuntimeError, match="inference only"):
        lowered.train()
