"""The noise of samples: a stream for every modality of every image, drawn ahead of its use."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from reglue.diffusion.modalities import State
from reglue.seeds import generator, normals

THREADS = 4
"""How many draw a share of the images each. One would take longer for a batch than a fast GPU for a step."""


@contextmanager
def drawn_ahead(
    seed: int,
    indices: Sequence[int],
    shapes: Mapping[str, Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    count: int,
) -> Generator[Iterator[State]]:
    """`count` standard normal states (B, …) of the images `indices`, one after another, on a device.

    The draws of a modality of an image are a function of (seed, modality, image): whatever else a model generates, its
    latents meet the same noise. Each state is drawn in float32, by threads while the device works with the last one.
    """
    streams = [{name: generator(seed, f"sample {name}", i) for name in shapes} for i in indices]
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
