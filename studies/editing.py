"""What do edits keep, how real do they look, and what does each option trade? On one run and real images.

    python studies/editing.py RUN photos/held-out --train photos/train --masks masks --head head --out measured

Images are in folders named as the run's classes; masks lie beside them as for `reglue probe`. What edits show is seen
by the encoder that the run learned from, and by a small classifier of real images:

    cosine     by cell, of the map that was asked for and the map seen in the edit; `error` is its standard error
    pixels     mean difference from the image, 0 to 255
    class      share that the classifier takes for the image's class; `asked`, for the class that was asked for
    variety    between two edits of an image, and `change`, from the image: LPIPS with --lpips, else 1 − cosine of the
               encoder's features
    miou       of a head on the edits, against what was painted
    seam       mean jump of brightness across the edge of a mask, beside that of the image
    distance   Fréchet distance, as `precision` to real images, by the encoder's class token
    seconds    for an edit

results.json has every figure, tables.md and curves.png show them, pictures/ has some edits of each. What was measured
stays: the same command goes on.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from reglue.data.masks import crop_mask, read_mask
from reglue.data.picture_writer import write_picture
from reglue.data.pictures import enlarge, image_grid
from reglue.editing.encoding import as_pixels, open_picture
from reglue.editing.options import LOCAL, Editing
from reglue.errors import UserError
from reglue.files import replacing
from reglue.metrics.classifier import Classifier, train_classifier
from reglue.metrics.distances import GaussianStatistics, frechet_distance, manifold_scores
from reglue.metrics.perceptual import encoder_distance, load_lpips
from reglue.perception.agreement import confusions, markdown_table, mean_iou
from reglue.perception.heads import load_head

RESULTS, SEED = "results.json", 0
Figures = dict[str, Any]
KEEP: Figures = {"keep": (LOCAL,)}
CURVES: dict[str, tuple[float, ...]] = {
    "until": (0.0, 0.2, 0.4, 0.6, 0.8),
    "strength": (0.2, 0.4, 0.6, 0.8, 1.0),
    "resample": (0, 1, 2),
    "guidance": (1.0, 1.5, 2.0, 3.0),
}
PAINTING = {f"scale {scale:g}": {"loss_scale": scale} for scale in (1.0, 3.0, 10.0, 30.0)}
INPAINTING = {"clamp": {}, "clamp, resample 2": {"resample": 2}}
INPAINTING |= {f"loss, scale {scale:g}": {"by": "loss", "loss_scale": scale} for scale in (1.0, 10.0, 100.0)}
CONFLICTS = {f"keep local, until {until:g}": {**KEEP, "until": until} for until in (0.0, 0.3, 0.6, 0.8)}
CONFLICTS |= {f"flow edit, strength {value:g}": {"flow_edit": True, "strength": value} for value in (0.6, 0.8, 1.0)}
REALISM = {f"keep local, until {until:g}": {**KEEP, "until": until} for until in (0.0, 0.3, 0.6)}
REALISM |= {f"strength {strength:g}": {"strength": strength} for strength in (0.4, 0.8)}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    run: Positional[str]
    """A run with a local map."""
    images: Positional[Path]
    """Real images that it has not learned from, in folders by class."""
    train: Path
    """Real images of the same kind, which teach the classifier and stand for what is real."""
    masks: Path
    """Of the images: they are painted again."""
    head: Path
    """Of `reglue head --layers all` on such masks."""
    out: Path
    """Folder of the results."""
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
        encoder = self.model.image_encoder().encoder
        assert encoder is not None
        self.encoder, self.head = encoder, load_head(options.head, self.model.device)
        self.subjects, others = np.array(self.files(options.images, 2 * options.count)).reshape(2, -1).tolist()
        self.others: list[Path] = others
        self.labels = torch.tensor([self.names.index(file.parent.name) for file in self.subjects])
        self.last, self.seconds = list[Image.Image](), 0.0
        file = options.out / RESULTS
        self.results: dict[str, Figures] = json.loads(file.read_text()) if file.is_file() else {}

    def files(self, folder: Path, count: int) -> list[Path]:
        """So many images of a folder, of each class in turn. Raises UserError where there are too few."""
        each = [sorted((folder / name).glob("*")) for name in self.names]
        if count > len(each) * min(map(len, each)):
            raise UserError(f"{folder} has too few images for {count}, of {', '.join(self.names)} in turn")
        return [each[i % len(each)][i // len(each)] for i in range(count)]

    def pixels(self, images: Sequence[Image.Image | Path]) -> Tensor:
        """Images as the model sees them, uint8 (N, 3, H, W)."""
        return torch.cat([as_pixels(open_picture(image), self.size) for image in images])

    def tokens(self, pixels: Tensor) -> Tensor:
        """Class tokens (N, D) of uint8 images."""
        return torch.cat([self.encoder.describe(some).class_token.cpu() for some in pixels.split(50)])

    def agreement(self, pixels: Tensor) -> Tensor:
        """Cosines (N, h, w) of the maps seen in uint8 images and in the subjects."""
        encode = self.model.image_encoder().encode
        first, second = (
            torch.cat([encode(some)[LOCAL] for some in each.split(50)]) for each in (pixels, self.pixels(self.subjects))
        )
        return F.cosine_similarity(first, second, dim=1)

    @cached_property
    def paintings(self) -> np.ndarray:
        """The masks of the subjects, uint8 (N, H, W)."""
        masks = [self.options.masks / file.relative_to(self.options.images) for file in self.subjects]
        return np.stack([np.asarray(crop_mask(read_mask(file.with_suffix(".png")), self.size)) for file in masks])

    @cached_property
    def judge(self) -> Classifier:
        """A classifier of real images."""
        files = self.files(self.options.train, self.options.judge)
        labels = torch.arange(len(files)) % len(self.names)
        return train_classifier(self.pixels(files), labels, len(self.names), SEED, progress=False)

    @cached_property
    def reference(self) -> Tensor:
        """What is real, uint8 (N, 3, H, W)."""
        return self.pixels(self.files(self.options.train, 2 * self.options.realism))

    @cached_property
    def difference(self) -> Callable[[Tensor, Tensor], Tensor]:
        """How different two batches of uint8 images are, (B,)."""
        if self.options.lpips:
            network = load_lpips(self.options.lpips)
            return lambda *both: network(*(F.interpolate(x / 127.5 - 1, 64, mode="bilinear") for x in both))
        layers = len(self.encoder.spec.layers)
        seen = lambda images: self.encoder.describe(images).features  # noqa: E731
        return lambda first, second: encoder_distance(seen(first), seen(second), layers)

    def edited(
        self, way: Figures, files: Sequence[Path] = (), classes: Sequence[int] = (), edit: int = 0, **sampling: Any
    ) -> Tensor:
        """An edit of each image, of the subjects if none are named, uint8 (N, 3, H, W).

        `head` in a way has each subject's painting painted.
        """
        model, files = self.model, files or self.subjects
        own = model.resolved(model.sampling_for(bool(classes)).changed(**sampling))
        painted: list[Figures] = (
            [{"paint": Image.fromarray(one)} for one in self.paintings] if "head" in way else [{}] * len(files)
        )
        asked = [Editing(**way, **one) for one in painted]
        images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in self.pixels(files)]
        subjects = [model.subject(image, one) for image, one in zip(images, asked, strict=True)]
        pairs = [(j, edit) for j in range(len(files))]
        labels = classes or model.labels_of(None, len(files))
        began = time.perf_counter()
        self.last = list(model.edits(subjects, pairs, labels, asked[0], own, SEED, batch_size=32))
        self.seconds = (time.perf_counter() - began) / len(files)
        return self.pixels(self.last)

    def note(self, name: str, measure: Callable[..., Figures], *arguments: Any, **options: Any) -> None:
        """Measure something, unless it is there already, and write it down with some pictures."""
        if name in self.results:
            return
        self.last, self.seconds = [], 0.0
        figures = measure(*arguments, **options) | ({"seconds": self.seconds} if self.seconds else {})
        self.results[name] = {key: round(float(value), 4) for key, value in figures.items()}
        print(name, self.results[name], flush=True)
        if self.last:
            shown = enlarge(np.stack([np.asarray(one.convert("RGB")) for one in self.last[:10]]), (96, 96))
            write_picture(
                self.options.out / "pictures" / f"{re.sub(r'[^a-z0-9.]+', '-', name)}.png",
                Image.fromarray(image_grid(shown, 10)),
            )
        self.options.out.mkdir(parents=True, exist_ok=True)
        with replacing(self.options.out / RESULTS) as beside:
            beside.write_text(json.dumps(self.results, indent=1))

    def beside(self, files: Sequence[Path]) -> Figures:
        """What images are to the subjects."""
        pixels, labels = self.pixels(files), [self.names.index(file.parent.name) for file in files]
        return {"cosine": self.agreement(pixels).mean(), "class": self.judge.accuracy(pixels, torch.tensor(labels))}

    def measure(self) -> None:
        """All of it."""
        self.note("real images: the image", self.beside, self.subjects)
        self.note("real images: another of the class", self.beside, self.others)
        self.note("curves: decoded", self.kept, {"keep": tuple(self.model.denoiser.config.shapes())})
        for name in ("until", "strength", "resample"):
            for value in CURVES[name]:
                way = {name: value} if name == "strength" else {**KEEP, name: value}
                self.note(f"curves: {name} {value:g}", self.kept, way)
        for scale in CURVES["guidance"]:
            guided = {"classes": self.labels.tolist(), "guidance_scale": scale}
            self.note(f"curves: guidance {scale:g}", self.kept, {**KEEP, "until": 0.3}, **guided)
        self.note("painting: real images", self.painted, None)
        self.note("painting: chance", self.painted, {"strength": 1.0})
        for name, way in PAINTING.items():
            self.note(f"painting: {name}", self.painted, {"head": self.options.head, **way})
        for name, way in INPAINTING.items():
            self.note(f"inpainting: {name}", self.completed, way)
        for name, way in CONFLICTS.items():
            self.note(f"conflicts: {name}", self.conflict, way)
        files = self.files(self.options.images, self.options.realism)
        self.note("realism: other real images", lambda: self.real(self.pixels(files)))
        self.note("realism: samples", lambda: self.real(self.samples(files)))
        for name, way in REALISM.items():
            self.note(f"realism: {name}", lambda way=way: self.real(self.edited(way, files)))

    def kept(self, way: Figures, **more: Any) -> Figures:
        """What edits keep, and how they vary."""
        second = self.edited(way, edit=1, **more)
        first = self.edited(way, **more)
        cosine = self.agreement(first).mean((1, 2))
        return {
            "cosine": cosine.mean(),
            "error": cosine.std() / len(cosine) ** 0.5,
            "pixels": (first.float() - self.pixels(self.subjects).float()).abs().mean(),
            "class": self.judge.accuracy(first, self.labels),
            "variety": self.difference(first, second).mean(),
        }

    def painted(self, way: Figures | None) -> Figures:
        """What a head sees of the paintings, in edits or in the images themselves."""
        pixels = self.pixels(self.subjects) if way is None else self.edited(way)
        maps = self.head.predict(self.encoder.describe(pixels), self.encoder.spec.layers, self.size).cpu()
        miou = mean_iou(confusions(maps, torch.from_numpy(self.paintings), self.head.spec.outputs).sum(0))
        return {"miou": miou, "class": self.judge.accuracy(pixels, self.labels)}

    def completed(self, way: Figures) -> Figures:
        """The right half drawn anew to fit the left one."""
        middle, mask = self.size[1] // 2, np.zeros(self.size, np.uint8)
        mask[:, middle:] = 255
        drawn = self.edited({"mask": Image.fromarray(mask), **way})
        cosine, both = self.agreement(drawn), (self.pixels(self.subjects).float(), drawn.float())
        own, jumps = ((one[..., middle] - one[..., middle - 1]).abs().mean() for one in both)
        right = cosine[..., cosine.shape[-1] // 2 :].mean()
        return {"cosine": right, "class": self.judge.accuracy(drawn, self.labels), "seam": jumps / own}

    def conflict(self, way: Figures) -> Figures:
        """The map of one class under the name of the next."""
        asked = (self.labels + 1) % len(self.names)
        drawn = self.edited(way, classes=asked.tolist(), sampler="adams-bashforth")
        return {
            "asked": self.judge.accuracy(drawn, asked),
            "class": self.judge.accuracy(drawn, self.labels),
            "cosine": self.agreement(drawn).mean(),
            "change": self.difference(drawn, self.pixels(self.subjects)).mean(),
        }

    def samples(self, files: Sequence[Path]) -> Tensor:
        """Samples of the classes of images."""
        self.last = self.model.generate([self.names.index(file.parent.name) for file in files], seed=SEED)
        return self.pixels(self.last)

    def real(self, pixels: Tensor) -> Figures:
        """How near images are to real ones."""
        generated, real = (self.tokens(one) for one in (pixels, self.reference))
        first, second = (GaussianStatistics(one.shape[1]).update(one).gaussian for one in (generated, real))
        precision = manifold_scores(generated=generated, real=real).precision.mean()
        return {"distance": frechet_distance(first, second), "precision": precision}

    def report(self) -> None:
        """Write the tables and the curves."""
        tables: list[str] = []
        for title in dict.fromkeys(name.partition(": ")[0] for name in self.results):
            rows = {name.partition(": ")[2]: row for name, row in self.results.items() if name.startswith(f"{title}: ")}
            heads = list(dict.fromkeys(key for row in rows.values() for key in row))
            lines = [[name, *(f"{row[key]:.3f}" if key in row else "" for key in heads)] for name, row in rows.items()]
            tables.append(markdown_table([title, *heads], lines, texts=1))
        (self.options.out / "tables.md").write_text("\n\n".join(tables) + "\n")
        measured = {name: values for name, values in CURVES.items() if f"curves: {name} {values[0]:g}" in self.results}
        figure, axes = plt.subplots(1, len(measured), figsize=(11, 2.8), sharey=True, layout="constrained")
        for axis, (option, values) in zip(axes, measured.items(), strict=True):
            for key in ("cosine", "class", "variety"):
                found = [self.results.get(f"curves: {option} {value:g}", {}).get(key, np.nan) for value in values]
                axis.plot(values, found, "o-", label=key)
            axis.axhline(self.results["real images: another of the class"]["cosine"], color="C0", ls=":")
            axis.set(xlabel="--guidance-scale" if option == "guidance" else f"--{option}", ylim=(0, 1.02))
        axes[0].legend()
        figure.savefig(self.options.out / "curves.png", dpi=80)


def main(arguments: list[str] | None = None) -> None:
    """Measure everything. A user's mistake ends with one line and exit code 2."""
    try:
        measuring = Measuring(tyro.cli(Options, description=__doc__, args=arguments))
        measuring.measure()
        measuring.report()
    except UserError as error:
        print(f"editing: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
