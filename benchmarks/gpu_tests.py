"""The tests that need a GPU: how many passed, and which did not.

    python benchmarks/gpu_tests.py

Not a benchmark, but what its figures rest on, so a GPU session begins with it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import tyro

from common import ROOT, Conditions, report
from reglue.training.distributed import resolve_device


@dataclass(frozen=True)
class GpuTests:
    """Run every test marked `gpu`. Without a GPU they are skipped, which is counted as such."""

    conditions: Annotated[Conditions, tyro.conf.arg(name="")] = field(default_factory=Conditions)
    folders: tuple[Path, ...] = (ROOT / "tests",)
    """Where to look for files with such tests. No other file is imported, nor what it needs."""


class Outcomes:
    """What pytest says of each test: a plugin of its."""

    def __init__(self) -> None:
        self.counts = Counter(passed=0, failed=0, skipped=0)
        self.failures: dict[str, str] = {}
        """Test → the line that says why."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is counted once, or twice if what comes after it fails besides."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures[report.nodeid] = (crash.message if crash else str(report.longrepr)).strip()[:500]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported counts as one that failed."""
        if report.failed:
            self.counts["failed"] += 1
            self.failures[report.nodeid] = str(report.longrepr).strip()[-500:]


def main(options: GpuTests) -> str:
    """Run them, and print the line."""
    outcomes = Outcomes()
    torch.set_num_threads(options.conditions.threads)
    # The last `-m` counts: pyproject.toml has one that leaves these tests out.
    arguments = ["-m", "gpu", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    files = [file for folder in options.folders for file in sorted(folder.rglob("test_*.py"))]
    marked = [str(file) for file in files if "mark.gpu" in file.read_text()]
    code = pytest.main([*arguments, *marked], plugins=[outcomes])
    figures: dict[str, Any] = {**outcomes.counts, "failures": outcomes.failures, "exit_code": int(code)}
    return report("gpu_tests", options, figures, resolve_device())


if __name__ == "__main__":
    main(tyro.cli(GpuTests, description=__doc__))
