"""What a configuration costs in accuracy: distance of its outputs to the float model's, or the user's own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from halfbyte.calibration import Forward, evaluating, run_batch
from halfbyte.confidence import margin_of_mean
from halfbyte.errors import QuantizationError
from halfbyte.outputs import attention_mask_of, is_logits, output_tensors

LossFunction: TypeAlias = Callable[[nn.Module, object], float | Tensor]
Loss: TypeAlias = Literal["kl", "mse"] | LossFunction

_ROWS = 4096  # rows of logits compared at a time


@dataclass(frozen=True, slots=True)
class Measurement:
    """A loss over all batches.

    Attributes:
        loss: Mean over positions (`kl`, `mse`) or batches (a callable).
        margin: Half width of the 95 % confidence interval of its difference to where the measurement started (the float
            model, or the quantized one), positions taken as independent; inf with fewer than two.
    """

    loss: float
    margin: float


class LossMeter:
    """Measures a model against the float model on fixed batches.

    `kl` is the mean over positions of `KL(float ‖ model)` in nats, of the outputs that are logits. `mse` is the squared error
    of all floating-point outputs relative to their mean square. Positions that an `attention_mask` leaves out do not count.

    Args:
        model: The float model. It runs here once; for the built-in losses its outputs are kept.
        batches: Batches of data.
        loss: "kl", "mse", or `loss(model, batch)` giving a number, smaller for better.
        forward: `forward(model, batch)`, for batches that are not arguments of the model.

    Raises:
        QuantizationError: the outputs have no logits, are not finite, or the callable gives no finite number.
    """

    def __init__(self, model: nn.Module, batches: Sequence[object], loss: Loss, forward: Forward | None) -> None:
        if loss not in ("kl", "mse") and not callable(loss):
            raise ValueError(f"loss={loss!r} is unknown; use 'kl', 'mse' or a function loss(model, batch)")
        self._batches, self._loss, self._forward = batches, loss, forward
        self._run = run_batch if forward is None else forward
        self._references: list[dict[str, Tensor]] = []
        if not callable(loss):
            with evaluating(model):
                for index, batch in enumerate(batches):
                    self._references.append(self._reference(index, self._run(model, batch), batch))

    def on(self, model: nn.Module, batches: Sequence[object]) -> LossMeter:
        """The same loss on other batches; `model` is the float model."""
        return LossMeter(model, batches, self._loss, self._forward)

    def values(self, model: nn.Module) -> Tensor:
        """`[positions]` or, for a callable, `[batches]` float64: the loss of a model at each."""
        values: list[Tensor] = []
        with evaluating(model):
            for index, batch in enumerate(self._batches):
                values.append(self._of_batch(model, index, batch))
        return torch.cat(values)

    def _of_batch(self, model: nn.Module, index: int, batch: object) -> Tensor:
        if callable(self._loss):
            return torch.tensor([self._call(self._loss, model, index, batch)], dtype=torch.float64)
        found = output_tensors(self._run(model, batch))
        mask = attention_mask_of(batch)
        parts = [
            self._compare(reference, _rows(found[name], mask), name)
            for name, reference in self._references[index].items()
        ]
        return torch.cat(parts)

    def _call(self, loss: LossFunction, model: nn.Module, index: int, batch: object) -> float:
        value = loss(model, batch)
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise QuantizationError(
                    f"loss gave a tensor of shape {tuple(value.shape)}; return one number, its mean"
                )
            if value.requires_grad:
                raise QuantizationError(
                    "loss gave a tensor with a gradient, whose graph would be kept; return loss.item(), or compute it "
                    "under torch.no_grad()"
                )
            value = value.item()
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise QuantizationError(f"loss gave {value!r} for batch {index}; return a finite number")
        return float(value)

    def _reference(self, index: int, output: object, batch: object) -> dict[str, Tensor]:
        tensors = {name: t for name, t in output_tensors(output).items() if t.is_floating_point()}
        if not tensors:
            raise QuantizationError(
                "the model returns no floating-point tensor; return it with forward=, or give a loss"
            )
        if self._loss == "kl":
            logits = {n: t for n, t in tensors.items() if is_logits(n, t, list(tensors), None)}
            if not logits:
                raise QuantizationError(
                    f"the outputs {', '.join(tensors)} are not logits; use loss='mse' or your own loss(model, batch)"
                )
            tensors = logits
        mask = attention_mask_of(batch)
        rows = {name: _rows(tensor, mask) for name, tensor in tensors.items()}
        for name, tensor in rows.items():
            if torch.isnan(tensor).any():
                raise QuantizationError(f"the float model gives NaN in {name} for batch {index}; leave that batch out")
        return {name: tensor.clone() for name, tensor in rows.items()}

    def _compare(self, reference: Tensor, found: Tensor, name: str) -> Tensor:
        if reference.shape != found.shape:
            raise QuantizationError(f"{name} has {tuple(found.shape)} values, {tuple(reference.shape)} in float")
        parts = []
        for a, b in zip(torch.split(reference, _ROWS), torch.split(found, _ROWS), strict=True):
            if self._loss == "kl":
                # float32 logits: the softmax is computed around their maximum; sums of small differences need float64.
                log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
                parts.append(torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1))
            else:
                signal = a.double().square().mean().clamp(min=1e-30)
                parts.append((a.double() - b.double()).square().mean(-1) / signal)
        values = torch.cat(parts)
        if not torch.isfinite(values).all():
            raise QuantizationError(f"{name} of a quantized model is not finite; leave out the scheme that does this")
        return values


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and tensor.dim() >= 2 and tensor.shape[:2] == mask.shape:
        tensor = tensor[mask]
    return tensor.detach().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)


def summarize(values: Tensor, start: Tensor | None = None) -> Measurement:
    """Mean of a loss, and the margin of its mean difference to the losses `start`."""
    n = values.numel()
    if n == 0:
        raise QuantizationError("data has no positions to compare")
    differences = values if start is None else values - start
    return Measurement(float(values.mean()), margin_of_mean(float(differences.std()) if n > 1 else 0.0, n))
