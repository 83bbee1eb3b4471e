"""Fixtures that every test folder shares, and CI's rule on skips."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halfbyte._extension import available_capabilities, cpu_capability, set_cpu_capability

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("HALFBYTE_SHARED", ROOT.parent / "shared"))

# In CI a test may only be skipped for what the machine cannot have: an ISA level of another CPU, or the data folder
# beside the checkout. Anything else (a missing package, say) would hide that nothing was tested.
ALLOWED_SKIPS = re.compile(r"this CPU has no |shared data is absent|HALFBYTE_SHARED")

skipped_in_ci: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collects the skips that CI does not allow; with xdist this runs in the process that reports."""
    note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """The same for modules that are skipped as a whole."""
    note_skip(report)


def note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Remembers a skip whose reason is not an allowed one."""
    if not os.environ.get("CI") or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not ALLOWED_SKIPS.search(reason):
        skipped_in_ci.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails the session where CI skipped what it may not."""
    if skipped_in_ci and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says which skips failed the session, and why."""
    if skipped_in_ci:
        terminalreporter.section("skipped in CI for a reason that tests/conftest.py does not allow", red=True)
        for line in skipped_in_ci:
            terminalreporter.line(line)


@pytest.fixture(params=["scalar", "avx2", "avxvnni", "avx512vnni", "amx"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on every ISA level of this CPU, and restores the one that was active."""
    if request.param not in available_capabilities():
        pytest.skip(f"this CPU has no {request.param}")
    before = cpu_capability()
    set_cpu_capability(request.param)
    yield request.param
    set_cpu_capability(before)


@pytest.fixture
def restore_level() -> Iterator[None]:
    """For tests that switch levels themselves with `set_cpu_capability`: restores the active one."""
    before = cpu_capability()
    yield
    set_cpu_capability(before)


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs the test with 1, 2 and 4 threads, and restores the number that was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For tests that call `torch.set_num_threads` themselves: restores the number that was set."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The `data` folder of real models beside the checkout (or in $HALFBYTE_SHARED); skips where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"shared data is absent: {SHARED / 'data'} (set HALFBYTE_SHARED to the folder that holds data/)")
    return SHARED / "data"
