"""How long a study takes: a few steps of every arm are timed here, or its operations counted for a GPU elsewhere.

Nothing else is made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from costs import GPUS, Cost, Parcel, counted_cost, parcels
from measures import Measures
from pack import Pack, pack
from reglue.commands.compress import Compress, compress
from reglue.commands.sample import Sample, sample
from reglue.commands.train import Train, train
from reglue.data.manifest import MANIFEST
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.files import replacing
from reglue.run import needed_columns
from reglue.training.tracking import read as read_log
from study import Arm, StudyOptions, trials_of

TIMED_STEPS = 20
"""As many go before, in which memory is allocated and kernels are chosen."""
TIMED_PARTS = 5
"""Of the timed steps, each between two waits for the device. Their median is taken, as other work comes in bursts."""
SAMPLING_STEPS = (2, 6)
"""Drawing is timed twice, so that loading and writing cancel out."""
SAMPLED_IMAGES = (32, 128)
"""Of the store, for codes that are not there yet: fitting is timed twice, and the difference scaled."""
TIMED_EPOCHS = 2


@dataclass(frozen=True)
class Line:
    """What one trial takes, in seconds."""

    name: str
    images_per_second: float
    training: float
    """Of the steps."""
    starting: float
    drawing: float
    measuring: float

    @property
    def total(self) -> float:
        """Of all together."""
        return self.training + self.starting + self.drawing + self.measuring


def plan(options: StudyOptions, arms: Sequence[Arm], jobs: Sequence[Compress] = ()) -> None:
    """Say what every arm takes, and the `jobs` that make codes first; print it, and write it beside --out.

    OUT-plan.json has the seconds, OUT-plan.md the table. Both are timed here, or counted with --counted-on; then
    UserError is raised for codes that are yet to be made, since nobody knows their size.
    """
    models = {arm.name: arm for arm in arms if arm.trained_as is None}  # The others draw from one of these.
    carried: list[Parcel] = []
    if options.counted_on:
        for job in jobs:
            raise UserError(
                f"--counted-on counts what is there, and {job.store} has no codes {job.compressor_name}; make them "
                "with `reglue compress`, or choose others"
            )
        fits, carried, measures = {}, list(parcels(options, arms)), Measures(options)
        costs = {name: counted_cost(options, arm, measures) for name, arm in models.items()}
    else:
        fits, costs = timed_costs(options, models, jobs)
    lines = list(lines_of(options, arms, costs))
    text = "\n\n".join([table(options, lines, fits), *([assumptions(options, carried)] if options.counted_on else [])])
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "steps": options.steps,
        "counted_on": options.counted_on,
        "seconds": sum(fits.values()) + sum(line.total for line in lines),
        "steps_within_minutes": proposed_steps(options, lines, fits),
        "compressors": fits,
        "arms": [asdict(line) for line in lines],
        "to_bring": [asdict(parcel) for parcel in carried],
    }
    for suffix, content in ((".md", text), (".json", json.dumps(written, indent=1))):
        with replacing(options.out.with_name(f"{options.out.name}-plan{suffix}")) as beside:
            beside.write_text(content + "\n")


def timed_costs(
    options: StudyOptions, models: Mapping[str, Arm], jobs: Sequence[Compress]
) -> tuple[dict[str, float], dict[str, Cost]]:
    """Seconds of each job that makes codes, and what each arm costs, timed here."""
    with TemporaryDirectory() as folder:
        fits = {job.compressor_name: seconds_of(job, Path(folder)) for job in jobs if not job.fitted}
        stand_in = Path(folder) / "store" if fits else None
        measures = Measures(options)
        return fits, {
            name: cost_of(options, arm, timed_store(options, arm, stand_in), measures) for name, arm in models.items()
        }


def assumptions(options: StudyOptions, carried: Sequence[Parcel]) -> str:
    """What a counted plan rests on, and what has to be brought to that machine."""
    assert options.counted_on is not None
    rates, share = GPUS[options.counted_on], options.assumed_share
    brought = "; ".join(f"{each.name}, {each.megabytes:,.0f} MB in {each.files} files" for each in carried)
    files = sum(each.files for each in carried)
    return (
        f"Counted, not timed: {share:.0%} of {rates.bfloat16 / 1e12:.0f} TFLOP/s in bfloat16 and of "
        f"{rates.float32 / 1e12:.0f} in float32 are assumed, and seconds that no operations tell (`studies/costs.py`). "
        f"To bring: {brought}; {files} files in all."
    )


def lines_of(options: StudyOptions, arms: Sequence[Arm], costs: Mapping[str, Cost]) -> Iterator[Line]:
    """What each trial takes."""
    milestones = len(options.milestones())
    for trial in trials_of(options, arms):
        cost, guided = costs[trial.arm.trained_as or trial.arm.name], trial.arm.guided and options.guidance != 1
        trained = trial.arm.trained_as is None
        sets = (milestones if trained else 0) + guided
        by_inception = sets if options.inception_everywhere else trained + guided
        yield Line(
            trial.folder.name,
            cost.images_per_second,
            training=options.steps * options.batch_size / cost.images_per_second if trained else 0.0,
            starting=milestones * cost.start_seconds if trained else 0.0,
            drawing=(sets + guided) * cost.drawing_seconds,  # Guidance evaluates twice.
            measuring=sets * cost.measuring_seconds + by_inception * cost.inception_seconds,
        )


def table(options: StudyOptions, lines: Sequence[Line], fits: Mapping[str, float]) -> str:
    """The plan in Markdown, in minutes."""
    heads = ("arm", "images/s", "train", "start", "draw", "measure", "all")
    rows = [heads, ("---",) * len(heads)]
    rows += [(f"compressor {name}", "", "", "", "", "", minutes(seconds)) for name, seconds in fits.items()]
    for line in lines:
        parts = (line.training, line.starting, line.drawing, line.measuring, line.total)
        rows.append((line.name, f"{line.images_per_second:.1f}", *map(minutes, parts)))
    total = sum(fits.values()) + sum(line.total for line in lines)
    ends = [
        f"{options.steps} steps of {options.batch_size}, measured at {options.milestones()}, {options.count} samples: "
        f"{minutes(total)} minutes in all, and once the features of real images. Columns are in minutes."
    ]
    if options.minutes is not None:
        steps = proposed_steps(options, lines, fits)
        ends.append(
            f"{options.minutes:g} minutes are enough for --steps {steps}."
            if steps
            else f"{options.minutes:g} minutes are not enough: codes, drawing and measuring alone take longer. Choose "
            "fewer --checkpoints, --count or arms."
        )
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", *ends])


def proposed_steps(options: StudyOptions, lines: Sequence[Line], fits: Mapping[str, float]) -> int | None:
    """The --steps with which the study takes --minutes; 0 if it takes more without any, None if nobody asks.

    All milestones are whole numbers of steps.
    """
    if options.minutes is None:
        return None
    per_step = sum(line.training for line in lines) / options.steps
    others = sum(fits.values()) + sum(line.total - line.training for line in lines)
    whole = 2 ** (options.checkpoints - 1)
    return max(0, int((options.minutes * 60 - others) / per_step) // whole * whole)


def minutes(seconds: float) -> str:
    """For the table."""
    return f"{seconds / 60:.1f}"


def timed_store(options: StudyOptions, arm: Arm, stand_in: Path | None) -> Path:
    """A store on which an arm can be timed: its own; the study's where that is yet to be made; or a few images."""
    for store in (arm.store, options.store):
        made = (store / MANIFEST).is_file()
        if made and all(column in Store.open(store).manifest.columns for column in needed_columns(arm.recipe)):
            return store
    return stand_in or arm.store


