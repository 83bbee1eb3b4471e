"""Distillation: end to end and block by block, all weights or scales alone."""

from __future__ import annotations

import copy

import pytest
import torch
from qat_models import assert_converts_to_the_same
from torch import Tensor, nn

import halfbyte as hb


class Block(nn.Module):
    """Returns a tuple, as the layers of many transformers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x))))), None


class Blocks(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return self.head(x)


def pair(scheme: hb.Scheme, **methods: str) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    teacher = Blocks()
    model = hb.prepare_qat_(copy.deepcopy(teacher), scheme, **methods)
    return model, teacher, [torch.randn(16, 32) for _ in range(6)]


def error(model: nn.Module, teacher: nn.Module, batches: list[Tensor], by: str) -> float:
    """KL divergence of the outputs, or squared error of what the last block returns."""
    model.eval()
    teacher.eval()
    total = 0.0
    with torch.no_grad():
        for x in batches:
            if by == "outputs":
                given, target = (torch.log_softmax(m(x), -1) for m in (model, teacher))
                total += nn.functional.kl_div(given, target, log_target=True, reduction="batchmean").item()
            else:
                given, target = (nn.Sequential(*map(First, m.blocks))(x) for m in (model, teacher))
                total += (given - target).square().mean().item()
    return total


class First(nn.Module):
    """The first of what a block returns."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


@pytest.mark.parametrize("by", ["outputs", "blocks"])
@pytest.mark.parametrize("train", ["all", "scales"])
def test_distilled_model_is_nearer_and_converts(by: str, train: str) -> None:
    model, teacher, batches = pair(hb.int_weight_only(2), weights="learned")
    before = error(model, teacher, batches, by)
    weight = model.blocks[0].up.weight.detach().clone()
    head = model.head.weight.detach().clone()
    stages = hb.qat.distill_(model, teacher, batches, by=by, train=train, learning_rate=2e-3, epochs=8, progress=False)
    assert [stage.name for stage in stages] == ([""] if by == "outputs" else [f"blocks.{k}" for k in range(3)])
    assert all(stage.losses[-1] < stage.losses[0] for stage in stages)
    assert error(model, teacher, batches, by) < before
    assert torch.equal(model.blocks[0].up.weight, weight) == (train == "scales")
    assert torch.equal(model.head.weight, head) == (train == "scales" or by == "blocks")
    assert all(p.requires_grad for p in model.parameters())
    assert_converts_to_the_same(model, (batches[0],))


def test_static_ranges_are_observed_without_dropout() -> None:
    model, teacher, batches = pair(hb.int8_static())
    model.eval()
    hb.qat.distill_(model, teacher, batches, progress=False)
    assert not any(module.training for module in model.modules())
    assert_converts_to_the_same(model, (batches[0],))


def test_only_one_block_holds_activations() -> None:
    model, teacher, batches = pair(hb.int8_dynamic())
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        hb.qat.distill_(model, teacher, batches[:1], by="blocks", progress=False)
        by_blocks = sum(saved)
        saved.clear()
        hb.qat.distill_(model, teacher, batches[:1], progress=False)
    assert by_blocks < 1.5 * sum(saved)  # three blocks, each saved once, not once for every block after it


def test_bad_arguments_are_refused() -> None:
    model, teacher, batches = pair(hb.int8_dynamic())
    with pytest.raises(hb.QuantizationError, match="not prepared"):
        hb.qat.distill_(teacher, teacher, batches)
    with pytest.raises(hb.QuantizationError, match="teacher is prepared"):
        hb.qat.distill_(model, model, batches)
    with pytest.raises(hb.QuantizationError, match="nothing to train"):
        hb.qat.distill_(model, teacher, batches, train="scales", progress=False)
    with pytest.raises(hb.QuantizationError, match="did not run"):
        model.blocks[1].idle = teacher.blocks[1].idle = nn.Linear(2, 2)
        hb.qat.distill_(model, teacher, batches, by="blocks", blocks=["blocks.1.idle"], progress=False)
    with pytest.raises(hb.QuantizationError, match="no module 'layers'"):
        hb.qat.distill_(model, teacher, batches, by="blocks", blocks=["layers"])
    with pytest.raises(ValueError, match="by='layers'"):
        hb.qat.distill_(model, teacher, batches, by="layers")
    with pytest.raises(hb.QuantizationError, match="loss of batch 0 is nan"):
        hb.qat.distill_(model, teacher, [torch.full((2, 32), float("nan"))], progress=False)
