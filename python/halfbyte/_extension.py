"""Loads the C++ extension ``halfbyte._C`` after checking that it fits the installed torch; CPU level and build facts.

An extension that was built for another torch can abort the interpreter while it is opened, so the check reads
``_build_info.json``, which the build puts beside it, and never opens one that does not match. Importing the extension
also registers ``torch.ops.halfbyte``.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import torch

__version__ = "0.1.0"  # pyproject.toml reads it here

REBUILD_COMMAND = "pip install . --no-build-isolation --no-deps"


def check_extension() -> None:
    """Checks that the extension is there and was built for the installed torch.

    Raises:
        ImportError: It is missing, or was built for a torch of another major or minor version. The message names both
            versions and the command that rebuilds.

    Example:
        >>> from halfbyte import _extension
        >>> _extension.check_extension()
    """
    spec = find_spec("halfbyte._C")
    info = Path(spec.origin).with_name("_build_info.json") if spec is not None and spec.origin is not None else None
    if info is None or not info.is_file():
        raise ImportError(
            "halfbyte's C++ extension is not built for this Python; "
            f"run `{REBUILD_COMMAND}` in halfbyte's source folder (`make build` to work in the source tree)"
        )
    built_for = str(json.loads(info.read_text())["torch_version"])
    # The local part (+cpu, +cu130) names a build of the same source, and the stable ABI holds across patch releases.
    installed = str(torch.__version__)
    if installed.split("+")[0].split(".")[:2] != built_for.split("+")[0].split(".")[:2]:
        raise ImportError(
            f"halfbyte was built for torch {built_for} but torch {installed} is installed; "
            f"run `{REBUILD_COMMAND}` in halfbyte's source folder to rebuild it"
        )


check_extension()

from halfbyte import _C  # noqa: E402  # only after the check


def cpu_capability() -> str:
    """Names the ISA level whose kernels run: the best this CPU supports, or what HALFBYTE_CPU_CAPABILITY forces.

    Example:
        >>> import halfbyte as hb
        >>> hb.cpu_capability() in hb.available_capabilities()
        True
    """
    return _C.cpu_capability()


def available_capabilities() -> tuple[str, ...]:
    """Lists the ISA levels that this CPU can run, slowest first; results are equal bit for bit on all of them.

    Example:
        >>> import halfbyte as hb
        >>> hb.available_capabilities()[0]
        'scalar'
    """
    return tuple(_C.available_capabilities())


def set_cpu_capability(name: str) -> None:
    """Makes all kernels of this process run on one ISA level from now on.

    Args:
        name: One of `available_capabilities()`.

    Raises:
        ValueError: This CPU cannot run the level, or there is none of that name.

    Example:
        >>> from halfbyte._extension import cpu_capability, set_cpu_capability
        >>> set_cpu_capability(cpu_capability())
    """
    _C.set_cpu_capability(name)


def build_info() -> dict[str, str]:
    """Says what the extension was built with: the versions of halfbyte and torch, and the compiler.

    Example:
        >>> from halfbyte._extension import build_info
        >>> sorted(build_info())
        ['compiler', 'halfbyte', 'torch']
    """
    return {"halfbyte": __version__, "torch": _C.torch_version, "compiler": _C.compiler}
