"""What rounding costs a language model, method by method: mean KL to the float model on text it was not calibrated on.

    python benchmarks/bench_gptq_accuracy.py --data FOLDER --json benchmarks/results/gptq_accuracy.json [--ggml libggml-base.so]

novels5M, all Linear weights but the tied head. Bits per weight count codes, scales, zero points and padding, as stored.
Calibration: windows of 256 tokens spread over `novels_train.txt`. Evaluation: the first windows of `novels_eval.txt`, and of
`tinyshakespeare.txt`, which is another kind of text. ggml's types are rounded by its own library, with the mean squares of
the inputs on the same calibration windows where a row says `imatrix`, and evaluated in the same model. So are the weights
that other libraries' GPTQ gives (`peer_gptq.py`), each in a Python of its own: `--peers llm-compressor=PYTHON`.
"""

import argparse
import copy
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

import gptq_mixtures
import halfbyte as hb
from halfbyte.calibration import InputStatistics
from models import ggml_types, llama, output

SEARCH_WINDOWS = 2  # to measure on: there are 300 measurements, each of a difference that shows
TEXTBOOK = {"error_feedback": 0.0, "polish": 0}
METHODS: dict[str, Callable[[], object]] = {
    "RTN": lambda: hb.algorithms.RTN(),
    "MSE": lambda: hb.MSE(weighting="none"),
    "textbook GPTQ": lambda: hb.GPTQ(**TEXTBOOK),  # type: ignore[arg-type]
    "GPTQ, error feedback": lambda: hb.GPTQ(polish=0),
    "GPTQ, polish": lambda: hb.GPTQ(error_feedback=0.0),
    "GPTQ": lambda: hb.GPTQ(),
}


def _recipe(scheme: hb.Scheme, overrides: dict[str, hb.Scheme] | None = None) -> hb.Recipe:
    return hb.Recipe(default=scheme, overrides={**(overrides or {}), **gptq_mixtures.KEPT_IN_FLOAT})


FORMATS = {
    f"{bits} bits, group {group}": _recipe(hb.int_weight_only(bits, group)) for bits in (4, 3, 2) for group in (32, 64)
}
FORMATS |= {
    "4 bits symmetric, group 64": _recipe(hb.int_weight_only(4, 64, symmetric=True)),
    "3 bits, v_proj 4 bits, group 64": _recipe(hb.int_weight_only(3, 64), {"*.v_proj": hb.int_weight_only(4, 64)}),
    "2 bits, down_proj 3 bits, group 64": _recipe(
        hb.int_weight_only(2, 64), {"*.down_proj": hb.int_weight_only(3, 64)}
    ),
    "ternary, group 64": _recipe(hb.ternary_weight_only(64)),
    "binary, group 32": _recipe(hb.int_weight_only(1, 32)),
}


def windows(tokenizer: Tokenizer, text: str, count: int) -> list[Tensor]:
    ids = tokenizer.encode(text[: count * llama.ROW * 8]).ids
    return [torch.tensor(ids[at : at + llama.ROW]) for at in range(0, len(ids) - llama.ROW + 1, llama.ROW)][:count]


