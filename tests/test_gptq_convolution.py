"""GPTQ of convolutions: each group of channels has the Hessian of its own inputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.hessian import InputHessian

IMAGES = torch.randn(8, 12, 9, 9, generator=torch.Generator().manual_seed(0))
SCALES = torch.logspace(-1, 1, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]


def images(groups: int) -> list[Tensor]:
    """Neighbouring pixels are alike, each channel in another direction and of another size."""
    along, across = IMAGES.cumsum(-1), IMAGES.cumsum(-2)
    mixed = torch.where((torch.arange(12) * groups // 12 % 2 == 0)[None, :, None, None], along, across)
    return list((mixed * SCALES[None, :, None, None]).split(2))


def unfolded(module: nn.Conv2d, batches: list[Tensor]) -> Tensor:
    """`[groups, pixels, I]` float64 in the order (tap, channel), by torch's own unfolding."""
    x = torch.cat(batches).double()
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    split = columns.view(len(x), module.groups, x.shape[1] // module.groups, 9, -1)
    return split.permute(1, 0, 4, 3, 2).reshape(module.groups, -1, 9 * x.shape[1] // module.groups)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}])
def test_each_group_has_the_hessian_of_its_inputs(groups: int, options: dict[str, int]) -> None:
    module = nn.Conv2d(12, 24, 3, groups=groups, **options)  # type: ignore[arg-type]
    batches, inputs = images(groups), InputHessian("conv")
    for batch in batches:
        inputs(module, (batch,))
    rows = unfolded(module, batches)
    expected = rows.transpose(1, 2) @ rows / rows.shape[1]
    found = [each.matrix() for each in inputs.of_groups()]
    assert len(found) == groups
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(inputs.matrix(), expected.mean(0), rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("groups", [2, 12])
@pytest.mark.parametrize("algorithm", [hb.GPTQ(), hb.AWQ()], ids=lambda each: type(each).__name__)
def test_a_group_is_rounded_like_a_convolution_of_its_own(groups: int, algorithm: object) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(12, 24, 3, groups=groups))
    batches, scheme, codes = images(groups), hb.int_weight_only(3), []
    for group in range(groups):
        channels, outputs = 12 // groups, 24 // groups
        alone = nn.Sequential(nn.Conv2d(channels, outputs, 3))
        alone[0].weight.data = whole[0].weight.data[group * outputs : (group + 1) * outputs].clone()
        mine = [b[:, group * channels : (group + 1) * channels] for b in batches]
        hb.quantize_(alone, scheme, data=mine, algorithms=[algorithm], progress=False, on_fallback="allow")  # type: ignore[list-item]
        codes.append(alone[0].dequantize())
    hb.quantize_(whole, scheme, data=batches, algorithms=[algorithm], progress=False, on_fallback="allow")  # type: ignore[list-item]
    assert torch.equal(whole[0].dequantize(), torch.cat(codes))


def test_channels_of_their_own_lose_less_than_with_nearest_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 12, 3, groups=12))
    batches = images(12)
    wanted, errors = model(torch.cat(batches)), []
    for algorithm in (hb.MSE(weighting="none"), hb.GPTQ()):
        copied = copy.deepcopy(model)
        hb.quantize_(copied, hb.int_weight_only(3), data=batches, algorithms=[algorithm], progress=False)
        errors.append((copied(torch.cat(batches)) - wanted).square().mean((0, 2, 3)))
    assert float((errors[1] / errors[0]).mean()) < 0.7


def test_a_channel_that_is_always_zero_is_harmless() -> None:
    model = nn.Sequential(nn.Conv2d(12, 12, 3, groups=12))
    batches = [batch.clone() for batch in images(12)]
    for batch in batches:
        batch[:, 5] = 0
    hb.quantize_(model, hb.int_weight_only(3), data=batches, algorithms=[hb.GPTQ()], progress=False)
    assert torch.isfinite(model(IMAGES)).all()


def test_too_few_pixels_count_for_each_group() -> None:
    model = nn.Sequential(nn.Conv2d(12, 12, 3, groups=2))
    batch = IMAGES[:1, :, :7, :7]  # 25 outputs of 54 inputs each
    with pytest.raises(hb.QuantizationError, match=r"0: 25 tokens .* fewer than its 54 inputs; give at least 29 more"):
        hb.quantize_(model, hb.int_weight_only(3), data=[batch], algorithms=[hb.GPTQ()], progress=False)
