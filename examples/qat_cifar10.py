"""Trains ResNet-8 and ResNet-20 with 4-bit weights and activations to follow the float model, beside plain quantization.

    python examples/qat_cifar10.py --data FOLDER [--models ResNet-8] [--seeds 0 1 2]

Protocol: batch normalization is folded; all convolutions but the first have 4-bit weights per channel and 4-bit inputs, the
first and the linear layer 8 bits. The student sees the 10,000 training images at hand (FOLDER/vision/cifar10_train.npz, fewer
than a float model is trained on, and compressed once more), shifted and mirrored at random, and minimises the KL divergence
to the float model's predictions: no label is used. Post-training quantization calibrates on the same images. Top-1 on test
images of cifar10_test.npz, which neither sees. A seed chooses the images of each step and how they are shifted.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import qat_tables
from models import output, vision

FIRST_AND_LAST: dict[str, dict[str, hb.Scheme | None]] = {
    "ResNet-8": {"conv0": hb.int8_static(), "fc": hb.int8_static()},
    "ResNet-20": {"conv1": hb.int8_static(), "linear": hb.int8_static()},
}
POST_TRAINING = {
    "MSE": (),
    "MSE, bias correction": (hb.algorithms.BiasCorrection(),),
    "AdaRound, bias correction": (hb.algorithms.BiasCorrection(), hb.algorithms.AdaRound()),
}


def training_images(root: Path, name: str) -> Tensor:
    """`[10000, 3, 32, 32]` as the model takes them."""
    with np.load(root / "vision" / "cifar10_train.npz") as arrays:
        pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float()
    if name == "ResNet-8":
        return pixels
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels / 255 - mean) / std


def load(root: Path, name: str, count: int) -> tuple[nn.Module, Tensor, vision.Vision]:
    """The float model with batch normalization folded, training images, and what it is scored on; inputs of about 1."""
    images, data = training_images(root, name), vision.load_data(root, name, images=count)
    model = vision.load_float(root, name).to(memory_format=torch.channels_last)
    hb.fuse_(model, images[:2])
    if (
        name == "ResNet-8"
    ):  # takes 0 to 255, with a first layer of very small weights, for which no learning rate is right
        first = model.get_submodule("conv0")
        with torch.no_grad():
            first.get_parameter("weight").mul_(255)
        images, data = images / 255, replace(data, images=data.images / 255)
    return model, images, data


def augmented(images: Tensor) -> Tensor:
    """Mirrored at random, and all shifted alike by up to four pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    down, right = torch.randint(0, 9, (2,)).tolist()
    return F.pad(mirrored, (4, 4, 4, 4), "replicate")[:, :, down : down + 32, right : right + 32]


def distill(student: nn.Module, teacher: nn.Module, images: Tensor, *, steps: int, batch: int, rate: float) -> None:
    """Trains all weights and ranges on the KL divergence to the teacher's predictions."""
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = augmented(images[torch.randint(len(images), (batch,))]).to(memory_format=torch.channels_last)
        with torch.no_grad():
            target = F.log_softmax(teacher(x), -1)
        loss = F.kl_div(F.log_softmax(student(x), -1), target, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step}: KL {loss.item():.4f} on training images", flush=True)
    student.eval()


def accuracy(model: nn.Module, data: vision.Vision) -> float:
    """Top-1, in percent."""
    return 100 * (vision.logits(model, data.images).argmax(-1) == data.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vision/")
    parser.add_argument("--models", nargs="+", choices=FIRST_AND_LAST, default=list(FIRST_AND_LAST))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=5000, help="test images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows: dict[str, dict[str, object]] = {}

    def add(model: str, row: str, top1: float, seconds: float = 0.0) -> None:
        key = f"{model}: {row}"
        rows[key] = {"model": model, "row": row, "top1": top1, "seconds": seconds}
        print(f"{key}: {top1:.2f} in {seconds:.0f} s", flush=True)
        if arguments.json is not None:
            output.merge_json(arguments.json, "cifar10", {key: rows[key]})

    for name in arguments.models:
        torch.manual_seed(0)
        teacher, images, data = load(arguments.data, name, arguments.images)
        recipe = hb.Recipe(default=hb.int_static(4, 4), overrides=FIRST_AND_LAST[name])
        add(name, "float", accuracy(teacher, data))
        for label, algorithms in POST_TRAINING.items():
            start = time.perf_counter()
            quantized = copy.deepcopy(teacher)
            hb.quantize_(quantized, recipe, images[:512].split(64), algorithms=algorithms, progress=False)
            seconds = time.perf_counter() - start
            add(name, f"PTQ, {label}", accuracy(quantized, data), seconds)
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            start = time.perf_counter()
            student = hb.prepare_qat_(copy.deepcopy(teacher), recipe, weights="learned", activations="learned")
            distill(student, teacher, images, steps=arguments.steps, batch=arguments.batch, rate=arguments.rate)
            hb.convert_(student, progress=False)
            seconds = time.perf_counter() - start
            add(name, f"trained, seed {seed}", accuracy(student, data), seconds)
    print(qat_tables.image_table(rows))


if __name__ == "__main__":
    main()
