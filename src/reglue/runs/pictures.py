"""Writing pictures while the next ones are drawn."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image
from torch import Tensor

from reglue.files import replacing

WAITING = 2
"""Batches that may wait to be written before drawing has to wait for them."""


class PictureWriter:
    """Writes batches of pictures as PNG files, in a thread of its own, each file whole or not at all.

    An error in writing (UserError) is raised by the next `write`, or at the end of the block, which waits for what is
    still to be written. If the block ends with another error, batches that have not begun are dropped.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> PictureWriter:
        return self

    def write(self, files: Sequence[Path], pixels: Tensor) -> None:
        """Have uint8 pixels (B, H, W, 3), on any device, written while the caller goes on. Waits if too many wait."""
        self._waiting.append(self._thread.submit(_write, files, pixels))
        while len(self._waiting) > WAITING or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            while self._waiting and error is None:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)


def _write(files: Sequence[Path], pixels: Tensor) -> None:
    # Only this thread waits for the device.
    images: np.ndarray = pixels.cpu().numpy()
    for file, image in zip(files, images, strict=True):
        with replacing(file) as beside:
            Image.fromarray(image).save(beside, format="png")