def seconds_of(job: Compress, folder: Path) -> float:
    """How long it takes to fit a compressor and to write the codes. Leaves codes in `folder`/store, of few images."""
    store, took = Store.open(job.store), []
    counts = [min(count, len(store) // share) for count, share in zip(SAMPLED_IMAGES, (2, 1), strict=True)]
    for name, count in zip(("fewer", "store"), counts, strict=True):
        few = folder / name
        if not few.is_dir():
            pack(Pack(job.store, few), torch.linspace(0, len(store) - 1, count).long())
        with timed() as seconds:
            compress(replace(job, store=few, epochs=TIMED_EPOCHS))
        took.append(seconds[0])
    per_image = max(0.0, (took[1] - took[0]) / (counts[1] - counts[0]))
    once = max(0.0, took[0] - counts[0] * per_image)
    passes = 1 if job.kind == "pca" else job.epochs / TIMED_EPOCHS
    return once + per_image * len(store) * passes


def cost_of(options: StudyOptions, arm: Arm, store: Path, measures: Measures) -> Cost:
    """Train and draw a little in a folder that is thrown away."""
    recipe = replace(arm.recipe, optimisation=replace(arm.recipe.optimisation, steps=2 * TIMED_STEPS))
    with TemporaryDirectory() as folder:
        with timed() as trained:
            run = train(
                Train(
                    recipe,
                    store,
                    Path(folder) / "run",
                    log_every=TIMED_STEPS // TIMED_PARTS,
                    preview_every=0,
                    workers=options.workers,
                    device=options.device,
                )
            )
        speed = median(line["images_per_second"] for line in read_log(run) if line["step"] > TIMED_STEPS)
        count = min(options.sampling_batch, options.count)
        took = []
        for steps in SAMPLING_STEPS:
            with timed() as drawn:
                sample(
                    Sample(
                        run,
                        Path(folder) / f"{steps}",
                        count,
                        sampler=options.sampler,
                        steps=steps,
                        autoencoder=arm.autoencoder or options.autoencoder,
                        batch_size=options.sampling_batch,
                        device=options.device,
                    )
                )
            took.append(drawn[0])
        looked = measures.seconds(Path(folder) / f"{SAMPLING_STEPS[0]}")
    per_step = max(0.0, (took[1] - took[0]) / (SAMPLING_STEPS[1] - SAMPLING_STEPS[0]))
    fixed = max(0.0, took[0] - SAMPLING_STEPS[0] * per_step)
    drawing = fixed + options.sampling_steps * per_step
    start = max(0.0, trained[0] - 2 * TIMED_STEPS * options.batch_size / speed)
    return Cost(speed, start, *(seconds * options.count / count for seconds in (drawing, *looked)))


@contextmanager
def timed() -> Iterator[list[float]]:
    """A list that has the seconds of the block, once it has ended."""
    took: list[float] = []
    began = time.perf_counter()
    yield took
    took.append(time.perf_counter() - began)
