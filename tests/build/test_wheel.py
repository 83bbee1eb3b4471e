"""A wheel built from the tree, installed into an empty environment and used from another folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command to its end; the test fails with its output if it does."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel of the files that git knows, in a copy: nothing of this checkout's own build may get into it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q"]
    run(sys.executable, "-m", "pip", "wheel", source, *options, "-w", folder, cwd=folder)
    (path,) = folder.glob("halfbyte-*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """One extension, the types, the licence; no tests, sources or caches."""
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert f"halfbyte/_C{suffix}" in names
    assert "halfbyte/_build_info.json" in names
    assert "halfbyte/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert all(top == "halfbyte" or top.endswith(".dist-info") for top in tops), tops
    assert not [name for name in names if "__pycache__" in name or name.endswith((".cpp", ".h", ".o", ".a"))]


def test_wheel_works_in_an_empty_environment_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """An operator gives what PyTorch's gives. The environment borrows torch from this one instead of installing it."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True, with_pip=False)
    python = environment / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-I", "-c", code, cwd=tmp_path).strip())
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        packages,
        wheel,
        cwd=tmp_path,
    )
    # Listed after the installed halfbyte; .pth files in these folders, such as the in-place build's, are not read.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    output = run(
        python,
        "-I",
        "-c",
        """
import torch, halfbyte as hb
x = torch.linspace(-3, 3, 1001)
y = hb.ops.fake_quantize(x, torch.tensor(0.02), torch.tensor(0), qmin=-128, qmax=127)
assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, 0.02, 0, -128, 127))
print(hb.__file__)
print(hb.__version__)
""",
        cwd=tmp_path,
    )
    where, version = output.splitlines()
    assert Path(where).is_relative_to(packages)
    assert version == wheel.name.split("-")[1]
