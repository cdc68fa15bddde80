"""What do edits keep, how real do they look, and what does each option trade? On one run and real images.

    python studies/editing.py RUN photos/held-out --train photos/train --masks masks --head head --out measured

Edits are seen by the encoder that the run learned from, and by a small classifier of real images:

    cosine     by cell, of the map that was asked for and the map seen in the edit; `error` is its standard error
    pixels     mean difference from the image, 0 to 255
    class      share that the classifier takes for the image's class; `asked`, for the class that was asked for
    variety    between two edits of an image, and `change`, from the image: LPIPS with --lpips, else 1 − cosine of the
               encoder's features
    miou       of a head on the edits, against what was painted; `correlation`, of depths
    seam       mean jump of brightness across the edge of a mask, beside that of the image
    distance   Fréchet distance, as `precision` to real images, by the encoder's class token
    seconds    for an edit

results.json has every figure, tables.md and curves.png show them, pictures/ has some edits of each. What was measured
stays: the same command goes on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tyro.conf import Positional

import reglue
from measures import Notes, mistakes_in
from reglue.data.masks import crop_mask, read_depth, read_mask
from reglue.data.picture_writer import write_picture
from reglue.data.pictures import enlarge, image_grid
from reglue.editing.encoding import as_pixels, open_picture
from reglue.editing.options import FEATURES, LOCAL, Editing
from reglue.errors import UserError
from reglue.metrics.classifier import Classifier, train_classifier
from reglue.metrics.distances import GaussianStatistics, frechet_distance, manifold_scores
from reglue.metrics.perceptual import encoder_distance, load_lpips
from reglue.perception.agreement import ClassAgreement, DepthAgreement
from reglue.perception.heads import load_head

SEED = 0
Figures = dict[str, Any]
CURVES = {"until": "--until", "strength": "--strength", "resample": "--resample", "guidance": "--guidance-scale"}


def ways(what: str, option: str, values: Sequence[float], **others: Any) -> dict[str, Figures]:
    """Ways to edit, by name, that differ in one option."""
    return {f"{what} {value:g}": {**others, option: value} for value in values}


KEEP: Figures = {"keep": (LOCAL,)}
WAYS: dict[str, dict[str, Figures | None]] = {
    "curves": {
        **ways("until", "until", (0.0, 0.2, 0.4, 0.6, 0.8), **KEEP),
        **ways("strength", "strength", (0.2, 0.4, 0.6, 0.8, 1.0)),
        **ways("resample", "resample", (0, 1, 2), **KEEP),
        **ways("guidance", "guidance_scale", (1.0, 1.5, 2.0, 3.0), **KEEP, until=0.3),
        **ways("features, scale", "loss_scale", (3.0, 10.0, 30.0), keep=(FEATURES,)),
    },
    "painting": {
        "real images": None,
        "chance": {"strength": 1.0},
        **ways("scale", "loss_scale", (1.0, 3.0, 10.0, 30.0)),
    },
    "inpainting": {
        "clamp": {},
        "clamp, resample 2": {"resample": 2},
        **ways("loss, scale", "loss_scale", (1.0, 10.0, 100.0), by="loss"),
    },
    "conflicts": {
        **ways("keep local, until", "until", (0.0, 0.3, 0.6, 0.8), **KEEP),
        **ways("flow edit, strength", "strength", (0.6, 0.8, 1.0), flow_edit=True),
    },
    "realism": {
        "other real images": None,
        "samples": None,
        **ways("keep local, until", "until", (0.0, 0.3, 0.6), **KEEP),
        **ways("strength", "strength", (0.4, 0.8)),
    },
}
"""By table and by row, what is edited how; None is not edited."""


@dataclass(frozen=True)
class Options:
    """What is measured."""

    run: Positional[str]
    """A run with a local map."""
    images: Positional[Path]
    """Real images that it has not learned from, in folders named as its classes where it has any."""
    train: Path
    """Real images of the same kind, which teach the classifier and stand for what is real."""
    out: Path
    """Folder of the results."""
    masks: Path | None = None
    """Of the images, as for `reglue probe`: they are painted again. For a head of depth, depths."""
    head: Path | None = None
    """Of `reglue head --layers all` on such masks, or depths. Without either nothing is painted."""
    sampler: str | None = None
    """Of all that is drawn. Default: the run's."""
    steps: int | None = None
    """Of the sampler. Default: the run's."""
    count: int = 30
    """Images to edit, of each class in turn."""
    realism: int = 200
    """Edits, and samples, whose distance from twice as many real images is measured."""
    judge: int = 2000
    """Real images that the classifier learns from."""
    lpips: tuple[Path, ...] = ()
    """Files of LPIPS, as for `reglue autoencode --perceptual.network`."""


