"""Photographs of a domain, from an archive to samples and a table: flowers, blood cells, blood smears, streets.

    python studies/domains.py cells --archive bccd-320.tar --work cells \
        --encoder dinov2-s --autoencoder TAEF2 --start flowers/runs/from-nothing

A domain is a way to cut its archive into training and held-out images, and what the public commands are given. They
are shown as they could be typed. Training stops at milestones, at each of which samples are measured; --start trains
once more, from another run's weights. The same command continues where it stopped. In --work:

    images/, stores/    both sides, as images (and masks) and as `reglue prepare` and `compress` leave them
    probe/, head/       what the encoder sees of the domain, and what names the pixels where there are masks
    runs/, samples/     a run from nothing, and one from --start; samples of each milestone
    results.json        every figure
    table.md, grid.png  the same as a table; real images above samples of the last milestone
"""

from __future__ import annotations

import csv
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from tyro.conf import Positional

from measures import Notes, mistakes_in, photographs, pictures
from reglue.data.masks import read_mask
from reglue.data.picture_writer import write_picture
from reglue.data.pictures import image_grid
from reglue.data.store import Store
from reglue.editing.options import LOCAL
from reglue.errors import UserError
from reglue.files import new_folder, read_json
from reglue.metrics.classifier import Classifier, train_classifier
from reglue.perception.agreement import IGNORE
from reglue.run import COMPRESSORS
from reglue.seeds import permutation
from study import Words, divided, is_store, merged, reglue

SIDES = ("training", "held-out")
HELD_OUT = 0.2
SHOWN = 8
"""Images of each row of the picture."""
PARTS = (
    "--model 8x256x4/2 --latent.unit-variance --local.compressor conv-16 --local.unit-variance --local.weight 0.5 "
    "--class-token.unit-variance --alignment.hidden 512"
)
TRAIN = (
    "--optimisation.batch-size 32 --optimisation.learning-rate 1e-3 --optimisation.warmup 100 "
    "--optimisation.time-shift 3 --optimisation.clip 1 --checkpoint-every 250 --preview-every 500"
)
SAMPLE = "--sampler adams-bashforth --steps 20"
CELL, MARGIN = 20, 1.25
"""The smallest side of a crop in pixels, and how much larger than its box one is."""
BOXES = ("Platelets", "RBC", "WBC")
"""Cells by the number that masks give them, from 1; the small ones are drawn last."""


@dataclass(frozen=True)
class Domain:
    """What tells a domain from another."""

    cut: Callable[[Path, Path], None]
    """From what was in the archive to `training` and `held-out`, of images/ and, with the same names, masks/."""
    prepare: str
    milestones: tuple[int, ...]
    """Training steps."""
    masks: tuple[str, ...] = ()
    """Names of the masks' classes, from 0."""
    train: str = ""
    sample: str = "--guidance-scale 2"


def flowers(archive: Path, out: Path) -> None:
    """A share of each class is held out."""
    for side, folder in zip(SIDES, divided(archive, HELD_OUT, out / "flowers"), strict=True):
        (out / side).mkdir()
        folder.rename(out / side / "images")


