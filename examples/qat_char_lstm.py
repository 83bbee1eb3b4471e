"""Trains a character LSTM with 4-bit, 2-bit and ternary weights, beside plain quantization to the same formats.

    python examples/qat_char_lstm.py --data FOLDER [--steps 200]

charrnn_shakespeare (FOLDER/lm, 0.28 M parameters): both LSTM layers and the decoder; the embedding's table keeps 8 bits. It is
fine-tuned on the characters of tinyshakespeare that precede those it is scored on, in rows of 256 from a zero state, with the
usual loss. Score: bits per character of the 512 rows of benchmarks/models/charrnn.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import halfbyte as hb

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from models import charrnn

NAME = "charrnn_shakespeare"
SCHEMES = {
    "8 bits": hb.int8_weight_only(),
    "4 bits, group 32": hb.int4_weight_only(32),
    "2 bits, group 32": hb.int_weight_only(2, 32),
    "ternary, group 32": hb.ternary_weight_only(32),
    "binary, group 32": hb.int_weight_only(1, 32),
}


def training_rows(root: Path) -> Tensor:
    """`[rows, 257]` characters before those that the model is scored on."""
    vocabulary = json.loads((root / "lm" / NAME / "config.json").read_text(encoding="utf-8"))["vocab"]
    file, length = charrnn.TEXTS[NAME]
    text = (root / "text" / file).read_text(encoding="utf-8")[:length]
    characters = torch.tensor([vocabulary[character] for character in text if character in vocabulary])
    return characters[: len(characters) // 257 * 257].reshape(-1, 257)


def train(model: nn.Module, rows: Tensor, *, steps: int, batch: int, rate: float) -> None:
    """The usual training loop."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = rows[torch.randint(len(rows), (batch,))]
        logits = model(chosen[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), chosen[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/charrnn_shakespeare and text/")
    parser.add_argument("--formats", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="rows of 256 characters a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append a line of results for each format")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = charrnn.load_float(arguments.data, NAME)
    evaluation, rows = charrnn.load_rows(arguments.data, NAME), training_rows(arguments.data)
    print(f"float: {charrnn.bits_per_character(model, evaluation):.4f} bits per character", flush=True)
    for name in arguments.formats:
        torch.manual_seed(0)
        recipe = hb.Recipe(default=SCHEMES[name], overrides={"embedding": hb.int8_weight_only()})
        quantized = copy.deepcopy(model)
        hb.quantize_(quantized, recipe, progress=False)
        before = charrnn.bits_per_character(quantized, evaluation)
        start = time.perf_counter()
        student = hb.prepare_qat_(copy.deepcopy(model), recipe, weights="learned")
        train(student, rows, steps=arguments.steps, batch=arguments.batch, rate=arguments.rate)
        hb.convert_(student, progress=False)
        seconds = time.perf_counter() - start
        after = charrnn.bits_per_character(student, evaluation)
        print(f"| {name} | {before:.4f} | {after:.4f} | {seconds:.0f} |", flush=True)
        if arguments.json is not None:
            row = {"format": name, "quantized": before, "trained": after, "steps": arguments.steps, "seconds": seconds}
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
