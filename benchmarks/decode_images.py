"""What `reglue prepare` does before its networks, by itself: images decoded and cropped, by as many processes.

python benchmarks/decode_images.py PHOTOS --resolution 256
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

from reglue.commands.prepare import Prepare
from reglue.data.decoding import decoded
from reglue.data.opening import open_images


@dataclass(frozen=True)
class DecodeImages:
    """The first part of `reglue prepare`."""

    images: Positional[Path]
    """As `reglue prepare` takes them."""
    resolution: int = 256
    workers: int | None = None
    """Processes that decode. Default: as `prepare` chooses."""


def main(options: DecodeImages) -> int:
    """Decode all images, and keep none. Returns how many there were."""
    asked = Prepare(options.images, Path("unused"), options.resolution, workers=options.workers)
    images = open_images(asked.images, asked.reading, asked.subset)
    batches = [part.tolist() for part in torch.arange(len(images)).split(asked.batch_size)]
    return sum(len(batch.names) for batch in decoded(images, batches, asked.size, asked.workers))


if __name__ == "__main__":
    print(main(tyro.cli(DecodeImages, description=__doc__)))
