"""The training step of `reglue train`, beside the published one.

    python benchmarks/train_speed.py --official PUBLISHED --model B/2 --compile blocks

First both have to compute the same loss from the same weights and draws. Ours is then the step on a store of random
rows, which it reads ahead; theirs is the loop of their train.py with its tensors in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import official
from common import alternate, matmul_rate, report, run, speedups
from counting import parameters, training_flops
from official import CLS, LOCAL
from reglue.commands.train import DenoiserTask, Losses, Train
from reglue.config import Compile
from reglue.data.batches import HostBatch, TrainingData
from reglue.data.prefetch import READERS, prefetch
from reglue.diffusion.conditions import CLASS
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import LATENT
from reglue.diffusion.objective import TrainingSample, loss_terms
from reglue.diffusion.paths import LINEAR, PATHS
from reglue.run import RunRecord
from reglue.sampling import Precision
from reglue.training import distributed
from reglue.training.loop import Means
from reglue.training.precision import compile_parts, to_compile
from workloads import CLASSES, OfModel, Workload

AGREEMENT = 1e-4
"""Largest relative difference of a term of the loss, ours against theirs, in float32."""
Targets = Literal["cached", "int8", "decoded"]


@dataclass(frozen=True)
class TrainSpeed(OfModel):
    """Noise, forward, backward, clipping, AdamW, moving average: seconds of a step."""

    batch_size: int = 256
    steps: int = 1
    """Steps of a turn. On a GPU many, since a turn starts with nothing read ahead."""
    compile: tuple[Compile, ...] = ("no",)
    targets: tuple[Targets, ...] = ("cached",)
    """Of alignment: cached features in float16 or int8, or decoded from codes."""
    workers: int | None = None
    """Threads that read ahead. Default: as `reglue train` chooses."""
    official_precision: official.MixedPrecision = "no"
    """Of theirs, in accelerate's words. Their train.sh has fp16, which needs a GPU."""


class TrainingStep:
    """What `reglue train` gives to its loop, and a step of that loop (`training.loop.fit`)."""

    def __init__(self, data: TrainingData, start: Denoiser, precision: Precision, compile: Compile = "no") -> None:
        """`start`: a model to copy, which is quicker than to draw initial weights."""
        recipe = data.recipe
        recipe = replace(recipe, optimisation=replace(recipe.optimisation, precision=precision))
        losses = Losses(deepcopy(start), PATHS[recipe.path])
        compile_parts(
            losses, losses.denoiser.backbone.blocks, to_compile(compile, data.device, recipe.optimisation.steps)
        )
        options = Train(recipe, data.store.folder, Path("nowhere"))
        self.task = DenoiserTask(options, RunRecord.of(data.store, recipe, 0), data, 1, losses)
        weights = losses.denoiser.state_dict()
        self.averages, self.weights = list(self.task.ema.values()), [weights[name] for name in self.task.ema]
        self.means = Means()

    def __call__(self, batch: HostBatch) -> dict[str, Tensor]:
        """One step. Returns the terms of its loss, and the gradient's norm as `gradient_norm`."""
        task = self.task
        with distributed.deterministic(task.device, True):
            terms = task.backward(batch, 0, last_part=True) | task.before_update(0)
            self.means.add(terms)
            task.optimiser.step()
            task.optimiser.zero_grad(set_to_none=True)
            decay = task.optimisation.ema_at(0)
            torch._foreach_lerp_(self.averages, self.weights, 1 - decay)  # type: ignore[reportPrivateImportUsage]
        return terms


