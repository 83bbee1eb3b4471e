"""GPTQ of convolutions: what weight-only widths cost image classifiers, with nearest codes on MSE scales and with GPTQ.

    python benchmarks/bench_gptq_convolutions.py --data FOLDER --json benchmarks/results/gptq_convolutions.json

One scale an output channel, asymmetric; the last, linear layer stays in float: it has more inputs than there are images to
calibrate on. Mean KL to the float model's classes, top-1 and the share of images whose class stays; on images that
calibration did not see.
"""

import argparse
import copy
from pathlib import Path

import torch

import halfbyte as hb
from models import output, vision

METHODS = {"MSE": lambda: hb.MSE(), "GPTQ": lambda: hb.GPTQ()}


def measure(root: Path, name: str, widths: list[int], images: int) -> dict[str, dict[str, object]]:
    """Rows by model, width and method."""
    data = vision.load_data(root, name, calibration=200, images=images)
    model = vision.load_float(root, name)
    batches = list(data.calibration.split(10))
    wanted = vision.logits(model, data.images).log_softmax(-1).double()
    rows = {}

    def add(label: str, found: torch.Tensor) -> None:
        kl = (wanted.exp() * (wanted - found)).sum(-1)
        rows[f"{name}: {label}"] = {
            "kl": kl.mean().item(),
            "kl_ci": 1.96 * kl.std().item() / len(kl) ** 0.5,
            "top1": (found.argmax(-1) == data.labels).double().mean().item(),
            "same": (found.argmax(-1) == wanted.argmax(-1)).double().mean().item(),
        }

    add("float32: ", wanted)
    for bits in widths:
        for method, make in METHODS.items():
            copied = copy.deepcopy(model)
            recipe = hb.Recipe(default=hb.int_weight_only(bits), overrides={torch.nn.Linear: None})
            hb.quantize_(copied, recipe, data=batches, algorithms=[make()], progress=False, on_fallback="allow")
            add(f"{bits} bits: {method}", vision.logits(copied, data.images).log_softmax(-1).double())
            print(convolutions_table({key: rows[key] for key in list(rows)[-1:]}).splitlines()[-1], flush=True)
    return rows


def convolutions_table(rows: dict[str, dict[str, object]]) -> str:
    """As docs/gptq.md shows it."""
    cells = [
        [
            *name.split(": "),
            f"{row['kl']:.4f} ± {row['kl_ci']:.4f}",
            f"{100 * float(str(row['top1'])):.1f} %",
            f"{100 * float(str(row['same'])):.1f} %",
        ]
        for name, row in rows.items()
    ]
    return output.markdown(["model", "weights", "method", "KL to float", "top-1", "same class"], cells, left=(0, 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with vision/")
    parser.add_argument("--models", nargs="+", choices=vision.NAMES, default=["MobileNetV1 0.25", "ResNet-20"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.models:
        rows = measure(arguments.data, name, arguments.bits, arguments.images)
        if arguments.json is not None:
            output.merge_json(arguments.json, "convolutions", rows)


if __name__ == "__main__":
    main()
