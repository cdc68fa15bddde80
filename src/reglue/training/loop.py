"""The training loop: `fit` reads top to bottom, for every kind of training. Run again, it continues, bit for bit."""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from reglue.config import YOUNG, OptimiserConfig
from reglue.data.prefetch import prefetch
from reglue.errors import Stopped, UserError, option
from reglue.progress import Bar
from reglue.training import checkpoints, distributed, parallel, stopping
from reglue.training.tracking import Trackers

Batch = TypeVar("Batch")


class Task(ABC, Generic[Batch]):
    """What `fit` trains, and all in which one training differs from another.

    Samples have positions, counted over all steps; what is at a position is a function of the seed alone. So a batch
    can be cut into parts, spread over processes and read again after a kill.
    """

    name: str
    """On the progress bar."""
    remedy: str
    """What to do when the loss is not finite, for the message."""
    shown: tuple[str, ...] = ("loss", "images_per_second")
    """Figures beside the progress bar."""

    def __init__(
        self,
        optimisation: OptimiserConfig,
        device: torch.device,
        part: int,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        averaged: nn.Module | None = None,
        ema: dict[str, Tensor] | None = None,
    ) -> None:
        """`model` is everything that learns, whose weights and buffers checkpoints keep.

        `ema` holds moving averages, under their names, of the weights of `averaged`, which is `model` or a part of it;
        they are changed in place. Without `averaged` it holds what the task itself keeps in checkpoints. A part of a
        step that a process computes at once is of `part` samples.
        """
        self.optimisation, self.device, self.part = optimisation, device, part
        self.model, self.optimiser = model, optimiser
        self.averaged, self.ema = averaged, ema or {}

    @abstractmethod
    def read(self, positions: range) -> Batch:
        """The samples at some positions. Threads call it, ahead of their use."""

    @abstractmethod
    def backward(self, batch: Batch, step: int, last_part: bool) -> dict[str, Tensor]:
        """Add the gradients of a part of a step, counted from 0. Returns what is logged of its loss, scalars."""

    def before_update(self, step: int) -> dict[str, Tensor]:
        """What happens to the gradients of a whole step. Returns scalars for the log. All processes call it."""
        return {"gradient_norm": parallel.clip_gradients(self.model.parameters(), self.optimisation.clip)}

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(self.optimisation, step)

    def line(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        """What is logged after so many steps, given the means since the line before. All processes call it."""
        return values

    def check(self, step: int, saved: int | None) -> None:
        """Raise UserError if it is no use to go on. Called after each line; `saved` is the last checkpoint's step."""

    def ended(self, step: int) -> bool:
        """Whether to end after so many steps, which have a checkpoint, though more were planned. All processes must
        agree, also when they resume from that checkpoint: it follows from what that keeps."""
        return False

    def evaluate(self, step: int) -> dict[str, Any]:
        """A line of measurements. The first process alone calls it, while the others wait."""
        return {}

    def preview(self, step: int) -> Image.Image | None:
        """A picture of what has been learned so far, in the first process; None draws none. All processes call it."""
        return None


def fit(
    task: Task[Any],
    run: Path,
    *,
    log_every: int,
    checkpoint_every: int,
    keep: int,
    evaluate_every: int = 0,
    preview_every: int = 0,
    evaluate_first: bool = False,
    workers: int = 0,
    track: Collection[str] = (),
    sharded: bool = False,
) -> None:
    """Train until the last step or an early end, from the last checkpoint in the run's folder if there is one.

    Whatever is done every so many steps is also done after the last one; 0 is never. With `evaluate_first` what is
    there before the first step is measured and shown too. `workers` threads read ahead, and `track` names trackers
    beside the run's own log. Raises UserError if the loss is not finite; Stopped after SIGTERM, with a checkpoint
    written.
    """
    optimisation, optimiser, model, ema = task.optimisation, task.optimiser, task.model, task.ema
    steps, batch_size = optimisation.steps, optimisation.batch_size
    rank, processes = distributed.rank_and_count()
    share = batch_size // processes

    def parts_of(step: int) -> list[range]:
        """The positions of a step that this process computes, as parts."""
        first = step * batch_size + rank * share
        return [range(start, min(start + task.part, first + share)) for start in range(first, first + share, task.part)]

    def due(every: int) -> bool:
        return every > 0 and (step == steps or step % every == 0)

    distributed.barrier()
    step = 0
    if checkpoint := checkpoints.last_of_all(run):
        step = checkpoints.restore(checkpoint, model, ema, optimiser)
    distributed.barrier()
    saved = step if checkpoint else None
    averages, weights = [], []
    if task.averaged is not None:
        current = task.averaged.state_dict()
        averages, weights = list(ema.values()), [current[name] for name in ema]

    if averages and rank == 0 and (warning := warning_of_age(optimisation)):
        Bar.write(warning, file=sys.stderr)
    with ExitStack() as stack:
        trackers = stack.enter_context(closing(Trackers(run, track, step or -1))) if rank == 0 else None
        writer = stack.enter_context(closing(checkpoints.Writer(run, keep, sharded)))
        if evaluate_first and not step:
            evaluate(task, step, trackers)
            undrawn = preview(task, step, trackers)
            check(task, step, trackers, saved)
            if undrawn:
                raise undrawn
        ahead = (part for future in range(step, steps) for part in parts_of(future))
        batches = stack.enter_context(closing(prefetch(task.read, ahead, workers, task.device)))
        shown: dict[str, Any] = {"unit": "step", "desc": task.name, "disable": rank > 0, "smoothing": 0.05}
        progress = stack.enter_context(Bar(total=steps, initial=step, aside=partial(checkpoints.told, run), **shown))
        means = Means()
        logged_step, logged_time = step, time.perf_counter()

        while step < steps and not task.ended(step):
            for group in optimiser.param_groups:
                group["lr"] = task.learning_rate(step)
            parts = parts_of(step)
            for part in parts:
                terms = task.backward(next(batches), step, last_part=part is parts[-1])
                means.add(terms, len(part))
            means.add(task.before_update(step))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if averages:
                torch._foreach_lerp_(averages, weights, 1 - optimisation.ema_at(step))  # type: ignore[reportPrivateImportUsage]
            step += 1
            progress.update()

            evaluation_due, checkpoint_due, preview_due = map(due, (evaluate_every, checkpoint_every, preview_every))
            stop = processes == 1 and stopping.requested()
            if stop or evaluation_due or checkpoint_due or preview_due or step % log_every == 0:
                # The only place that waits for the device. Here processes agree to stop if one of them is asked to.
                values, stop = means.over_processes(stopping.requested())
                check_finite(values, logged_step, step, task.remedy)
                now = time.perf_counter()
                values["learning_rate"] = task.learning_rate(step - 1)
                values["images_per_second"] = (step - logged_step) * batch_size / (now - logged_time)
                line = task.line(step, values)
                if trackers:
                    trackers.log(step, line)
                    upcoming = min(steps, (step // checkpoint_every + 1) * checkpoint_every)
                    told = [f"{name.replace('_', ' ')} {line[name]:.4g}" for name in task.shown]
                    progress.set_postfix_str(", ".join([*told, f"checkpoint at {upcoming:,}"]))
                task.check(step, saved)
                means, logged_step, logged_time = Means(), step, time.perf_counter()
            # Figures and pictures come before the checkpoint: a process that is killed in between makes them again, and
            # none is missing.
            if evaluation_due:
                evaluate(task, step, trackers)
            writer.check()
            undrawn = preview(task, step, trackers) if preview_due else None
            if evaluation_due:
                check(task, step, trackers, saved)
            if checkpoint_due or stop:
                writer.save(step, model, ema, optimiser)
                saved = step
            if undrawn:
                raise undrawn  # Now: a picture that cannot be drawn costs no step.
            if evaluation_due or preview_due:
                logged_time = time.perf_counter()
            if stop and step < steps:
                writer.wait()
                raise Stopped(f"stopped after step {step}, with a checkpoint; the same command continues")
        writer.wait()
    distributed.barrier()


def evaluate(task: Task[Any], step: int, trackers: Trackers | None) -> None:
    """Measure and log in the first process, which alone has trackers, while the others wait."""
    if trackers:
        trackers.log(step, task.evaluate(step))
    distributed.barrier()


def check(task: Task[Any], step: int, trackers: Trackers | None, saved: int | None) -> None:
    """Have the first process look whether what it measured speaks against going on, while the others wait."""
    if trackers:
        task.check(step, saved)
    distributed.barrier()


def preview(task: Task[Any], step: int, trackers: Trackers | None) -> Exception | None:
    """Have a picture drawn, and keep it. Returns what went wrong, if anything did."""
    try:
        picture = task.preview(step)
        if trackers and picture:
            trackers.image(step, "previews", picture)
    except Exception as error:
        return error
    return None


def warning_of_age(optimisation: OptimiserConfig) -> str | None:
    """A line for a training that is too short for its moving average; None if it is long enough."""
    share = optimisation.initial_share(optimisation.steps)
    if share < YOUNG:
        return None
    return (
        f"warning: after {optimisation.steps} steps {share:.0%} of the averaged weights will be those that training "
        f"began with; choose {option('optimisation.ema_warmup')} yes, or a lower {option('optimisation.ema')}"
    )


def check_finite(values: Mapping[str, float], since: int, step: int, remedy: str) -> None:
    """Raises UserError if a figure of the steps between is infinite or no number."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the loss is not finite between steps {since} and {step} ({', '.join(bad)}); {remedy}; "
            "the last checkpoint is untouched"
        )


class Means:
    """Means of scalars over steps, on the device, so that nothing waits for it until they are wanted."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], count: int = 1) -> None:
        """Add scalars that are means over so many samples. A name may be there in some steps alone."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name], self.counts[name] = value.new_zeros((), dtype=torch.float64), 0
            self.sums[name].add_(value, alpha=count)
            self.counts[name] += count

    def over_processes(self, asked_to_stop: bool) -> tuple[dict[str, float], bool]:
        """The means over all processes, and whether any of them is asked to stop. Waits for the device."""
        means = torch.stack([total / self.counts[name] for name, total in self.sums.items()])
        asked = means.new_tensor([asked_to_stop])
        *numbers, any_asked = distributed.average(torch.cat([means, asked])).tolist()
        return dict(zip(self.sums, numbers, strict=True)), any_asked > 0


def part_size(optimisation: OptimiserConfig, processes: int) -> int:
    """Images in a part of a step that a process computes at once. Raises UserError if the batch does not divide."""
    part, rest = divmod(optimisation.batch_size, processes * optimisation.accumulate)
    if rest or not part:
        raise UserError(
            f"a batch size of {optimisation.batch_size} does not divide into {processes} processes × "
            f"{optimisation.accumulate} accumulated parts"
        )
    return part


def adamw(parameters: Any, optimisation: OptimiserConfig) -> torch.optim.AdamW:
    """The optimiser of a configuration."""
    return torch.optim.AdamW(
        parameters,
        lr=optimisation.learning_rate,
        betas=optimisation.betas,
        eps=optimisation.epsilon,
        weight_decay=optimisation.weight_decay,
        fused=True,
    )


def learning_rate(optimisation: OptimiserConfig, step: int) -> float:
    """The learning rate of a step, counted from 0.

    It is the full one in the last step of the warm-up and in the first one after it; a cosine is 0 in the last step.
    """
    rate, warmup = optimisation.learning_rate, optimisation.warmup
    if step < warmup:
        return rate * (step + 1) / warmup
    if optimisation.decay == "cosine":
        done = (step - warmup) / max(optimisation.steps - 1 - warmup, 1)
        return rate * (1 + math.cos(math.pi * done)) / 2
    return rate
