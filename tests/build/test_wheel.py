"""A wheel built from the tree, installed into an empty environment and used from another folder."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import sysconfig
import tarfile
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
    """Builds the wheel as a user would; its build folder is kept, so that a second run compiles what changed."""
    folder, build = tmp_path_factory.mktemp("wheel"), ROOT / "build" / "wheel"
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "-C", f"build-dir={build}"]
    build.parent.mkdir(exist_ok=True)
    with build.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # xdist may run the tests of this file in two processes
        run(sys.executable, "-m", "pip", "wheel", ROOT, *options, "-w", folder, cwd=folder)
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


def test_sdist_holds_what_a_build_needs_and_nothing_else(tmp_path: Path) -> None:
    """Sources, build files, licence and readme; nothing that git does not know."""
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=ROOT)
    (path,) = tmp_path.glob("halfbyte-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    known = set(run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines())
    assert {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "cpp/src/module.cpp"} <= names
    assert names - known == {"PKG-INFO"}
