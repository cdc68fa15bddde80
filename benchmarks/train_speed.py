"""The speed of our training step, in all its variants: targets, compilation, recomputation, precision.

    python benchmarks/train_speed.py --model B/2 --compile blocks --targets int8

Weights, images and features are random; sizes, arithmetic and files are those of training. `images_per_second` and
`ms_per_step` are the mean over `--repeats` steps in a row, waiting for data included, and nothing waits for the device
between them. The parts (`ms_read`, `ms_finish`, `ms_without_reading`) are the shortest of a few, each by itself, since
other programs on a machine only make them longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import Timed, alternate, matrix_rate, peak_gpu_memory_mib, peak_memory_mib, report
from counting import training_flops
from reglue.config import Compile, Precision
from reglue.data.batches import HostBatch, TrainingData
from reglue.data.prefetch import prefetch
from reglue.training import distributed
from reglue.training.precision import autocast
from training_step import TrainingStep
from workloads import LAYERS, Data, RandomOnline, Workload, random_encoder, random_store

WARMUP = 3
"""Steps that are not timed."""


@dataclass(frozen=True)
class TrainSpeed:
    """What is timed."""

    conditions: Annotated[Timed, tyro.conf.arg(name="")] = field(default_factory=lambda: Timed(repeats=20))
    recipe: Literal["sit", "repa", "redi", "reg", "reglue"] = "reglue"
    data: Data = "imagenet"
    """Sizes: ImageNet at 256 px (SD-VAE, DINOv2-B), those of `reglue demo`, or a toy's."""
    model: str | None = None
    """B/2, XL/2, … or DEPTHxWIDTHxHEADS/PATCH. Default: B/2, or the data's own."""
    batch_size: int = 256
    targets: Literal["cached", "int8", "decoded", "online"] = "cached"
    """int8: cached in 8 bits. online: a DINOv2-B with registers and random weights, on random pixels."""
    precision: Precision = "bfloat16"
    compile: Compile = "no"
    checkpoint_blocks: float = 0.0
    """Share of the blocks that are computed again in the backward pass."""
    deterministic: bool = True
    """As `reglue train --deterministic`: what it costs is what the other way saves."""
    workers: int = 4
    """Threads that read ahead; 0: the step waits for its data."""


def main(options: TrainSpeed) -> str:
    """Measure, and print the line."""
    device = options.conditions.begin()
    with TemporaryDirectory() as folder:
        figures = measured(options, Path(folder) / "store", device)
    return report("train_speed", options, figures, device)


def measured(options: TrainSpeed, folder: Path, device: torch.device) -> dict[str, Any]:
    """The figures of a training step."""
    workload = Workload.of(options.data, options.model, options.recipe)
    batch = options.batch_size
    toy = options.data == "toy"
    store = random_store(folder, workload, 2 * batch, "int8" if options.targets == "int8" else "float16")
    targets = "decoded" if options.targets == "decoded" else "cached"
    recipe = replace(workload.recipe, alignment=replace(workload.recipe.alignment, targets=targets))
    data = TrainingData(store, recipe, workload.config, 0, device)
    if options.targets == "online" and data.targets is not None:
        data.targets = RandomOnline(random_encoder(workload, LAYERS[-1:], device))
    torch.manual_seed(0)
    train = TrainingStep(
        recipe, workload.config, device, options.precision, options.compile,
        checkpoint_blocks=options.checkpoint_blocks, deterministic=options.deterministic,
    )  # fmt: skip
    repeats = options.conditions.repeats
    positions = (range(n * batch, (n + 1) * batch) for n in count())

    def step(draft: HostBatch) -> None:
        with autocast(device, options.precision):
            sample = data.finish(draft)
        train(sample)

    def shortest(action: Callable[[], object]) -> float:
        return 1e3 * alternate({"action": action}, 3, device)["action"].minimum

    draft = data.read(range(batch))
    with FlopCounterMode(display=False) as target_flops, sdpa_kernel(SDPBackend.MATH):
        data.finish(draft)
    started = time.perf_counter()
    step(draft)
    distributed.synchronize(device)
    first_step = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The data has no end, so that the threads read as far ahead after the steps as before them, if they can.
    with closing(prefetch(data.read, positions, options.workers, device)) as drafts:
        milliseconds = 1e3 * mean_of(lambda: step(next(drafts)), repeats, device)
    peak_memory, peak_gpu_memory = peak_memory_mib(), peak_gpu_memory_mib(device)
    rate = matrix_rate(device, options.precision, 256 if toy else None)
    flops = training_flops(workload.config) * batch
    features = store.manifest.columns["features"] if options.targets in ("cached", "int8") else None
    return {
        "images_per_second": 1e3 * batch / milliseconds,
        "ms_per_step": milliseconds,
        "ms_first_step": 1e3 * first_step,
        "ms_read": shortest(lambda: data.read(range(batch))),
        "ms_finish": shortest(lambda: data.finish(draft)),
        "ms_without_reading": shortest(lambda: step(draft)),
        # What has to be computed, not what is: without recomputation.
        "flops_per_step": flops,
        "flops_of_targets": target_flops.get_total_flops(),
        "matrix_flops_per_second": rate,
        "share_of_matrix_rate": 1e3 * flops / milliseconds / rate,
        "bytes_of_features_per_image": sum(shard.bytes for shard in features.shards) / len(store) if features else 0,
        "peak_memory_mib": peak_memory,
        "peak_gpu_memory_mib": peak_gpu_memory,
    }


def mean_of(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds of one of many steps in a row, after WARMUP others."""
    for _ in range(WARMUP):
        step()
    distributed.synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    distributed.synchronize(device)
    return (time.perf_counter() - started) / repeats


if __name__ == "__main__":
    main(tyro.cli(TrainSpeed, description=__doc__))
