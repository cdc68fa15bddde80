"""Images as an autoencoder is trained and measured on them: pixels, and the noise that draws their latents."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from reglue.data.images import ImageSource, UnreadableImage
from reglue.errors import UserError
from reglue.seeds import generator, normals, permutation

REPLACEMENTS = 100
"""An image that cannot be read is replaced by the next that can, among so many."""


@dataclass
class ImageSamples(Dataset[tuple[Tensor, Tensor]]):
    """Images with the noise that their latents are drawn by, each a function of the seed and a position.

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

    def __post_init__(self) -> None:
        self._order: tuple[int, Tensor] = (-1, torch.arange(len(self.rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        """uint8 pixels (3, height, width) and noise (C, h, w)."""
        draws = generator(self.seed, f"autoencoder {self.purpose}", position)
        mirrored = self.flips and draws.random() < 0.5
        noise = normals([draws], {"posterior": self.shape})["posterior"][0]
        epoch, index = divmod(position, len(self.rows))
        if self.purpose == "training" and self._order[0] != epoch:
            self._order = (epoch, permutation(self.seed, "order of autoencoder images", epoch, len(self.rows)))
        pixels = self._readable(int(self._order[1][index]))
        return (pixels.flip(2) if mirrored else pixels), noise

    def _readable(self, index: int) -> Tensor:
        """The image of a row. One that cannot be read is reported, and the next that can stands in for it."""
        for row in self.rows[(index + torch.arange(REPLACEMENTS)) % len(self.rows)].tolist():
            image = self.images.load(row, self.size)
            if not isinstance(image, UnreadableImage):
                return image
            tqdm.write(f"skipped {self.images.path / image.name}: {image.reason}", file=sys.stderr)
        raise UserError(f"{self.images.path}: {REPLACEMENTS} images in a row cannot be read; mend or remove them")


def loader(
    samples: ImageSamples, batches: Iterable[range], workers: int, device: torch.device
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of pixels and noise at the given positions, decoded by other processes ahead of their use."""
    return DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[reportArgumentType], any iterable of positions will do
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # which leaves PyTorch's global random state alone
        worker_init_fn=_go_on,
    )


def _go_on(_: int) -> None:
    """In a process that reads: the job itself stops in good order, and needs its next batch for that.

    SLURM, `timeout` and Ctrl-C send their signals to all processes at once.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def all_of(
    samples: ImageSamples, batch_size: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples once, in order and on the device, with a progress bar."""
    batches = [range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)]
    with tqdm(total=len(samples), unit="image", desc=samples.purpose, leave=False) as progress:
        for pixels, noise in loader(samples, batches, workers, device):
            yield pixels.to(device), noise.to(device)
            progress.update(len(pixels))


def to_images(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to [−1, 1], in the memory format in which convolutions are fastest."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_pixels(images: Tensor) -> Tensor:
    """Images in [−1, 1], of any floating type, to the nearest uint8; values outside are clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