class Measuring:
    """A run with its images, and the figures so far."""

    def __init__(self, options: Options) -> None:
        self.options, self.model = options, reglue.load(options.run)
        self.names, self.size = self.model.record.class_names, self.model.record.resolution
        encoder = self.model.image_encoder(target=True).encoder
        assert encoder is not None
        self.encoder = encoder
        self.subjects, self.others = np.array(self.files(options.images, 2 * options.count)).reshape(2, -1).tolist()
        self.labels = self.labels_of(self.subjects)
        self.last, self.seconds = list[Image.Image](), 0.0
        asked = {"sampler": options.sampler, "steps": options.steps}
        self.quick = {name: value for name, value in asked.items() if value is not None}
        self.notes = Notes(options.out)

    def files(self, folder: Path, count: int) -> list[Path]:
        """So many images of a folder, of each class in turn. Raises UserError where there are too few."""
        each = [sorted((folder / name).glob("*")) for name in self.names] or [sorted(folder.glob("*"))]
        turns, least = -(-count // len(each)), min(map(len, each))
        if turns > least:
            raise UserError(f"{folder} has too few images for {count} of {', '.join(self.names) or 'no class'} in turn")
        # Frames of a film are alike, so those of one class are taken from all over it.
        step = 1 if self.names else least // turns
        return [each[i % len(each)][i // len(each) * step] for i in range(count)]

    def labels_of(self, files: Sequence[Path]) -> Tensor:
        """The classes of images by number, (N,)."""
        return torch.tensor([self.names.index(file.parent.name) if self.names else 0 for file in files])

    def pixels(self, images: Sequence[Image.Image | Path]) -> Tensor:
        """Images as the model sees them, uint8 (N, 3, H, W)."""
        return torch.cat([as_pixels(open_picture(image), self.size) for image in images])

    def agreement(self, pixels: Tensor) -> Tensor:
        """Cosines (N, h, w) of the maps seen in uint8 images and in the subjects."""
        encode, both = self.model.image_encoder().encode, (pixels, self.pixels(self.subjects))
        maps = [torch.cat([encode(some)[LOCAL] for some in each.split(50)]) for each in both]
        return F.cosine_similarity(*maps, dim=1)

    @cached_property
    def judge(self) -> Classifier:
        """A classifier of real images."""
        files = self.files(self.options.train, self.options.judge)
        return train_classifier(self.pixels(files), self.labels_of(files), len(self.names), SEED, progress=False)

    @cached_property
    def difference(self) -> Callable[[Tensor, Tensor], Tensor]:
        """How different two batches of uint8 images are, (B,)."""
        if self.options.lpips:
            network = load_lpips(self.options.lpips)
            return lambda *both: network(*(F.interpolate(x / 127.5 - 1, 64, mode="bilinear") for x in both))
        describe, layers = self.encoder.describe, len(self.encoder.spec.layers)
        return lambda a, b: encoder_distance(describe(a).features, describe(b).features, layers)

    def edited(self, way: Figures, files: Sequence[Path] = (), classes: Sequence[int] = (), edit: int = 0) -> Tensor:
        """An edit of each image, of the subjects if none are named, uint8 (N, 3, H, W); `paint` has one for each."""
        model, files = self.model, files or self.subjects
        ours = {part.name: way[part.name] for part in fields(Editing) if part.name in way}
        others = self.quick | {name: value for name, value in way.items() if name not in ours}
        own = model.resolved(model.sampling_for(bool(classes)).changed(**others))
        paintings = [Image.fromarray(one) for one in way.get("paint", ())] or [None] * len(files)
        asked = [Editing(**{**ours, "paint": one}) for one in paintings]
        images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in self.pixels(files)]
        subjects = list(map(model.subject, images, asked))
        pairs, labels = [(j, edit) for j in range(len(files))], classes or model.labels_of(None, len(files))
        began = time.perf_counter()
        self.last = list(model.edits(subjects, pairs, labels, asked[0], own, SEED, batch_size=32))
        self.seconds = (time.perf_counter() - began) / len(files)
        return self.pixels(self.last)

    def note(self, name: str, measure: Callable[[], Figures]) -> None:
        """Measure something, unless it is there already, and write it down with some pictures."""
        if name in self.notes.results:
            return
        self.last, self.seconds = [], 0.0
        figures = measure() | ({"seconds": self.seconds} if self.seconds else {})
        if self.last:
            shown = enlarge(np.stack([np.asarray(one.convert("RGB")) for one in self.last[:10]]), (96, 96))
            file = self.options.out / "pictures" / f"{re.sub(r'[^a-z0-9.]+', '-', name)}.png"
            write_picture(file, Image.fromarray(image_grid(shown, 10)))
        self.notes.write(name, figures)

    def measure(self) -> None:
        """All of it."""
        for name, files in (("the image", self.subjects), ("another of the class", self.others)):
            self.note(f"real images: {name}", partial(self.beside, files))
        self.note("curves: decoded", partial(self.curves, "", {"keep": tuple(self.model.denoiser.config.shapes())}))
        for title, rows in WAYS.items():
            for name, way in rows.items():
                if self.possible(title, way):
                    self.note(f"{title}: {name}", partial(getattr(self, title), name, way))
        self.report()

    def possible(self, title: str, way: Figures | None) -> bool:
        """Whether there are the classes and the head that a row takes."""
        of_classes = title == "conflicts" or "guidance_scale" in (way or {})
        return bool((self.names or not of_classes) and (self.options.head or title != "painting"))

    def right(self, pixels: Tensor) -> Figures:
        """The share of images that the classifier takes for the subjects' classes, where there are any."""
        return {"class": self.judge.accuracy(pixels, self.labels)} if self.names else {}

    def beside(self, files: Sequence[Path]) -> Figures:
        """What images of the subjects' classes are to them."""
        pixels = self.pixels(files)
        return {"cosine": self.agreement(pixels).mean()} | self.right(pixels)

    def curves(self, name: str, way: Figures) -> Figures:
        """What edits keep, and how they vary."""
        classes = self.labels.tolist() if self.names and "guidance_scale" in way else ()
        second, first = (self.edited(way, classes=classes, edit=edit) for edit in (1, 0))
        cosine = self.agreement(first).mean((1, 2))
        return {
            "cosine": cosine.mean(),
            "error": cosine.std() / len(cosine) ** 0.5,
            "pixels": (first.float() - self.pixels(self.subjects).float()).abs().mean(),
            "variety": self.difference(first, second).mean(),
        } | self.right(first)

    def painting(self, name: str, way: Figures | None) -> Figures:
        """What a head sees of paintings, in edits or in the images themselves."""
        file, folder, images = self.options.head, self.options.masks, self.options.images
        assert file is not None
        assert folder is not None
        head = load_head(file, self.model.device)
        depth = head.spec.task == "depth"
        beside = [(folder / one.relative_to(images)).with_suffix(".png") for one in self.subjects]
        read = read_depth if depth else read_mask
        paintings = np.stack([np.asarray(crop_mask(read(one), self.size)) for one in beside])
        led = {"head": file, "paint": paintings} if way and "loss_scale" in way else {}
        pixels = self.edited(way | led) if way else self.pixels(self.subjects)
        maps = head.predict(self.encoder.describe(pixels), self.encoder.spec.layers, self.size).cpu()
        found = DepthAgreement() if depth else ClassAgreement(head.spec.outputs)
        figure = found.measure(found.counts(maps, torch.from_numpy(paintings)).sum(0))
        return {"correlation" if depth else "miou": figure[found.names[0]]} | self.right(pixels)

    def inpainting(self, name: str, way: Figures) -> Figures:
        """The right half drawn anew to fit the left one."""
        middle, mask = self.size[1] // 2, np.zeros(self.size, np.uint8)
        mask[:, middle:] = 255
        drawn = self.edited({"mask": Image.fromarray(mask), **way})
        cosine, both = self.agreement(drawn), (self.pixels(self.subjects).float(), drawn.float())
        own, jumps = ((one[..., middle] - one[..., middle - 1]).abs().mean() for one in both)
        right = cosine[..., cosine.shape[-1] // 2 :].mean()
        return {"cosine": right, "seam": jumps / own} | self.right(drawn)

    def conflicts(self, name: str, way: Figures) -> Figures:
        """The map of one class under the name of the next."""
        asked = (self.labels + 1) % len(self.names)
        drawn = self.edited({**way, "sampler": "adams-bashforth"}, classes=asked.tolist())
        return {
            "asked": self.judge.accuracy(drawn, asked),
            "cosine": self.agreement(drawn).mean(),
            "change": self.difference(drawn, self.pixels(self.subjects)).mean(),
        } | self.right(drawn)

    def realism(self, name: str, way: Figures | None) -> Figures:
        """How near images are to real ones."""
        files = self.files(self.options.images, self.options.realism)
        if name == "samples":
            labels = self.labels_of(files).tolist() if self.names else None
            self.last = self.model.generate(labels, count=len(files), seed=SEED, **self.quick)
        pixels = self.edited(way, files) if way else self.pixels(self.last or files)
        reference = self.pixels(self.files(self.options.train, 2 * self.options.realism))
        generated, real = (
            torch.cat([self.encoder.describe(some).class_token.cpu() for some in each.split(50)])
            for each in (pixels, reference)
        )
        first, second = (GaussianStatistics(one.shape[1]).update(one).gaussian for one in (generated, real))
        precision = manifold_scores(generated=generated, real=real).precision.mean()
        return {"distance": frechet_distance(first, second), "precision": precision}

    def report(self) -> None:
        """Write the tables and the curves."""
        (self.options.out / "tables.md").write_text(self.notes.tables())
        figure, axes = plt.subplots(1, len(CURVES), figsize=(11, 2.8), sharey=True, layout="constrained")
        for axis, (what, flag) in zip(axes, CURVES.items(), strict=True):
            points = {float(name.split()[-1]): row for name, row in self.notes.results.items()
                      if name.startswith(f"curves: {what} ")}  # fmt: skip
            for key in ("cosine", "class", "variety"):
                axis.plot([*points], [row.get(key, np.nan) for row in points.values()], "o-", label=key)
            axis.axhline(self.notes.results["real images: another of the class"]["cosine"], color="C0", ls=":")
            axis.set(xlabel=flag, ylim=(0, 1.02))
        axes[0].legend()
        figure.savefig(self.options.out / "curves.png", dpi=80)


def main(arguments: list[str] | None = None) -> None:
    """Measure everything. A user's mistake ends with one line and exit code 2."""
    with mistakes_in("editing"):
        Measuring(tyro.cli(Options, description=__doc__, args=arguments)).measure()


if __name__ == "__main__":
    main()
