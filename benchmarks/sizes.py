"""What `prepare`, `train` and `sample` take at several sizes of images: CPU seconds, and memory at most.

    python benchmarks/sizes.py

Small networks, those of the starter kit and `--model`, on images of noise. Each measurement is a process of its own,
forked from this one when everything is imported, so memory is that of the whole command; its imports alone are the
first row. The last rows decode one image of twice the largest size, whole and in tiles.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from common import Benchmark, report, run
from counting import show
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.sample import Sample, sample
from reglue.commands.train import Train, train
from reglue.encoders import tiling
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.vision import load_encoder
from reglue.papers import RECIPES
from reglue.progress import quiet


@dataclass(frozen=True)
class Sizes(Benchmark):
    """One row for each size."""

    sizes: tuple[int, ...] = (64, 128, 256, 512)
    """Sides in pixels."""
    model: str = "tiny"
    images: int = 2
    """Images that are prepared, that a step trains on, and that are drawn."""
    steps: int = 2
    """Of training, and of sampling."""
    tile: int = 512
    """Of the tiles of the last row, in pixels."""


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of some work in a process of its own, and MiB that were resident in it at most."""
    process = os.fork()
    if not process:
        try:
            with quiet():
                work()
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    _, status, used = os.wait4(process, 0)
    assert not status, "see the line above"
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10


def row(what: str, pixels: str, work: Callable[[], object], images: int) -> dict[str, Any]:
    """A row of the table, with seconds for one image."""
    seconds, memory = measured(work)
    return {"": what, "pixels": pixels, "CPU seconds an image": f"{seconds / images:.2f}", "MiB at most": round(memory)}


def rows(options: Sizes, folder: Path) -> list[dict[str, Any]]:
    """All measurements."""
    count, steps = options.images, options.steps
    autoencoder, _ = load_autoencoder("starter"), load_encoder("starter", 64)  # What they import is imported now.
    optimisation = replace(
        RECIPES["sit"].optimisation, steps=steps, batch_size=count, compile="no", precision="float32"
    )
    recipe = replace(RECIPES["sit"], model=options.model, optimisation=optimisation)
    found = [row("imports", "", lambda: None, 1)]
    for side in options.sizes:
        images, store, out, drawn = (folder / f"{name}-{side}" for name in ("images", "store", "run", "samples"))
        images.mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{i}.png")
        fitting = Prepare(images, store, side, "starter", "starter", batch_size=count, workers=0, device="cpu")
        training = Train(recipe, store, out, preview_every=0, device="cpu")
        drawing = Sample(out, drawn, count=count, sampler="euler", steps=steps, device="cpu")
        pixels = f"{side}×{side}"
        found.append(row("prepare", pixels, partial(prepare, fitting), count))
        found.append(row("a step of train", pixels, partial(train, training), count * steps))
        found.append(row(f"sample, {steps} steps", pixels, partial(sample, drawing), count))
    side = 2 * max(options.sizes)
    latents = torch.randn(1, autoencoder.spec.latent_channels, *autoencoder.spec.latent_size((side, side)))
    for what, tile in (("decode", 0), (f"decode, --tile {options.tile}", options.tile)):
        found.append(row(what, f"{side}×{side}", partial(tiling.decode, autoencoder, latents, tile), 1))
    return found


def main(options: Sizes) -> str:
    """Print the table, and then the line of JSON. Returns it."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        table = rows(options, Path(folder))
    show(table)
    return report(options, {"rows": table})


if __name__ == "__main__":
    run(Sizes, main, __doc__)
