"""Large images are decoded in tiles, one by one, so that memory is that of a tile, whatever the size of the image.

Tiles overlap, and are faded into each other: at its edges no decoder sees what is next to them. A decoder that
normalises over groups of channels would do so over each tile by itself, and neighbours would differ in tone; so all are
decoded twice, first to measure, then with the mean and variance of all. What attends to the whole image attends to a
tile.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from reglue.encoders.autoencoders import Autoencoder

OVERLAP = 0.25
"""Share of a tile's side that it has in common with its neighbour, at least."""
SMALLEST = 4
"""Latent pixels along the side of a tile, at least."""
ONE_AT_A_TIME = Lock()
"""Threads may share a decoder, whose normalisation is another one while it decodes in tiles."""


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Tensor, tile: int) -> Tensor:
    """Raw latents (B, C, H, W) → images (B, 3, factor·H, factor·W) in [−1, 1].

    Those of more than `tile` pixels along a side in tiles of as many, the others as `autoencoder.decode` does, to the
    bit; 0 decodes all as it does.
    """
    side = max(tile // autoencoder.spec.downsampling, SMALLEST)
    if not tile or autoencoder.of_one_size or max(latents.shape[2:]) <= side:
        return autoencoder.decode(latents)
    with ONE_AT_A_TIME:
        return torch.cat([_in_tiles(autoencoder, image, side) for image in latents.split(1)])


def _in_tiles(autoencoder: Autoencoder, latents: Tensor, side: int) -> Tensor:
    """An image (1, 3, …) as the mean of its tiles, each weighted by how far a pixel is from the tile's own edge."""
    factor, sizes = autoencoder.spec.downsampling, latents.shape[2:]
    places = [*product(*([slice(i, i + side) for i in _begins(size, side)] for size in sizes))]
    images = latents.new_zeros(1, 3, *(factor * size for size in sizes))
    weights = torch.zeros_like(images[:, :1])
    with _normalising_alike(autoencoder, lambda: [autoencoder.decode(latents[..., *place]) for place in places]):
        for place in places:
            decoded = autoencoder.decode(latents[..., *place])
            rows, columns = (_ramp(size, round(OVERLAP * side) * factor).to(decoded) for size in decoded.shape[2:])
            weight, within = rows[:, None] * columns, [slice(factor * p.start, factor * p.stop) for p in place]
            images[..., *within] += weight * decoded
            weights[..., *within] += weight
    return images.div_(weights).clamp_(-1, 1)


def _begins(size: int, side: int) -> list[int]:
    """Where tiles of a side begin that cover a size: evenly, the last at its end."""
    if size <= side:
        return [0]
    steps = math.ceil((size - side) / (side - round(OVERLAP * side)))
    return [round(i * (size - side) / steps) for i in range(steps + 1)]


def _ramp(size: int, overlap: int) -> Tensor:
    """The weights (size,) of a tile's pixels along a side, which rise over the overlap from either end."""
    from_start = torch.arange(size) + 0.5
    return torch.minimum(from_start, size - from_start).clamp(max=overlap)


@contextmanager
def _normalising_alike(network: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """Inside, every GroupNorm of a network normalises by the mean and variance of all that it meets in `run`."""
    norms = [part for part in network.modules() if isinstance(part, nn.GroupNorm)]
    moments = defaultdict[nn.Module, list[Tensor]](list)

    def measure(norm: nn.GroupNorm, inputs: tuple[Tensor, ...]) -> None:
        groups = inputs[0].unflatten(1, (norm.num_groups, -1)).flatten(2)
        moments[norm].append(torch.stack([groups.mean(2), groups.square().mean(2)]))

    def normalise(norm: nn.GroupNorm, inputs: tuple[Tensor, ...], _: Any) -> Tensor:
        mean, square = torch.stack(moments[norm]).mean(0)[..., None]
        groups = inputs[0].unflatten(1, (norm.num_groups, -1)).flatten(2)
        found = ((groups - mean) * (square - mean.square() + norm.eps).rsqrt()).view_as(inputs[0])
        weight, bias = (part.view(-1, *[1] * (found.dim() - 2)) for part in (norm.weight, norm.bias))
        return found * weight + bias

    if norms:
        with ExitStack() as hooks:
            for norm in norms:
                hooks.callback(norm.register_forward_pre_hook(measure).remove)
            run()
    with ExitStack() as hooks:
        for norm in norms:
            hooks.callback(norm.register_forward_hook(normalise).remove)
        yield
