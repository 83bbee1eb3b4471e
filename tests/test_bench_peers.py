"""The comparison with other libraries: a worker process, what a missing library gives, ranking, and the charts."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks' folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def row(name: str, ms: float, **changes: object) -> dict[str, object]:
    library = name.split()[0]
    facts = {"library": library, "name": name, "scheme": "", "wbits": 8, "act": "int8", "shape": "64x128", "rows": 1}
    return facts | {"cold": True, "ms": ms, "error": 0.0, "valid": True, "limit": 0.5, "disturbed": False} | changes


def test_our_rows_are_as_accurate_as_their_bits(benchmark_module: Any) -> None:
    bench = benchmark_module("bench_peers")
    library = bench.Library("halfbyte", sys.executable, 1)
    assert library.missing() is None
    notes: dict[str, str] = {}
    rows = bench.measure([library], "64x128", [1, 3], {}, notes, hot=True, seconds=0.0)
    library.process.stdin.close()
    assert library.process.wait(timeout=60) == 0
    assert notes == {}
    assert all(r.valid and r.ms > 0 and r.limit is None for r in rows)
    assert {(r.rows, r.cold) for r in rows} == {(1, True), (1, False), (3, True), (3, False)}


def test_a_library_that_is_not_there_says_so(benchmark_module: Any) -> None:
    bench = benchmark_module("bench_peers")
    assert "no-such-library" in bench.Library("no-such-library", sys.executable, 1).missing()


def test_a_wrong_result_does_not_win(benchmark_module: Any) -> None:
    tables = benchmark_module("peer_tables")
    rows = [row("halfbyte int8_dynamic", 2.0), row("fast but wrong", 1.0, valid=False), row("slow", 3.0)]
    text = tables.contest_table(rows, "int8")
    assert "1.50x slow" in text
    assert "behind in 0 of 1" in text


def test_a_peer_ahead_of_us_is_bold(benchmark_module: Any) -> None:
    tables = benchmark_module("peer_tables")
    text = tables.contest_table([row("halfbyte int8_dynamic", 2.0), row("fast", 1.0)], "int8")
    assert "**0.50x** fast" in text
    assert "behind in 1 of 1" in text


def test_calm_rows_are_not_replaced_by_disturbed_ones(benchmark_module: Any, tmp_path: Path) -> None:
    bench = benchmark_module("bench_peers")
    path = tmp_path / "peers.json"
    machine = {"level": "scalar", "cpu": "any"}
    for ms, disturbed in ((2.0, True), (1.0, False), (5.0, True)):
        bench.merge(path, {"machine": machine}, [bench.Row(**row("halfbyte int8_dynamic", ms, disturbed=disturbed))])
    assert [r["ms"] for r in json.loads(path.read_text())["rows"]] == [1.0]


def test_the_limit_is_the_slower_of_reading_and_multiplying(benchmark_module: Any) -> None:
    limits = benchmark_module("limits")
    found = {"read_gbs": 10.0, "maddubs256": 100.0}
    bytes_bound = limits.limit_ms(found, "avx2", weight_bytes=1e7, operations=2e7, integer=True)
    product_bound = limits.limit_ms(found, "avx2", weight_bytes=1e7, operations=1e9, integer=True)
    assert (bytes_bound, product_bound) == pytest.approx((1.0, 10.0))
    assert limits.limit_ms({}, "avx2", weight_bytes=1e7, operations=1e9, integer=True) is None


def test_charts_of_the_same_rows_are_equal(benchmark_module: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables = benchmark_module("peer_tables")
    rows = [
        row(name, ms * m, rows=m, wbits=bits, act=act)
        for m in (1, 16)
        for name, ms, bits, act in (
            ("halfbyte int8_dynamic", 1.0, 8, "int8"),
            ("halfbyte int4_int8_dynamic", 1.0, 4, "int8"),
            ("halfbyte int4_weight_only", 1.0, 4, "fp32"),
            ("a peer of 8 bits", 2.0, 8, "int8"),
            ("a peer of 4 bits", 2.0, 4, "int8"),
            ("a weight-only peer", 2.0, 4, "fp32"),
            ("a float", 2.0, 32, "fp32"),
        )
    ]
    for folder in ("first", "second"):
        tables.draw_charts({"rows": rows, "machine": {"level": "scalar"}}, tmp_path / folder)
    for name in ("peers_scalar.svg", "limits_scalar.svg"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
