"""What `import halfbyte` costs and leaves behind, seen from a fresh interpreter."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "python"

# A copy of the module search path of this process, so that the subprocess sees the same halfbyte.
PRELUDE = f"import sys; sys.path[:] = {sys.path!r}; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120)


def test_import_prints_nothing() -> None:
    """Neither stream gets a byte."""
    result = run("import halfbyte")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_import_changes_no_global_state() -> None:
    """Default dtype, device, threads, random states, warning filters, environment, grad mode, logging: as before."""
    result = run(
        """
import json, logging, os, random, warnings
import numpy, torch

def state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "random": [random.getstate()[1][:5], torch.get_rng_state().sum().item()],
        "numpy random": numpy.random.get_state()[1][:5].tolist(),
        "warnings": len(warnings.filters),
        "environment": dict(os.environ),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "print options": str(torch._tensor_str.PRINT_OPTS),
        "root logger": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "numpy errors": numpy.geterr(),
        "quantized engine": torch.backends.quantized.engine,
    }

before = state()
import halfbyte
print(json.dumps([before, state()]))
"""
    )
    assert result.returncode == 0, result.stderr
    before, after = json.loads(result.stdout)
    assert after == before


def test_import_adds_less_than_300_ms_over_torch() -> None:
    """The median of five, after torch is in memory."""
    seconds = []
    for _ in range(5):
        result = run("import time, torch; t = time.perf_counter(); import halfbyte; print(time.perf_counter() - t)")
        assert result.returncode == 0, result.stderr
        seconds.append(float(result.stdout))
    assert statistics.median(seconds) <= 0.3, seconds


def test_import_leaves_heavy_packages_alone() -> None:
    """Packages that only some functions need are imported by those functions."""
    result = run("import torch; before = set(sys.modules); import halfbyte; print(*sorted(set(sys.modules) - before))")
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "halfbyte" in loaded
    assert not loaded & {"scipy", "matplotlib", "sklearn", "transformers", "onnx", "onnxruntime", "tqdm", "pandas"}


@pytest.mark.parametrize("other", ["2.12.1", "2.14.0+cu130", "3.13.0"])
def test_another_torch_is_refused_in_one_sentence(other: str) -> None:
    """Both versions and the command are named, and the extension was never opened."""
    result = run(
        f"""
import torch
built_for = torch.__version__
torch.__version__ = {other!r}
try:
    import halfbyte
except ImportError as error:
    print(error)
    print(built_for)
assert "halfbyte._C" not in sys.modules
"""
    )
    assert result.returncode == 0, result.stderr
    message, built_for = result.stdout.splitlines()
    assert other in message and built_for in message
    assert "pip install . --no-build-isolation --no-deps" in message


@pytest.mark.parametrize("other", ["2.13.9", "2.13.0+cu130"])
def test_another_patch_or_local_version_is_accepted(other: str) -> None:
    """The stable ABI holds across patch releases; +cpu and +cu130 are builds of one source."""
    result = run(f"import torch; torch.__version__ = {other!r}; import halfbyte")
    assert result.returncode == 0, result.stderr


def test_a_missing_extension_is_one_sentence(tmp_path: Path) -> None:
    """A source tree that was never built says how to build it."""
    package = tmp_path / "halfbyte"
    package.mkdir()
    (package / "__init__.py").write_text("from halfbyte import _extension\n")
    (package / "_extension.py").write_text((SOURCE / "halfbyte" / "_extension.py").read_text())
    result = run(f"sys.path.insert(0, {str(tmp_path)!r}); import halfbyte")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: halfbyte's C++ extension is not built")
    assert "pip install . --no-build-isolation --no-deps" in last


def test_an_unknown_cpu_capability_fails_at_import() -> None:
    """HALFBYTE_CPU_CAPABILITY is checked at once; the message lists the names."""
    result = run("import os; os.environ['HALFBYTE_CPU_CAPABILITY'] = 'avx9'; import halfbyte")
    assert result.returncode == 1
    assert "ImportError" in result.stderr.splitlines()[-1]
    assert "'avx9'" in result.stderr and "scalar" in result.stderr.splitlines()[-1]


def test_cpu_capability_can_be_forced() -> None:
    """HALFBYTE_CPU_CAPABILITY=scalar makes the scalar kernels run."""
    result = run(
        "import os; os.environ['HALFBYTE_CPU_CAPABILITY'] = 'scalar'; import halfbyte; print(halfbyte.cpu_capability())"
    )
    assert result.stdout.strip() == "scalar", result.stderr
