"""How long a study takes here: a few steps of every arm, timed by the jobs themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from reglue.jobs.sample import Sample, sample
from reglue.jobs.train import Train, train
from reglue.runs.tracking import read as read_log
from study import Arm, StudyOptions, trials_of

TIMED_STEPS = 8
FIRST_STEPS = 3
"""Left out of the timing: memory is allocated, and kernels are chosen or compiled."""
SAMPLING_STEPS = (2, 6)
"""Drawing is timed twice, so that loading and writing cancel out."""


@dataclass(frozen=True)
class Cost:
    """What one arm costs."""

    images_per_second: float
    """Of training."""
    drawing_seconds: float
    """For all samples of one checkpoint, without guidance."""


def print_plan(options: StudyOptions, arms: Sequence[Arm]) -> None:
    """Time every arm and print the minutes of each and of all."""
    trials = trials_of(options, arms)
    costs = {arm.name: cost_of(options, arm) for arm in arms}
    total = 0.0
    print(f"{'arm':<24} {'images/s':>9} {'train, min':>11} {'draw, min':>10}")
    for trial in trials:
        cost = costs[trial.arm.name]
        trained = trial.arm.trained_as is None
        training = options.steps * options.batch_size / cost.images_per_second / 60 if trained else 0.0
        draws = len(options.milestones()) if trained else 0
        draws += 2 if trial.arm.guided and options.guidance != 1 else 0  # Guidance evaluates twice.
        drawing = draws * cost.drawing_seconds / 60
        total += training + drawing
        print(f"{trial.folder.name:<24} {cost.images_per_second:>9.1f} {training:>11.1f} {drawing:>10.1f}")
    print(
        f"{options.steps} steps of {options.batch_size}, measured at {options.milestones()}, {options.count} samples: "
        f"{total:.1f} minutes, to which measuring adds what log.jsonl of an earlier study says"
    )


def cost_of(options: StudyOptions, arm: Arm) -> Cost:
    """Train and draw a little in a folder that is thrown away."""
    recipe = replace(arm.recipe, optimisation=replace(arm.recipe.optimisation, steps=TIMED_STEPS))
    with TemporaryDirectory() as folder:
        job = Train(recipe, arm.store, Path(folder) / "run", log_every=1, preview_every=0, device=options.device)
        run = train(job)
        speeds = [line["images_per_second"] for line in read_log(run)[FIRST_STEPS:]]
        count = min(options.sampling_batch, options.count)
        took = []
        for steps in SAMPLING_STEPS:
            began = time.perf_counter()
            sample(
                Sample(
                    run,
                    Path(folder) / f"{steps}",
                    count,
                    sampler=options.sampler,
                    steps=steps,
                    autoencoder=options.autoencoder,
                    batch_size=options.sampling_batch,
                    device=options.device,
                )
            )
            took.append(time.perf_counter() - began)
    per_step = max(0.0, (took[1] - took[0]) / (SAMPLING_STEPS[1] - SAMPLING_STEPS[0]))
    fixed = max(0.0, took[0] - SAMPLING_STEPS[0] * per_step)
    return Cost(median(speeds), (fixed + options.sampling_steps * per_step) * options.count / count)
