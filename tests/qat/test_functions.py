"""Products of fake-quantized operands: values and gradients are autograd's, and less is saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte.convolution import ConvGeometry
from halfbyte.qat.affine import Affine
from halfbyte.qat.folded_weight import FoldedWeight
from halfbyte.qat.functions import ConvProduct, LinearProduct, fake_quantized_product


def affine(bits: int, scale: float, zero_point: int = 0, **options: object) -> Affine:
    qmin = 0 if zero_point else -(1 << (bits - 1))
    return Affine(torch.tensor(scale), torch.tensor(zero_point), qmin, qmin + (1 << bits) - 1, **options)


def per_row(weight: Tensor) -> Affine:
    scale = weight.detach().abs().amax(1, keepdim=True) / 9  # some values are clipped
    return Affine(scale, torch.zeros_like(scale, dtype=torch.int32), -8, 7, group_size=weight.shape[1])


def gradients(y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return torch.autograd.grad((y * weights).sum(), tensors)


def test_linear_has_the_values_and_gradients_of_autograd() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 3, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    b = torch.randn(5, requires_grad=True)
    of_x, of_w = affine(8, 0.01, 100), per_row(w)
    y = fake_quantized_product(LinearProduct(), x, w, b, of_x, of_w)
    expected = F.linear(of_x(x), of_w(w), b)
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(gradients(y, x, w, b), gradients(expected, x, w, b), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("unfold", [False, True])
def test_conv_has_the_values_and_gradients_of_autograd(
    transposed: bool, memory_format: torch.memory_format, unfold: bool
) -> None:
    torch.manual_seed(0)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(8, 6, 3, stride=2, padding=1, groups=2)
    geometry = ConvGeometry.of(layer)
    x = torch.randn(2, 8, 9, 7).to(memory_format=memory_format).requires_grad_()
    factor = torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0, 0.1], requires_grad=not unfold)
    matrix = geometry.weight_matrix(layer.weight) * factor[:, None]
    fake = FoldedWeight(per_row(matrix), geometry, factor, unfold=unfold)
    of_x = affine(8, 0.01, 100)
    y = fake_quantized_product(ConvProduct(geometry), x, layer.weight, layer.bias, of_x, fake)
    expected = geometry.convolve(of_x(x), fake(layer.weight), layer.bias)
    torch.testing.assert_close(y, expected)
    trained = [x, layer.weight, layer.bias] + ([] if unfold else [factor])
    for found, wanted in zip(gradients(y, *trained), gradients(expected, *trained), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    y = fake_quantized_product(ConvProduct(geometry), x, layer.weight, None, of_x, fake)
    (of_input,) = gradients(y, x)
    assert of_input.is_contiguous(memory_format=memory_format)


def test_per_sample_scales_keep_the_memory_format() -> None:
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    fake = hb.qat.activation_quantizer(hb.int8_dynamic().activation, per_sample=True).fake(x)
    y = fake(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    scale = x.abs().amax((1, 2, 3)) / 127
    expected = torch.stack([torch.round(s / k) * k for s, k in zip(x, scale, strict=True)])
    torch.testing.assert_close(y, expected)


def test_nothing_is_saved_beside_what_is_alive() -> None:
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fake_quantized_product(LinearProduct(), x, w, None, affine(8, 0.01), per_row(w))
    alive = {x.data_ptr(), w.data_ptr()}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in alive) <= 16 * 8 + 16  # qparams


def test_second_derivatives_are_refused() -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8)
    y = fake_quantized_product(LinearProduct(), x, w, None, affine(8, 0.01), None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
