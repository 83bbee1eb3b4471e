"""The end of quantization-aware training: the inference forms of all layers become the model."""

from __future__ import annotations

import time

import torch
from torch import nn

from halfbyte.activation import ActivationRange
from halfbyte.errors import QuantizationError
from halfbyte.formats import FloatFormat
from halfbyte.nn import FoldedBatchNorm, QuantizedModule
from halfbyte.progress import track
from halfbyte.qat.modules import QATModule
from halfbyte.qat.quantizers import MovingAverageActivation
from halfbyte.qat.state import QATState, forget, qat_state
from halfbyte.report import ModuleReport, Report
from halfbyte.swap import interrupts_deferred, replace_module
from halfbyte.targets import disable_fast_paths


def convert_qat(model: nn.Module, progress: bool) -> Report:
    """Replaces the layers that train by the quantized modules that they evaluate with.

    Raises:
        QuantizationError: the model is in training mode, a layer is not fake-quantized now, or a range was never observed. The
            model is as it was.
    """
    start = time.perf_counter()
    state = qat_state(model)
    made = state.plan
    modules = {row.name: _checked(model, row.name) for row in made.targets}
    new: dict[str, nn.Module] = {}
    reports: dict[str, ModuleReport] = {}
    rows = sorted(made.targets, key=lambda row: row.tied_to is not None)  # owners of a shared weight first
    with torch.no_grad():
        for row in track(rows, "converting", enabled=progress):
            begin = time.perf_counter()
            module, home = modules[row.name], None if row.tied_to is None else new[row.tied_to]
            packed = home.packed_weight if isinstance(home, QuantizedModule) else getattr(home, "weight", None)
            new[row.name] = module.converted(packed)
            reports[row.name] = ModuleReport(
                plan=row,
                rounding=f"trained, {type(module.weight_quantizer).__name__}",
                relative_error=_relative_error(module, new[row.name]),
                seconds=time.perf_counter() - begin,
                fallbacks=row.fallbacks,
                activation=_range(module),
            )
    _commit(model, state, new)
    return Report(
        modules=tuple(reports.get(row.name) or ModuleReport(plan=row, fallbacks=row.fallbacks) for row in made.rows),
        bytes_before=made.bytes_before,
        bytes_after=made.bytes_after,
        seconds=time.perf_counter() - start,
    )


def _checked(model: nn.Module, name: str) -> QATModule:
    module = model.get_submodule(name)
    if not isinstance(module, QATModule):
        raise QuantizationError(
            f"{name} is a {type(module).__name__} now, not the layer that hb.prepare_qat_ put there: put it back"
        )
    if module.training:
        raise QuantizationError(f"{name} is in training mode; call model.eval() before hb.convert_(model)")
    if not module.quantizes:
        raise QuantizationError(
            f"fake quantization of {name} is off, so it was not trained for its integers; call "
            "hb.qat.set_enabled(model) and train on, or wait for the start of the schedule"
        )
    if module.activations is not None and not module.activations.ready:
        raise QuantizationError(
            f"the range of the input of {name} was never observed: run training batches that reach it, or leave the layer "
            "out with an override"
        )
    module.inference_form()  # raises where batch normalization is not in the same mode
    return module


def _relative_error(module: QATModule, converted: nn.Module) -> float:
    matrix, _ = module.folded()
    weight_format = module.scheme.weight
    if isinstance(weight_format, FloatFormat):
        rounded = matrix.to(weight_format.dtype)
    else:
        assert isinstance(converted, QuantizedModule)
        rounded = converted.dequantize()
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
    error = torch.linalg.vector_norm(rounded.to(torch.float64) - matrix).item()
    return error / norm if norm > 0 else 0.0


def _range(module: QATModule) -> ActivationRange | None:
    qparams = None if module.activations is None else module.activations.qparams()
    if qparams is None:
        return None
    scale, zero_point = (tensor.item() for tensor in qparams)
    activation = module.scheme.activation
    assert activation is not None
    half = 1 << (activation.bits - 1)
    quantizer = module.input_quantizer
    return ActivationRange(
        low=(-half - zero_point) * scale,
        high=(half - 1 - zero_point) * scale,
        band=0.0,
        samples=0,
        batches=int(quantizer.batches) if isinstance(quantizer, MovingAverageActivation) else 0,
        converged=True,
        observer=type(quantizer).__name__,
    )


def _commit(model: nn.Module, state: QATState, new: dict[str, nn.Module]) -> None:
    with interrupts_deferred():
        for row in state.plan.targets:
            replace_module(model, (row.name, *row.aliases), new[row.name])
        for layer, norm_name in state.batch_norms.items():
            norm = model.get_submodule(norm_name)
            names = [name for name, module in model.named_modules(remove_duplicate=False) if module is norm]
            replace_module(model, names, FoldedBatchNorm(layer))
        disable_fast_paths(model)
        forget(model)
