"""How long a study takes here: a few steps of every arm, timed by the jobs themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from measures import Measures
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
    measuring_seconds: float
    """For the networks to look at them."""
    inception_seconds: float
    """The same of the Inception, which may only look at the last ones."""


def print_plan(options: StudyOptions, arms: Sequence[Arm]) -> None:
    """Time every arm and print the minutes of each and of all."""
    measures = Measures(options)
    costs = {arm.name: cost_of(options, arm, measures) for arm in arms}
    checkpoints = len(options.milestones())
    total = 0.0
    print(f"{'arm':<24} {'images/s':>9} {'train, min':>11} {'draw, min':>10} {'measure, min':>13}")
    for trial in trials_of(options, arms):
        cost, guided = costs[trial.arm.name], trial.arm.guided and options.guidance != 1
        trained = trial.arm.trained_as is None
        sets = (checkpoints if trained else 0) + guided
        by_inception = sets if options.inception_everywhere else trained + guided
        minutes = (
            options.steps * options.batch_size / cost.images_per_second / 60 if trained else 0.0,
            (sets + guided) * cost.drawing_seconds / 60,  # Guidance evaluates twice.
            (sets * cost.measuring_seconds + by_inception * cost.inception_seconds) / 60,
        )
        total += sum(minutes)
        columns = f"{minutes[0]:>11.1f} {minutes[1]:>10.1f} {minutes[2]:>13.1f}"
        print(f"{trial.folder.name:<24} {cost.images_per_second:>9.1f} {columns}")
    print(
        f"{options.steps} steps of {options.batch_size}, measured at {options.milestones()}, {options.count} samples: "
        f"{total:.1f} minutes in all, and once the features of real images"
    )


def cost_of(options: StudyOptions, arm: Arm, measures: Measures) -> Cost:
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
        looked = measures.seconds(Path(folder) / f"{SAMPLING_STEPS[0]}")
    per_step = max(0.0, (took[1] - took[0]) / (SAMPLING_STEPS[1] - SAMPLING_STEPS[0]))
    fixed = max(0.0, took[0] - SAMPLING_STEPS[0] * per_step)
    drawing = fixed + options.sampling_steps * per_step
    return Cost(median(speeds), *(seconds * options.count / count for seconds in (drawing, *looked)))
