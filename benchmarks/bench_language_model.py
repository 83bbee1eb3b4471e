"""Quantization of real language models: size, perplexity, distance to float, text, speed.

    python benchmarks/bench_language_model.py --model novels5M --json benchmarks/results/novels5M.json

Prints a markdown table. ``--parts quality`` measures everything but time, ``--parts speed`` times decoding at batch 1
(``model.generate``) and prefill, alternating each model with the float one. Results of both land in the same JSON file.
Every quantized model is saved and reloaded on a meta-device skeleton in a new process: its logits must be equal bit for
bit.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor
from transformers import LlamaForCausalLM

import halfbyte as hb
from models import llama, output, reload, shared_data
from models.variants import VARIANTS

FLOAT = "float32"
TIED_HEAD = ("lm_head", "model.embed_tokens")


def quality(
    root: Path, name: str, chosen: list[str], text: llama.Text, *, float_head: bool
) -> dict[str, dict[str, object]]:
    """Size, perplexity, KL and text of every chosen variant; each is reloaded in a new process."""
    float_model = llama.load_float(root, name)
    parameters = sum(parameter.numel() for parameter in float_model.parameters())
    reference = llama.log_probs(float_model, text.evaluation)
    inputs = {"input_ids": text.evaluation[0][None]}
    calibration = [row[None] for row in text.calibration]
    result: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        saved: dict[str, tuple[Path, Path]] = {}
        for index, variant in enumerate(chosen):
            model = copy.deepcopy(float_model)
            path, expected = Path(folder) / f"{index}.safetensors", Path(folder) / f"{index}.expected.safetensors"
            if variant == FLOAT:
                tensor_bytes, fallbacks = 4 * parameters, 0
                save_model(model, str(path))
            else:
                report = VARIANTS[variant].quantize_(model, calibration, float_patterns=TIED_HEAD if float_head else ())
                tensor_bytes, fallbacks = report.bytes_after, len(report.fallbacks)
                hb.save(model, path)
                reload.save_expected(model, inputs, expected)
                saved[variant] = (path, expected)
            distance = llama.evaluate(model, text.evaluation, reference)
            result[variant] = {
                "bits_per_weight": 8 * tensor_bytes / parameters,
                "tensor_bytes": tensor_bytes,
                "file_bytes": path.stat().st_size,
                "perplexity": distance.perplexity,
                "perplexity_change": distance.perplexity_change,
                "perplexity_change_ci": distance.perplexity_change_ci,
                "kl": distance.kl,
                "kl_ci": distance.kl_ci,
                "same_top1": distance.same_top1,
                "tokens": distance.tokens,
                "fallbacks": fallbacks,
                "text": llama.greedy(model, text),
            }
        answers = reload.same_in_new_process(name, list(saved.values()))
        for variant, same in zip(saved, answers, strict=True):
            result[variant]["reload_bit_equal"] = same
    return result


@torch.inference_mode()
def _prefill(model: LlamaForCausalLM, tokens: Tensor) -> None:
    model(input_ids=tokens, use_cache=False)


def _decode(model: LlamaForCausalLM, prompt: Tensor, new_tokens: int) -> None:
    mask = torch.ones_like(prompt)
    model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )


def speed(
    root: Path, name: str, chosen: list[str], text: llama.Text, *, repeats: int, new_tokens: int = 64
) -> dict[str, dict[str, object]]:
    """Tokens a second of each variant and of float32 beside it, alternating, medians of `repeats`."""
    float_model = llama.load_float(root, name)
    row = text.evaluation[0][None]
    prompt = row[:, :16]
    result: dict[str, dict[str, object]] = {}
    for variant in chosen:
        if variant == FLOAT:
            continue
        model = copy.deepcopy(float_model)
        start = time.process_time()
        VARIANTS[variant].quantize_(model, [part[None] for part in text.calibration])
        quantize_cpu_seconds = time.process_time() - start
        decode = output.alternate(
            [lambda: _decode(float_model, prompt, new_tokens), lambda m=model: _decode(m, prompt, new_tokens)],
            repeats=repeats,
        )
        prefill = output.alternate(
            [lambda: _prefill(float_model, row), lambda m=model: _prefill(m, row)], repeats=5 * repeats
        )
        result[variant] = {
            "quantize_cpu_seconds": quantize_cpu_seconds,
            "decode_tokens_per_second": new_tokens / decode[1],
            "decode_vs_float": decode[0] / decode[1],
            "prefill_tokens_per_second": row.numel() / prefill[1],
            "prefill_vs_float": prefill[0] / prefill[1],
        }
    return result


def quality_table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown."""
    header = [
        "scheme",
        "bits/weight",
        "file, kB",
        "perplexity",
        "change, %",
        "KL to float, nats",
        "same top-1",
        "reload",
    ]
    table = [
        [
            name,
            f"{row['bits_per_weight']:.2f}",
            f"{row['file_bytes'] / 1000:,.0f}",
            f"{row['perplexity']:.3f}",
            "" if name == FLOAT else f"{100 * row['perplexity_change']:+.3f} ± {100 * row['perplexity_change_ci']:.3f}",
            "" if name == FLOAT else f"{row['kl']:.2e} ± {row['kl_ci']:.0e}",
            "" if name == FLOAT else f"{100 * row['same_top1']:.1f} %",
            "" if name == FLOAT else ("equal" if row["reload_bit_equal"] else "DIFFERENT"),
        ]
        for name, row in rows.items()
    ]
    return output.markdown(header, table)


