"""What every benchmark shares: conditions, alternating timings, and one line of JSON at the end."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from reglue.config import Precision
from reglue.training.distributed import resolve_device, synchronize
from reglue.training.precision import matmul_precision

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = 10
"""Of matrices, in a call that is timed: so a GPU begins each without waiting to be told."""
PACKAGES = ("torch", "timm", "diffusers", "numpy", "safetensors", "pillow")


@dataclass(frozen=True)
class Conditions:
    """What every benchmark is told."""

    threads: int = 1
    """Of the CPU, for each operation."""
    out: Path | None = None
    """File for the line of JSON, besides the screen."""


@dataclass(frozen=True)
class Timed(Conditions):
    """What a benchmark of calls is told."""

    device: str = "auto"
    """auto, cpu or cuda."""
    repeats: int = 5
    """How often everything is timed, in turns."""

    def begin(self) -> torch.device:
        """Set the threads. Returns the device."""
        torch.set_num_threads(self.threads)
        return resolve_device(self.device)


@dataclass(frozen=True)
class Comparison(Timed):
    """What a benchmark of ours beside the published code is told."""

    official: Path | None = None
    """A checkout of the published REGLUE code, to measure beside ours; ours alone if not given. What it needs beyond
    our own packages (accelerate) must be importable."""
    toy: bool = False
    """Sizes that take seconds: to see that the script runs, not to measure."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over the repeats."""

    minimum: float
    median: float
    cpu_minimum: float
    """Seconds that the process had a core: on a shared CPU the steadier figure, on a GPU that of the launches."""
    cpu_median: float
    repeats: int

    def of_one(self, steps: int) -> Timing:
        """The same for one of so many steps of a call: their mean."""
        seconds = {name: value / steps for name, value in asdict(self).items() if name != "repeats"}
        return replace(self, **seconds)


def alternate(
    contestants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Time the contestants in turns, so that a machine that is busy at times is busy for all of them alike.

    Every round begins with another contestant. `warmup` calls of each are not timed.
    """
    names = list(contestants)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            started, started_cpu = time.perf_counter(), time.process_time()
            contestants[name]()
            synchronize(device)
            if turn >= warmup:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - started_cpu)
    return {
        name: Timing(min(wall[name]), median(wall[name]), min(cpu[name]), median(cpu[name]), repeats) for name in names
    }


@dataclass(frozen=True)
class Measured:
    """What a contestant took."""

    timing: Timing
    peak_gpu_memory_mib: float | None
    """From its making on, with nobody else's tensors there; None without a GPU."""


Maker = Callable[[], Mapping[str, Callable[[], object]]]
"""Makes a contestant, with all that it keeps on the device: its calls, by what to add to its name for each."""


def measured(makers: Mapping[str, Maker], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Make the contestants and time their calls.

    On a CPU they take turns, as in `alternate`. A GPU is nobody else's, and its memory is what they are short of: there
    one is made, timed and gone before the next. Raises OutOfMemoryError if one does not fit alone; `free` then.
    """
    groups = [[name] for name in makers] if device.type == "cuda" else [list(makers)]
    result: dict[str, Measured] = {}
    for names in groups:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        contestants = {f"{name}{way}": call for name in names for way, call in makers[name]().items()}
        timed = alternate(contestants, repeats, device)
        result |= {name: Measured(timing, peak_gpu_memory_mib(device)) for name, timing in timed.items()}
        del contestants
        free(device)
    return result


def seconds_of_process(command: Sequence[str | Path], **environment: str) -> tuple[float, float]:
    """Seconds by the clock, and of cores, of a new process with all that it starts. Raises CalledProcessError."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def free(device: torch.device) -> None:
    """Give a GPU's memory back that nothing holds any more, what has been compiled included.

    Not inside an `except`: there the traceback still holds all that the functions had which failed.
    """
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def seconds_of(timing: Timing, device: torch.device) -> float:
    """The figure to judge by: the median, of the time on a core where the device is the CPU."""
    return timing.cpu_median if device.type == "cpu" else timing.median


def ratio(theirs: Timing, ours: Timing, device: torch.device) -> float:
    """How many times ours is faster."""
    return seconds_of(theirs, device) / seconds_of(ours, device)


def commit_of(folder: Path) -> str | None:
    """The commit that a folder is a checkout of, with `-changed` behind it where files differ; None without git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=-changed", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
    }


def peak_memory_mib() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_gpu_memory_mib(device: torch.device) -> float | None:
    """The most memory of a GPU that tensors have taken so far; None without one."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


def matrix_rate(device: torch.device, precision: Precision, size: int | None = None) -> float:
    """Operations per second of large square matrix products in a row: what a step could reach at most."""
    size = size or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.mm(a, b)

    with matmul_precision(device, precision):
        timed = alternate({"products": multiply}, 5, device)["products"]
    return PRODUCTS * 2 * size**3 / (timed.cpu_minimum if device.type == "cpu" else timed.minimum)


def plain(value: Any) -> Any:
    """Figures and options as JSON has them: dataclasses as objects, numbers to five digits, paths as text."""
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return str(value) if isinstance(value, Path) else value


def report(benchmark: str, options: Any, figures: Mapping[str, Any], device: torch.device) -> str:
    """Print the figures with all that they depend on, as one line of JSON. Returns the line.

    `options.conditions` says how it was measured, and where the line is written besides.
    """
    conditions: Conditions = options.conditions
    content: dict[str, Any] = {
        "benchmark": benchmark,
        "figures": figures,
        "options": {key: value for key, value in asdict(options).items() if key != "conditions"},
        "hardware": hardware(device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit_of(ROOT),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if isinstance(conditions, Timed):
        content["options"]["repeats"] = conditions.repeats
    if isinstance(conditions, Comparison):
        content["toy"] = conditions.toy
        content["official_commit"] = commit_of(conditions.official) if conditions.official else None
    line = json.dumps(plain(content))
    if conditions.out:
        conditions.out.parent.mkdir(parents=True, exist_ok=True)
        conditions.out.write_text(line + "\n")
    print(line, flush=True)
    return line
