"""Layers that train with fake-quantized weights and inputs, and evaluate with the integers that they will be converted to.

Each is a subclass of the layer whose place it takes and holds that layer's very parameters. In evaluation mode it runs its
*inference form*: the quantized module that `convert_` would put there, made anew when anything it depends on has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.building import quantized_module
from halfbyte.convolution import CONV_TYPES, ConvGeometry, ConvModule
from halfbyte.errors import QuantizationError
from halfbyte.formats import FloatFormat
from halfbyte.nn.packed_weight import PackedWeight, WeightPacker
from halfbyte.nn.trained_parts import with_value
from halfbyte.ops import Layout
from halfbyte.qat.batchnorm import QATBatchNorm, safe_divisor, taken_over
from halfbyte.qat.folded_weight import FoldedWeight, as_matrix
from halfbyte.qat.functions import ConvProduct, FakeQuantize, LinearProduct, fake_quantized_product
from halfbyte.qat.quantizer_base import ActivationQuantizer, WeightQuantizer, recomputing
from halfbyte.qat.switches import Switches
from halfbyte.schemes import Scheme

Fn = TypeVar("Fn", bound=Callable[..., Any])
_CACHE = "_inference"


def _not_compiled(function: Fn) -> Fn:
    reason = "integers are made anew where weights have changed: compile the converted model for evaluation"
    return cast(Fn, torch.compiler.disable(function, reason=reason))  # type: ignore[no-untyped-call]


class QATModule(Switches):
    """Base of the layers. Switches: `weights` and `activations`, whether each is fake-quantized.

    Attributes:
        name: Qualified name, for messages.
        scheme: What the layer is converted to.
        layout: Layout of the packed weight.
        weight_quantizer, input_quantizer: Where the scales come from; no input quantizer where activations stay in float.
    """

    name: str
    scheme: Scheme
    layout: Layout
    weight_quantizer: WeightQuantizer
    input_quantizer: nn.Module | None
    _batch_norm: tuple[
        QATBatchNorm, ...
    ]  # at most one; in a tuple, since it is a child of another module and not of this one

    @classmethod
    def of(
        cls,
        old: nn.Module,
        name: str,
        scheme: Scheme,
        layout: Layout,
        weight_quantizer: WeightQuantizer,
        input_quantizer: nn.Module | None,
        batch_norm: QATBatchNorm | None = None,
    ) -> QATModule:
        """One that takes the place of a float layer and holds its parameters."""
        module = cast(QATModule, taken_over(cls, old))
        module.add_switches(weights=True, activations=True)
        module.name, module.scheme, module.layout = name, scheme, layout
        module.weight_quantizer, module.input_quantizer = weight_quantizer, input_quantizer
        module._batch_norm = () if batch_norm is None else (batch_norm,)
        return module

    @property
    def batch_norm(self) -> QATBatchNorm | None:
        """The batch normalization that is folded into this layer."""
        return self._batch_norm[0] if self._batch_norm else None

    @property
    def master_weight(self) -> nn.Parameter:
        """The weight in floating point, which is what trains."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def own_bias(self) -> nn.Parameter | None:
        """The layer's bias; an embedding has none."""
        return self._parameters.get("bias")

    @property
    def geometry(self) -> ConvGeometry | None:
        """Of a convolution, else None."""
        return None

    @property
    def quantizes(self) -> bool:
        """Whether all that the scheme quantizes is fake-quantized now."""
        return self.on("weights") and (self.input_quantizer is None or self.on("activations"))

    @property
    def activations(self) -> ActivationQuantizer | None:
        """The input quantizer."""
        return cast("ActivationQuantizer | None", self.input_quantizer)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """The weight's matrix `[O, I]` and the bias, batch normalization folded in; differentiable."""
        matrix, bias, norm = as_matrix(self.master_weight, self.geometry), self.own_bias, self.batch_norm
        if norm is None:
            return matrix, bias
        factor, shift = norm.fold()
        return matrix * factor[:, None], shift if bias is None else bias * factor + shift

    def converted(self, packed: PackedWeight | nn.Parameter | None = None) -> nn.Module:
        """The quantized module with the integers of this moment.

        Args:
            packed: Weight to share, of another module that holds the same one.

        Raises:
            QuantizationError: the range of a static input is not known.
        """
        with torch.no_grad():
            activation = None if self.activations is None else self.activations.qparams()
            matrix, bias = self.folded()
            weight_format = self.scheme.weight
            if isinstance(weight_format, FloatFormat):
                weight = matrix if self.geometry is None else self.geometry.weight_of(matrix)
                packed = packed or nn.Parameter(weight.to(weight_format.dtype), requires_grad=False)
            elif packed is None:
                packer = WeightPacker(weight_format, self.layout, (matrix.shape[0], matrix.shape[1]))
                packer.add(self.weight_quantizer.codes(matrix))
                packed = packer.packed()
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias.to(self.master_weight.dtype), requires_grad=False)
        return quantized_module(self, self.scheme, packed, bias, activation).eval()

    @_not_compiled
    def inference_form(self) -> nn.Module:
        """What evaluation runs; itself where it trains or is not quantized now.

        Raises:
            QuantizationError: as `converted`, or batch normalization is in training mode while this layer is not.
        """
        if self.training or not self.quantizes:
            return self
        norm = self.batch_norm
        if norm is not None and not norm.folded:
            raise QuantizationError(
                f"{self.name} is in evaluation mode and the batch normalization folded into it is not: call eval() or "
                "train() on the whole model"
            )
        # Compared by value: writes through .data leave no other trace.
        now = [*self.parameters(), *self.buffers(), *(() if norm is None else (*norm.parameters(), *norm.buffers()))]
        cached: tuple[list[Tensor], nn.Module] | None = self.__dict__.get(_CACHE)
        if cached is None or not all(map(torch.equal, cached[0], now)):
            cached = ([tensor.detach().clone() for tensor in now], self.converted())
            self.__dict__[_CACHE] = cached
        return cached[1]

    def train(self, mode: bool = True) -> QATModule:
        """As `nn.Module.train`; the integers of an earlier evaluation are forgotten."""
        self.__dict__.pop(_CACHE, None)
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _CACHE}

    def _forward(self, *args: Any) -> Tensor:
        """Either form."""
        if self.training or not self.quantizes:
            return self.fake_quantized(*args)
        return self._evaluated(*args)

    @_not_compiled
    def _evaluated(self, *args: Any) -> Tensor:
        """The inference form; with gradients, its value and the gradient of the differentiable one."""
        form = self.inference_form()
        tensors = [*self.parameters(), *(a for a in args if isinstance(a, Tensor))]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
            return cast(Tensor, form(*args))
        with torch.no_grad():
            value: Tensor = form(*args)
        return with_value(self.fake_quantized(*args), value)

    def fake_quantized(self, *args: Any) -> Tensor:
        """The differentiable form."""
        raise NotImplementedError

    def _input_fake(self, x: Tensor) -> FakeQuantize | None:
        if self.activations is None:
            return None
        fake = self.activations.fake(x)
        return fake if self.on("activations") else None

    def _weight_and_bias(self) -> tuple[FakeQuantize | None, Tensor | None]:
        """What happens to the weight, and the bias of the product."""
        norm = self.batch_norm
        if norm is None:
            if not self.on("weights"):
                return None, self.own_bias
            fake = self.weight_quantizer.fake(as_matrix(self.master_weight, self.geometry))
            return (fake if self.geometry is None else FoldedWeight(fake, self.geometry)), self.own_bias
        if norm.folded:
            factor, shift = norm.fold()
            bias = shift if self.own_bias is None else self.own_bias * factor + shift
            return self._folded_fake(factor, unfold=False), bias
        if not self.on("weights"):
            return None, self.own_bias
        factor = safe_divisor(norm.fold()[0].detach())
        if recomputing():  # the statistics have moved since the first forward, whose weight this must be
            factor = self.__dict__.get("_factor", factor)
        elif not torch.compiler.is_compiling():
            self.__dict__["_factor"] = factor
        return self._folded_fake(factor, unfold=True), self.own_bias

    def _folded_fake(self, factor: Tensor, *, unfold: bool) -> FoldedWeight:
        fake: FakeQuantize = _Identity()
        if self.on("weights"):
            matrix = as_matrix(self.master_weight, self.geometry).detach() * factor.detach()[:, None]
            fake = self.weight_quantizer.fake(matrix)
        return FoldedWeight(fake, self.geometry, factor, unfold)

    def extra_repr(self) -> str:
        """Sizes and scheme, for `print(model)`."""
        return f"{super().extra_repr()}, {self.scheme}"


