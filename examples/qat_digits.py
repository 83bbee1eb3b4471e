"""Trains a classifier of handwritten digits with fake quantization, from 8 bits down to 1, beside plain quantization.

    python examples/qat_digits.py

The model of `digits.py` made narrow, 7,782 parameters: it has none to spare, so that few bits hurt. Every layer is quantized,
the first and the last too; the embedding's table keeps 8 bits. Training starts from the float model and goes on for ten
epochs on the same images and labels: the usual loop with three lines more.
"""

from __future__ import annotations

import copy
import time

import digits
import torch
from torch import Tensor, nn

import halfbyte as hb

SCHEMES = {
    "8 bits, inputs 8 bits": hb.int8_static(),
    "4 bits, inputs 4 bits": hb.int_static(4, 4),
    "3 bits, inputs 3 bits": hb.int_static(3, 3),
    "2 bits, inputs 2 bits": hb.int_static(2, 2),
    "ternary": hb.ternary_weight_only(),
    "binary": hb.int_weight_only(1),
}


def post_training(model: nn.Module, scheme: hb.Scheme, x: Tensor) -> nn.Module:
    """Quantized without training, on ranges of some training images."""
    quantized = copy.deepcopy(model)
    hb.quantize_(quantized, scheme, x[:512].split(64), progress=False)
    return quantized


def trained(model: nn.Module, scheme: hb.Scheme, x: Tensor, y: Tensor, *, epochs: int) -> nn.Module:
    """Fine-tuned with fake quantization, then quantized."""
    torch.manual_seed(0)
    student = hb.prepare_qat_(copy.deepcopy(model), scheme, weights="learned", activations="learned")
    student.train()
    scales = list(hb.qat.scale_parameters(student))
    weights = [p for p in student.parameters() if not any(p is scale for scale in scales)]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": scales, "weight_decay": 0.0}], lr=1e-3)
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


def main() -> None:
    x_train, x_test, y_train, y_test = digits.load_data()
    model = digits.train(x_train, y_train, epochs=40, embedding=4, width=24)
    print(f"float: {digits.accuracy(model, x_test, y_test):.2%} of {len(x_test)} test images\n")
    print(f"{'weights':24}{'quantized':>12}{'trained':>10}{'seconds':>9}")
    for name, scheme in SCHEMES.items():
        before = digits.accuracy(post_training(model, scheme, x_train), x_test, y_test)
        start = time.perf_counter()
        student = trained(model, scheme, x_train, y_train, epochs=10)
        seconds = time.perf_counter() - start
        print(f"{name:24}{before:>12.2%}{digits.accuracy(student, x_test, y_test):>10.2%}{seconds:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
