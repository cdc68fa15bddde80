"""`reglue prepare`, beside its bare networks and beside the published preprocessing.

    python benchmarks/prepare_speed.py --official PUBLISHED --images PHOTOS --count 4096

Theirs is two commands: `dataset_tools.py convert` crops images into PNG files, `encode` makes moments of them, one at a
time and on a GPU alone; without one only `convert` runs. First both have to crop alike. Ours starts no interpreter and
theirs two, so take thousands of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import official
import reglue
from common import Comparison, alternate, report, run, speedups
from reglue.commands.prepare import NO_ENCODER, Prepare, prepare
from reglue.data.images import ImageSource, UnreadableImage
from reglue.data.opening import open_images
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError
from reglue.sampling import Precision
from reglue.training.precision import autocast

AT_HAND = 1024
"""Decoded images for the bare networks, at most."""


@dataclass(frozen=True)
class PrepareSpeed(Comparison):
    """Images to latent moments, and to features where an encoder is named: images per second.

    Beside the published code leave the encoder out: theirs runs in the training step.
    """

    images: Path | None = None
    """A folder of photographs. Default: smooth random ones."""
    count: int = 512
    """Random images, where no folder is given."""
    resolution: int = 256
    autoencoder: str = "starter"
    """starter, or a folder in diffusers' layout (KL autoencoder)."""
    encoder: str = NO_ENCODER
    precision: Precision = "float32"
    workers: int | None = None
    """Processes that decode. Default: as `reglue prepare` chooses."""


def main(options: PrepareSpeed) -> str:
    """Check that both crop alike, then time all. Returns the line of JSON."""
    device = options.begin()
    count, resolution = (4, 32) if options.toy else (options.count, options.resolution)
    with TemporaryDirectory() as temporary:
        images = options.images or random_images(Path(temporary), count, resolution)
        source = open_images(images)
        at_hand = decoded(source, range(min(len(source), AT_HAND)), resolution)
        contestants: dict[str, Callable[[], object]] = {
            "ours": partial(ours, options, images, resolution),
            "networks": networks(options, at_hand, device),
        }
        figures: dict[str, Any] = {"images": len(source)}
        if options.official:
            figures["pixel_difference"] = pixel_difference(options.official, source, resolution)
            assert figures["pixel_difference"] <= 1, figures
            contestants["theirs"] = partial(theirs, options, options.official, images, resolution, device)
        figures["seconds"] = seconds = alternate(contestants, options.repeats, device)
    rate = len(source) / seconds["ours"].median
    figures |= {
        "images_per_second": rate,
        "share_of_networks": rate * seconds["networks"].median / len(at_hand),
        "times_faster": speedups(seconds) if device.type == "cuda" else {},  # On a CPU half of theirs is missing.
    }
    return report(options, figures, device)


def ours(options: PrepareSpeed, images: Path, resolution: int) -> None:
    """The command, on a new store."""
    same = {name: getattr(options, name) for name in ("precision", "workers", "device")}
    with TemporaryDirectory() as folder:
        store, features = Path(folder) / "store", options.encoder != NO_ENCODER
        prepare(Prepare(images, store, resolution, options.autoencoder, options.encoder, features=features, **same))


def networks(options: PrepareSpeed, crops: Tensor, device: torch.device) -> Callable[[], None]:
    """The forward passes that the command needs, on images that are there."""
    autoencoder = load_autoencoder(options.autoencoder, device=device).to(memory_format=torch.channels_last)
    size = (crops.shape[2], crops.shape[3])
    encoder = None if options.encoder == NO_ENCODER else load_encoder(options.encoder, size, device=device)
    batches = crops.to(device).split(Prepare.batch_size)

    @torch.inference_mode()
    def forward() -> None:
        for pixels in batches:
            images = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with autocast(device, options.precision):
                autoencoder.encode(images)
                if encoder:
                    encoder.describe(pixels)

    return forward


def theirs(options: PrepareSpeed, folder: Path, images: Path, resolution: int, device: torch.device) -> None:
    """Their two commands; the first alone on a CPU."""
    starter = Path(reglue.__path__[0]) / "starter/autoencoder"
    autoencoder = starter if options.autoencoder == "starter" else options.autoencoder
    with TemporaryDirectory() as out:
        convert(folder, images, f"{out}/images", resolution)
        if device.type == "cuda":
            places = (f"--source={out}/images", f"--dest={out}/moments")
            official.preprocess(folder, "encode", f"--model-url={autoencoder}", *places)


def convert(folder: Path, images: Path, out: str, resolution: int, *more: str) -> None:
    """Their decoding and cropping."""
    crop = ("--transform=center-crop-dhariwal", f"--resolution={resolution}x{resolution}")
    official.preprocess(folder, "convert", f"--source={images}", f"--dest={out}", *crop, *more)


def pixel_difference(folder: Path, source: ImageSource, resolution: int) -> int:
    """The largest difference between ours and theirs in the first few images, in 8 bits."""
    first = sorted(range(len(source)), key=lambda index: source.names[index])[:8]
    with TemporaryDirectory() as out:
        convert(folder, source.path, out, resolution, f"--max-images={len(first)}")
        files = sorted(Path(out).rglob("*.png"))  # Numbered in the order of the paths.
        expected = np.stack([np.array(Image.open(file).convert("RGB"), np.int16) for file in files])
    return int(np.abs(decoded(source, first, resolution).permute(0, 2, 3, 1).numpy() - expected).max())


def decoded(source: ImageSource, indices: Iterable[int], resolution: int) -> Tensor:
    """Images of a source, uint8 (N, 3, H, W). Raises UserError for one that cannot be read."""
    images = [source.load(index, (resolution, resolution)) for index in indices]
    for image in images:
        if isinstance(image, UnreadableImage):
            raise UserError(f"--images: {source.path / image.name}: {image.reason}; take it out")
    return torch.stack([image for image in images if isinstance(image, Tensor)])


def random_images(folder: Path, count: int, resolution: int) -> Path:
    """Smooth random images a little larger than the resolution, in two classes."""
    random = np.random.default_rng(0)
    for i in range(count):
        file = folder / f"class-{i % 2}" / f"{i:05d}.jpg"
        file.parent.mkdir(exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((resolution + 64, resolution + 32), Image.Resampling.BICUBIC).save(file)
    return folder


if __name__ == "__main__":
    run(PrepareSpeed, main, __doc__)
