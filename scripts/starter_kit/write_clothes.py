"""Fashion-MNIST as folders of PNG images, one per class: what the starter model is trained on.

    python scripts/starter_kit/write_clothes.py --out clothes

70,000 photographs of clothes from a shop, greyscale, 28×28 (Zalando SE, MIT licence), fetched by torchvision; or read
from its files in `--source`/FashionMNIST/raw, where there is no network.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

from reglue.errors import UserError
from reglue.files import TakesPaths, new_folder

NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""Of the classes, in the order of the data set's labels."""


@dataclass(frozen=True)
class WriteClothes(TakesPaths):
    """Write the images."""

    out: Path
    """A new folder, for `train` (60,000 images) and `held-out` (10,000)."""
    source: Path = Path("downloads")
    """Where torchvision keeps the files that it fetched."""


def write_clothes(options: WriteClothes) -> None:
    """Write both parts, whole or not at all. Raises UserError if the data are not there and cannot be fetched."""
    try:
        parts = {
            part: FashionMNIST(str(options.source), train=part == "train", download=True)
            for part in ("train", "held-out")
        }
    except (OSError, RuntimeError) as error:  # what torchvision raises without a network, or for damaged files
        raise UserError(
            f"Fashion-MNIST cannot be fetched ({error}); put its four .gz files into {options.source}/FashionMNIST/raw"
        ) from error
    with new_folder(options.out) as beside:
        for part, images in parts.items():
            for i in tqdm(range(len(images)), desc=f"write {part}", unit="image"):
                image, label = images[i]
                folder = beside / part / NAMES[label]
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{i:05d}.png")


if __name__ == "__main__":
    try:
        write_clothes(tyro.cli(WriteClothes, description=__doc__))
    except UserError as error:
        sys.exit(f"write_clothes: {error}")
