"""Static INT8 on trained image classifiers: accuracy, memory and time of calibration, observers beside torch.ao's.

    python benchmarks/bench_vision.py --json benchmarks/results/vision.json

Calibration and evaluation images are disjoint. "same" is how many images keep float's answer. The interval of a change in
top-1 is that of a paired test: the standard error of `wrong to right` less `right to wrong`.
"""

import argparse
import copy
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.ao.quantization import HistogramObserver

import halfbyte as hb
from models import output, shared_data, vision

_EQUALIZE, _CORRECT = hb.algorithms.CrossLayerEqualization, hb.algorithms.BiasCorrection
_PER_TENSOR = "int8 static, one scale a weight"
VARIANTS: dict[str, tuple[Callable[[], hb.Scheme], Callable[[], list[object]]]] = {
    "int8 static": (hb.int8_static, list),
    "int8 static, not corrected": (hb.int8_static, lambda: [hb.RTN()]),
    "int8 static, bias corrected only": (hb.int8_static, lambda: [_CORRECT(), hb.RTN()]),
    "int8 static, GPTQ, corrected": (hb.int8_static, lambda: [_CORRECT(), hb.GPTQ()]),
    _PER_TENSOR: (lambda: hb.int8_static(per_channel=False), lambda: [hb.RTN()]),
    f"{_PER_TENSOR}, equalized": (lambda: hb.int8_static(per_channel=False), lambda: [_EQUALIZE(), hb.RTN()]),
    f"{_PER_TENSOR}, equalized, corrected": (lambda: hb.int8_static(per_channel=False), lambda: [_EQUALIZE()]),
    "W4A8 static, nearest": (hb.int4_int8_static, lambda: [hb.RTN()]),
    "W4A8 static, MSE, corrected": (hb.int4_int8_static, list),
    "W4A8 static, GPTQ, corrected": (hb.int4_int8_static, lambda: [_CORRECT(), hb.GPTQ()]),
    "W4A8 static, AdaRound": (hb.int4_int8_static, lambda: [hb.algorithms.AdaRound()]),
    "W4A8 static, AdaRound, corrected": (hb.int4_int8_static, lambda: [_CORRECT(), hb.algorithms.AdaRound()]),
    "int8 static, symmetric": (lambda: hb.int8_static(symmetric=True), list),
    "int8 static, min/max": (lambda: hb.int8_static(observer=hb.observers.MinMax()), list),
    "int8 static, 99.9 %": (lambda: hb.int8_static(observer=hb.observers.Percentile()), list),
    "int8 static, entropy": (lambda: hb.int8_static(observer=hb.observers.Entropy()), list),
}