def smears_of(archive: Path) -> Iterator[tuple[str, Path, list[tuple[str, tuple[int, ...]]]]]:
    """Each photograph with its side and its cells in boxes, and all of a photograph on one side: cells of one slide
    are alike, so that a crop beside its neighbour would not be held out."""
    cells: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for row in csv.DictReader((archive / "boxes.csv").open()):
        box = tuple(int(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
        cells.setdefault(row["image"], []).append((row["cell"], box))
    for place, index in enumerate(permutation(0, "held out", 0, len(cells)).tolist()):
        name = sorted(cells)[index]
        yield SIDES[place < round(HELD_OUT * len(cells))], archive / "images" / name, cells[name]


def crops(archive: Path, out: Path) -> None:
    """Squares around the boxes, in a folder for each kind of cell."""
    for side, file, cells in smears_of(archive):
        with Image.open(file) as image:
            for number, (cell, (left, top, right, bottom)) in enumerate(cells):
                size = round(min(MARGIN * max(right - left, bottom - top, CELL), *image.size))
                x, y = ((a + b - size) // 2 for a, b in ((left, right), (top, bottom)))
                x, y = (min(max(p, 0), whole - size) for p, whole in zip((x, y), image.size, strict=True))
                to = out / side / "images" / cell / f"{file.stem}-{number:03d}.png"
                to.parent.mkdir(parents=True, exist_ok=True)
                image.crop((x, y, x + size, y + size)).save(to)


def smears(archive: Path, out: Path) -> None:
    """Whole photographs, with ellipses in the boxes as masks: nobody has drawn better ones."""
    for side, file, cells in smears_of(archive):
        for kind in ("images", "masks"):
            (out / side / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, out / side / "images")
        with Image.open(file) as image:
            width, height = image.size
        mask, (y, x) = np.zeros((height, width), np.uint8), np.mgrid[:height, :width]
        for cell, (left, top, right, bottom) in sorted(cells, key=lambda one: (one[0] != "RBC", one[0])):
            across, down = ((2 * p - a - b) / max(b - a, 1) for p, a, b in ((x, left, right), (y, top, bottom)))
            mask[across**2 + down**2 <= 1] = 1 + BOXES.index(cell)
        Image.fromarray(mask).save(out / side / "masks" / f"{file.stem}.png")


def streets(archive: Path, out: Path) -> None:
    """CamVid's own division, its validation images among the training ones; what has no label is ignored."""
    unlabelled = (archive / "classes.txt").read_text().split().index("unlabelled")
    for part, side in {"train": "training", "val": "training", "test": "held-out"}.items():
        for kind in ("images", "masks"):
            (out / side / kind).mkdir(parents=True, exist_ok=True)
        for file in sorted((archive / part / "images").iterdir()):
            shutil.copy(file, out / side / "images")
            labels = np.asarray(read_mask(archive / part / "masks" / f"{file.stem}.png"))
            mask = np.where(labels == unlabelled, IGNORE, labels).astype(np.uint8)
            Image.fromarray(mask).save(out / side / "masks" / f"{file.stem}.png")


STREET = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
DOMAINS = {
    "flowers": Domain(flowers, "--resolution 64 --flips", (1000, 2000, 5000)),
    # There are eleven red cells for each of the others.
    "cells": Domain(crops, "--resolution 64 --flips --per-class 400", (500, 1000, 2000)),
    "smears": Domain(smears, "--resolution 96 128 --flips", (500, 1000, 2000), ("background", *BOXES), sample=""),
    "streets": Domain(streets, "--resolution 144 192 --flips", (500, 1000, 2000), tuple(STREET.split()),
                      "--optimisation.batch-size 16", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Which domain, and with what it is seen."""

    domain: Positional[str]
    """flowers, cells, smears or streets."""
    archive: Path
    """A .tar of its photographs."""
    work: Path
    """Folder of all that comes of it: new, or one to continue."""
    encoder: str
    """As for `reglue prepare`."""
    autoencoder: str
    """As for `reglue prepare`."""
    inception: Path | None = None
    """Measure FID as well, by this file of weights."""
    start: Path | None = None
    """A run to start another training from."""
    count: int = 500
    """Samples at each milestone."""
    milestones: tuple[int, ...] = ()
    """Training steps. Default: the domain's."""
    prepare: str = ""
    compress: str = "--hidden 128 --epochs 6 --cosine-epochs 7"
    probe: str = "--columns features.last latent"
    head: str = ""
    train: str = ""
    sample: str = ""


class Working:
    """A domain's folder, and the figures so far."""

    def __init__(self, options: Options) -> None:
        if options.domain not in DOMAINS:
            raise UserError(f"{options.domain} is no domain of this study; choose of {', '.join(DOMAINS)}")
        self.options, self.domain, self.work = options, DOMAINS[options.domain], options.work
        self.notes = Notes(options.work)
        self.milestones = sorted(options.milestones or self.domain.milestones)

    def go(self) -> None:
        """All of it."""
        self.cut()
        self.prepare()
        self.measure()
        self.report()

    def cut(self) -> None:
        """Images of both sides, if they are not there yet."""
        if (self.work / "images").is_dir():
            return
        with new_folder(self.work / "images") as beside:
            with tarfile.open(self.options.archive) as archive:
                archive.extractall(beside / "archive", filter="data")
            inside = [path for path in (beside / "archive").iterdir() if path.is_dir()]
            self.domain.cut(inside[0] if len(inside) == 1 else beside / "archive", beside)
            shutil.rmtree(beside / "archive")

    def prepare(self) -> None:
        """Stores, codes, and what the encoder sees."""
        options, masks = self.options, self.domain.masks
        for side in SIDES:
            words = merged("--features", self.domain.prepare, options.prepare)
            for name in ("--flips", "--per-class") if side == "held-out" else ():
                words.pop(name, None)  # Held-out images are looked at as they are.
            where = {"encoder": options.encoder, "autoencoder": options.autoencoder}
            reglue("prepare", self.work / "images" / side / "images", self.work / "stores" / side, words=words, **where)
        training, held_out = (self.work / "stores" / side for side in SIDES)
        flags = zip(("--masks", "--validation-masks"), SIDES, strict=True)
        labels: Words = {flag: [str(self.work / "images" / side / "masks")] for flag, side in flags} if masks else {}
        reglue("probe", training, words=merged(options.probe) | labels, validation=held_out, out=self.work / "probe")
        reglue("compress", training, words=merged(options.compress), kind="conv", channels=16, name="conv-16")
        if masks:
            words = merged("--layers all", options.head) | {"--class-names": [*masks]}
            reglue("head", training, words=words, masks=labels["--masks"][0], out=self.work / "head")

    @cached_property
    def stores(self) -> list[Store]:
        """Of both sides."""
        return [Store.open(self.work / "stores" / side) for side in SIDES]

    @property
    def names(self) -> Sequence[str]:
        """Of the images' classes."""
        return self.stores[0].manifest.source.class_names or ()

    def measure(self) -> None:
        """Train, draw and measure, from milestone to milestone."""
        self.note("training images", lambda: self.figures(self.stores[0].folder))
        self.grow("from nothing", PARTS)
        if self.options.start:
            fitted = self.options.start / COMPRESSORS / LOCAL
            reglue("compress", self.stores[0].folder, fitted=fitted, name="started")
            self.grow("from another run", f"{PARTS} --from {self.options.start} --local.compressor started")

    def grow(self, name: str, parts: str) -> None:
        """Train a run from milestone to milestone, and measure what it draws at each."""
        run = self.work / "runs" / name.replace(" ", "-")
        for step in self.milestones:
            words = merged(TRAIN, parts, self.domain.train, self.options.train, f"--optimisation.steps {step}")
            self.note(f"{name}, {step:,} steps", partial(self.drawn, run, words))

    def drawn(self, run: Path, words: Words) -> dict[str, Any]:
        """The figures of samples at a milestone."""
        reglue("train", "reglue", words=words, store=self.stores[0].folder, out=run)
        (step,) = words["--optimisation.steps"]
        samples = self.work / "samples" / run.name / f"step-{step}"
        count, said = self.options.count, merged(SAMPLE, self.domain.sample, self.options.sample)
        reglue("sample", run, words=said, out=samples, count=count, step=step)
        return self.figures(samples)

    def note(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure something unless it is there already."""
        if name not in self.notes.results:
            self.notes.write(name, measure())

    def figures(self, images: Path) -> dict[str, Any]:
        """Distances from the held-out images, and the classes that a classifier of real images sees."""
        found: dict[str, Any] = {}
        networks = {"store": "encoder"} | ({str(self.options.inception): "FID"} if self.options.inception else {})
        for network, what in networks.items():
            file = self.work / "report.json"
            words = merged("--resamples 0")
            reglue("evaluate", images, words=words, reference=self.stores[1].folder, feature_network=network, out=file)
            metrics = read_json(file, dict[str, Any], "measure again")["metrics"]
            file.unlink()
            found[what] = metrics["frechet_distance"]["value"]
            if what == "encoder":
                found |= {key: metrics[key]["value"] for key in ("precision", "recall")}
        return found | self.recognised(images)

    @cached_property
    def judge(self) -> Classifier:
        """A small classifier of the training images."""
        images, labels = photographs(self.stores[0])
        return train_classifier(images, torch.tensor(labels), len(self.names), 0)

    def recognised(self, images: Path) -> dict[str, float]:
        """The share of samples of each class that are taken for it; of the held-out images, where `images` is a store.

        Unlike the others a figure of the training images could not be compared: the classifier knows them by heart.
        """
        if len(self.names) < 2:
            return {}
        if is_store(images):
            drawn, labels = photographs(self.stores[1])
        else:
            labels = read_json(images / "samples.json", dict[str, Any], "draw them again")["labels"]
            drawn = torch.cat(list(pictures(images, len(labels))))
        taken, asked = self.judge.predict(drawn), torch.tensor(labels)
        return {name: float((taken[asked == i] == i).double().mean()) for i, name in enumerate(self.names)}

    def report(self) -> None:
        """The table, and real images above samples."""
        lines = Notes(self.work)
        lines.results = {f"{self.options.domain}: {name}": row for name, row in self.notes.results.items()}
        (self.work / "table.md").write_text(lines.tables())
        images, labels = photographs(self.stores[1])
        kinds = [[i for i, label in enumerate(labels) if label == kind] for kind in sorted({*labels})]
        turns = range(min(SHOWN, len(images)))  # Of each class in turn, as samples are.
        chosen = [kinds[i % len(kinds)][i * len(kinds[i % len(kinds)]) // len(turns)] for i in turns]
        rows = [images[chosen]]
        for folder in sorted((self.work / "samples").iterdir()):
            rows.append(torch.cat(list(pictures(folder / f"step-{self.milestones[-1]}", len(rows[0])))))
        grid = image_grid(torch.cat(rows).permute(0, 2, 3, 1).numpy(), len(rows[0]))
        write_picture(self.work / "grid.png", Image.fromarray(grid))
        print(lines.tables())


def main(arguments: list[str] | None = None) -> None:
    """All of it. A user's mistake ends with one line and exit code 2."""
    with mistakes_in("domains"):
        Working(tyro.cli(Options, description=__doc__, args=arguments)).go()


if __name__ == "__main__":
    main()
