"""How long the figures of `reglue evaluate` take, and how much memory, for features of many images.

    python benchmarks/evaluate_speed.py --count 50000 --width 2048 --threads 1

Both sides are random features of full rank and slowly falling variances, as a network's are. Every figure is taken
once; its seconds are by the clock, and those that the CPU worked, which are fewer where it had other work too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import torch
import tyro
from torch import Tensor

from common import Conditions, peak_gpu_memory_mib, peak_memory_mib, report
from reglue.metrics.distances import (
    GaussianStatistics,
    frechet_distance,
    frechet_influence,
    inception_scores,
    kernel_distance,
    manifold_scores,
)
from reglue.metrics.resampling import resample_counts, resampled_means
from reglue.seeds import generator
from reglue.training.distributed import resolve_device, synchronize

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluateSpeed:
    """Options of the measurement."""

    conditions: Annotated[Conditions, tyro.conf.arg(name="")] = field(default_factory=Conditions)
    count: int = 50_000
    """Images of either side."""
    width: int = 2048
    """Features of an image."""
    classes: int = 1008
    """Logits of an image."""
    resamples: int = 1000
    """Of the intervals."""
    device: str = "cpu"
    """Where pairwise distances are taken: auto, cpu, cuda or cuda:N."""
    seed: int = 0


def main(options: EvaluateSpeed) -> None:
    """Measure every figure in turn."""
    torch.set_num_threads(options.conditions.threads)
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
        memory[name] = round(peak_memory_mib())
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
    figures = {
        "seconds": seconds,
        "cpu_seconds": busy,
        "peak_memory_mib_so_far": memory,
        "total_seconds": sum(seconds.values()),
        "total_cpu_seconds": sum(busy.values()),
        "peak_memory_mib": peak_memory_mib(),
        "peak_gpu_memory_mib": peak_gpu_memory_mib(device),
    }
    report("evaluate_speed", options, figures, device)


def features(options: EvaluateSpeed, side: str) -> Tensor:
    """Random features (count, width) float32: variances fall as 1/rank, means are away from zero."""
    numbers = generator(options.seed, f"features of the {side}")
    drawn = torch.empty(options.count, options.width)
    scales = torch.arange(1, options.width + 1).float().rsqrt()
    for block in drawn.split(1024):
        block.copy_(torch.from_numpy(numbers.standard_normal(tuple(block.shape), dtype="float32")))
        block.mul_(scales).add_(0.5)
    return drawn


if __name__ == "__main__":
    main(tyro.cli(EvaluateSpeed, description=__doc__))
