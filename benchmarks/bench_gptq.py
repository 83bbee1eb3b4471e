"""The parts of GPTQ beside what the tools in plain torch do, on one layer.

    python benchmarks/bench_gptq.py --json benchmarks/results/gptq.json

hessian: `H.addmm_(X.T, X)`, in pieces of 8,192 tokens. factor: cholesky, cholesky_inverse, cholesky(upper). solve: the
loop over columns with lazy updates of blocks of 128, round to nearest on given scales. layer: all three. Each pair takes
turns; figures are medians. With one thread the clock is CPU time, so that other processes do not count.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import ops
from halfbyte.hessian import reversed_cholesky
from models import output

BITS, GROUP, BLOCK, DAMPING = 4, 128, 128, 0.01
PIECE = 8192


def torch_factor(hessian: Tensor) -> Tensor:
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def torch_solve(weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """GPTQ column by column, as the tools in Python write it."""
    weight, codes = weight.clone(), torch.empty_like(weight)
    columns = weight.shape[1]
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        part, factor = weight[:, begin:end].clone(), upper[begin:end, begin:end]
        errors = torch.empty_like(part)
        for i in range(end - begin):
            s, z = scale[:, (begin + i) // GROUP], zero[:, (begin + i) // GROUP]
            code = torch.clamp(torch.round(part[:, i] / s) + z, 0, 2**BITS - 1)
            error = (part[:, i] - (code - z) * s) / factor[i, i]
            part[:, i:] -= error[:, None] * factor[i, i:]
            codes[:, begin + i], errors[:, i] = code, error
        weight[:, end:] -= errors @ upper[begin:end, end:]
    return codes


def _once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(size: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of each part, by `part` and `part torch`."""
    generator = torch.Generator().manual_seed(0)
    piece, pieces = (
        min(tokens, PIECE),
        -(-tokens // PIECE),
    )  # the same tokens again and again: time does not depend on them
    x = torch.randn(piece, size, generator=generator) * (0.2 + torch.rand(size, generator=generator))
    weight = torch.randn(size, size, generator=generator) * 0.02
    tiles, full = ops.hessian_tiles(size), torch.zeros(size, size)
    seconds: dict[str, float] = {}

    def pair(name: str, ours: object, theirs: object) -> None:
        functions: list[Callable[[], object]] = [ours, theirs]  # type: ignore[list-item]
        times = output.alternate(functions, repeats=repeats) if repeats else [_once(f) for f in functions]
        seconds[name], seconds[f"{name} torch"] = times

    def in_pieces(add: Callable[[], object]) -> Callable[[], object]:
        return lambda: [add() for _ in range(pieces)]

    pair("hessian", in_pieces(lambda: ops.hessian_update_(tiles, x)), in_pieces(lambda: full.addmm_(x.t(), x)))
    tiles.zero_()
    ops.hessian_update_(tiles, x)
    hessian = ops.hessian_matrix(tiles, size) / piece
    order, single = torch.arange(size), hessian.float()
    pair("factor", lambda: reversed_cholesky(hessian, DAMPING, order), lambda: torch_factor(single))
    options = {"bits": BITS, "symmetric": False, "group_size": GROUP}
    scale, zero, _ = ops.search_qparams(weight, grid=1, max_shrink=0.0, **options)  # type: ignore[arg-type]
    factor, upper, floats = reversed_cholesky(hessian, DAMPING, order)[0], torch_factor(single), zero.float()
    pair(
        "solve",
        lambda: ops.gptq_round(weight, factor, scale=scale, zero_point=zero, **options),  # type: ignore[arg-type]
        lambda: torch_solve(weight, upper, scale, floats),
    )
    codes = ops.gptq_round(weight, factor, scale=scale, zero_point=zero, **options)[0]  # type: ignore[arg-type]
    seconds["equal codes"] = (codes == torch_solve(weight, upper, scale, floats)).float().mean().item()
    seconds["solve with search"] = output.alternate(
        [lambda: ops.gptq_round(weight, factor, importance=single.diagonal().contiguous(), **options)],  # type: ignore[arg-type]
        repeats=max(1, repeats),
    )[0]
    return seconds


def layers_table(results: dict[str, dict[str, object]]) -> str:
    """As docs/gptq.md shows it."""
    rows = [
        [shape, part, f"{seconds[part]:.3f}", f"{seconds[part + ' torch']:.3f}", f"{ratio:.1f}"]
        for shape, seconds in results.items()
        for part in ("hessian", "factor", "solve", "layer")
        if (ratio := float(str(seconds[part + " torch"])) / float(str(seconds[part])))
    ]
    return output.markdown(["layer", "part", "halfbyte, s", "torch, s", "ratio"], rows, left=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--repeats", type=int, default=3, help="after a warm-up; 0 takes the first time, with no warm-up"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="merge the results into this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {f"{n}x{n}": measure(n, arguments.tokens, arguments.repeats) for n in arguments.sizes}
    for seconds in results.values():
        for suffix in ("", " torch"):
            seconds[f"layer{suffix}"] = sum(seconds[part + suffix] for part in ("hessian", "factor", "solve"))
    print(layers_table({shape: dict(seconds) for shape, seconds in results.items()}))
    for shape, seconds in results.items():
        print(
            f"\n{shape}: equal codes {seconds['equal codes']:.5f}, solve with scale search {seconds['solve with search']:.3f} s"
        )
    if arguments.json is not None:
        output.merge_json(arguments.json, f"{arguments.tokens}-tokens", results)


if __name__ == "__main__":
    main()
