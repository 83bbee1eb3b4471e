"""`hb.algorithms.Rotation`: the stream is found, turned and proven; models it cannot turn are left alone, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
from test_folds import NORMS, TOKENS, decoder
from test_transforms import one_thread, same  # noqa: F401, the fixture runs by itself
from torch import nn

import halfbyte as hb
from halfbyte.algorithms import Rotation
from halfbyte.algorithms.rotation import orthogonal
from halfbyte.errors import QuantizationError

BATCHES = [torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def quantize(model: nn.Module, *algorithms: object, **options: object) -> hb.Report:
    options = {"data": BATCHES, "progress": False, "on_fallback": "allow"} | options
    return hb.quantize_(model, hb.int4_int8_dynamic(16), algorithms=algorithms, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["RMSNorm", "own", "own, less one"])
def test_a_stream_between_rms_norms_is_rotated(norm: str) -> None:
    original = decoder(NORMS[norm])
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name == "blocks.0.norm1.weight":
                parameter[:3] = 0.0  # a gain that cannot be divided out
    model = copy.deepcopy(original)
    (record,) = quantize(model, Rotation()).transforms
    assert not record.reason
    assert record.change is not None and 0 < record.change < 1e-5
    assert "Hadamard" in record.detail
    writers = record.detail.split("written by ")[1].split(", ")
    layers = [f"blocks.{i}.{name}" for i in range(2) for name in ("attention.o", "down")]
    assert writers == ["embed", *layers]
    (gain,) = model.get_submodule("blocks.0.norm2").parameters()
    assert bool((gain == float(norm != "own, less one")).all())


def test_outlying_channels_of_the_stream_are_spread() -> None:
    original = decoder(nn.RMSNorm)
    with torch.no_grad():
        for block in original.blocks:
            block.norm1.weight[2:4] *= 200.0  # type: ignore[union-attr, operator, index]
            for part in (block.attention.q, block.attention.k, block.attention.v):  # type: ignore[union-attr]
                part.weight[:, 2:4] /= 200.0
    errors = []
    for algorithms in ((), (Rotation(),), (Rotation(), hb.GPTQ())):
        model = copy.deepcopy(original)
        quantize(model, *algorithms)
        with torch.no_grad():
            errors.append((model(TOKENS) - original(TOKENS)).norm().item())
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[0]


def test_layer_norm_is_not_rotated() -> None:
    model = decoder(nn.LayerNorm)
    report = quantize(model, Rotation())
    (record,) = report.transforms
    assert "no RMSNorm" in record.reason
    assert [f.kind for f in report.fallbacks] == ["transform"]


def test_a_layer_norm_without_bias_is_not_rotated() -> None:
    (record,) = quantize(decoder(lambda width: nn.LayerNorm(width, bias=False)), Rotation()).transforms
    assert "does not commute with a rotation" in record.reason


def test_16_bit_weights_are_not_rotated() -> None:
    (record,) = quantize(decoder(nn.RMSNorm).to(torch.bfloat16), Rotation()).transforms
    assert "model.float()" in record.reason


def test_a_tied_head_is_refused_with_its_bytes_and_the_remedy() -> None:
    model = decoder(nn.RMSNorm, tied=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match=r"shares its weight with .*6\.40 kB more"):
        quantize(model, Rotation())
    assert same(model, before)


def test_a_model_without_norms_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    (record,) = quantize(model, Rotation(), data=[torch.randn(8, 32)]).transforms
    assert "no norm is read by linear layers alone" in record.reason


@pytest.mark.parametrize("width", [1, 64, 12, 172])
def test_matrices_are_orthogonal_and_follow_the_seed(width: int) -> None:
    matrix = orthogonal(width, 3)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, orthogonal(width, 3))
    assert width == 1 or not torch.equal(matrix, orthogonal(width, 4))