class QATLinear(QATModule, nn.Linear):
    """`nn.Linear` in training for `QuantizedLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return self._forward(x)

    def fake_quantized(self, x: Tensor) -> Tensor:
        """The differentiable form."""
        weight_fake, bias = self._weight_and_bias()
        return fake_quantized_product(LinearProduct(), x, self.master_weight, bias, self._input_fake(x), weight_fake)

    def for_steps(self) -> Callable[[Tensor], Tensor]:
        """The layer for several inputs, with its weight fake-quantized once for all of them."""
        if not self.training:
            return self
        fake, bias = self._weight_and_bias()
        weight = self.master_weight if fake is None else fake(self.master_weight)
        return lambda x: fake_quantized_product(LinearProduct(), x, weight, bias, self._input_fake(x), None)


class QATConv(QATModule):
    """What the convolutions share."""

    @property
    def geometry(self) -> ConvGeometry:
        """Sizes."""
        return ConvGeometry.of(cast(ConvModule, self))

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """`[N, C, ...]` to `[N, O, ...]`; `output_size` is that of `nn.ConvTranspose2d`."""
        return self._forward(x) if output_size is None else self._forward(x, output_size)

    def fake_quantized(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The differentiable form."""
        geometry = self.geometry
        batch = x if x.dim() == geometry.dims + 2 else x.unsqueeze(0)
        if output_size is not None:
            geometry = geometry.with_output_size(batch.shape[2:], output_size)
        weight_fake, bias = self._weight_and_bias()
        input_fake = self._input_fake(batch)
        batch, geometry = geometry.padded(batch)
        y = fake_quantized_product(ConvProduct(geometry), batch, self.master_weight, bias, input_fake, weight_fake)
        return y if x.dim() == geometry.dims + 2 else y.squeeze(0)


