"""One line for each run, store and autoencoder, from the few small files that tell it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reglue.data.manifest import MANIFEST, Manifest
from reglue.files import read_json
from reglue.published.sharing import REPORTS
from reglue.reals.record import RECORD as TRAINING_RECORD
from reglue.reals.record import TrainingRecord
from reglue.run import RunRecord
from reglue.training import checkpoints, tracking
from reglue.watching.words import counted

REMEDY = "see `reglue verify`"


@dataclass(frozen=True)
class Row:
    """What there is to say of one, in a few characters each."""

    what: str
    steps: str = ""
    loss: str = ""
    figure: str = ""


def run(folder: Path) -> Row:
    """That of a run."""
    record = RunRecord.read(folder)
    recipe = record.recipe
    last = tracking.newest(folder, "loss")
    done = max([*checkpoints.steps(folder), last.get("step", 0)], default=0)
    planned = recipe.optimisation.steps
    steps = f"{done:,}" if record.origin or done >= planned else f"{done:,} of {planned:,}"
    name = recipe.name + (" (imported)" if record.origin else "")
    return Row(f"{name} {recipe.model}, {_side(record.resolution)}", steps, _loss(last), newest_figure(folder))


def store(folder: Path) -> Row:
    """That of a store."""
    if not (folder / MANIFEST).is_file():
        return Row("half-written")
    # Without the hash of the manifest, whose shards may be thousands: `verify` compares it.
    manifest = read_json(folder / MANIFEST, Manifest, REMEDY)
    rows = sum(shard.rows for shard in manifest.columns["label"].shards) if "label" in manifest.columns else 0
    return Row(f"{counted(rows, 'image')}, {_side(manifest.source.resolution)}")


def autoencoder(folder: Path) -> Row:
    """That of an autoencoder that is trained here."""
    record = read_json(folder / TRAINING_RECORD, TrainingRecord, REMEDY)
    last, planned = tracking.newest(folder, "loss"), record.recipe.optimisation.steps
    done = max(record.steps_done, last.get("step", 0))
    measured = tracking.newest(folder, "validation").get("validation", {})
    name = next((name for name in ("rfid", "psnr", "mae") if name in measured), None) or next(iter(measured), None)
    return Row(
        f"{_side(record.resolution)}" + (f", from {record.source.name}" if record.source else ""),
        f"{done:,}" if done >= planned else f"{done:,} of {planned:,}",
        _loss(last),
        f"{name} {measured[name]:.4g}" if name else "",
    )


def newest_figure(folder: Path) -> str:
    """The Fréchet distance of a run's newest report, with its name and the number of images; empty without reports."""
    reports = sorted((folder / REPORTS).glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in reversed(reports):
        content: dict[str, Any] = read_json(file, dict[str, Any], REMEDY)
        try:
            value, count = float(content["metrics"]["frechet_distance"]["value"]), content["image_count"]
            return f"{content['distance_name']} {value:.4g}" + (f" ({count:,})" if count else "")
        except (KeyError, TypeError, ValueError):
            continue
    return ""


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    return sum(entry.stat(follow_symlinks=False).st_size for entry in _files(folder))


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry


def _loss(line: dict[str, Any]) -> str:
    return f"{line['loss']:.4g}" if isinstance(line.get("loss"), int | float) else ""


def _side(resolution: tuple[int, int]) -> str:
    return f"{resolution[0]}×{resolution[1]}"
