"""What a training step costs with fake quantization: time and memory beside the float step and PyTorch's own QAT.

    python benchmarks/bench_qat.py [--threads 2] [--seconds 20] [--json FILE]

ResNet-20 on batches of 128 images, channels last, and the 5 M-parameter language model on 8 rows of 256 tokens; forward,
backward and a step of SGD. All contenders take turns, a row is the median. The peak of memory is that of the allocations of
one step, as the profiler records them, above what the model and its optimizer hold. It may exceed the float step's by one bit
for each element of an input that is fake-quantized.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.ao.nn.qat as nnqat
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules_qat, get_default_qat_qconfig, prepare_qat

import halfbyte as hb
from models import llama, output, shared_data, vision

Step = Callable[[], None]


def image_step(model: nn.Module) -> Step:
    """A step of training ResNet-20."""
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (128,))
    return training_step(model, lambda: nn.functional.cross_entropy(model(images), labels))


def text_step(model: nn.Module) -> Step:
    """A step of training the language model."""
    tokens = torch.randint(0, 1024, (8, 256))
    return training_step(model, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss)


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Step:
    """Forward, backward, SGD."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def torch_qat(model: nn.Module) -> nn.Module:
    """PyTorch's eager QAT: 8-bit weights per channel and 8-bit activations, batch normalization fused."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, vision.ResNet20 | vision.BasicBlock):
            names = [[f"conv{n}", f"bn{n}"] for n in (1, 2) if hasattr(module, f"conv{n}")]
            fuse_modules_qat(module, names, inplace=True)
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "ConvBn2d":
            module.qconfig = get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_qat(model, inplace=True)
    count = sum(isinstance(m, nnqat.Linear) or type(m).__name__ == "ConvBn2d" for m in model.modules())
    assert count > 15, "PyTorch's QAT found nothing to do"
    return model


def fake_quantized_elements(model: nn.Module, step: Step) -> int:
    """Elements of inputs that a step fake-quantizes."""
    counts: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, hb.qat.QATModule) and module.input_quantizer]
    hooks = [layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel())) for layer in layers]
    step()
    for hook in hooks:
        hook.remove()
    return sum(counts)


def peak_bytes(step: Step) -> int:
    """Most bytes that the allocations of one step held at a time."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(
    name: str, model: nn.Module, make_step: Callable[[nn.Module], Step], example: object, seconds: float
) -> list[dict[str, object]]:
    """A row for each contender."""
    schemes = {
        "float": None,
        "8-bit static": (hb.int8_static(), {}),
        "8-bit dynamic": (hb.int8_dynamic(), {}),
        "4-bit weights, 8-bit inputs, scales trained": (
            hb.int_static(4, 8),
            {"weights": "learned", "activations": "learned"},
        ),
    }
    models: dict[str, nn.Module] = {}
    for label, chosen in schemes.items():
        models[label] = copy.deepcopy(model)
        if chosen is not None:
            scheme, options = chosen
            hb.prepare_qat_(models[label], scheme, example, on_fallback="allow", **options)
    models["8-bit, torch.ao"] = torch_qat(model)
    steps = {label: make_step(each) for label, each in models.items()}
    times: dict[str, list[float]] = {label: [] for label in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["float"]) < 3:
        for label, step in steps.items():
            begin = time.perf_counter()
            step()
            times[label].append((time.perf_counter() - begin) * 1e3)
    peaks = {label: peak_bytes(step) for label, step in steps.items()}
    rows: list[dict[str, object]] = []
    for label in steps:
        median = statistics.median(times[label])
        elements = 0 if label == "float" or "torch" in label else fake_quantized_elements(models[label], steps[label])
        rows.append(
            {
                "model": name,
                "step": label,
                "ms": round(median, 2),
                "times_float": round(median / statistics.median(times["float"]), 3),
                "repeats": len(times[label]),
                "peak_mb": round(peaks[label] / 1e6, 2),
                "over_float_mb": round((peaks[label] - peaks["float"]) / 1e6, 2),
                "allowed_over_float_mb": round(elements / 8e6, 2),
            }
        )
        print(" | ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for all contenders of one model")
    parser.add_argument("--models", nargs="+", choices=["ResNet-20", "novels5M"], default=["ResNet-20", "novels5M"])
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    if "ResNet-20" in arguments.models:
        model = vision.ResNet20().to(memory_format=torch.channels_last)
        example = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
        rows += measure("ResNet-20", model, image_step, example, arguments.seconds)
    root = shared_data()
    if "novels5M" in arguments.models:
        if root is None:
            print("skipped novels5M: no shared data here; HALFBYTE_SHARED names the folder that holds data/")
        else:
            rows += measure("novels5M", llama.load_float(root, "novels5M"), text_step, None, arguments.seconds)
    if arguments.json is not None:
        output.merge_json(arguments.json, "steps", {f"{row['model']}, {row['step']}": row for row in rows})


if __name__ == "__main__":
    main()
