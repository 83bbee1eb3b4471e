"""From post-training quantization to training: integers that an algorithm found are where training starts."""

from __future__ import annotations

import torch
from torch import nn

from halfbyte.errors import QuantizationError
from halfbyte.nn import QuantizedModule
from halfbyte.qat.folded_weight import as_matrix
from halfbyte.qat.learned_weight import LearnedWeight
from halfbyte.qat.modules import QATModule
from halfbyte.qat.state import qat_modules


def start_from_(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """Lets a prepared model begin with the integers of a quantized copy of it, such as GPTQ's.

    Trained scales (and where ranges begin) become those of the copy. Weights that would be rounded to another integer than the
    copy's move to the value it stands for; the others stay as they are, so that what rounding lost can still be told.

    Args:
        model: Prepared by `prepare_qat_(..., weights="learned")` or another method that trains scales.
        quantized: What `quantize_` made of the same float model with the same schemes.

    Returns:
        The model.

    Raises:
        QuantizationError: a layer of the model does not train its scale, folds batch normalization, or is not quantized alike
            in the copy. The model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> scheme, batches = hb.int_weight_only(2, group_size=16), [torch.randn(64, 64) for _ in range(4)]
        >>> quantized = copy.deepcopy(model)
        >>> report = hb.quantize_(quantized, scheme, batches, algorithms=[hb.GPTQ()], progress=False)
        >>> _ = hb.qat.start_from_(hb.prepare_qat_(model, scheme, weights="learned"), quantized)
        >>> torch.equal(model.eval()(batches[0]), quantized(batches[0]))
        True
    """
    others = dict(quantized.named_modules())
    pairs = [(module, _counterpart(module, others.get(module.name))) for module in qat_modules(model)]
    with torch.no_grad():
        for module, (quantizer, other) in pairs:
            found = other.packed_weight.codes(other.weight_format)
            quantizer.load_codes(found)
            weight, geometry = module.master_weight, module.geometry
            matrix = as_matrix(weight, geometry)
            same = quantizer.codes(matrix).codes == found.codes
            started = torch.where(same, matrix, other.dequantize().to(matrix.dtype))
            weight.copy_(started if geometry is None else geometry.weight_of(started))
    return model


def _counterpart(module: QATModule, other: nn.Module | None) -> tuple[LearnedWeight, QuantizedModule]:
    """The quantizer of a layer and the quantized module that it starts from, if they go together."""
    quantizer = module.weight_quantizer
    if not isinstance(quantizer, LearnedWeight):
        raise QuantizationError(f"{module.name} does not train its scale; prepare with weights='learned'")
    if module.batch_norm is not None:
        raise QuantizationError(
            f"{module.name} folds batch normalization in training: call hb.fuse_ on the float model first"
        )
    if not isinstance(other, QuantizedModule) or other.packed_weight.shape != quantizer.shape:
        given = "nothing" if other is None else f"a {type(other).__name__}"
        raise QuantizationError(
            f"{module.name} is {given} in the quantized model; quantize a copy of the same float model"
        )
    if other.weight_format != quantizer.format:
        raise QuantizationError(
            f"{module.name} has {other.weight_format} in the quantized model; here it is {quantizer.format}"
        )
    return quantizer, other
