"""Trackers of other projects: the figures, pictures and recipe of a training in TensorBoard, Weights & Biases, Trackio.

Each writes to this machine, and sends something elsewhere only where the user's own settings for it say so. Whatever is
raised here is a warning in `tracking.Trackers`. The libraries are imported when a tracker is made.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reglue.files import parse_json, replacing

RECORDS = ("run.json", "training.json")
"""What the folders of trainings hold: their records, with the recipe."""
IDENTITY = "tracked-as.txt"
"""In a training's folder, by which name others know it, so that what continues it continues its curves."""
PROJECT = "reglue"


class TensorBoard:
    """Event files in the run's folder `tensorboard`: `tensorboard --logdir RUN`."""

    def __init__(self, run: Path, after_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # What was written of later steps is of work that was lost: it is done again, and TensorBoard forgets it.
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=after_step + 1)
        if after_step < 0:
            recipe = json.dumps(configuration(run), indent=1, ensure_ascii=False)
            self.writer.add_text("recipe", "\n".join(f"    {line}" for line in recipe.splitlines()), 0)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """See `tracking.Tracker`."""
        for name, value in flat(values):
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """See `tracking.Tracker`."""
        self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """See `tracking.Tracker`."""
        self.writer.close()


class Wandb:
    """Weights & Biases: files in the run's folder `wandb`, offline unless the user has set WANDB_MODE otherwise.

    `wandb sync RUN/wandb/offline-run-*` sends them later.
    """

    def __init__(self, run: Path, after_step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # Read when it is imported.
        import wandb

        self.made = wandb.Image
        name = identity(run)
        settings = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=name,
            name=f"{run.resolve().name}-{name}",
            dir=str(run),
            mode=None if "WANDB_MODE" in os.environ else "offline",
            resume="allow",
            reinit="create_new",
            config=configuration(run),
            settings=wandb.Settings(**settings),
        )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """See `tracking.Tracker`."""
        self.run.log(dict(flat(values)), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """See `tracking.Tracker`."""
        self.run.log({name: self.made(picture)}, step=step)

    def close(self) -> None:
        """See `tracking.Tracker`."""
        self.run.finish()


class Trackio:
    """Trackio: its own data base on this machine (TRACKIO_DIR), `trackio show --project reglue`.

    It goes to a Space or a server only where the user has set TRACKIO_SPACE_ID or TRACKIO_SERVER_URL.
    """

    def __init__(self, run: Path, after_step: int) -> None:
        import trackio

        self.library = trackio
        name = f"{run.resolve().name}-{identity(run)}"
        with redirect_stdout(io.StringIO()):  # It prints how to see it, in the middle of ours.
            self.run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=name,
                config=configuration(run),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: dict[str, Any]) -> None:
        """See `tracking.Tracker`."""
        self.run.log(dict(flat(values)), step=step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        """See `tracking.Tracker`."""
        self.run.log({name: self.library.Image(picture)}, step=step)

    def close(self) -> None:
        """See `tracking.Tracker`."""
        with redirect_stdout(io.StringIO()):
            self.library.finish()


def flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among values, those of a measurement as `validation/NAME`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in flat(value))
        elif isinstance(value, int | float):
            yield name, float(value)


def configuration(run: Path) -> dict[str, Any]:
    """The record of a training as plain data, with its recipe."""
    file = next(run / name for name in RECORDS if (run / name).is_file())
    return parse_json(file.read_bytes(), dict[str, Any])


def identity(run: Path) -> str:
    """By which a training is known elsewhere: drawn once, and kept in its folder."""
    file = run / IDENTITY
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    if not re.fullmatch(r"[0-9a-f]{8}", text):
        text = secrets.token_hex(4)
        with replacing(file) as beside:
            beside.write_text(text + "\n")
    return text
