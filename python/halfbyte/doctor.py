"""`hb.doctor`: what this machine and this installation give, and what holds them back."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte import _C
from halfbyte._extension import available_capabilities, build_info, cpu_capability
from halfbyte.table import Table, format_bytes

_OVERRIDE = "HALFBYTE_CPU_CAPABILITY"
_OPTIONAL = ("transformers", "numpy", "scipy", "tqdm", "matplotlib", "onnx", "onnxruntime", "gguf")
_AVX512 = ("avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
# What dispatch.cpp asks for, in the words of /proc/cpuinfo.
_LEVEL_FLAGS: Mapping[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avxvnni": ("avx2", "fma", "f16c", "avx_vnni"),
    "avx512vnni": ("fma", "f16c", *_AVX512),
    "amx": ("fma", "f16c", *_AVX512, "amx_tile", "amx_int8"),
}


@dataclass(frozen=True, slots=True)
class Advice:
    """A warning and what to do about it."""

    problem: str
    fix: str

    def to_dict(self) -> dict[str, str]:
        """A JSON-able description."""
        return {"problem": self.problem, "fix": self.fix}


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """What `doctor` found; prints as a table, shows as one in a notebook.

    Attributes:
        halfbyte: Version of halfbyte.
        torch: Installed version of torch; `built_for` is the one that the extension was built with, by `compiler`.
        python, system: Versions of Python and of the operating system.
        cpu: Model of the CPU; `cpu_flags` are the extensions the operating system lists.
        levels: ISA levels compiled in, slowest first; `available` can run here, `active` does.
        forced_level: Value of HALFBYTE_CPU_CAPABILITY, or None.
        threads: Threads that torch and halfbyte use; `cpus` may be used by this process.
        memory, memory_available: Bytes of the machine, and of those that are free to use; None where the system does not say.
        huge_pages: Setting of transparent huge pages: `always`, `madvise`, `never`, or None where there is no such thing.
        packages: Optional packages and their versions, None for those that are not installed.
    """

    halfbyte: str
    torch: str
    built_for: str
    compiler: str
    python: str
    system: str
    cpu: str
    cpu_flags: frozenset[str]
    levels: tuple[str, ...]
    available: tuple[str, ...]
    active: str
    forced_level: str | None
    threads: int
    cpus: int
    memory: int | None
    memory_available: int | None
    huge_pages: str | None
    packages: Mapping[str, str | None]

    def why_missing(self, level: str) -> str:
        """Why a level that was compiled in cannot run here; empty if it can."""
        if level in self.available:
            return ""
        missing = [flag for flag in _LEVEL_FLAGS.get(level, ()) if flag not in self.cpu_flags]
        if missing:
            return f"this CPU has no {', '.join(missing)}"
        return "the operating system or a hypervisor does not allow it"

    @property
    def warnings(self) -> tuple[Advice, ...]:
        """What costs speed or may break, each with a fix."""
        found: list[Advice] = []
        best = self.available[-1]
        if self.active != best:
            why = f"{_OVERRIDE}={self.forced_level} forces it" if self.forced_level else "it was set in this process"
            found.append(Advice(f"kernels run on {self.active}, though {best} is there: {why}", f"unset {_OVERRIDE}"))
        if best == "scalar":
            found.append(
                Advice("only the scalar kernels run: results are right, but slow", "use a CPU with AVX2 (x86-64-v3)")
            )
        if self.threads == 1 and self.cpus > 1:
            fix = f"torch.set_num_threads({self.cpus}), or unset OMP_NUM_THREADS"
            found.append(Advice(f"one thread is used, though {self.cpus} CPUs are there", fix))
        if self.threads > self.cpus:
            problem = f"{self.threads} threads share {self.cpus} CPUs: they wait for each other"
            found.append(Advice(problem, f"torch.set_num_threads({self.cpus})"))
        if _public(self.torch) != _public(self.built_for):
            problem = f"built for torch {_public(self.built_for)}, used with {_public(self.torch)}"
            found.append(
                Advice(problem, "rebuild if anything looks wrong: pip install . --no-build-isolation --no-deps")
            )
        if self.huge_pages == "never":
            problem = "transparent huge pages are off: large weights are read through many small pages"
            found.append(Advice(problem, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"))
        if self.memory_available is not None and self.memory and self.memory_available < self.memory // 20:
            problem = f"{format_bytes(self.memory_available)} of memory are left"
            found.append(Advice(problem, "close other programs, or pass max_memory to hb.quantize_"))
        return tuple(found)

    def to_dict(self) -> dict[str, object]:
        """A JSON-able description."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **facts,
            "cpu_flags": sorted(self.cpu_flags),
            "levels": {level: self.why_missing(level) or "available" for level in self.levels},
            "available": list(self.available),
            "packages": dict(self.packages),
            "warnings": [advice.to_dict() for advice in self.warnings],
        }

    def _table(self) -> Table:
        table = Table(["", "found"])
        table.add("halfbyte", f"{self.halfbyte}, built for torch {self.built_for} with {self.compiler}")
        table.add("torch", self.torch)
        table.add("python", self.python)
        table.add("system", self.system)
        table.add("cpu", self.cpu)
        for level in self.levels:
            state = self.why_missing(level) or "available"
            table.add(f"level {level}", "active" if level == self.active else state)
        table.add("threads", f"{self.threads} on {self.cpus} CPUs")
        if self.memory is not None:
            free = "" if self.memory_available is None else f", {format_bytes(self.memory_available)} free"
            table.add("memory", f"{format_bytes(self.memory)}{free}")
        if self.huge_pages is not None:
            table.add("huge pages", self.huge_pages)
        for name, version in self.packages.items():
            table.add(name, version or "not installed")
        for advice in self.warnings:
            table.add("warning", f"{advice.problem}; {advice.fix}")
        return table

    def __str__(self) -> str:
        return self._table().to_text()

    def _repr_html_(self) -> str:
        return self._table().to_html()


def doctor() -> Doctor:
    """Looks at the installation and the machine: versions, ISA levels and why one is missing, threads, memory, warnings.

    Nothing is changed. Print it, and put it into bug reports.

    Returns:
        The findings; `warnings` has what to fix, and how.

    Example:
        >>> hb.doctor().active in hb.available_capabilities()
        True
    """
    built = build_info()
    memory = _memory()
    return Doctor(
        halfbyte=built["halfbyte"],
        torch=str(torch.__version__),
        built_for=built["torch"],
        compiler=built["compiler"],
        python=platform.python_version(),
        system=platform.platform(),
        cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
        cpu_flags=frozenset(_cpuinfo("flags").split()),
        levels=tuple(_C.compiled_capabilities()),
        available=tuple(available_capabilities()),
        active=cpu_capability(),
        forced_level=os.environ.get(_OVERRIDE) or None,
        threads=torch.get_num_threads(),
        cpus=_usable_cpus(),
        memory=memory.get("MemTotal"),
        memory_available=memory.get("MemAvailable"),
        huge_pages=_huge_pages(),
        packages={name: _version(name) for name in _OPTIONAL},
    )


def _public(version: str) -> str:
    return version.split("+")[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpuinfo(key: str) -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _memory() -> dict[str, int]:
    lines = (line.split() for line in _read("/proc/meminfo").splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3 and words[2] == "kB"}


def _usable_cpus() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()  # a container's share: microseconds of CPU in each period
    if len(quota) == 2 and quota[0].isdigit():
        cpus = min(cpus, max(1, round(int(quota[0]) / int(quota[1]))))
    return cpus


def _huge_pages() -> str | None:
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.partition("[")[2].partition("]")[0] or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
