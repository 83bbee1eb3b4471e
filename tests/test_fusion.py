"""fuse_: what is folded is found by running the model, the output stays, and what cannot be folded says why."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch normalizations with statistics and gains that are not the trivial ones, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for tensor in (module.running_mean, module.weight, module.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.1)
    return model.eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: nn.BatchNorm2d(6), (2, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed in groups": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), lambda: nn.BatchNorm1d(6), (2, 4, 5)),
    "linear": (lambda: nn.Linear(4, 6, bias=False), lambda: nn.BatchNorm1d(6), (5, 4)),
    "no gain": (lambda: nn.Conv2d(4, 6, 1), lambda: nn.BatchNorm2d(6, affine=False), (2, 4, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_take_in_the_normalization_that_follows(name: str) -> None:
    torch.manual_seed(0)
    layer, norm, shape = LAYERS[name]
    model = nn.Sequential(layer(), norm(), nn.ReLU())
    model = with_statistics(model) if name != "no gain" else model.eval()
    x = torch.randn(shape)
    expected = model(x)
    report = hb.fuse_(model, x)
    assert report.fused == (hb.fusion.FusedLayer("0", "1", "ReLU"),)
    assert report.kept == {}
    assert isinstance(model[1], hb.nn.FoldedBatchNorm)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert report.change < 1e-5
    assert "folded" in str(report)


class Functional(nn.Module):
    """A residual block written with functional ops, modules declared in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.second_norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first_norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.first_norm(self.first(x)))
        return F.relu6(x + self.second_norm(self.second(x)))


def test_order_is_that_of_the_run_not_of_the_names() -> None:
    model = with_statistics(Functional())
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    report = hb.fuse_(model, x)
    assert {(row.layer, row.batch_norm, row.activation) for row in report.fused} == {
        ("first", "first_norm", "ReLU"),
        ("second", "second_norm", ""),
    }
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class Case(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.other = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)


class FedElsewhere(Case):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class ReadInPlace(Case):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0] += 1
        return self.bn(y)


class Returned(Case):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class SharedNorm(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.other(self.bn(self.conv(x))))


class SharedConv(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.conv(x)))


class BetweenThem(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(torch.tanh(self.conv(x)))


class OnInput(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x))


class NotReached(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Tied(Case):
    def __init__(self) -> None:
        super().__init__()
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.other(x)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (FedElsewhere, "the output of conv is also read by"),
        (ReadInPlace, "the output of conv is changed in place"),
        (Returned, "the output of conv is also read by output"),
        (SharedNorm, "it is shared: it runs 2 times"),
        (SharedConv, "conv is shared: it runs 2 times"),
        (BetweenThem, "it follows tanh"),
        (OnInput, "it reads an input of the model"),
        (NotReached, "the example does not reach it"),
        (Tied, "the weight of conv is shared with other"),
    ],
)
def test_what_cannot_be_folded_stays_and_says_why(case: type[nn.Module], reason: str) -> None:
    model = with_statistics(case())
    before = copy.deepcopy(model.state_dict())
    report = hb.fuse_(model, torch.randn(2, 4, 5, 5))
    assert list(report.kept) == ["bn"]
    assert re.search(reason, report.kept["bn"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_normalization_in_training_mode_stays_and_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(model.state_dict())
    report = hb.fuse_(model, torch.randn(2, 3, 5, 5))
    assert "training mode" in report.kept["1"]
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    stateless = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert "no running statistics" in hb.fuse_(stateless, torch.randn(2, 3, 5, 5)).kept["1"]


def test_a_sequence_of_linear_layers_is_normalized_over_another_dimension() -> None:
    model = with_statistics(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    report = hb.fuse_(model, torch.randn(2, 6, 6))
    assert "does not normalize the features of 0" in report.kept["1"]


class Conditional(Case):
    """Reads the shape of a tensor and a number from it: the first is no use of its numbers, the second is."""

    def forward(self, x: Tensor, look: bool) -> Tensor:
        y = self.conv(x)
        if look and y.mean().item() > 1e9:
            return y
        return self.bn(y.contiguous()).view(y.shape[0], y.size(1), -1)


def test_reading_a_shape_is_no_use_and_reading_a_number_is() -> None:
    x = torch.randn(2, 4, 5, 5)
    assert hb.fuse_(with_statistics(Conditional()), (x, False)).kept == {}
    assert "also read by mean" in hb.fuse_(with_statistics(Conditional()), {"x": x, "look": True}).kept["bn"]


def test_changed_outputs_put_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(hb.fusion, "_LARGEST_CHANGE", -1.0)
    report = hb.fuse_(model, torch.randn(2, 3, 5, 5))
    assert "put back" in report.kept["1"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failing_example_leaves_the_model_as_it_was() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(RuntimeError):
        hb.fuse_(model, torch.randn(2, 7, 5, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(model[1], nn.BatchNorm2d)


def test_quantized_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    with pytest.raises(hb.QuantizationError, match="fuse the float model"):
        hb.fuse_(model, torch.randn(2, 8))


def fused() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def test_a_file_of_a_fused_model_loads_into_the_model_as_it_was_built(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = with_statistics(fused())
    x = torch.randn(5, 8)
    hb.fuse_(model, x)
    hb.quantize_(model, hb.int8_static(), [x], progress=False)
    hb.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        skeletons = [fused().eval(), copy.deepcopy(model)[:0]]
    for skeleton in (fused().eval(), skeletons[0]):
        loaded = hb.load_(skeleton, tmp_path / "m.safetensors")
        assert torch.equal(loaded(x), model(x))
        assert isinstance(loaded[1], hb.nn.FoldedBatchNorm)
    assert hb.verify(model, [x]).ok


def test_a_model_that_cannot_be_folded_alike_is_refused(tmp_path: Path) -> None:
    model = with_statistics(fused())
    hb.fuse_(model, torch.randn(5, 8))
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    hb.save(model, tmp_path / "m.safetensors")
    other = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(hb.FileFormatError, match="'1'"):
        hb.load_(other, tmp_path / "m.safetensors")
    assert other[0].bias is None
    wider = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    with pytest.raises(hb.FileFormatError):
        hb.load_(wider, tmp_path / "m.safetensors")
    assert wider[0].bias is None
    assert isinstance(wider[1], nn.BatchNorm1d)
