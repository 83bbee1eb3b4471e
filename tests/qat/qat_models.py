"""Small models, and a few steps of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import halfbyte as hb


def train(
    model: nn.Module,
    batches: Iterable[object],
    *,
    steps: int = 3,
    lr: float = 0.01,
    loss: Callable[[object], Tensor] | None = None,
) -> list[float]:
    """Losses of some steps of SGD towards small outputs."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _, batch in zip(range(steps), batches, strict=False):
        output = model(*batch) if isinstance(batch, tuple) else model(batch)
        value = loss(output) if loss is not None else mean_square(output)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def mean_square(output: object) -> Tensor:
    while isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, Tensor)
    return (output - 0.5).square().mean()


def conv_net() -> nn.Module:
    """Convolutions with batch normalization, with and without bias, and a linear layer with it."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def assert_converts_to_the_same(model: nn.Module, batch: tuple[object, ...]) -> hb.Report:
    """Evaluation mode gives the bits that the converted model gives, with gradients enabled and without."""
    model.eval()
    with torch.no_grad():
        expected = flat(model(*batch))
    with_gradients = flat(model(*batch))
    report = hb.convert_(model, progress=False)
    assert not any(isinstance(module, hb.qat.QATModule) for module in model.modules())
    with torch.no_grad():
        found = flat(model(*batch))
    assert len(found) == len(expected) > 0
    for a, b, c in zip(found, expected, with_gradients, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    return report


def flat(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [tensor for each in output.values() for tensor in flat(each)]
    if isinstance(output, tuple | list):
        return [tensor for each in output for tensor in flat(each)]
    return []