def accuracy(root: Path, name: str, chosen: list[str], images: int | None) -> Iterator[tuple[str, dict[str, object]]]:
    """Top-1 of float and of every chosen variant, one at a time."""
    data = vision.load_data(root, name, images=images, calibration=200)
    model = vision.load_float(root, name)
    batches = list(data.calibration.split(20))
    hb.fuse_(model, batches[0])
    expected = vision.logits(model, data.images)
    right = expected.argmax(1) == data.labels
    yield "float32", {"top1": 100 * right.float().mean().item(), "images": len(right)}
    for variant in chosen:
        scheme, algorithms = VARIANTS[variant]
        quantized = copy.deepcopy(model)
        start = time.perf_counter()
        try:
            hb.quantize_(quantized, scheme(), batches, algorithms(), progress=False, on_fallback="allow")
        except hb.QuantizationError as error:  # too little data for GPTQ, say
            print(f"{name}, {variant}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        found = vision.logits(quantized, data.images)
        now = found.argmax(1) == data.labels
        gained, lost = int((now & ~right).sum()), int((right & ~now).sum())
        yield (
            variant,
            {
                "top1": 100 * now.float().mean().item(),
                "change": 100 * (gained - lost) / len(right),
                "change_error": 100 * math.sqrt(gained + lost) / len(right),
                "same": 100 * (found.argmax(1) == expected.argmax(1)).float().mean().item(),
                "sqnr_db": 10 * math.log10(float(expected.var() / (found - expected).square().mean())),
                "seconds": seconds,
            },
        )


def calibration_cost(root: Path, name: str) -> dict[str, object]:
    """Time of observers beside the forward pass, and peak memory of calibrating 10 and 1,000 images, each in a new process."""
    images = vision.load_data(root, name, images=1).calibration[:10]
    model = vision.load_float(root, name)
    hb.fuse_(model, images[:2])
    prepared = hb.prepare_(copy.deepcopy(model), hb.int8_static())

    @torch.no_grad()
    def run(subject: nn.Module) -> None:
        subject(images)

    seconds = output.alternate([lambda: run(model), lambda: run(prepared)], repeats=15)
    peaks = {count: _peak_in_new_process(name, count) for count in (10, 1000)}
    return {
        "forward_ms": 1000 * seconds[0],
        "observers_part": seconds[1] / seconds[0] - 1,
        "peak_mb": {str(count): peak for count, peak in peaks.items()},
        "peak_ratio": peaks[1000] / peaks[10],
    }


def _peak_in_new_process(name: str, count: int) -> float:
    command = [sys.executable, __file__, "--calibrate", name, str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _calibrate(root: Path, name: str, count: int) -> float:
    """Peak memory in MB of a process that calibrates on `count` images, repeated from ten, ten at a time."""
    images = vision.load_data(root, name, images=1).calibration[:10].clone()
    model = vision.load_float(root, name)
    hb.fuse_(model, images[:2])
    hb.prepare_(model, hb.int8_static())
    hb.calibrate(model, (images for _ in range(count // 10)), progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def observers() -> dict[str, object]:
    """Histogram observers on 16 million values: forward, qparams, and the error of what they choose."""
    x = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    theirs, ours = HistogramObserver(), hb.observers.MSE(samples_per_batch=None)
    sampled = hb.observers.MSE()
    theirs(x), ours.update(x), sampled.update(x)
    forward = output.alternate([lambda: theirs(x), lambda: ours.update(x), lambda: sampled.update(x)], repeats=3)
    qparams = output.alternate([theirs.calculate_qparams, ours.qparams], repeats=15)

    def error(scale: Tensor, zero_point: Tensor) -> float:
        y = torch.fake_quantize_per_tensor_affine(x, scale.reshape(()), zero_point.int().reshape(()), 0, 255)
        return float((y - x).square().mean())

    return {
        "forward_ms": {"torch": 1000 * forward[0], "all values": 1000 * forward[1], "sampled": 1000 * forward[2]},
        "forward_ratio": forward[0] / forward[1],
        "qparams_ms": {"torch": 1000 * qparams[0], "halfbyte": 1000 * qparams[1]},
        "qparams_ratio": qparams[0] / qparams[1],
        "error_ratio": error(*ours.qparams()) / error(*theirs.calculate_qparams()),
    }


def table(name: str, rows: dict[str, dict[str, object]]) -> str:
    """Markdown."""
    header = [name, "top-1, %", "change", "same as float, %", "SQNR, dB"]
    lines = [
        [
            variant,
            f"{row['top1']:.2f}",
            f"{row['change']:+.2f} ± {row['change_error']:.2f}" if "change" in row else "",
            f"{row['same']:.2f}" if "same" in row else "",
            f"{row['sqnr_db']:.1f}" if "sqnr_db" in row else "",
        ]
        for variant, row in rows.items()
    ]
    return output.markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=vision.NAMES, default=list(vision.NAMES), metavar="MODEL")
    parser.add_argument("--schemes", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="SCHEME")
    parser.add_argument("--parts", nargs="+", choices=["accuracy", "calibration", "observers"], default=["accuracy"])
    parser.add_argument("--images", type=int, help="evaluate the first IMAGES only (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    parser.add_argument("--calibrate", nargs=2, metavar=("MODEL", "IMAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    root = shared_data()
    if root is None:
        parser.exit(0, "skipped: no shared data here; HALFBYTE_SHARED names the folder that holds data/\n")
    torch.set_num_threads(arguments.threads)
    if arguments.calibrate:
        print(_calibrate(root, arguments.calibrate[0], int(arguments.calibrate[1])))
        return

    def keep(section: str, row: str, values: dict[str, object]) -> None:
        if arguments.json is not None:
            output.merge_json(arguments.json, section, {row: values})

    for name in arguments.models if "accuracy" in arguments.parts else ():
        rows: dict[str, dict[str, object]] = {}
        for variant, row in accuracy(root, name, arguments.schemes, arguments.images):
            rows[variant] = row
            keep(name, variant, row)
        print(table(name, rows), flush=True)
    for name in arguments.models if "calibration" in arguments.parts else ():
        cost = calibration_cost(root, name)
        keep("calibration", name, cost)
        print(name, cost, flush=True)
    if "observers" in arguments.parts:
        found = observers()
        keep("observers", "16 million values", found)
        print(found)


if __name__ == "__main__":
    main()
