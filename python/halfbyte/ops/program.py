"""Programs: the integer parts of a lowered model, many layers in one call (`run_program`).

`halfbyte/lowering/program.py` writes them; `cpp/src/torch/program_ops.cpp` runs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import halfbyte._extension  # noqa: F401  # registers torch.ops.halfbyte
from halfbyte.ops.autograd import skipped_autograd

__all__ = ["run_program"]

_run_program = torch.ops.halfbyte.run_program.default


def run_program(
    inputs: list[Tensor],
    constants: list[Tensor],
    steps: Tensor,
    numbers: Tensor,
    *,
    arena: int,
    outputs: Sequence[int],
) -> list[Tensor]:
    """Runs a program on a batch.

    Args:
        inputs: float32, each with the batch first; as many elements a sample as the program was made for.
        constants: Weights, their qparams, biases and tables, as the steps count them.
        steps: int64 vector, the steps with their fields.
        numbers: float32 vector, the scales and bounds in the order in which steps read them.
        arena: Bytes of scratch memory a sample.
        outputs: For each result: 1 if it is channels last in memory, else 0; its dimensions without the batch; their sizes.

    Returns:
        The results, float32.

    Raises:
        RuntimeError: The program does not fit the tensors.
    """
    with skipped_autograd():
        results: list[Tensor] = _run_program(inputs, constants, steps, numbers, arena, outputs)
    return results


def _run_program_fake(
    inputs: list[Tensor],
    constants: list[Tensor],
    steps: Tensor,
    numbers: Tensor,
    arena: int,
    outputs: list[int],
) -> list[Tensor]:
    results, at = [], 0
    while at < len(outputs):
        last, dims = outputs[at : at + 2]
        sizes = outputs[at + 2 : at + 2 + dims]
        at += 2 + dims
        batch = inputs[0].shape[0]
        if last:
            result = inputs[0].new_empty((batch, *sizes[1:], sizes[0])).movedim(-1, 1)
        else:
            result = inputs[0].new_empty((batch, *sizes))
        results.append(result)
    return results


torch.library.register_fake("halfbyte::run_program", _run_program_fake)
