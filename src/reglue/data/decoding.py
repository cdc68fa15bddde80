"""Decoding: the images of a source as cropped batches, by other processes ahead of their use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reglue.data.images import ImageSource, Noticed, UnreadableImage, noticing
from reglue.errors import UserError

MOST_WORKERS = 16
"""Processes that decode unless more are asked for: each keeps two batches of decoded images in memory."""


class DecodedImages(NamedTuple):
    """Decoded images with names and labels (B,) int64, uint8 pixels (B, 3, h, w), and those that cannot be read."""

    names: list[str]
    labels: Tensor
    pixels: Tensor
    noticed: Noticed
    """Of all of them together."""
    unreadable: list[UnreadableImage]
    failure: UserError | None
    """Why the source cannot be read at all. It travels as data, since a DataLoader would wrap it in a traceback."""


def decoded(
    images: ImageSource,
    batches: Sequence[list[int]],
    size: tuple[int, int],
    workers: int | None = None,
    pinned: bool = False,
) -> Iterator[DecodedImages]:
    """Batches of images, given by their indices, in order, cropped to `size` (height, width).

    So many processes decode; 0 decodes in this one, and None stands for one for each core, at most `MOST_WORKERS`.
    `pinned`: into memory that a GPU can copy from by itself.
    """
    loader = DataLoader(
        _Crops(images, size),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=min(default_workers() if workers is None else workers, 1 if images.sequential else len(batches)),
        pin_memory=pinned,
    )
    return iter(loader)


def default_workers() -> int:
    """One process for each core, shared with torchrun's other processes here."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), MOST_WORKERS)


class _Crop(NamedTuple):
    """An image as a process that decodes hands it over. A stream knows a label only while it reads the image."""

    name: str
    label: int
    pixels: Tensor
    noticed: Noticed


class _Crops(Dataset):
    """The images of a source, decoded and cropped."""

    def __init__(self, images: ImageSource, size: tuple[int, int]):
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> _Crop | UnreadableImage | UserError:
        try:
            with noticing() as noticed:
                pixels = self.images.load(index, self.size)
            if isinstance(pixels, UnreadableImage):
                return pixels
            return _Crop(self.images.names[index], self.images.labels[index], pixels, noticed)
        except UserError as error:
            return error


def _collate(items: list[_Crop | UnreadableImage | UserError]) -> DecodedImages:
    crops = [item for item in items if isinstance(item, _Crop)]
    return DecodedImages(
        [crop.name for crop in crops],
        torch.tensor([crop.label for crop in crops], dtype=torch.int64),
        torch.stack([crop.pixels for crop in crops]) if crops else torch.empty(0, dtype=torch.uint8),
        Noticed([peak for crop in crops for peak in crop.noticed.peaks], sum(crop.noticed.converted for crop in crops)),
        [item for item in items if isinstance(item, UnreadableImage)],
        next((item for item in items if isinstance(item, UserError)), None),
    )
