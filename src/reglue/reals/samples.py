"""Images as an autoencoder is trained and measured on them: pixels, and the noise that draws their latents."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from reglue.data.images import ImageSource, UnreadableImage
from reglue.data.prefetch import in_batches, prefetch
from reglue.errors import UserError
from reglue.progress import Bar
from reglue.seeds import generator, normals, permutation

REPLACEMENTS = 100
"""An image that cannot be read is replaced by the next that can, among so many."""
_order = lru_cache(maxsize=2)(permutation)  # Threads that read ahead are in two epochs at most.


@dataclass(frozen=True)
class ImageSamples:
    """Images with the noise that their latents are drawn by, each a function of the seed and a position. Any number of
    threads may read them.

    Position counts over all epochs, in a new random order in each; but for "training" there is one epoch, in order.
    """

    images: ImageSource
    rows: Tensor
    """(N,) int64: indices of the images that take part."""
    size: tuple[int, int]
    shape: tuple[int, ...]
    """Of the latents of one image."""
    seed: int
    purpose: str
    flips: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """uint8 pixels (3, height, width) and noise (C, h, w)."""
        draws = generator(self.seed, f"autoencoder {self.purpose}", position)
        mirrored = self.flips and draws.random() < 0.5
        noise = normals([draws], {"posterior": self.shape})["posterior"][0]
        epoch, index = divmod(position, len(self.rows))
        if self.purpose == "training":
            index = int(_order(self.seed, "order of autoencoder images", epoch, len(self.rows))[index])
        pixels = self._readable(index)
        return (pixels.flip(2) if mirrored else pixels), noise

    def batch(self, positions: range, pinned: bool = False) -> tuple[Tensor, Tensor]:
        """uint8 pixels (B, 3, height, width) and noise (B, C, h, w), pinned for a GPU to copy if that is wanted."""
        pixels, noise = map(torch.stack, zip(*map(self.__getitem__, positions), strict=True))
        return (pixels.pin_memory(), noise.pin_memory()) if pinned else (pixels, noise)

    def _readable(self, index: int) -> Tensor:
        """The image of a row. One that cannot be read is reported, and the next that can stands in for it."""
        for row in self.rows[(index + torch.arange(REPLACEMENTS)) % len(self.rows)].tolist():
            image = self.images.load(row, self.size)
            if not isinstance(image, UnreadableImage):
                return image
            Bar.write(f"skipped {self.images.path / image.name}: {image.reason}", file=sys.stderr)
        raise UserError(f"{self.images.path}: {REPLACEMENTS} images in a row cannot be read; fix or remove them")


def all_of(
    samples: ImageSamples, batch_size: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples once, in order and on the device, with a progress bar; so many threads decode ahead."""
    parts = in_batches(len(samples), batch_size)
    with Bar(total=len(samples), unit="image", desc=samples.purpose, leave=False) as progress:
        for pixels, noise in prefetch(samples.batch, parts, workers, device):
            yield pixels.to(device), noise.to(device)
            progress.update(len(pixels))


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to [−1, 1], in the memory format in which convolutions are fastest."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_pixels(images: Tensor) -> Tensor:
    """Images in [−1, 1], of any floating type, to the nearest uint8; values outside are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
