"""AdaRound: the output error it leaves, against nearest rounding, GPTQ and all roundings of a small layer."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.hessian import InputHessian


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    return (torch.randn(rows, features, generator=generator) @ mix).relu()


def rounded_error(codes: hb.nn.WeightCodes, weight: Tensor, x: Tensor) -> Tensor:
    return ((codes.dequantize(weight.shape[1]) - weight) @ x.T).square().sum(1)


@pytest.mark.parametrize("weight_format", [hb.IntFormat(bits=3), hb.IntFormat(bits=2, symmetric=False)], ids=str)
def test_rounding_is_near_the_best_of_all_up_and_down_choices(weight_format: hb.IntFormat) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(4, 8), correlated(200, 8)
    inputs = InputHessian("layer")
    inputs.update(x)
    rounded = hb.algorithms.AdaRound().round_layer("layer", weight, weight_format, inputs).codes
    zero = 0 if rounded.zero_point is None else rounded.zero_point.float()
    below = torch.floor(weight / rounded.scale + zero)
    best = torch.full((4,), torch.inf)
    for choice in product((0, 1), repeat=8):
        codes = torch.clamp(below + torch.tensor(choice), weight_format.qmin, weight_format.qmax)
        error = (((codes - zero) * rounded.scale - weight) @ x.T).square().sum(1)
        best = torch.minimum(best, error)
    found, nearest = rounded_error(rounded, weight, x), hb.MSE().round(weight, weight_format, inputs.mean_square)
    assert (found <= best * 1.3).all()
    assert (found <= rounded_error(nearest, weight, x) * (1 + 1e-5)).all()


def test_output_error_is_below_that_of_nearest_rounding_on_other_data() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    data, x = list(correlated(1024, 32).split(64)), correlated(256, 32, seed=0).flip(0)
    errors = {}
    for name, algorithm in (("nearest", hb.MSE()), ("adaround", hb.algorithms.AdaRound(steps=200))):
        quantized = copy.deepcopy(model)
        hb.quantize_(quantized, hb.int4_int8_static(), data, [algorithm], progress=False)
        errors[name] = (quantized(x) - model(x)).norm().item()
    assert errors["adaround"] < 0.85 * errors["nearest"]


def test_the_same_data_gives_the_same_bits() -> None:
    codes = []
    for _ in range(2):
        torch.manual_seed(len(codes))
        model = nn.Sequential(nn.Linear(16, 8))
        nn.init.constant_(model[0].weight, 0.1)
        with torch.no_grad():
            model[0].weight.add_(torch.arange(128.0).view(8, 16).sin())
        algorithm = hb.algorithms.AdaRound(steps=50)
        hb.quantize_(model, hb.int4_int8_static(), [correlated(64, 16)], [algorithm], progress=False)
        codes.append(model[0].qweight)
    assert torch.equal(*codes)


@pytest.mark.parametrize("option", ["steps", "learning_rate", "regularization"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}=0 is not positive"):
        hb.algorithms.AdaRound(**{option: 0})


def test_data_is_needed() -> None:
    with pytest.raises(hb.QuantizationError, match="AdaRound"):
        hb.quantize_(nn.Sequential(nn.Linear(8, 8)), hb.int4_int8_dynamic(8), algorithms=[hb.algorithms.AdaRound()])