def summary_table(rows: dict[str, dict[str, object]]) -> str:
    """The few rows and columns that a reader wants first, as markdown."""
    chosen = [FLOAT, "int8_weight_only", "int8_dynamic", "int4 g32, MSE", "W4A8 g32, MSE", "int3 g32, MSE"]
    table = [
        [
            name,
            f"{rows[name]['bits_per_weight']:.2f}",
            f"{rows[name]['file_bytes'] / 1000:,.0f}",
            f"{rows[name]['perplexity']:.2f}",
            "" if name == FLOAT else f"{100 * rows[name]['perplexity_change']:+.2f} %",
        ]
        for name in chosen
    ]
    return output.markdown(["scheme", "bits/weight", "file, kB", "perplexity", "change"], table)


def text_list(rows: dict[str, dict[str, object]]) -> str:
    """Greedy continuations, as a markdown table."""
    return output.markdown(
        ["scheme", "greedy text"],
        [[name, str(row["text"]).replace("\n", " ").replace("|", "\\|")] for name, row in rows.items()],
        left={0, 1},
    )


def speed_table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown."""
    header = ["scheme", "decode, tokens/s", "vs float", "prefill, tokens/s", "vs float", "quantize, CPU s"]
    table = [
        [
            name,
            f"{row['decode_tokens_per_second']:.0f}",
            f"{row['decode_vs_float']:.2f}",
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['prefill_vs_float']:.2f}",
            f"{row['quantize_cpu_seconds']:.2f}",
        ]
        for name, row in rows.items()
    ]
    return output.markdown(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=llama.MODELS, default="novels5M")
    parser.add_argument(
        "--schemes", nargs="+", choices=[FLOAT, *VARIANTS], default=[FLOAT, *VARIANTS], metavar="SCHEME"
    )
    parser.add_argument("--parts", nargs="+", choices=["quality", "speed"], default=["quality", "speed"])
    parser.add_argument("--rows", type=int, help="evaluation rows (default: 200 windows, or all 180 stories)")
    parser.add_argument("--float-head", action="store_true", help="leave the tied embedding and head in float")
    parser.add_argument("--repeats", type=int, default=7, help="timings a figure is the median of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()

    root = shared_data()
    if root is None:
        parser.exit(0, "skipped: no shared data here; HALFBYTE_SHARED names the folder that holds data/\n")
    torch.set_num_threads(arguments.threads)
    text = llama.load_text(root, arguments.model, rows=arguments.rows)
    for part in arguments.parts:
        if part == "quality":
            rows = quality(root, arguments.model, arguments.schemes, text, float_head=arguments.float_head)
            print(quality_table(rows), text_list(rows), sep="\n\n")
        else:
            rows = speed(root, arguments.model, arguments.schemes, text, repeats=arguments.repeats)
            print(speed_table(rows))
        print()
        if arguments.json is not None:
            output.merge_json(arguments.json, part, rows)


if __name__ == "__main__":
    main()