class QATConv1d(QATConv, nn.Conv1d):
    """`nn.Conv1d` in training for `QuantizedConv1d`."""


class QATConv2d(QATConv, nn.Conv2d):
    """`nn.Conv2d` in training for `QuantizedConv2d`."""


class QATConv3d(QATConv, nn.Conv3d):
    """`nn.Conv3d` in training for `QuantizedConv3d`."""


class QATConvTranspose1d(QATConv, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` in training for `QuantizedConvTranspose1d`."""


class QATConvTranspose2d(QATConv, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` in training for `QuantizedConvTranspose2d`."""


class QATConvTranspose3d(QATConv, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` in training for `QuantizedConvTranspose3d`."""


class QATEmbedding(QATModule, nn.Embedding):
    """`nn.Embedding` in training for `QuantizedEmbedding`."""

    def forward(self, indices: Tensor) -> Tensor:
        """Rows of the table: `[*indices.shape, embedding_dim]`."""
        return self._forward(indices)

    def fake_quantized(self, indices: Tensor) -> Tensor:
        """The differentiable form."""
        weight = self.quantized_weight()
        return F.embedding(indices, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def quantized_weight(self) -> Tensor:
        """The fake-quantized table, differentiable."""
        weight: Tensor = self.weight_quantizer(self.master_weight) if self.on("weights") else self.master_weight
        return weight


class _Identity:
    """Nothing happens: the weight of a folded layer that is not quantized now."""

    tensors: tuple[Tensor, ...] = ()

    def quantize(self, x: Tensor, *tensors: Tensor) -> Tensor:
        return x.detach()

    def vjp(self, x: Tensor, *tensors: Tensor) -> Any:
        return x.detach(), lambda grad: (grad,)

    def __call__(self, x: Tensor) -> Tensor:
        return x


_CONV_TYPES = (QATConv1d, QATConv2d, QATConv3d, QATConvTranspose1d, QATConvTranspose2d, QATConvTranspose3d)


def qat_type(module: nn.Module) -> type[QATModule]:
    """The class that trains in the place of a target."""
    if isinstance(module, nn.Linear):
        return QATLinear
    if isinstance(module, nn.Embedding):
        return QATEmbedding
    return next(qat for kind, qat in zip(CONV_TYPES, _CONV_TYPES, strict=True) if isinstance(module, kind))
