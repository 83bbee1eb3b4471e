"""What this machine can do at most, by `limits.c` compiled here: the bars that rows of the benchmarks are held against."""

import json
import subprocess
import tempfile
from pathlib import Path

PRODUCTS = {  # level of halfbyte: the instruction that multiplies 8-bit integers, and the one that multiplies floats
    "avx2": ("maddubs256", "fma256"),
    "avxvnni": ("vnni256", "fma256"),
    "avx512vnni": ("vnni512", "fma512"),
}


def measure_limits(threads: int) -> dict[str, float]:
    """Read bandwidth in GB/s and peaks in 1e9 operations a second (a multiply-add is two); empty without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "limits")
        source = str(Path(__file__).with_name("limits.c"))
        try:
            subprocess.run(["cc", "-O3", "-pthread", source, "-o", program], check=True, capture_output=True)
            output = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return {}
    limits: dict[str, float] = json.loads(output)
    return limits


def limit_ms(
    limits: dict[str, float], level: str, *, weight_bytes: float, operations: float, integer: bool
) -> float | None:
    """The least time for reading the weights once and for the products; None where the limits are not known."""
    peak = limits.get(PRODUCTS[level][0 if integer else 1]) if level in PRODUCTS else None
    if not peak or "read_gbs" not in limits:
        return None
    return max(weight_bytes / limits["read_gbs"], operations / peak) * 1e-6
