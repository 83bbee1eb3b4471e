"""Distillation: a prepared model trained to give what the float model gives, without labels.

The bridge from PTQ to training: some hundred batches of calibration data and the float model are enough. Blocks one after
another, as in EfficientQAT (Chen et al. 2024, arXiv:2407.11062), or the model end to end on the KL divergence of its logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.calibration import Data, Forward, all_batches, evaluating, run_batch
from halfbyte.errors import QuantizationError
from halfbyte.flow import find_blocks
from halfbyte.outputs import attention_mask_of, is_logits, output_tensors
from halfbyte.progress import track
from halfbyte.qat.control import scale_parameters
from halfbyte.qat.modules import QATModule
from halfbyte.qat.state import qat_modules, qat_state
from halfbyte.sequential import without_cache


@dataclass(frozen=True, slots=True)
class DistilledStage:
    """What training one block, or the whole model, did.

    Attributes:
        name: Qualified name of the block; empty for the model.
        losses: Mean loss of each epoch: squared error relative to the mean square, or KL divergence in nats.
    """

    name: str
    losses: tuple[float, ...]


def distill_(
    model: nn.Module,
    teacher: nn.Module,
    data: Data,
    *,
    by: Literal["outputs", "blocks"] = "outputs",
    train: Literal["all", "scales"] = "all",
    learning_rate: float = 1e-4,
    scale_learning_rate: float | None = None,
    epochs: int = 1,
    blocks: Sequence[str] | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> list[DistilledStage]:
    """Trains a prepared model to give what the float model gives.

    Runs without dropout and with the statistics of batch normalization fixed. Adam, its rate falling to zero along half a
    cosine in every stage. What is kept beside both models is one batch, the activations of what is trained on it, and the
    optimizer's moments: by blocks, those of one block. The price is that the blocks before run again for every batch.

    Args:
        model: A model that `prepare_qat_` prepared; left in the mode it was in.
        teacher: The float model that it was, such as a deep copy from before. It runs in evaluation mode.
        data: Batches, as for `quantize_`; gone through once an epoch, in their order.
        by: "outputs" trains end to end: KL divergence of logits, or for a model without logits the squared error. "blocks"
            trains one repeated block after another on the squared error of what it returns, each on what the trained ones
            before it give.
        train: "all" parameters, or only the trained "scales" of quantizers.
        learning_rate: Of weights.
        scale_learning_rate: Of scales; None takes `learning_rate`.
        epochs: Passes over the data, in every stage.
        blocks: Names of the blocks, in order; None finds the repeated ones.
        forward: `forward(model, batch)`, for batches that are not arguments of the model.
        progress: Show progress bars on stderr.

    Returns:
        The stages with their losses.

    Raises:
        QuantizationError: the model is not prepared, the teacher is, nothing to train, no blocks, or a loss that is not
            finite (steps taken before stay).

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> teacher = copy.deepcopy(model)
        >>> _ = hb.prepare_qat_(model, hb.int_weight_only(2), weights="learned")
        >>> batches = [torch.randn(32, 64) for _ in range(8)]
        >>> (stage,) = hb.qat.distill_(model, teacher, batches, learning_rate=1e-3, epochs=4, progress=False)
        >>> stage.losses[-1] < stage.losses[0]
        True
    """
    if by not in ("outputs", "blocks") or train not in ("all", "scales"):
        raise ValueError(f"by={by!r}, train={train!r}: use by='outputs' or 'blocks', train='all' or 'scales'")
    if epochs < 1:
        raise ValueError(f"epochs={epochs} is not positive; use 1 or more")
    names = [row.name for row in qat_state(model).plan.targets]
    if teacher is model or any("qat" in type(module).__module__ for module in teacher.modules()):
        raise QuantizationError(
            "the teacher is prepared for training too; give the float model, copied before prepare_qat_"
        )
    batches = all_batches(data)
    run = run_batch if forward is None else forward
    if by == "blocks" and blocks is None:
        blocks = find_blocks(model, names)
        if not blocks:
            raise QuantizationError(
                "the model has no repeated blocks; name them with blocks=[...], or use by='outputs'"
            )
    for name in blocks or ():
        if not all(name in dict(each.named_modules()) for each in (model, teacher)):
            raise QuantizationError(f"blocks: there is no module {name!r} in both the model and the teacher")
    results = []
    with without_cache(model), without_cache(teacher), _training(model):
        for name in [""] if by == "outputs" else list(blocks or ()):
            part = model.get_submodule(name)
            groups = _groups(part, name, train, learning_rate, scale_learning_rate)
            loss = functools.partial(_block_loss, name) if name else _output_loss
            with _only(model, groups):
                optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
                losses = []
                for epoch in range(epochs):
                    total = 0.0
                    label = f"distilling {name}".strip() + f", epoch {epoch + 1}"
                    for index, batch in enumerate(track(batches, label, enabled=progress)):
                        optimizer.zero_grad()
                        value = loss(model, teacher, batch, run)
                        if not math.isfinite(value.item()):
                            raise QuantizationError(
                                f"{name or 'the model'}: the loss of batch {index} is {value.item()}; use a lower "
                                "learning rate, and batches without NaN"
                            )
                        value.backward()  # type: ignore[no-untyped-call]
                        optimizer.step()
                        schedule.step()
                        total += value.item()
                    losses.append(total / len(batches))
                optimizer.zero_grad()
            results.append(DistilledStage(name, tuple(losses)))
    return results


def _groups(
    part: nn.Module, name: str, train: str, learning_rate: float, scale_learning_rate: float | None
) -> list[dict[str, object]]:
    scales = list(scale_parameters(part)) if any(isinstance(m, QATModule) for m in part.modules()) else []
    ids = {id(parameter) for parameter in scales}
    weights = [p for p in part.parameters() if id(p) not in ids and p.requires_grad] if train == "all" else []
    if not scales and not weights:
        raise QuantizationError(
            f"{name or 'the model'} has nothing to train: prepare it with weights='learned', or use train='all'"
        )
    rate = learning_rate if scale_learning_rate is None else scale_learning_rate
    groups: list[dict[str, object]] = [{"params": weights, "lr": learning_rate}, {"params": scales, "lr": rate}]
    return [group for group in groups if group["params"]]


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for the layers that train with fake quantization; all flags come back as they were."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in qat_modules(model):
        module.train()
    try:
        yield
    finally:
        for module in qat_modules(model):
            module.eval()  # forgets integers of before
        for each, training in before:
            each.training = training


@contextmanager
def _only(model: nn.Module, groups: list[dict[str, object]]) -> Iterator[None]:
    """Gradients for the parameters of the groups alone."""
    wanted = {id(p) for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


def _output_loss(
    model: nn.Module, teacher: nn.Module, batch: object, run: Callable[[nn.Module, object], object]
) -> Tensor:
    with evaluating(teacher):
        wanted = {name: t for name, t in output_tensors(run(teacher, batch)).items() if t.is_floating_point()}
    if not wanted:
        raise QuantizationError("the model returns no floating-point tensor; return one with forward=")
    logits = {name: t for name, t in wanted.items() if is_logits(name, t, list(wanted), None)}
    found, mask = output_tensors(run(model, batch)), attention_mask_of(batch)
    losses = []
    for name, target in (logits or wanted).items():
        given = found[name]
        if mask is not None and given.dim() >= 2 and given.shape[:2] == mask.shape:
            given, target = given[mask], target[mask]
        if logits:
            given, target = (F.log_softmax(t.float(), -1).flatten(0, -2) for t in (given, target))
            losses.append(F.kl_div(given, target, log_target=True, reduction="batchmean"))
        else:
            losses.append(_relative_square(given, target))
    return torch.stack(losses).mean()


def _block_loss(
    name: str, model: nn.Module, teacher: nn.Module, batch: object, run: Callable[[nn.Module, object], object]
) -> Tensor:
    with evaluating(teacher):
        target = _returned(teacher, name, batch, run, gradients=False)
    return _relative_square(_returned(model, name, batch, run, gradients=True), target)


class _Stop(Exception):
    """Ends a run once the block has returned."""


def _returned(
    model: nn.Module, name: str, batch: object, run: Callable[[nn.Module, object], object], *, gradients: bool
) -> Tensor:
    """What a block returns when the model runs up to it; its first tensor, of a tuple."""
    outputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[object, ...]) -> None:
        torch.set_grad_enabled(gradients)

    def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        outputs.append(next(t for t in output_tensors(output).values() if t.is_floating_point()))
        raise _Stop

    block = model.get_submodule(name)
    hooks = [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        with torch.no_grad():  # until the block
            run(model, batch)
    except _Stop:
        return outputs[0]
    finally:
        for hook in hooks:
            hook.remove()
    raise QuantizationError(f"{name} did not run on a batch; leave it out of blocks=[...]")


def _relative_square(given: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(given.float(), target.float()) / target.float().square().mean().clamp(min=1e-30)
