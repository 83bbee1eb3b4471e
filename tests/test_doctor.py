"""hb.doctor and hb.kernel_info: facts about this machine, warnings with a fix, and what runs where."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte._extension import cpu_capability


@pytest.fixture(scope="module")
def healthy() -> hb.Doctor:
    """This machine's findings, with whatever there is to warn about put right."""
    found = hb.doctor()
    return dataclasses.replace(
        found,
        available=("scalar", "avx2"),
        active="avx2",
        forced_level=None,
        threads=4,
        cpus=4,
        torch="2.13.0",
        built_for="2.13.0+cpu",
        huge_pages="madvise",
        memory=64 * 10**9,
        memory_available=32 * 10**9,
    )


def test_findings_are_those_of_this_process() -> None:
    found = hb.doctor()
    assert found.halfbyte == hb.__version__
    assert found.torch == str(torch.__version__)
    assert found.available == tuple(hb.available_capabilities())
    assert found.active == hb.cpu_capability()
    assert found.threads == torch.get_num_threads()
    assert found.levels[0] == "scalar"
    assert set(found.available) <= set(found.levels)
    assert found.packages["numpy"] is not None


def test_text_html_and_dict_have_the_facts() -> None:
    found = hb.doctor()
    for fact in (found.halfbyte, found.cpu, found.system, f"level {found.active}"):
        assert fact in str(found)
    assert found._repr_html_().startswith("<table>")
    assert json.loads(json.dumps(found.to_dict()))["active"] == found.active


def test_healthy_machine_has_no_warnings(healthy: hb.Doctor) -> None:
    assert healthy.warnings == ()


@pytest.mark.parametrize(
    ("changes", "problem", "fix"),
    [
        ({"active": "scalar", "forced_level": "scalar"}, "HALFBYTE_CPU_CAPABILITY=scalar forces it", "unset"),
        ({"active": "scalar"}, "set in this process", "unset"),
        ({"available": ("scalar",), "active": "scalar"}, "only the scalar kernels run", "AVX2"),
        ({"threads": 1}, "one thread is used, though 4 CPUs", "set_num_threads(4)"),
        ({"threads": 8}, "8 threads share 4 CPUs", "set_num_threads(4)"),
        ({"torch": "2.13.1"}, "built for torch 2.13.0, used with 2.13.1", "pip install"),
        ({"huge_pages": "never"}, "huge pages are off", "madvise"),
        ({"memory_available": 10**8}, "100.00 MB of memory are left", "max_memory"),
    ],
)
def test_each_problem_is_named_with_a_fix(
    healthy: hb.Doctor, changes: dict[str, object], problem: str, fix: str
) -> None:
    (advice,) = dataclasses.replace(healthy, **changes).warnings
    assert problem in advice.problem
    assert fix in advice.fix


def test_missing_level_is_explained(healthy: hb.Doctor) -> None:
    levels = ("scalar", "avx2", "avx512vnni", "amx")
    found = dataclasses.replace(healthy, levels=levels, cpu_flags=frozenset({"avx2", "fma", "f16c", "avx512f"}))
    assert found.why_missing("avx2") == ""
    assert found.why_missing("avx512vnni").endswith("avx512cd, avx512bw, avx512dq, avx512vl, avx512_vnni")
    assert found.why_missing("amx").endswith("avx512_vnni, amx_tile, amx_int8")
    blocked = dataclasses.replace(found, available=("scalar",), active="scalar")
    assert "hypervisor" in blocked.why_missing("avx2")


def test_forced_level_of_a_new_process_is_reported() -> None:
    if len(hb.available_capabilities()) == 1:
        pytest.skip("this CPU has no second level")
    code = "import halfbyte as hb; d = hb.doctor(); print(d.active, d.forced_level, len(d.warnings) > 0)"
    environment = {**os.environ, "HALFBYTE_CPU_CAPABILITY": "scalar", "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert answer.stdout.split() == ["scalar", "scalar", "True"]


def test_doctor_changes_nothing() -> None:
    before = (cpu_capability(), torch.get_num_threads(), torch.get_rng_state())
    hb.doctor()
    assert (cpu_capability(), torch.get_num_threads()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 16)
        self.own = nn.Embedding(8, 16)
        self.up = nn.Linear(16, 48)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight


def test_kernel_info_says_what_runs_for_each_module() -> None:
    model = Tied()
    recipe = hb.Recipe(default=hb.int8_dynamic(), overrides={"up": hb.int4_weight_only(16)})
    hb.quantize_(model, recipe, progress=False)
    info = {m.name: m for m in hb.kernel_info(model).modules}
    assert {name: m.operator for name, m in info.items()} == {
        "table": "embedding_weight_only",
        "own": "embedding_weight_only",
        "up": "linear_weight_only",
        "head": "linear_int8",
    }
    assert {name: (m.layout, m.tile) for name, m in info.items()} == {
        "table": ("tiles", "16 x 4"),
        "own": ("rows", "1 x 16"),
        "up": ("tiles", "16 x 8"),
        "head": ("tiles", "16 x 4"),
    }
    assert all(m.level == hb.cpu_capability() for m in info.values())
    assert [name for name, m in info.items() if m.register_tile] == ["up", "head"]


def test_kernel_info_counts_shared_bytes_once() -> None:
    model = Tied()
    hb.quantize_(model, hb.int8_weight_only(), progress=False)
    modules = hb.kernel_info(model).modules
    buffers = {id(b): b.nbytes for b in model.buffers()}
    assert sum(m.bytes for m in modules) == sum(buffers.values())
    assert [m.bytes for m in modules if m.name == "head"] == [0]
    assert "shared" in str(hb.kernel_info(model))


def test_kernel_info_follows_the_level(level: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    hb.quantize_(model, hb.int8_dynamic(), progress=False)
    (info,) = hb.kernel_info(model[0]).modules
    assert (info.name, info.level) == ("", level)
    assert info.kernel == f"matmul u8 s8 ({level})"
    tiles = {"scalar": "2 x 16", "avx2": "4 x 16", "avxvnni": "6 x 16", "avx512vnni": "6 x 64", "amx": "32 x 64"}
    assert info.register_tile == tiles[level]
    weight_only = nn.Sequential(nn.Linear(16, 16))
    hb.quantize_(weight_only, hb.int8_weight_only(), progress=False)
    assert hb.kernel_info(weight_only).modules[0].register_tile.split(" x ")[0] == "6"


def test_kernel_info_names_torch_for_sixteen_bit_floats() -> None:
    model = Tied()
    hb.quantize_(model, hb.bf16(), progress=False)
    info = hb.kernel_info(model)
    assert {m.operator for m in info.modules} == {"torch linear", "torch embedding"}
    assert {m.level for m in info.modules} == {"torch"}
    assert info._repr_html_().startswith("<table>")
    assert json.dumps(info.to_dict())


def test_kernel_info_of_a_float_model_is_refused() -> None:
    with pytest.raises(hb.QuantizationError, match="nothing is quantized"):
        hb.kernel_info(Tied())