def spread(tokenizer: Tokenizer, text: str, count: int) -> list[Tensor]:
    """One window at each of `count` places."""
    pieces = [text[i * (len(text) // count) :][: llama.ROW * 8] for i in range(count)]
    return [torch.tensor(tokenizer.encode(piece).ids[1 : llama.ROW + 1]) for piece in pieces]  # not half a word


def layers_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def quantized(
    model: nn.Module, method: object, recipe: hb.Recipe, data: list[Tensor]
) -> tuple[nn.Module, float, float]:
    """The model in packed kernels, bits per weight, seconds."""
    copied = copy.deepcopy(model)
    report = hb.quantize_(
        copied,
        recipe,
        data=None if isinstance(method, hb.algorithms.RTN) else data,
        algorithms=[method],  # type: ignore[list-item]
        progress=False,
        on_fallback="allow",
    )
    rows = [m.plan for m in report.modules if m.plan.scheme is not None]
    weights = sum(layer.weight.numel() for layer in layers_of(model).values())
    return copied, 8 * sum(row.bytes_after for row in rows) / weights, report.seconds


def ggml(
    model: nn.Module, library: ggml_types.Ggml, name: str, importance: dict[str, Tensor] | None
) -> tuple[nn.Module, float, float]:
    copied = copy.deepcopy(model)
    start = time.perf_counter()
    for layer_name, layer in layers_of(copied).items():
        weights = None if importance is None else importance[layer_name]
        layer.weight = nn.Parameter(library.round_trip(layer.weight, name, weights), requires_grad=False)
    return copied, ggml_types.BITS[name], time.perf_counter() - start


def peer(
    model: nn.Module, library: str, python: str, folder: Path, bits: int, group: int, data: list[Tensor]
) -> tuple[nn.Module, float, float]:
    """The float model with the weights of another library's GPTQ; scales count 16 bits, zero points as many as a code."""
    copied = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as temporary:
        tokens, weights = Path(temporary) / "tokens.safetensors", Path(temporary) / "weights.safetensors"
        save_file({"tokens": torch.cat(data)}, tokens)
        script = Path(__file__).with_name("peer_gptq.py")
        command = [python, str(script), library, "--model", str(folder), "--calibration", str(tokens)]
        command += ["--bits", str(bits), "--group", str(group), "--threads", str(torch.get_num_threads())]
        output_of = subprocess.run([*command, "--out", str(weights)], check=True, capture_output=True, text=True).stdout
        found = load_file(weights)
    for name, layer in layers_of(copied).items():
        layer.weight = nn.Parameter(found[name], requires_grad=False)
    return copied, bits + (16 + bits) / group, float(output_of.split()[-1])


def mean_squares(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    statistics = {name: InputStatistics(name) for name in layers_of(model)}
    handles = [layer.register_forward_pre_hook(statistics[name]) for name, layer in layers_of(model).items()]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: found.mean_square for name, found in statistics.items()}


def accuracy_table(rows: dict[str, dict[str, object]]) -> str:
    """As docs/gptq.md shows it; a row's name is its format, a colon and the method."""
    cells = [
        [
            *name.split(": "),
            f"{row['bits_per_weight']:.3f}",
            f"{row['kl']:.5f} ± {row['kl_ci']:.5f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl_other']:.5f} ± {row['kl_other_ci']:.5f}",
            f"{row['seconds']:.1f}",
        ]
        for name, row in rows.items()
    ]
    header = ["format", "method", "bits per weight", "KL", "perplexity", "KL, other text", "seconds"]
    return output.markdown(header, cells, left=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/novels5M and text/")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ggml", type=Path, help="libggml-base.so")
    parser.add_argument(
        "--types", nargs="+", choices=ggml_types.BITS, default=["Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K"]
    )
    parser.add_argument("--peers", nargs="*", default=[], metavar="LIBRARY=PYTHON", help="of peer_gptq.py")
    parser.add_argument(
        "--searched",
        type=float,
        nargs="*",
        default=[],
        metavar="BITS",
        help="mixtures of at most so many bits a weight",
    )
    parser.add_argument("--cache", type=Path, help="keeps the measurements of the search")
    parser.add_argument("--calibration", type=int, default=48, help="windows")
    parser.add_argument("--windows", type=int, default=40, help="evaluated of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = llama.load_float(arguments.data, "novels5M")
    tokenizer = Tokenizer.from_file(str(arguments.data / "lm" / "novels5M" / "tokenizer.json"))

    def text(name: str) -> str:
        return (arguments.data / "text" / name).read_text(encoding="utf-8")

    evaluation = windows(tokenizer, text("novels_eval.txt"), arguments.windows)
    other = windows(tokenizer, text("tinyshakespeare.txt"), arguments.windows)
    calibration = torch.stack(spread(tokenizer, text("novels_train.txt"), arguments.calibration)).split(8)
    references = [llama.log_probs(model, rows) for rows in (evaluation, other)]
    rows: dict[str, dict[str, object]] = {}

    def add(name: str, result: tuple[nn.Module, float, float]) -> None:
        same, different = (
            llama.evaluate(result[0], r, f) for r, f in zip((evaluation, other), references, strict=True)
        )
        rows[name] = {
            "bits_per_weight": result[1],
            "perplexity": same.perplexity,
            "kl": same.kl,
            "kl_ci": same.kl_ci,
            "kl_other": different.kl,
            "kl_other_ci": different.kl_ci,
            "seconds": result[2],
        }
        print(accuracy_table({name: rows[name]}).splitlines()[-1], flush=True)
        if arguments.json is not None:
            output.merge_json(arguments.json, "novels5M", {name: rows[name]})

    for label in arguments.formats:
        for method in arguments.methods:
            add(f"{label}: {method}", quantized(model, METHODS[method](), FORMATS[label], list(calibration)))
        for library, _, python in (text.partition("=") for text in arguments.peers):
            weight_format = FORMATS[label].default.weight
            group = weight_format.group_size(llama.ROW)
            folder = arguments.data / "lm" / "novels5M"
            add(
                f"{label}: {library}",
                peer(model, library, python, folder, weight_format.bits, group, list(calibration)),
            )
    if arguments.searched:
        weights = sum(layer.weight.numel() for layer in layers_of(model).values())
        table = gptq_mixtures.sensitivities(model, [calibration[0][:SEARCH_WINDOWS]], arguments.cache)
        for bits in arguments.searched:
            found = gptq_mixtures.mixture(table, weights, bits)
            add(f"searched, at most {bits:.3f} bits: GPTQ", quantized(model, hb.GPTQ(), found, list(calibration)))
    if arguments.ggml is not None:
        library, importance = ggml_types.Ggml(arguments.ggml), mean_squares(model, list(calibration))
        for name in arguments.types:
            if name not in ggml_types.NEEDS_IMPORTANCE:
                add(f"{name}: ggml", ggml(model, library, name, None))
            add(f"{name}: ggml, imatrix", ggml(model, library, name, importance))


if __name__ == "__main__":
    main()
