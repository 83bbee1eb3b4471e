"""Trains a language model's 2-, 3-, 4-bit and ternary weights to follow the float model, beside GPTQ at the same bytes.

    python examples/qat_language_model.py --data FOLDER [--formats "2 bits" ...]

novels5M (FOLDER/lm, 5.0 M parameters): all Linear weights but the tied head, groups of 32 as in docs/gptq.md. Training starts
from GPTQ's integers (`hb.qat.start_from_`) and minimises the KL divergence to the float model's predictions on windows of
256 tokens of its own training text; no label is used. Evaluation: the same 40 windows as docs/gptq.md, which are in neither
training nor calibration text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

import halfbyte as hb

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench_gptq_accuracy import spread, windows
from models import llama

SCHEMES = {
    "4 bits": hb.int_weight_only(4, 32),
    "3 bits": hb.int_weight_only(3, 32),
    "2 bits": hb.int_weight_only(2, 32),
    "2 bits, no zero points": hb.codebook_weight_only((-0.75, -0.25, 0.25, 0.75), 32),
    "ternary": hb.ternary_weight_only(32),
}
# Fewer bits, longer steps: weights have further to go to the next integer.
LEARNING_RATES = {"4 bits": 5e-5, "3 bits": 2e-4}
SCALE_RATE = 1e-3  # a part of the scale


def distill(student: nn.Module, teacher: nn.Module, data: Sequence[Tensor], *, rate: float) -> None:
    """Trains all weights and scales on the KL divergence to the teacher's predictions."""
    student.train()
    scales = set(hb.qat.scale_parameters(student))
    weights = [p for p in student.parameters() if p not in scales]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "lr": rate}, {"params": list(scales), "lr": 0.3 * rate}],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=len(data), pct_start=0.1
    )
    for step, rows in enumerate(data):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                target = teacher(input_ids=rows, use_cache=False).logits
            logits = student(input_ids=rows, use_cache=False).logits
        loss = F.kl_div(
            F.log_softmax(logits.float(), -1).flatten(0, 1),
            F.log_softmax(target.float(), -1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"  step {step}: KL {loss.item():.4f} on training text", flush=True)
    student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/novels5M and text/")
    parser.add_argument("--formats", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="windows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate at 2 bits and for ternary")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append a line of results for each format")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    teacher = llama.load_float(arguments.data, "novels5M")
    tokenizer = Tokenizer.from_file(str(arguments.data / "lm" / "novels5M" / "tokenizer.json"))
    train = (arguments.data / "text" / "novels_train.txt").read_text(encoding="utf-8")
    evaluation = windows(tokenizer, (arguments.data / "text" / "novels_eval.txt").read_text(encoding="utf-8"), 40)
    reference = llama.log_probs(teacher, evaluation)
    calibration = list(torch.stack(spread(tokenizer, train, 48)).split(8))
    rows = torch.stack(spread(tokenizer, train, arguments.steps * arguments.batch))
    data = rows[torch.randperm(len(rows))].split(arguments.batch)
    float_parts: dict[str, hb.Scheme | None] = {"model.embed_tokens": None, "lm_head": None}
    for name in arguments.formats:
        recipe = hb.Recipe(default=SCHEMES[name], overrides=float_parts)
        start = time.perf_counter()
        quantized = copy.deepcopy(teacher)
        report = hb.quantize_(
            quantized, recipe, data=calibration, algorithms=[hb.GPTQ()], progress=False, on_fallback="allow"
        )
        before = llama.evaluate(quantized, evaluation, reference)
        after_gptq = time.perf_counter()
        print(f"{name}: GPTQ {before.kl:.4f}", flush=True)
        student = hb.prepare_qat_(copy.deepcopy(teacher), recipe, weights="learned", on_fallback="allow")
        hb.qat.start_from_(student, quantized)
        rate = LEARNING_RATES.get(name, arguments.rate)
        distill(student, teacher, data, rate=rate)
        hb.convert_(student, progress=False)
        after = llama.evaluate(student, evaluation, reference)
        plans = [m.plan for m in report.modules if m.plan.scheme is not None]
        row = {
            "format": name,
            "bits_per_weight": 8 * sum(p.bytes_after for p in plans) / sum(math.prod(p.shape or ()) for p in plans),
            "gptq": before.kl,
            "gptq_ci": before.kl_ci,
            "trained": after.kl,
            "trained_ci": after.kl_ci,
            "perplexity": after.perplexity,
            "steps": arguments.steps,
            "batch": arguments.batch,
            "rate": rate,
            "gptq_seconds": after_gptq - start,
            "seconds": time.perf_counter() - after_gptq,
        }
        print(
            f"| {name} | {row['bits_per_weight']:.2f} | {before.kl:.4f} ± {before.kl_ci:.4f} "
            f"| {after.kl:.4f} ± {after.kl_ci:.4f} | {after.perplexity:.2f} | {row['seconds']:.0f} |",
            flush=True,
        )
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
