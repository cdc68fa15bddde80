"""Where the figures and pictures of a training go: its own folder always, and whatever trackers are asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from reglue.data.plots import beside_preview, curves
from reglue.errors import UserError, option
from reglue.extras import EXTRAS, need
from reglue.files import parse_json, read_jsonl, replacing
from reglue.progress import Bar
from reglue.training.trackers import TensorBoard, Trackio, Wandb

FILE, PROGRESS = "metrics.jsonl", "progress.png"
REMEDY = "fix that line, or delete it"
TAIL = 2**16
"""Bytes at the end of a log, which hold its last lines."""


class Tracker(Protocol):
    """Something that records a training, such as a dashboard. Only the first process has any."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Figures of a step: numbers by name, and under `validation` those of a measurement, also by name."""
        ...

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture of a step. Pictures of one name, such as `previews`, show the same thing at different steps."""
        ...

    def close(self) -> None:
        """The training has ended, been stopped or failed."""
        ...


class JsonLines:
    """The run's own record: `metrics.jsonl`, one JSON object per line, and pictures as `NAME/STEP.png`."""

    def __init__(self, run: Path, after_step: int) -> None:
        """Continue the log after a step: later lines are of work that was lost and will be done again."""
        self.run = run
        if (run / FILE).is_file():
            kept = [line for line in read(run) if line["step"] <= after_step]
            with replacing(run / FILE) as beside:
                beside.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line, without figures that are infinite or not a number, which JSON has no word for."""
        with (self.run / FILE).open("a") as file:
            file.write(json.dumps(_finite({"step": step, **values}), allow_nan=False) + "\n")

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """Write one picture, and beneath the losses so far as `progress.png`, in place of the one before."""
        (self.run / name).mkdir(exist_ok=True)
        with replacing(self.run / name / f"{step:08d}.png") as beside:
            picture.save(beside, format="png")
        lines = read(self.run)
        together = beside_preview(curves(lines, losses(lines)), np.asarray(picture.convert("RGB")))
        with replacing(self.run / PROGRESS) as beside:
            Image.fromarray(together).save(beside, format="png")

    def close(self) -> None:
        """Nothing is held open."""


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
"""What makes each tracker of the folder of a run and the step after which it goes on: -1 for one that begins. To add
one, put it here under a name and give that name as `--track`."""


def check_trackers(names: Collection[str]) -> None:
    """Raise UserError for a name that is not in TRACKERS, and for one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"{option('track')} {name}: no such tracker; choose from {', '.join(sorted(TRACKERS))}")
        if name in EXTRAS["track"]:
            need(f"{option('track')} {name}", name)


class Trackers:
    """The run's own record and other trackers as one. What another one raises is a warning, once, and then it is left
    out: it never stops a training. A record that cannot be written does, as a checkpoint does."""

    def __init__(self, run: Path, names: Collection[str], after_step: int, record: bool = True) -> None:
        """`names` are keys of TRACKERS; `jsonl` need not be among them. Without `record` it is left alone: another
        process may be training."""
        self.record: Tracker | None = JsonLines(run, after_step) if record else None
        self.others: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            if name != "jsonl":
                self._guarded(name, lambda name=name: self.others.update({name: TRACKERS[name](run, after_step)}))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """See `Tracker`."""
        if self.record:
            self.record.log(step, values)
        for name, tracker in [*self.others.items()]:
            self._guarded(name, lambda tracker=tracker: tracker.log(step, values))

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """See `Tracker`."""
        if self.record:
            self.record.image(step, name, picture)
        for other, tracker in [*self.others.items()]:
            self._guarded(other, lambda tracker=tracker: tracker.image(step, name, picture))

    def close(self) -> None:
        """See `Tracker`."""
        if self.record:
            self.record.close()
        for name, tracker in [*self.others.items()]:
            self._guarded(name, tracker.close)

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:
            self.others.pop(name, None)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            Bar.write(f"warning: tracker {name} failed and is left out from here on ({reason})", file=sys.stderr)


def losses(lines: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the losses in the lines of a log, their sum first: what stands before the gradient's norm."""
    of_steps = (line for line in lines if "gradient_norm" in line)
    names = dict.fromkeys(name for line in of_steps for name in takewhile("gradient_norm".__ne__, line))
    return sorted((name for name in names if name != "step"), key=lambda name: name != "loss")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values without floats that are not finite, also within those that are named sets of figures."""
    kept = {name: _finite(value) if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value for name, value in kept.items() if not isinstance(value, float) or isfinite(value)}


def newest(run: Path, name: str) -> dict[str, Any]:
    """The last line of a run's log that has a figure of this name; empty if the log's end has none.

    Only the end is read, which is quick however long the log is, and lines that are damaged are passed over.
    """
    if not (run / FILE).is_file():
        return {}
    with (run / FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        with suppress(ValueError):
            values = parse_json(line, dict[str, Any])
            if name in values and type(values.get("step")) is int:
                return values
    return {}


def read(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's log, as `read_jsonl` reads them. Raises UserError for a line without a step, too."""
    lines = read_jsonl(run / FILE, dict[str, Any], REMEDY)
    for number, line in enumerate(lines, 1):
        if type(line.get("step")) is not int:
            raise UserError(f"{run / FILE} is damaged (line {number}: its step is no whole number); {REMEDY}")
    return lines
