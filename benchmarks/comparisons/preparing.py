"""Preparing: images to moments, ours and the published preprocessing scripts."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image

from common import ROOT, Comparison, report, seconds_of_process
from reglue.commands.prepare import Prepare
from reglue.data.images import UnreadableImage
from reglue.data.opening import open_images
from workloads import random_images, spread


@dataclass(frozen=True)
class Preparing:
    """Time images to latent moments with the same autoencoder, from the start of the processes that do it.

    Theirs is two commands: `dataset_tools.py convert` decodes and crops into uncompressed PNGs, `encode` makes moments
    one image at a time, on a GPU alone: without one only `convert` is timed, beside the part of ours that decodes and
    crops. Ours is `reglue prepare` with its own choice of processes that decode. Features are left out on both sides:
    theirs cannot store them, since their encoder runs in every training step, where `train --encoder-in-step` times it.

    Interpreters start in fractions of a minute: take thousands of images.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=lambda: Comparison(repeats=2))
    images: Path | None = None
    """A folder of images; random ones if not given."""
    count: int = 512
    """Images: so many random ones, or evenly spread over the folder."""
    autoencoder: str = "starter"
    """starter, or a folder in diffusers' layout (KL autoencoder), for both."""
    resolution: int = 256


def preparing(options: Preparing) -> str:
    """Prepare the same images both ways."""
    conditions = options.conditions
    device = conditions.begin()
    resolution, count = (32, 4) if conditions.toy else (options.resolution, options.count)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = folder / "images"
        if options.images:
            count = spread(options.images, images, count)
        else:
            random_images(images, count, resolution)
        turns = []
        for turn in range(conditions.repeats):
            out = folder / str(turn)
            commands = {**ours(options, images, out, resolution), **theirs(options, images, out, resolution, device)}
            turns.append({name: seconds_of_process(command, PYTHONPATH=path()) for name, command in commands.items()})
        figures = figures_of(turns, count, device)
        if conditions.official:
            figures["pixel_difference"] = pixel_difference(images, folder / "0/images", resolution)
            assert figures["pixel_difference"] <= 1, figures
    return report("prepare", options, figures, device)


def figures_of(turns: list[dict[str, tuple[float, float]]], count: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every command, and how many times faster ours is: of cores where the device is the CPU."""
    by_clock, of_cores = ({name: min(turn[name][kind] for turn in turns) for name in turns[0]} for kind in (0, 1))
    judged = of_cores if device.type == "cpu" else by_clock
    faster = {}
    if "theirs: convert" in judged:
        faster["decode and crop"] = judged["theirs: convert"] / judged["ours: decode and crop"]
    if "theirs: encode" in judged:
        faster["images to moments"] = (judged["theirs: convert"] + judged["theirs: encode"]) / judged["ours: prepare"]
    return {
        "images": count,
        "seconds": by_clock,
        "seconds_of_cores": of_cores,
        "ours_images_per_second": count / by_clock["ours: prepare"],
        "times_faster": faster,
    }


def path() -> str:
    """Where a new process finds what this one has imported."""
    return os.pathsep.join(filter(None, sys.path))


def ours(options: Preparing, images: Path, out: Path, resolution: int) -> dict[str, list[str]]:
    """The job, and the part of it that needs no network."""
    python, size = sys.executable, ["--resolution", str(resolution)]
    networks = ["--autoencoder", options.autoencoder, "--encoder", "none", "--device", options.conditions.device]
    return {
        "ours: prepare": [python, "-m", "reglue", "prepare", str(images), str(out / "store"), *size, *networks],
        "ours: decode and crop": [python, str(ROOT / "benchmarks/decode_images.py"), str(images), *size],
    }


def theirs(options: Preparing, images: Path, out: Path, resolution: int, device: torch.device) -> dict[str, list[str]]:
    """Their two commands, where there is their code; the first alone without a GPU, which the second asks for."""
    official = options.conditions.official
    if official is None:
        return {}
    starter = Path(sys.modules["reglue"].__path__[0]) / "starter/autoencoder"
    autoencoder = starter if options.autoencoder == "starter" else options.autoencoder
    tool = [sys.executable, str(official / "preprocessing/dataset_tools.py")]
    crop = ["--transform=center-crop-dhariwal", f"--resolution={resolution}x{resolution}"]
    convert = [*tool, "convert", f"--source={images}", f"--dest={out / 'images'}", *crop]
    encode = [*tool, "encode", f"--model-url={autoencoder}", f"--source={out / 'images'}", f"--dest={out / 'moments'}"]
    return {"theirs: convert": convert, **({"theirs: encode": encode} if device.type == "cuda" else {})}


def pixel_difference(images: Path, converted: Path, resolution: int) -> int:
    """The largest difference between ours and theirs of the first few images, in 8 bits. Theirs are sorted by path."""
    source = open_images(images, Prepare.reading, None)
    places = {name: index for index, name in enumerate(source.names)}
    files = sorted(str(file) for file in images.rglob("*") if file.is_file())
    differences = [0]
    for file, png in list(zip(files, sorted(converted.rglob("*.png")), strict=True))[:8]:
        crop = source.load(places[Path(file).relative_to(images).as_posix()], (resolution, resolution))
        if not isinstance(crop, UnreadableImage):
            expected = np.asarray(Image.open(png), dtype=np.int16).transpose(2, 0, 1)
            differences.append(int(np.abs(crop.numpy() - expected).max()))
    return max(differences)