def main(options: TrainSpeed) -> str:
    """Check that both compute the same loss, then time both. Returns the line of JSON."""
    device = options.begin()
    workload, batch = options.workload(), 4 if options.toy else options.batch_size
    start = workload.random_model()
    figures: dict[str, Any] = {"parameters": parameters(workload.config), "batch_size": batch}
    contestants: dict[str, Callable[[], object]] = {}
    if options.official:
        figures["loss_difference"] = loss_difference(options.official, workload, start)
        assert figures["loss_difference"] < AGREEMENT, figures
        contestants[f"theirs {options.official_precision}"] = theirs(options, options.official, workload, start, batch)
    parts: dict[str, Callable[[], object]] = {}
    target_flops: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        for targets in options.targets:
            data = training_data(targets, Path(folder) / targets, workload, batch, device)
            rows = data.read(range(batch))
            parts[f"read {targets}"] = partial(data.read, range(batch))
            parts[f"finish {targets}"] = partial(data.finish, rows)
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                data.finish(rows)
            target_flops[targets] = counter.get_total_flops() // batch
            for precision, compile in product(options.precision, options.compile):
                name = f"ours {precision}, {targets}" + ("" if compile == "no" else f", compiled {compile}")
                contestants[name] = ours(options, data, start, batch, precision, compile)
        figures["seconds_per_step"] = measured = alternate(contestants, options.repeats, device, options.steps)
        figures["seconds_of_parts"] = alternate(parts, options.repeats, device)
    flops = training_flops(workload.config)
    rates = {precision: matmul_rate(device, precision, options.toy) for precision in options.precision}
    images = {name: batch / step.median for name, step in measured.items()}
    figures |= {
        "images_per_second": images,
        "times_faster": speedups(measured),
        "flops_per_image": flops,
        "flops_of_targets_per_image": target_flops,
        "matmul_flops_per_second": rates,
        "share_of_matmul_rate": {
            name: flops * images[name] / rate
            for precision, rate in rates.items()
            for name in images
            if name.startswith(f"ours {precision},")
        },
    }
    return report(options, figures, device)


def loss_difference(folder: Path, workload: Workload, start: Denoiser) -> float:
    """The largest relative difference of a term of the loss between ours and theirs, on the same draws, in float32."""
    config = workload.config
    theirs = official.model(folder, start, fused_attention=True)
    state = {name: torch.randn(2, *shape) for name, shape in config.shapes().items()}
    images, label = torch.cat([state[LATENT], state[LOCAL]], dim=1), torch.arange(2)
    rows, columns = config.token_grid
    tokens = torch.randn(2, 1 + rows * columns, config.alignment_width)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = official.losses(folder, theirs.eval(), images, state[CLS], label, tokens)
        torch.manual_seed(1)
        time = torch.rand(2, 1, 1, 1).flatten()
        latent, local = torch.randn_like(images).split([state[LATENT].shape[1], state[LOCAL].shape[1]], dim=1)
        noise = {LATENT: latent, LOCAL: local, CLS: torch.randn_like(state[CLS])}
        terms = loss_terms(start, LINEAR, TrainingSample(state, noise, time, {CLASS: label}, tokens))
    differences = [(terms[name] - value).abs() / value.abs() for name, value in expected.items()]
    return torch.stack(differences).max().item()  # NaN if one is.


def theirs(options: TrainSpeed, folder: Path, workload: Workload, start: Denoiser, batch: int) -> Callable[[], object]:
    """A turn of the published step."""
    device, shapes = options.begin(), workload.config.shapes()
    model = official.model(folder, start, fused_attention=True)
    weights = workload.recipe.loss_weights(0)
    step = official.TrainingStep(folder, model, weights, options.official_precision, device.type == "cpu")
    channels, *grid = shapes[LATENT]
    moments = as_loaded(torch.randn(batch, 2 * channels, *grid), device)
    label = as_loaded(torch.randint(CLASSES, (batch,)), device)
    rows, columns = workload.config.token_grid
    sizes = (shapes[LOCAL], shapes[CLS], (1 + rows * columns, workload.token_width))
    semantics = [torch.randn(batch, *size, device=device) for size in sizes]

    def turn() -> None:
        for _ in range(options.steps):
            step(moments.to(device), label.to(device), *semantics)

    return turn


def as_loaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor as their DataLoader hands it over: in pinned memory where there is a GPU to copy it."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def training_data(targets: Targets, folder: Path, workload: Workload, batch: int, device: torch.device) -> TrainingData:
    """A random store, twice as large as a batch, and what `reglue train` reads of it."""
    store = workload.random_store(folder, 2 * batch, "int8" if targets == "int8" else "float16")
    alignment = replace(workload.recipe.alignment, targets="decoded" if targets == "decoded" else "cached")
    return TrainingData(store, replace(workload.recipe, alignment=alignment), workload.config, 0, device)


def ours(
    options: TrainSpeed, data: TrainingData, start: Denoiser, batch: int, precision: Precision, compile: Compile
) -> Callable[[], object]:
    """A turn of our step, with threads that read ahead and end with the turn."""
    step, workers = TrainingStep(data, start, precision, compile), options.workers
    if workers is None:
        workers = 0 if data.device.type == "cpu" else READERS

    def turn() -> None:
        positions = (range(i * batch, (i + 1) * batch) for i in range(options.steps))
        for rows in prefetch(data.read, positions, workers, data.device):
            step(rows)

    return turn


if __name__ == "__main__":
    run(TrainSpeed, main, __doc__)
