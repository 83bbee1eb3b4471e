"""Trains the digit classifier of `digits.py` with fake quantization, from 8 bits down to 1, beside plain quantization.

    python examples/qat_digits.py

Starts from the trained float model and fine-tunes it for a few epochs on its own training images and labels: the user's
training loop with three lines more. "weights and inputs" rows quantize the input of every layer too, with trained ranges.
"""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

import halfbyte as hb

_HEAD = {
    "head": hb.int8_static(),
    "intensity": hb.int8_weight_only(),
}  # first and last layers at 8 bits, as is customary
RECIPES: dict[str, hb.Scheme | hb.Recipe] = {
    "8 bits, weights and inputs": hb.int8_static(),
    "4 bits, weights and inputs": hb.Recipe(default=hb.int_static(4, 4), overrides=_HEAD),
    "2 bits, weights and inputs": hb.Recipe(default=hb.int_static(2, 2), overrides=_HEAD),
    "2 bits, weights": hb.int_weight_only(2, group_size=64),
    "ternary weights": hb.ternary_weight_only(group_size=64),
    "binary weights": hb.int_weight_only(1, group_size=64),
}


def post_training(model: nn.Module, recipe: hb.Scheme | hb.Recipe, x: Tensor) -> nn.Module:
    """Quantized without training, on ranges of some training images."""
    quantized = copy.deepcopy(model)
    hb.quantize_(quantized, recipe, x[:512].split(64), progress=False)
    return quantized


def trained(model: nn.Module, recipe: hb.Scheme | hb.Recipe, x: Tensor, y: Tensor, *, epochs: int) -> nn.Module:
    """Fine-tuned with fake quantization, then quantized."""
    torch.manual_seed(0)
    student = hb.prepare_qat_(copy.deepcopy(model), recipe, weights="learned", activations="learned")
    student.train()
    scales = set(hb.qat.scale_parameters(student))
    weights = [parameter for parameter in student.parameters() if parameter not in scales]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": list(scales), "weight_decay": 0.0}], lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(student(x[rows]), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    student.eval()
    hb.convert_(student, progress=False)
    return student


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return (model(x).argmax(-1) == y).float().mean().item()


def compare(model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor], *, epochs: int) -> None:
    """Prints the accuracy of each recipe without and with training."""
    x_train, x_test, y_train, y_test = data
    print(f"{'':30}{'quantized':>12}{'trained':>10}{'seconds':>9}   (float: {accuracy(model, x_test, y_test):.2%})")
    for name, recipe in RECIPES.items():
        before = accuracy(post_training(model, recipe, x_train), x_test, y_test)
        start = time.perf_counter()
        after = accuracy(trained(model, recipe, x_train, y_train, epochs=epochs), x_test, y_test)
        print(f"{name:30}{before:>12.2%}{after:>10.2%}{time.perf_counter() - start:>9.1f}", flush=True)


def main() -> None:
    import digits

    data = digits.load_data()
    compare(digits.train(data[0], data[2], epochs=12), data, epochs=4)


if __name__ == "__main__":
    main()
