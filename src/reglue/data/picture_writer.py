"""Writing pictures while the next ones are drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from reglue.files import replacing

WAITING = 2
"""Batches that may wait to be written before drawing has to wait for them."""
THREADS = 4
"""How many write at the same time."""
FASTEST = 1
"""zlib's level: a quarter of its default's time, for photographs that take 3 % more room."""


class PictureWriter:
    """Writes batches of pictures as PNG files, in threads of its own and in any order, each file whole or not at all.

    An error in writing (UserError) is raised by the next `write`, or at the end of the block, which waits for what is
    still to be written. If the block ends with another error, batches that have not begun are dropped.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._count = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self._waiting: deque[list[Future[None]]] = deque()

    def __enter__(self) -> PictureWriter:
        return self

    def write(self, files: Sequence[Path], pixels: Tensor) -> None:
        """Have uint8 pixels (B, H, W, 3), on any device, written while the caller goes on. Waits if too many wait."""
        size = max(1, -(-len(files) // self._count))
        parts = [(files[start : start + size], pixels[start : start + size]) for start in range(0, len(files), size)]
        self._waiting.append([self._threads.submit(_write, *part) for part in parts])
        while len(self._waiting) > WAITING or (self._waiting and all(part.done() for part in self._waiting[0])):
            self._wait_for_one()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            while self._waiting and error is None:
                self._wait_for_one()
        finally:
            self._threads.shutdown(cancel_futures=True)

    def _wait_for_one(self) -> None:
        """Until the oldest batch is written. Raises what its writing has met."""
        for part in self._waiting.popleft():
            part.result()


def write_picture(path: Path, image: Image.Image, **options: Any) -> None:
    """Write an image in the format of its name, whole or not at all, with the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        image.save(beside, format=Image.registered_extensions()[path.suffix], **options)


def _write(files: Sequence[Path], pixels: Tensor) -> None:
    # Only these threads wait for the device.
    images: np.ndarray = pixels.cpu().numpy()
    for file, image in zip(files, images, strict=True):
        with replacing(file) as beside:
            Image.fromarray(image).save(beside, format="png", compress_level=FASTEST)
