"""Hessian sums and GPTQ rounding against plain float64 torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte import ops
from halfbyte._extension import available_capabilities, set_cpu_capability

FUSED = [level for level in available_capabilities() if level != "scalar"]


def hessian(x: Tensor) -> Tensor:
    tiles = ops.hessian_tiles(x.shape[1])
    ops.hessian_update_(tiles, x)
    return ops.hessian_matrix(tiles, x.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "features"), [(0, 5), (1, 1), (130, 47), (129, 48), (300, 49), (4100, 200), (50, 800)]
)
def test_hessian_equals_float64_product(level: str, tokens: int, features: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, features, generator=torch.Generator().manual_seed(1)).to(dtype)
    got, expected = hessian(x), x.double().T @ x.double()
    assert torch.equal(got, got.T)
    # Rounding errors of a float32 sum of at most 4096 products, each relative to |x_i| |x_j|.
    bound = x.double().abs().T @ x.double().abs() * 2.0**-24 * 64 + 1e-12
    assert ((got - expected).abs() <= bound).all()


def test_hessian_takes_rows_apart_and_does_not_drift() -> None:
    # 2^12 blocks of one token each: in float32 the sum would stop growing in steps of 2^-24 of itself.
    x = torch.full((1, 3), 1.0 + 2.0**-11)
    tiles = ops.hessian_tiles(3)
    for _ in range(4096):
        ops.hessian_update_(tiles, x)
    assert torch.equal(
        ops.hessian_matrix(tiles, 3), torch.full((3, 3), 4096.0, dtype=torch.float64) * x[0, 0].double() ** 2
    )


def test_hessian_reads_strided_inputs() -> None:
    x = torch.randn(70, 120)
    assert torch.equal(hessian(x[:, ::2]), hessian(x[:, ::2].contiguous()))


@pytest.mark.usefixtures("restore_level", "restore_threads")
def test_hessian_is_equal_for_threads_and_fused_levels() -> None:
    x = torch.randn(500, 400)
    results = []
    for level in FUSED:
        set_cpu_capability(level)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(hessian(x))
    assert all(torch.equal(results[0], result) for result in results)


def problem(rows: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and a damped Hessian of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inputs, inputs, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(inputs, inputs, dtype=torch.float64, generator=generator)
    x *= 0.1 + 3 * torch.rand(inputs, dtype=torch.float64, generator=generator)
    h = x.T @ x / len(x)
    h += 0.01 * h.diag().mean() * torch.eye(inputs)
    return torch.randn(rows, inputs, generator=generator) * 0.1, h


def reversed_factor(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)


def textbook(
    weight: Tensor, h: Tensor, order: Tensor, scale: Tensor, zero: Tensor, options: dict[str, object], *, search: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ as published, in float64: codes, scales, distance of every column from a rounding tie, loss."""
    group_size, bits = int(options["group_size"]), int(options["bits"])  # type: ignore[call-overload]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if options["symmetric"] else (0, 2**bits - 1)
    low += bool(options["narrow_range"])
    importance = h.diag().float()
    w, h = weight.double()[:, order], h[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes, tie, loss = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(len(w), dtype=torch.float64)
    scale, zero = scale.clone(), zero.clone()
    for k in range(w.shape[1]):
        group = int(order[k]) // group_size
        if search and k % group_size == 0:
            columns = order[k : k + group_size]
            found = ops.search_qparams(
                w[:, k : k + group_size].float(),
                importance[columns].contiguous(),
                grid=32,
                **options,  # type: ignore[arg-type]
            )
            scale[:, group], zero[:, group] = found[0][:, 0].to(scale.dtype), found[1][:, 0]
        s, z = scale[:, group].double(), zero[:, group].double()
        if bits == 1 and options["symmetric"]:
            q = (w[:, k] >= 0).double()
            rounded, tie[:, k] = (2 * q - 1) * s, (w[:, k] / s).abs()
        else:
            ratio = w[:, k] / s
            q = torch.clamp(torch.round(ratio), low - z, high - z)
            rounded, tie[:, k] = q * s, (ratio - ratio.floor() - 0.5).abs()
            q = q + z
        codes[:, k] = q
        error = (w[:, k] - rounded) / upper[k, k]
        loss += error**2
        w[:, k:] -= error[:, None] * upper[k, k:]
    back = torch.argsort(order)
    return codes[:, back], scale, tie[:, back], loss


def formats(bits: int, *, symmetric: bool, narrow: bool = False, group_size: int = 32) -> dict[str, object]:
    return {
        "bits": bits,
        "symmetric": symmetric,
        "narrow_range": narrow,
        "group_size": group_size,
        "scale_dtype": torch.float16,
    }


CASES = [
    (50, 64, formats(4, symmetric=False), "identity", False),
    (100, 256, formats(4, symmetric=False), "descending", False),
    (7, 86, formats(3, symmetric=False, group_size=43), "identity", True),
    (130, 512, formats(2, symmetric=False, group_size=256), "identity", True),
    (33, 384, formats(4, symmetric=True, group_size=384), "descending", False),
    (64, 192, formats(8, symmetric=True, group_size=96), "groups", True),
    (200, 640, formats(3, symmetric=True, narrow=True, group_size=128), "identity", True),
    (49, 260, formats(5, symmetric=False, group_size=130), "groups", True),
    (1, 1, formats(4, symmetric=False, group_size=1), "identity", True),
    (48, 96, formats(1, symmetric=True), "descending", False),
    (40, 96, formats(1, symmetric=False), "identity", True),
]


@pytest.mark.parametrize(("rows", "inputs", "options", "ordering", "search"), CASES)
def test_gptq_round_equals_textbook(
    level: str, rows: int, inputs: int, options: dict[str, object], ordering: str, search: bool
) -> None:
    weight, h = problem(rows, inputs)
    importance, group_size = h.diag().float(), int(options["group_size"])  # type: ignore[call-overload]
    order = torch.arange(inputs)
    if ordering == "descending":
        order = torch.argsort(h.diag(), descending=True)
    if ordering == "groups":
        order = order.view(-1, group_size).flip(0).reshape(-1)
    scale, zero, _ = ops.search_qparams(weight, importance, grid=32, **options)  # type: ignore[arg-type]
    codes, found, found_zero, loss = ops.gptq_round(
        weight,
        reversed_factor(h[order][:, order]).float(),
        order=order,
        scale=None if search else scale,
        zero_point=None if search else zero,
        importance=importance,
        grid=32,
        **options,  # type: ignore[arg-type]
    )
    expected, expected_scale, tie, expected_loss = textbook(weight, h, order, scale, zero, options, search=search)
    # float32 may decide otherwise only where float64 was within its errors of a tie; all that follows in the row then may
    # differ. A searched scale may differ where two candidates are as good.
    same = (codes.double() == expected).all(dim=1) & (found == expected_scale).all(dim=1)
    decided = (tie > 2e-3).all(dim=1)
    assert same.double().mean() > 0.9
    if not search:
        assert same[decided].all()
    assert codes.dtype == (torch.int8 if options["symmetric"] and options["bits"] != 1 else torch.uint8)
    torch.testing.assert_close(loss[same].double(), expected_loss[same], rtol=2e-4, atol=1e-9)
    # The loss is the quadratic form of the rounding error.
    signed = 2.0 * codes - 1 if options["symmetric"] and options["bits"] == 1 else codes.double()
    groups = torch.arange(inputs) // group_size
    error = weight.double() - (signed - found_zero[:, groups]) * found.double()[:, groups]
    torch.testing.assert_close(loss.double(), (error @ h * error).sum(1), rtol=2e-3, atol=1e-9)


@pytest.mark.usefixtures("restore_level", "restore_threads")
@pytest.mark.parametrize("search", [False, True])
def test_gptq_round_is_equal_for_threads_rows_and_fused_levels(search: bool) -> None:
    weight, h = problem(500, 256)
    factor = reversed_factor(h).float()
    options = {"bits": 3, "symmetric": False, "group_size": 32}
    scale, zero, _ = ops.search_qparams(weight, **options)  # type: ignore[arg-type]
    given = {} if search else {"scale": scale, "zero_point": zero}
    results = []
    for level in FUSED:
        set_cpu_capability(level)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(ops.gptq_round(weight, factor, **options, **given))  # type: ignore[arg-type]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    part = {name: value[77:90] for name, value in given.items()}
    alone = ops.gptq_round(weight[77:90], factor, **options, **part)  # type: ignore[arg-type]
    assert all(torch.equal(a[77:90], b) for a, b in zip(results[0], alone, strict=True))


def test_gptq_round_with_identity_is_round_to_nearest() -> None:
    weight = torch.randn(60, 128)
    options = {"bits": 4, "symmetric": False, "group_size": 32}
    scale, zero, _ = ops.search_qparams(weight, **options)  # type: ignore[arg-type]
    codes, *_ = ops.gptq_round(weight, torch.eye(128), **options)  # type: ignore[arg-type]
    assert torch.equal(codes, ops.quantize(weight, scale, zero, qmin=0, qmax=15, group_size=32))


def error(weight: Tensor, h: Tensor, result: tuple[Tensor, ...], options: dict[str, object]) -> Tensor:
    """`e H e^T` of each row, in float64."""
    codes, scale, zero = result[:3]
    signed = 2.0 * codes - 1 if options["symmetric"] and options["bits"] == 1 else codes.double()
    groups = torch.arange(weight.shape[1]) // int(options["group_size"])  # type: ignore[call-overload]
    e = weight.double() - (signed - zero[:, groups]) * scale.double()[:, groups]
    return (e @ h * e).sum(1)


@pytest.mark.parametrize(
    ("rows", "inputs", "options"),
    [
        (50, 64, formats(4, symmetric=False)),
        (100, 86, formats(3, symmetric=False, group_size=43)),
        (130, 512, formats(2, symmetric=False, group_size=256)),
        (33, 384, formats(4, symmetric=True, group_size=384)),
        (200, 320, formats(2, symmetric=True, narrow=True, group_size=64)),
        (1, 1, formats(4, symmetric=False, group_size=1)),
        (48, 96, formats(1, symmetric=True)),
        (40, 260, formats(8, symmetric=True, group_size=130)),
    ],
)
def test_polish_ends_where_no_code_scale_or_zero_point_alone_is_better(
    level: str, rows: int, inputs: int, options: dict[str, object]
) -> None:
    weight, h = problem(rows, inputs)
    scale_dtype = options["scale_dtype"]
    options = {name: value for name, value in options.items() if name != "scale_dtype"}
    rounded = ops.gptq_round(weight, reversed_factor(h).float(), scale_dtype=scale_dtype, **options)[:3]  # type: ignore[arg-type]
    before = error(weight, h, rounded, options)
    codes_only = ops.gptq_polish(weight, h.float(), *rounded, refit=False, **options)  # type: ignore[arg-type]
    assert torch.equal(codes_only[1], rounded[1]) and torch.equal(codes_only[2], rounded[2])
    once = ops.gptq_polish(weight, h.float(), *rounded, sweeps=1, **options)  # type: ignore[arg-type]
    result = ops.gptq_polish(weight, h.float(), *rounded, sweeps=1000, **options)  # type: ignore[arg-type]
    losses = [error(weight, h, x, options) for x in (codes_only, once, result)]
    slack = 1e-5 * before + 1e-9
    assert (losses[0] <= before + slack).all() and (losses[1] <= before + slack).all()
    assert (losses[2] <= losses[1] + slack).all()
    if inputs > 1 and options["bits"] != 8:
        assert losses[2].sum() < 0.97 * before.sum()
    codes, scale, zero = result
    assert codes.dtype == rounded[0].dtype and scale.dtype == scale_dtype
    # Every neighbour of the result, in float64.
    group_size = int(options["group_size"])  # type: ignore[call-overload]
    binary = options["bits"] == 1
    low, high = (-(2 ** (int(options["bits"]) - 1)), 2 ** (int(options["bits"]) - 1) - 1)  # type: ignore[call-overload]
    low, high = (low + bool(options["narrow_range"]), high) if options["symmetric"] else (0, high - low)
    low, high = (0, 1) if binary else (low, high)
    slack = 1e-4 * losses[2] + 1e-7 * before.max()
    for column in range(0, inputs, max(1, inputs // 40)):
        for step in (-1, 1):
            moved = codes.clone()
            moved[:, column] = (moved[:, column].int() + step).clamp(low, high).to(codes.dtype)
            assert (error(weight, h, (moved, scale, zero), options) >= losses[2] - slack).all()
    for group in range(inputs // group_size):
        for factor in (0.99, 1.01):
            other = scale.float().clone()
            other[:, group] *= factor
            assert (error(weight, h, (codes, other, zero), options) >= losses[2] - slack).all()
        for step in (-1, 1) if not options["symmetric"] else ():
            other = zero.clone()
            other[:, group] = (other[:, group] + step).clamp(0, high)
            assert (error(weight, h, (codes, scale, other), options) >= losses[2] - slack).all()
    assert all(
        torch.equal(a, b) for a, b in zip(ops.gptq_polish(weight, h.float(), *result, **options), result, strict=True)
    )  # type: ignore[arg-type]


@pytest.mark.usefixtures("restore_level", "restore_threads")
def test_polish_is_equal_for_threads_rows_and_fused_levels() -> None:
    weight, h = problem(500, 256)
    options = {"bits": 3, "symmetric": False, "group_size": 32}
    rounded = ops.gptq_round(weight, reversed_factor(h).float(), **options)[:3]  # type: ignore[arg-type]
    results = []
    for level in FUSED:
        set_cpu_capability(level)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(ops.gptq_polish(weight, h.float(), *rounded, **options))  # type: ignore[arg-type]
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    alone = ops.gptq_polish(weight[77:90], h.float(), *(x[77:90] for x in rounded), **options)  # type: ignore[arg-type]
    assert all(torch.equal(a[77:90], b) for a, b in zip(results[0], alone, strict=True))


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "features"), [(0, 5), (1, 1), (130, 47), (4100, 200), (50, 800)])
def test_cross_hessian_equals_float64_product(level: str, tokens: int, features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(tokens, features, generator=generator).to(dtype) for _ in range(2))
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        matrix = torch.ones(features, features, dtype=torch.float64)
        ops.cross_hessian_update_(matrix, y, x)
        results.append(matrix)
    assert torch.equal(*results)
    bound = y.double().abs().T @ x.double().abs() * 2.0**-24 * 64 + 1e-12
    assert ((results[0] - 1 - y.double().T @ x.double()).abs() <= bound).all()


def test_gptq_operators_reject_what_does_not_fit() -> None:
    weight, factor = torch.randn(4, 64), torch.eye(64)
    options = {"bits": 4, "symmetric": False, "group_size": 32}
    with pytest.raises(ValueError, match="permutation"):
        ops.gptq_round(weight, factor, order=torch.zeros(64, dtype=torch.long), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes groups apart"):
        ops.gptq_round(weight, factor, order=torch.arange(64).view(2, 32).T.reshape(-1), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factor has shape"):
        ops.gptq_round(weight, torch.eye(63), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="go together"):
        ops.gptq_round(weight, factor, scale=torch.ones(4, 2), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hessian_tiles"):
        ops.hessian_update_(ops.hessian_tiles(48), torch.randn(2, 49))
    rounded = (torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="hessian has shape"):
        ops.gptq_polish(weight, torch.eye(63), *rounded, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="codes has dtype"):
        ops.gptq_polish(weight, factor, rounded[0].view(torch.int8), *rounded[1:], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="zero_point"):
        ops.gptq_polish(weight, factor, *rounded[:2], rounded[2][:3], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="for both"):
        ops.cross_hessian_update_(torch.zeros(3, 3).double(), torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="matrix has shape"):
        ops.cross_hessian_update_(torch.zeros(2, 3).double(), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(TypeError, match="dtype"):
        ops.hessian_update_(ops.hessian_tiles(48), torch.zeros(2, 48, dtype=torch.int32))


def test_gptq_operators_pass_opcheck() -> None:
    weight, h = problem(8, 64)
    factor, order = reversed_factor(h).float(), torch.arange(64, dtype=torch.int32)
    tiles = ops.hessian_tiles(64)
    torch.library.opcheck(torch.ops.halfbyte.hessian_update_.default, (tiles, torch.randn(5, 64)))
    torch.library.opcheck(torch.ops.halfbyte.hessian_matrix.default, (tiles, 64))
    arguments = (weight, factor, order, None, None, None, 4, False, False, 32, 8, 0.5, torch.float16)
    torch.library.opcheck(torch.ops.halfbyte.gptq_round.default, arguments)
    matrix = torch.zeros(64, 64, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.halfbyte.cross_hessian_update_.default, (matrix, torch.randn(5, 64), torch.randn(5, 64))
    )
    codes, scale, zero_point, _ = ops.gptq_round(weight, factor, bits=4, symmetric=False, group_size=32)
    polish = (weight, h.float(), codes, scale, zero_point, 4, False, False, 32, 2, True, torch.float32)
    torch.library.opcheck(torch.ops.halfbyte.gptq_polish.default, polish)
