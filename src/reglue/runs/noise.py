"""The noise of samples: a stream for every modality of every image, drawn ahead of its use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from reglue.diffusion.modalities import State
from reglue.seeds import generator, normals

STREAMS = "one stream per modality"
"""What protocols of samples say about the noise. Older ones say nothing: all modalities of an image shared a stream,
so that what a model generated besides latents decided the noise of its latents."""


@contextmanager
def drawn_ahead(
    seed: int,
    indices: Sequence[int],
    shapes: Mapping[str, Sequence[int]],
    device: torch.device,
    dtype: torch.dtype,
    count: int,
) -> Iterator[Iterator[State]]:
    """`count` standard normal states (B, …) of the images `indices`, one after another, on a device.

    The draws of a modality of an image are a function of (seed, modality, image): whatever else a model generates, its
    latents meet the same noise. Each state is drawn in float32, by a thread while the device works with the last one.
    """
    generators = {name: [generator(seed, f"sample {name}", i) for i in indices] for name in shapes}
    pinned = device.type == "cuda"

    def draw() -> State:
        return {n: normals(generators[n], {n: shape}, pinned=pinned)[n] for n, shape in shapes.items()}

    def states() -> Iterator[State]:
        ahead = thread.submit(draw)
        for left in reversed(range(count)):
            drawn = ahead.result()
            if left:
                ahead = thread.submit(draw)
            # PyTorch gives pinned memory away again only when the GPU has copied it.
            yield {name: x.to(device, non_blocking=pinned).to(dtype) for name, x in drawn.items()}

    with ThreadPoolExecutor(1, "noise") as thread:
        yield states()
