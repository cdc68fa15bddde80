"""How good is the starter model? A classifier that has seen real photographs alone judges what it draws.

    python scripts/starter_kit/judge_model.py SAMPLES --images clothes

SAMPLES is what `reglue sample` wrote, all classes equally often. The last line is JSON: the share of samples that the
classifier takes for the class that was asked for, by class too, and its share on real photographs that it has not seen.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.images import ImageFolder, UnreadableImage
from reglue.errors import UserError
from reglue.files import TakesPaths
from reglue.metrics.classifier import train_classifier
from reglue.seeds import permutation


@dataclass(frozen=True)
class JudgeModel(TakesPaths):
    """Judge samples."""

    samples: Positional[Path]
    images: Path
    """What `write_clothes.py` wrote."""
    count: int = 12_000
    """Photographs to learn from."""
    held_out: int = 2_000
    """Photographs to measure the classifier on."""
    resolution: int = 32
    seed: int = 0


def read(folder: ImageFolder, rows: list[int], resolution: int) -> Tensor:
    """Images, uint8 (N, 3, H, W). Raises UserError for one that cannot be read."""
    images: list[Tensor] = []
    for row in tqdm(rows, desc=f"read {folder.path.name}", unit="image", leave=False):
        image = folder.load(row, (resolution, resolution))
        if isinstance(image, UnreadableImage):
            raise UserError(f"{folder.path / image.name}: {image.reason}")
        images.append(image)
    return torch.stack(images)


def main(options: JudgeModel) -> None:
    """Train the classifier and let it judge."""
    parts = {}
    for part, count in (("train", options.count), ("held-out", options.held_out)):
        folder = ImageFolder.open(options.images / part)
        rows = permutation(options.seed, f"judge: {part}", 0, len(folder))[:count].tolist()
        parts[part] = read(folder, rows, options.resolution), torch.tensor(folder.labels)[rows]
    names = ImageFolder.open(options.images / "train").class_names
    judge = train_classifier(*parts["train"], classes=len(names), seed=options.seed)
    drawn = ImageFolder.open(options.samples)
    pixels = read(drawn, list(range(len(drawn))), options.resolution)
    labels = torch.arange(len(drawn)) % len(names)
    figures = {
        "recognised": judge.accuracy(pixels, labels),
        "of real photographs": judge.accuracy(*parts["held-out"]),
        "by class": {
            name: round(judge.accuracy(pixels[labels == label], labels[labels == label]), 3)
            for label, name in enumerate(names)
        },
        "samples": len(drawn),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    try:
        main(tyro.cli(JudgeModel, description=__doc__))
    except UserError as error:
        sys.exit(f"judge_model: {error}")
