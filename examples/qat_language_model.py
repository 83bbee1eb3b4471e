"""Trains a language model's 2-, 3-, 4-bit and ternary weights to follow the float model, beside what needs no training.

    python examples/qat_language_model.py --data FOLDER [--formats "2 bits" ...]

novels5M (FOLDER/lm, 5.0 M parameters): all Linear weights but the tied head, in the formats of docs/gptq.md. Training starts
from GPTQ's integers (`hb.qat.start_from_`) and minimises the KL divergence to the float model's predictions on windows of
256 tokens of its own training text; no label is used. Bytes are those of GPTQ's model: embedding, norms and head are trained
too, and stay in float.

Evaluation: the 40 windows of docs/gptq.md, and 40 of another kind of text; neither GPTQ nor training sees them. Settings are
for choosing with `--validate`, which scores on 32 windows of the training text that training leaves out.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

import halfbyte as hb

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import qat_tables
from bench_gptq_accuracy import spread, windows
from models import llama, output


@dataclass(frozen=True)
class Case:
    """A format of the weights, and how it is trained: fewer bits, longer steps, for the next integer is further away."""

    scheme: hb.Scheme
    steps: int
    rate: float
    down_proj: hb.Scheme | None = None

    @property
    def recipe(self) -> hb.Recipe:
        """All linear layers but the tied head."""
        parts: dict[str, hb.Scheme | None] = {"model.embed_tokens": None, "lm_head": None}
        mixed = {"*.down_proj": self.down_proj} if self.down_proj else {}
        return hb.Recipe(default=self.scheme, overrides={**parts, **mixed})


CASES = {
    "4 bits": Case(hb.int_weight_only(4, 32), 80, 5e-5),
    "3 bits": Case(hb.int_weight_only(3, 32), 300, 2e-4),
    "2 bits": Case(hb.int_weight_only(2, 32), 800, 5e-4),
    "2 bits, down_proj 3 bits": Case(hb.int_weight_only(2, 64), 800, 5e-4, hb.int_weight_only(3, 64)),
    "2 bits, no zero points": Case(hb.codebook_weight_only((-0.75, -0.25, 0.25, 0.75), 32), 300, 5e-4),
    "ternary": Case(hb.ternary_weight_only(32), 300, 5e-4),
}
SCALE_RATE = 0.3  # of the weights' rate; scales move by that part of themselves


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    checkpoint: Path | None = None,
    every: int = 50,
) -> None:
    """Trains all weights and scales on the KL divergence to the teacher's predictions: warm-up, then half a cosine.

    Goes on where a checkpoint of the same training ends, if there is one, and writes it anew `every` few steps.
    """
    student.train()
    scales = list(hb.qat.scale_parameters(student))  # a list: checkpoints of the optimizer go by the order
    weights = [p for p in student.parameters() if not any(p is scale for scale in scales)]
    groups = [{"params": weights, "lr": rate}, {"params": scales, "lr": SCALE_RATE * rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)

    def pace(step: int) -> float:
        return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    begin, total = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint)
        student.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        begin = state["step"]
    for step in range(begin, steps):
        rows = data[torch.arange(step * batch, (step + 1) * batch) % len(data)]
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
        total += loss.item()
        if (step + 1) % every == 0:
            print(f"  step {step + 1}: KL {total / every:.4f} on training text", flush=True)
            total = 0.0
            if checkpoint is not None:
                parts = {"model": student, "optimizer": optimizer, "schedule": schedule}
                torch.save({"step": step + 1, **{key: part.state_dict() for key, part in parts.items()}}, checkpoint)
    student.eval()


@dataclass(frozen=True)
class Texts:
    """Windows of 256 tokens."""

    calibration: list[Tensor]
    training: Tensor
    scored: dict[str, list[Tensor]]


def load_texts(root: Path, *, validate: bool) -> Texts:
    """Training windows in random order, without the 32 that settings are validated on; calibration as in docs/gptq.md."""
    tokenizer = Tokenizer.from_file(str(root / "lm" / "novels5M" / "tokenizer.json"))
    train, same, other = (
        (root / "text" / f"{name}.txt").read_text(encoding="utf-8")
        for name in ("novels_train", "novels_eval", "tinyshakespeare")
    )
    ids = torch.tensor(tokenizer.encode(train).ids)
    rows = ids[: len(ids) // llama.ROW * llama.ROW].view(-1, llama.ROW)
    every = len(rows) // 32
    left_out = torch.arange(32) * every + every // 2
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[left_out] = False
    shuffled = rows[kept][torch.randperm(int(kept.sum()), generator=torch.Generator().manual_seed(1))]
    scored = {"kl": list(rows[left_out])}
    if not validate:
        scored = {"kl": windows(tokenizer, same, 40), "kl_other": windows(tokenizer, other, 40)}
    return Texts(list(torch.stack(spread(tokenizer, train, 48)).split(8)), shuffled, scored)


def scores(model: nn.Module, texts: Texts, references: dict[str, list[Tensor]]) -> dict[str, llama.Distance]:
    """Distances to the float model on each text."""
    return {label: llama.evaluate(model, rows, references[label]) for label, rows in texts.scored.items()}


def compare(
    case: Case,
    teacher: nn.Module,
    texts: Texts,
    references: dict[str, list[Tensor]],
    *,
    batch: int,
    checkpoint: Path | None = None,
) -> dict[str, object]:
    """Rounds to the smallest squared error, quantizes with GPTQ, trains from there; a row of the table."""
    row: dict[str, object] = {"steps": case.steps, "batch": batch, "rate": case.rate}
    found: dict[str, dict[str, llama.Distance]] = {}

    def add(method: str, model: nn.Module, start: float) -> None:
        row[f"{method}_seconds"] = time.perf_counter() - start
        found[method] = scores(model, texts, references)
        for label, distance in found[method].items():
            row.update({f"{method}_{label}": distance.kl, f"{method}_{label}_ci": distance.kl_ci})
        print(f"  {method}: KL {found[method]['kl'].kl:.4f}, {row[f'{method}_seconds']:.0f} s", flush=True)

    for method, algorithm in (("mse", hb.MSE(weighting="none")), ("gptq", hb.GPTQ())):
        start = time.perf_counter()
        quantized = copy.deepcopy(teacher)
        report = hb.quantize_(
            quantized,
            case.recipe,
            data=texts.calibration,
            algorithms=[algorithm],
            progress=False,
            on_fallback="allow",
        )
        add(method, quantized, start)
    start = time.perf_counter()
    student = hb.prepare_qat_(copy.deepcopy(teacher), case.recipe, weights="learned", on_fallback="allow")
    hb.qat.start_from_(student, quantized)
    distill(
        student,
        teacher,
        texts.training,
        steps=case.steps,
        batch=batch,
        rate=case.rate,
        checkpoint=checkpoint,
    )
    hb.convert_(student, progress=False)
    add("trained", student, start)
    for label in texts.scored:
        ratio = llama.ratio_of_sums(found["trained"][label].row_kl, found["gptq"][label].row_kl)
        row[f"ratio_{label}"], row[f"ratio_{label}_ci"] = ratio
    plans = [m.plan for m in report.modules if m.plan.scheme is not None]
    row["bits_per_weight"] = 8 * sum(p.bytes_after for p in plans) / sum(math.prod(p.shape or ()) for p in plans)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/novels5M and text/")
    parser.add_argument("--formats", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, help="instead of the format's own number")
    parser.add_argument("--rate", type=float, help="learning rate instead of the format's own")
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens a step")
    parser.add_argument("--validate", action="store_true", help="score on training text that was left out")
    parser.add_argument("--checkpoints", type=Path, help="folder to write to every 50 steps, and to go on from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    teacher = llama.load_float(arguments.data, "novels5M")
    texts = load_texts(arguments.data, validate=arguments.validate)
    references = {label: llama.log_probs(teacher, rows) for label, rows in texts.scored.items()}
    table: dict[str, dict[str, object]] = {}
    for name in arguments.formats:
        print(name, flush=True)
        case = CASES[name]
        case = replace(case, steps=arguments.steps or case.steps, rate=arguments.rate or case.rate)
        checkpoint = arguments.checkpoints and arguments.checkpoints / f"{name}.pt"
        table[name] = compare(case, teacher, texts, references, batch=arguments.batch, checkpoint=checkpoint)
        if arguments.json is not None:
            section = "validation" if arguments.validate else "novels5M"
            output.merge_json(arguments.json, section, {name: table[name]})
    print(qat_tables.language_table(table))


if __name__ == "__main__":
    main()
