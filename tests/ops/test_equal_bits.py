"""One result for an operator, whatever the ISA level, the number of threads, and the rows that go with a row.

Shapes and values are drawn: odd sizes, every width, and operands that make the largest sums: codes all 0 or all ones,
activations all of one size and sign, zero points at either end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import halfbyte as hb
from halfbyte._extension import available_capabilities, cpu_capability, set_cpu_capability

Result = tuple[Tensor, ...]
drawn = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FILLS = ["random", "lowest", "highest", "ends"]  # of codes: all 0, all ones, either
ROWS = ["random", "huge and tiny", "positive", "negative", "signs"]  # of activations


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, threads = cpu_capability(), torch.get_num_threads()
    yield
    set_cpu_capability(level)
    torch.set_num_threads(threads)


def same_everywhere(call: Callable[[], Result]) -> Result:
    """The result, after all levels and thread counts gave its bits."""
    set_cpu_capability("scalar")
    torch.set_num_threads(1)
    expected = call()
    for level in available_capabilities():
        set_cpu_capability(level)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for wanted, found in zip(expected, call(), strict=True):
                assert hb.outputs.same_bits(wanted, found), f"{level}, {threads} threads"
    return expected


def filled(shape: tuple[int, ...], bits: int, fill: str, generator: torch.Generator) -> Tensor:
    """Unsigned codes."""
    largest = 2**bits - 1
    codes = torch.randint(0, largest + 1, shape, generator=generator)
    if fill == "ends":
        codes = (codes % 2) * largest
    elif fill != "random":
        codes = torch.full(shape, 0 if fill == "lowest" else largest)
    return codes.to(torch.uint8)


def activations(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if kind == "random":
        return x
    if kind == "huge and tiny":
        return x * 10.0 ** torch.randint(-30, 15, shape, generator=generator)
    signs = {"positive": 1.0, "negative": -1.0, "signs": torch.sign(x)}[kind]
    return torch.ones(shape) * signs  # per token, every code is 127 or -127


@st.composite
def linears(draw: st.DrawFn) -> dict[str, object]:
    bits, groups, group_size = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 130))
    out_features, rows = draw(st.integers(1, 130)), draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 33]))
    kind = draw(st.sampled_from(["symmetric", "zero_points", *(["codebook"] if bits <= 4 else [])]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    codes = filled((out_features, groups * group_size), bits, draw(st.sampled_from(FILLS)), generator)
    scale_dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    arguments: dict[str, object] = {
        "x": activations((rows, groups * group_size), draw(st.sampled_from(ROWS)), generator),
        "qweight": hb.ops.pack(codes, bits, layout="tiles", group_size=group_size),
        "scale": (torch.rand(groups, out_features, generator=generator) + 0.01).to(scale_dtype),
        "bias": torch.randn(out_features, generator=generator) if draw(st.booleans()) else None,
        "bits": bits,
        "out_features": out_features,
        "group_size": group_size,
    }
    if kind == "zero_points":
        arguments["zero_point"] = filled((groups, out_features), bits, draw(st.sampled_from(FILLS)), generator)
    if kind == "codebook":
        arguments["codebook"] = torch.randn(16, generator=generator)
    return arguments


def alone(x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([call(row[None]) for row in x])


@drawn
@given(linears())
def test_weight_only_products(arguments: dict[str, object]) -> None:
    x = arguments.pop("x")
    assert isinstance(x, Tensor)

    def call(x: Tensor) -> Tensor:
        return hb.ops.linear_weight_only(x, **arguments)  # type: ignore[arg-type]

    (y,) = same_everywhere(lambda: (call(x),))
    assert hb.outputs.same_bits(y, alone(x, call))


@drawn
@given(linears(), st.one_of(st.none(), st.sampled_from([-128, -1, 0, 127])))
def test_int8_products(arguments: dict[str, object], act_zero_point: int | None) -> None:
    x = arguments.pop("x")
    assert isinstance(x, Tensor)
    arguments.pop("codebook", None)
    if act_zero_point is not None:
        arguments["act_scale"] = torch.tensor(1 / 128)  # so that ones are clamped to 127, and minus ones reach -128
        arguments["act_zero_point"] = torch.tensor(act_zero_point, dtype=torch.int32)

    def call(x: Tensor) -> Tensor:
        return hb.ops.linear_int8(x, **arguments)  # type: ignore[arg-type]

    (y,) = same_everywhere(lambda: (call(x),))
    assert hb.outputs.same_bits(y, alone(x, call))


def special(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random values with NaN, infinities, both zeros, halves and huge numbers among them."""
    x = torch.randn(shape, generator=generator) * 3
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 0.5, -1.5, 2.5, 3e38, -3e38, 1e-42])
    chosen = values[torch.randint(len(values), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.2, chosen, x).to(dtype)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, object]:
    """A tensor with qparams of some granularity; large enough now and then for several threads."""
    shape = draw(st.sampled_from([(1, 1), (3, 5), (7, 31), (5, 64), (33, 129), (2, 3, 48), (600, 130), (70, 1030)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    granularity = draw(st.sampled_from(["tensor", "first", "last", "group"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    last = shape[-1]
    group = draw(st.sampled_from([d for d in range(1, last + 1) if last % d == 0]))
    keys = {"tensor": {}, "first": {"axis": 0}, "last": {"axis": -1}, "group": {"group_size": group}}[granularity]
    sizes = {"tensor": (), "first": shape[:1], "last": shape[-1:], "group": (*shape[:-1], last // group)}[granularity]
    signed = draw(st.booleans())
    return {
        "x": special(shape, dtype, generator),
        "scale": torch.rand(sizes, generator=generator) * 0.1 + 0.01,
        "zero_point": torch.randint(-128, 256, sizes, generator=generator).clamp(
            *((-128, 127) if signed else (0, 255))
        ),
        "ends": {"qmin": -128, "qmax": 127} if signed else {"qmin": 0, "qmax": 255},
        "keys": keys,
    }


@drawn
@given(tensors())
def test_elementwise_operators(drawn_case: dict[str, object]) -> None:
    x, scale, zero_point = (drawn_case[name] for name in ("x", "scale", "zero_point"))
    ends, keys = drawn_case["ends"], drawn_case["keys"]
    assert isinstance(x, Tensor) and isinstance(scale, Tensor) and isinstance(zero_point, Tensor)
    assert isinstance(ends, dict) and isinstance(keys, dict)
    leaf, grad = (
        x.clone().requires_grad_(),
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype),
    )
    learned = [scale.clone().requires_grad_(), zero_point.float().requires_grad_()]

    def call() -> Result:
        q = hb.ops.quantize(x, scale, zero_point, **ends, **keys)
        y = hb.ops.fake_quantize(leaf, scale, zero_point, **ends, **keys)
        trained = hb.ops.fake_quantize_learned(leaf, *learned, **ends, **keys)
        return (
            q,
            hb.ops.dequantize(q, scale, zero_point, **keys, dtype=x.dtype),
            y.detach(),
            trained.detach(),
            *torch.autograd.grad(y, leaf, grad),
            *torch.autograd.grad(trained, [leaf, *learned], grad),
            *hb.ops.observe_minmax(x, **keys),
        )

    same_everywhere(call)


@drawn
@given(
    st.integers(1, 100_000), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99)
)
def test_histograms(count: int, bins: int, dtype: torch.dtype, seed: int) -> None:
    x = torch.nan_to_num(special((count,), dtype, torch.Generator().manual_seed(seed)), nan=0.0)

    def call() -> Result:
        return (hb.ops.histogram_update_(torch.zeros(bins, dtype=torch.int64), x, low=-4.0, high=5.0),)

    (counts,) = same_everywhere(call)
    assert int(counts.sum()) == count
