"""What the benchmarks share: options, turns, and the line of JSON at the end."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.benchmark import Measurement, TaskSpec, timer

from reglue.errors import UserError
from reglue.machine import commit, machine
from reglue.sampling import Precision
from reglue.training.distributed import resolve_device
from reglue.training.precision import matmul_precision

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PACKAGES = ("torch", "timm", "diffusers", "numpy", "safetensors", "pillow")


@dataclass(frozen=True)
class Benchmark:
    """Options of every benchmark."""

    out: Path | None = None
    """File that gets the line of JSON too."""


@dataclass(frozen=True)
class Comparison(Benchmark):
    """Options of a benchmark that times ours, beside the published code where there is a checkout."""

    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 1
    """CPU threads of each operation."""
    repeats: int = 5
    """Timed turns of each contestant."""
    official: Path | None = None
    """A checkout of the published REGLUE code to measure beside ours. Without it ours is measured alone."""
    toy: bool = False
    """Sizes that take seconds, to see that the benchmark runs."""

    def begin(self) -> torch.device:
        """Set the threads. Returns the device."""
        torch.set_num_threads(self.threads)
        return resolve_device(self.device)


def core_seconds() -> float:
    """Seconds of CPU that this process and the finished ones it started have used so far."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def alternate(
    contestants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, calls: int = 1
) -> dict[str, Measurement]:
    """Time the contestants in turns, A B A B, so that whatever slows the machine down slows all of them.

    The first turn of each is not timed. A contestant makes `calls` calls in a turn; measurements are per call. The
    clock is CPU time on a CPU, which other programs disturb least, and wall time, synchronised, on a GPU.
    """
    clock = core_seconds if device.type == "cpu" else timer
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(1 + repeats):
        for name, contestant in contestants.items():
            begun = clock()
            contestant()
            seconds[name].append(clock() - begun)
    return {name: Measurement(calls, times[1:], TaskSpec(name, "")) for name, times in seconds.items()}


def speedups(measured: Mapping[str, Measurement]) -> dict[str, float]:
    """How many times faster each of ours is than each of theirs, by medians."""
    return {
        f"{our} / {their}": measured[their].median / measured[our].median
        for our in measured
        for their in measured
        if our.startswith("ours") and their.startswith("theirs")
    }


def matmul_rate(device: torch.device, precision: Precision, toy: bool) -> float:
    """FLOP/s of large square matrix products in a row: the most that a step could reach."""
    size = 64 if toy else 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(10):
            torch.mm(a, b)

    with matmul_precision(device, precision):
        return 2 * size**3 / alternate({"mm": multiply}, 5, device, calls=10)["mm"].median


def plain(value: Any) -> Any:
    """A value as JSON has it: measurements by median and spread, numbers to five digits, paths as text."""
    if isinstance(value, Measurement):
        value = {"median": value.median, "fastest": min(value.times), "iqr": value.iqr, "turns": len(value.times)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return str(value) if isinstance(value, Path) else value


def report(options: Benchmark, figures: Mapping[str, Any], device: torch.device = CPU) -> str:
    """Print figures and all that they depend on as one line of JSON. Returns the line."""
    gpu = device if device.type == "cuda" else None
    content: dict[str, Any] = {
        "benchmark": type(options).__name__,
        "figures": figures,
        "options": asdict(options),
        "hardware": {
            "cpu": machine(CPU),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "gpu": gpu and machine(gpu),
            "cuda": gpu and torch.version.cuda,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit(ROOT),
        "official_commit": commit(folder) if (folder := getattr(options, "official", None)) else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    line = json.dumps(plain(content))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(line + "\n")
    print(line, flush=True)
    return line


def run(kind: type[Any], main: Callable[[Any], object], description: str | None) -> None:
    """A benchmark's command line: a mistake of the user ends it with one line and code 2."""
    try:
        main(tyro.cli(kind, description=description))
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
