"""The noise of samples: a stream for every modality of every image, drawn ahead of its use."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from reglue.diffusion.modalities import State
from reglue.seeds import Index, generator, indices_of, normals

THREADS = 4
"""How many draw a share of the images each. One would take longer for a batch than a fast GPU for a step."""


@contextmanager
def drawn_ahead(
    seed: int,
    indices: Sequence[Index],
    shapes: Mapping[str, Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    count: int,
) -> Generator[Iterator[State]]:
    """`count` standard normal states (B, …) of the images `indices`, one after another, on a device.

    The draws of a modality of an image are a function of (seed, modality, image): whatever else a model generates, its
    latents meet the same noise. Each state is drawn in float32, by threads while the device works with the last one.
    """
    streams = [{name: generator(seed, f"sample {name}", *indices_of(i)) for name in shapes} for i in indices]
    size = -(-len(streams) // THREADS)
    shares = [streams[start : start + size] for start in range(0, len(streams), size)]
    pinned = device.type == "cuda"

    def draw(share: list[dict[str, np.random.Generator]]) -> State:
        return {n: normals([s[n] for s in share], {n: shape}, pinned=pinned)[n] for n, shape in shapes.items()}

    def begin() -> list[Future[State]]:
        return [threads.submit(draw, share) for share in shares]

    def states() -> Iterator[State]:
        ahead = begin()
        for left in reversed(range(count)):
            drawn = [share.result() for share in ahead]
            if left:
                ahead = begin()
            # PyTorch gives pinned memory away again only when the GPU has copied it.
            parts = {name: [share[name].to(device, non_blocking=pinned) for share in drawn] for name in shapes}
            yield {name: torch.cat(part).to(dtype) for name, part in parts.items()}

    with ThreadPoolExecutor(THREADS, "noise") as threads:
        yield states()


class Draws:
    """Standard normal states of images, one after another, for a control: streams of its own for every image."""

    def __init__(self, seed: int, purpose: str, indices: Sequence[Index], shapes: Mapping[str, Sequence[int]]) -> None:
        """The draws of a modality of an image are a function of (seed, purpose, modality, image)."""
        self.seed, self.purpose, self.indices, self.shapes = seed, purpose, indices, shapes
        self._streams: list[dict[str, np.random.Generator]] = []

    def of(self, images: slice) -> Draws:
        """Those of some of the images, from the first one on."""
        return Draws(self.seed, self.purpose, self.indices[images], self.shapes)

    def next(self, like: State) -> State:
        """Noise (B, …) of every modality, on the device and in the precision of a state that has them."""
        if not self._streams:
            self._streams = [
                {name: generator(self.seed, f"{self.purpose} {name}", *indices_of(i)) for name in self.shapes}
                for i in self.indices
            ]
        return {
            name: normals([streams[name] for streams in self._streams], {name: shape})[name].to(like[name])
            for name, shape in self.shapes.items()
        }
