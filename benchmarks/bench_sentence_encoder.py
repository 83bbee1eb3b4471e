"""Quantization of the MiniLM sentence encoder: size, SICK-R correlation, distance of the embeddings, speed.

    python benchmarks/bench_sentence_encoder.py --json benchmarks/results/minilm.json

One evaluation is one pass over the distinct sentences of the pairs, in batches of 64 of similar length; its time beside
the float model's is the speed column. Every quantized model is saved and reloaded in a new process.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import nn

import halfbyte as hb
from models import minilm, output, reload, shared_data
from models.variants import VARIANTS

FLOAT = "float32"


def quality(root: Path, chosen: list[str], pairs: minilm.Pairs) -> dict[str, dict[str, object]]:
    """Size and correlation of every chosen variant, and the smallest cosine between its embeddings and float's."""
    float_model = minilm.load_float(root)
    parameters = sum(parameter.numel() for parameter in float_model.parameters())
    reference = minilm.embed(float_model, pairs)
    batches = [inputs for _, inputs in minilm.batches(pairs, batch=16)]
    calibration = batches[:: max(1, len(batches) // 16)]
    result: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        saved: dict[str, tuple[Path, Path]] = {}
        for index, variant in enumerate(chosen):
            model = copy.deepcopy(float_model)
            path, expected = Path(folder) / f"{index}.safetensors", Path(folder) / f"{index}.expected.safetensors"
            if variant == FLOAT:
                tensor_bytes = 4 * parameters
                save_model(model, str(path))
            else:
                report = VARIANTS[variant].quantize_(model, calibration)
                tensor_bytes = report.bytes_after
                hb.save(model, path)
                reload.save_expected(model, batches[len(batches) // 2], expected)
                saved[variant] = (path, expected)
            embeddings = minilm.embed(model, pairs)
            spearman, pearson = minilm.score(embeddings, pairs)
            cosine = nn.functional.cosine_similarity(embeddings, reference)
            result[variant] = {
                "bits_per_weight": 8 * tensor_bytes / parameters,
                "file_bytes": path.stat().st_size,
                "spearman": spearman,
                "pearson": pearson,
                "mean_cosine": cosine.mean().item(),
                "min_cosine": cosine.min().item(),
                "pairs": len(pairs.rating),
            }
        answers = reload.same_in_new_process("minilm", list(saved.values()))
        for variant, same in zip(saved, answers, strict=True):
            result[variant]["reload_bit_equal"] = same
    return result


def speed(root: Path, chosen: list[str], pairs: minilm.Pairs, *, repeats: int) -> dict[str, dict[str, object]]:
    """Sentences a second at batch 64 and milliseconds for one sentence, alternating with float32."""
    float_model = minilm.load_float(root)
    batches = [inputs for _, inputs in minilm.batches(pairs)]
    large = batches[len(batches) // 2]
    small = {key: value[:1] for key, value in large.items()}
    result: dict[str, dict[str, object]] = {}

    @torch.inference_mode()
    def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        model(**inputs)

    for variant in chosen:
        if variant == FLOAT:
            continue
        model = copy.deepcopy(float_model)
        VARIANTS[variant].quantize_(model, batches[:: max(1, len(batches) // 8)])
        row: dict[str, object] = {}
        for label, inputs, times in (("batch", large, repeats), ("single", small, 5 * repeats)):
            seconds = output.alternate(
                [lambda i=inputs: run(float_model, i), lambda m=model, i=inputs: run(m, i)], repeats=times
            )
            row[f"{label}_ms"] = 1000 * seconds[1]
            row[f"{label}_vs_float"] = seconds[0] / seconds[1]
            row[f"{label}_shape"] = list(inputs["input_ids"].shape)
        result[variant] = row
    return result


def quality_table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown."""
    header = [
        "scheme",
        "bits/weight",
        "file, MB",
        "Spearman",
        "change",
        "Pearson",
        "min cosine to float",
        "reload",
    ]
    base = rows.get(FLOAT, {}).get("spearman")
    table = [
        [
            name,
            f"{row['bits_per_weight']:.2f}",
            f"{row['file_bytes'] / 1e6:.2f}",
            f"{row['spearman']:.5f}",
            "" if base is None or name == FLOAT else f"{row['spearman'] - base:+.5f}",
            f"{row['pearson']:.5f}",
            f"{row['min_cosine']:.5f}",
            "" if name == FLOAT else ("equal" if row["reload_bit_equal"] else "DIFFERENT"),
        ]
        for name, row in rows.items()
    ]
    return output.markdown(header, table)


def speed_table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown."""
    header = ["scheme", "64 sentences, ms", "vs float", "1 sentence, ms", "vs float"]
    table = [
        [
            name,
            f"{row['batch_ms']:.1f}",
            f"{row['batch_vs_float']:.2f}",
            f"{row['single_ms']:.2f}",
            f"{row['single_vs_float']:.2f}",
        ]
        for name, row in rows.items()
    ]
    return output.markdown(header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--schemes", nargs="+", choices=[FLOAT, *VARIANTS], default=[FLOAT, *VARIANTS], metavar="SCHEME"
    )
    parser.add_argument("--parts", nargs="+", choices=["quality", "speed"], default=["quality", "speed"])
    parser.add_argument("--pairs", type=int, help="evaluate the first PAIRS pairs only (default: all 4,927)")
    parser.add_argument("--repeats", type=int, default=7, help="timings a figure is the median of")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()

    root = shared_data()
    if root is None:
        parser.exit(0, "skipped: no shared data here; HALFBYTE_SHARED names the folder that holds data/\n")
    torch.set_num_threads(arguments.threads)
    pairs = minilm.load_pairs(root, arguments.pairs)
    for part in arguments.parts:
        if part == "quality":
            rows = quality(root, arguments.schemes, pairs)
            print(quality_table(rows))
        else:
            rows = speed(root, arguments.schemes, pairs, repeats=arguments.repeats)
            print(speed_table(rows))
        print()
        if arguments.json is not None:
            output.merge_json(arguments.json, part, rows)


if __name__ == "__main__":
    main()
