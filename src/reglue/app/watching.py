"""The Watch tab: a run that trains elsewhere on this machine, from what it writes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from reglue.app.drawing import Wish, classes_of
from reglue.app.work import Work
from reglue.app.workshop import Run
from reglue.data.images import open_picture
from reglue.data.plots import Curve, curves
from reglue.errors import UserError, one_line
from reglue.pipeline import load
from reglue.training import checkpoints, tracking

FIGURES = ("step", "images_per_second", "learning_rate", "validation")
"""Of the log's lines, what is no loss and has no curve."""
RECENT = 10
"""Lines whose mean rate the remaining time is computed from."""
SAMPLES, SAMPLE_STEPS = 8, 40
"""Images of a checkpoint, and the steps that they are drawn in, at most."""
QUIET = 180.0
"""Seconds without a line after which a run is said to be quiet."""


@dataclass(frozen=True)
class Watched:
    """Where a training is."""

    step: int
    steps: int
    """As planned."""
    loss: float | None = None
    """The newest one."""
    rate: float | None = None
    """Images per second, of late."""
    seconds_left: float | None = None
    quiet: float | None = None
    """Seconds since the last line of the log; None if there is no log."""
    curves: Mapping[str, Curve] = field(default_factory=dict[str, Curve])
    """By the name of the loss, the weighted sum first."""
    previews: tuple[int, ...] = ()
    """Steps with a preview, ascending."""
    checkpoints: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """Of the steps that are done, from 0 to 1."""
        return self.step / self.steps

    def line(self) -> str:
        """Where it is, in a line."""
        if self.quiet is None and not self.checkpoints:
            return f"nothing yet of {self.steps:,} steps"
        parts = [f"step {self.step:,} of {self.steps:,}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.step >= self.steps:
            return " · ".join([*parts, "complete"])
        if self.rate:
            parts.append(f"{self.rate:,.3g} images/s")
        if self.quiet is None or self.quiet > QUIET:
            said = "no log is here" if self.quiet is None else f"nothing written for {duration(self.quiet)}"
            return " · ".join([*parts, said])
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        return " · ".join(parts)


def look(run: Run) -> Watched:
    """Read where a run is. Raises UserError for a damaged log."""
    folder, optimisation = run.folder, run.record.recipe.optimisation
    log = folder / tracking.FILE
    lines = tracking.read(folder)
    saved = tuple(checkpoints.steps(folder))
    step = max([line["step"] for line in lines[-1:]] + list(saved[-1:]), default=0)
    names = dict.fromkeys(name for line in lines for name in line if name not in FIGURES)
    found = curves(lines, sorted(names, key=lambda name: (name != "loss", name == "gradient_norm")))
    of_late = curves(lines[-RECENT:], ["images_per_second"])
    rates = [rate for points in of_late.values() for _, rate in points if rate]
    rate = len(rates) / sum(1 / one for one in rates) if rates else None
    left = (optimisation.steps - step) * optimisation.batch_size / rate if rate else None
    return Watched(
        step=step,
        steps=optimisation.steps,
        loss=found["loss"][-1][1] if "loss" in found else None,
        rate=rate,
        seconds_left=left,
        quiet=time.time() - log.stat().st_mtime if lines else None,
        curves=found,
        previews=tuple(sorted(int(file.stem) for file in (folder / "previews").glob("[0-9]" * 8 + ".png"))),
        checkpoints=saved,
    )


def preview(run: Run, step: int) -> Image.Image:
    """What the run drew at a step. Raises UserError if there is no such picture, or it is damaged."""
    file: Path = run.folder / "previews" / f"{step:08d}.png"
    try:
        with open_picture(file) as opened:
            return opened.convert("RGB")
    except Exception as error:  # Decoders raise nearly anything on malformed bytes, not OSError alone.
        raise UserError(f"{file} cannot be read ({one_line(error)}); wait for the next preview") from error


def draw_checkpoints(runs: Sequence[Run], work: Work) -> dict[str, dict[int, list[Image.Image]]]:
    """Images of the same seeds from every checkpoint of each run: by the run's title and the step."""
    drawn: dict[str, dict[int, list[Image.Image]]] = {}
    for run in runs:
        for step in checkpoints.steps(run.folder):
            work.what = f"{run.title}, step {step:,}"
            model = load(run.name, step=step, device=run.device)
            wish = Wish(count=SAMPLES)
            steps = min(model.default_sampling.steps, SAMPLE_STEPS)
            with warnings.catch_warnings():  # Of young averages, which is what there is to see here.
                warnings.simplefilter("ignore")
                images = model.generate(
                    classes_of(run, wish), count=SAMPLES, steps=steps, controls=[work.watching(model)]
                )
            drawn.setdefault(run.title, {})[step] = images
    return drawn


def nearest_step(steps: Sequence[int], asked: float) -> int | None:
    """The step nearest to the one that is asked for."""
    return min(steps, key=lambda step: abs(step - asked), default=None)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
