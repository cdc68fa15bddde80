"""How long the figures of `reglue evaluate` take, and how much memory, for features of many images.

    python benchmarks/evaluate_scale.py --count 50000 --width 2048 --threads 1

Both sides are random features of full rank and slowly falling variances, as a network's are. The last line printed is
one JSON object: what was asked for, seconds of every figure (by the clock, and those that the CPU
worked, which are fewer where it had other work too), peak memory, hardware, versions and date.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
import tyro
from torch import Tensor

from reglue.metrics.distances import (
    GaussianStatistics,
    frechet_distance,
    frechet_influence,
    inception_scores,
    kernel_distance,
    manifold_scores,
)
from reglue.metrics.resampling import resample_counts, resampled_means
from reglue.runs.ranks import resolve_device, synchronize
from reglue.seeds import generator

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluateScale:
    """Options of the measurement."""

    count: int = 50_000
    """Images of either side."""
    width: int = 2048
    """Features of an image."""
    classes: int = 1008
    """Logits of an image."""
    resamples: int = 1000
    """Of the intervals."""
    threads: int = 1
    """Of the CPU."""
    device: str = "cpu"
    """Where pairwise distances are taken: auto, cpu, cuda or cuda:N."""
    seed: int = 0


def main(options: EvaluateScale) -> None:
    """Measure every figure in turn."""
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    seconds: dict[str, float] = {}
    busy: dict[str, float] = {}
    memory: dict[str, int] = {}

    def timed(name: str, work: Callable[[], T]) -> T:
        started, worked = time.perf_counter(), time.process_time()
        result = work()
        synchronize(device)
        seconds[name] = round(time.perf_counter() - started, 1)
        busy[name] = round(time.process_time() - worked, 1)
        memory[name] = peak_mebibytes()
        print(
            f"{name:<24} {seconds[name]:8.1f} s ({busy[name]:.1f} of the CPU), peak {memory[name]:6d} MiB so far",
            flush=True,
        )
        return result

    images, reference = timed("features drawn", lambda: [features(options, side) for side in ("images", "reference")])
    logits = torch.randn(options.count, options.classes, generator=torch.Generator().manual_seed(options.seed))
    own, real = timed(
        "means and covariances",
        lambda: [GaussianStatistics(options.width).update(side).gaussian for side in (images, reference)],
    )
    timed("FID", lambda: frechet_distance(own, real))
    counts, reference_counts = timed(
        "resamples drawn",
        lambda: [
            resample_counts(options.count, options.resamples, options.seed, side) for side in ("images", "reference")
        ],
    )
    timed("interval of FID", lambda: resampled_means(frechet_influence(images, own, real), counts))
    timed(
        "Inception Score",
        lambda: [inception_scores(logits, drawn) for drawn in (torch.ones(1, options.count), counts)],
    )
    timed(
        "KID with its interval",
        lambda: kernel_distance(
            images.to(device), reference.to(device), generator=generator(options.seed, "kernel distance"), counts=counts
        ),
    )
    scores = timed(
        "precision to coverage", lambda: manifold_scores(generated=images.to(device), real=reference.to(device))
    )
    timed(
        "intervals of these",
        lambda: [
            resampled_means(values.cpu(), drawn)
            for values, drawn in (
                (scores.precision, counts),
                (scores.density, counts),
                (scores.recall, reference_counts),
                (scores.coverage, reference_counts),
            )
        ],
    )
    result = {
        "options": asdict(options),
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_mebibytes_so_far": memory,
        "total_seconds": round(sum(seconds.values()), 1),
        "total_cpu_seconds": round(sum(busy.values()), 1),
        "peak_mebibytes": peak_mebibytes(),
        "hardware": hardware(device),
        "versions": {name: version(name) for name in ("reglue", "torch", "numpy")}
        | {"python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device.type == "cuda":
        result["peak_device_mebibytes"] = torch.cuda.max_memory_allocated(device) >> 20
    print(json.dumps(result))


def features(options: EvaluateScale, side: str) -> Tensor:
    """Random features (count, width) float32: variances fall as 1/rank, means are away from zero."""
    numbers = generator(options.seed, f"features of the {side}")
    drawn = torch.empty(options.count, options.width)
    scales = torch.arange(1, options.width + 1).float().rsqrt()
    for block in drawn.split(1024):
        block.copy_(torch.from_numpy(numbers.standard_normal(tuple(block.shape), dtype="float32")))
        block.mul_(scales).add_(0.5)
    return drawn


def peak_mebibytes() -> int:
    """The most memory that this process has had so far, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def hardware(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main(tyro.cli(EvaluateScale, description=__doc__))
