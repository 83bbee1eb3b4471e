"""Matrix operators give equal bits for any number of threads, and really use them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from quantized_weights import random_weight

import halfbyte as hb


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    """Restores torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 5, 70, 300])
@pytest.mark.parametrize("shape", [(1024, 512), (48, 2048)])
def test_threads_give_equal_bits(level: str, rows: int, shape: tuple[int, int]) -> None:
    if level == "scalar" and rows > 70:
        rows = 71  # slow enough already
    w = random_weight(*shape, 4, group_size=128)
    x = torch.randn(rows, shape[1])
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        arguments = (x, w.qweight, w.scale)
        results.append((hb.ops.linear_int8(*arguments, **w.kwargs), hb.ops.linear_weight_only(*arguments, **w.kwargs)))
    for int8, weight_only in results[1:]:
        assert torch.equal(int8, results[0][0])
        assert torch.equal(weight_only, results[0][1])


# Seconds of processor time of each thread of the process, before and after the products.
USES_TWO_THREADS = """
import os, torch
import halfbyte as hb
torch.set_num_threads(2)
q = torch.randint(-8, 8, (2048, 2048), dtype=torch.int8)
qweight = hb.ops.pack(q, 4, layout="tiles")
x, scale = torch.randn(ROWS, 2048), torch.ones(1, 2048)
def times():
    out = {}
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        out[thread] = int(fields[11]) + int(fields[12])
    return out
hb.ops.OPERATOR(x, qweight, scale, bits=4, out_features=2048)
before = times()
while sum(times().values()) - sum(before.values()) < 60:
    for _ in range(20):
        hb.ops.OPERATOR(x, qweight, scale, bits=4, out_features=2048)
print(sum(t - before.get(thread, 0) >= 15 for thread, t in times().items()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("operator", ["linear_int8", "linear_weight_only"])
@pytest.mark.parametrize("rows", [1, 64])
def test_two_threads_share_the_work(operator: str, rows: int) -> None:
    script = USES_TWO_THREADS.replace("OPERATOR", operator).replace("ROWS", str(rows))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(result.stdout) == 2
