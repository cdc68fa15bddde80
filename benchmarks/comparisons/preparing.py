"""Preparing: images to moments, ours and the published preprocessing scripts."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import tyro

from common import Comparison, report
from reglue.jobs.prepare import Prepare, prepare
from workloads import random_images


@dataclass(frozen=True)
class Preparing:
    """Time images to latent moments with the same autoencoder, from the start of the process that does it.

    Theirs is two commands: `dataset_tools.py convert` crops into uncompressed PNGs, `encode` makes moments one image at
    a time, on a GPU alone: without one only `convert` is timed. Ours is `reglue prepare`. Features are not
    compared: theirs computes them anew in every training step.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    images: Path | None = None
    """A folder of images; random ones if not given."""
    count: int = 64
    """How many random images."""
    autoencoder: str | None = None
    """A folder in diffusers' layout (KL autoencoder), for both; that of the starter kit if not given."""
    resolution: int = 256


def preparing(options: Preparing) -> str:
    """Prepare the same images both ways."""
    conditions = options.conditions
    device = conditions.begin()
    resolution, count = (32, 4) if conditions.toy else (options.resolution, options.count)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = options.images or random_images(folder / "images", count, resolution)
        count = sum(1 for file in images.rglob("*") if file.is_file())
        ours, theirs = [], []
        for turn in range(conditions.repeats):
            started = time.perf_counter()
            prepare(
                Prepare(
                    images, folder / f"store-{turn}", resolution, options.autoencoder or "starter", "none",
                    workers=0 if conditions.toy else 2, device=conditions.device,
                )
            )  # fmt: skip
            ours.append(time.perf_counter() - started)
            if conditions.official:
                out = folder / f"theirs-{turn}"
                theirs.append(published(conditions.official, options, images, out, resolution, device))
    figures: dict[str, Any] = {"images": count, "ours_seconds": ours, "ours_images_per_second": count / min(ours)}
    if theirs and device.type == "cuda":
        figures |= {"theirs_seconds": theirs, "theirs_images_per_second": count / min(theirs)}
        figures["times_faster"] = min(theirs) / min(ours)
    elif theirs:
        figures["theirs_seconds_of_convert_alone"] = theirs
    return report("prepare", options, figures, device)


def published(
    official: Path, options: Preparing, images: Path, out: Path, resolution: int, device: torch.device
) -> float:
    """Seconds of their two commands; of the first alone without a GPU, which the second asks for."""
    autoencoder = options.autoencoder or str(Path(sys.modules["reglue"].__path__[0]) / "starter/autoencoder")
    tool = [sys.executable, str(official / "preprocessing/dataset_tools.py")]
    size = f"{resolution}x{resolution}"
    convert = ["convert", f"--source={images}", f"--dest={out / 'images'}", "--transform=center-crop-dhariwal"]
    encode = ["encode", f"--model-url={autoencoder}", f"--source={out / 'images'}", f"--dest={out / 'vae-sd'}"]
    started = time.perf_counter()
    commands = [[*tool, *convert, f"--resolution={size}"], [*tool, *encode]]
    for command in commands if device.type == "cuda" else commands[:1]:
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started
