"""What the latents of images carry: channel by channel, how much of them is of the image, and how much is noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

DEAD = 0.01
"""A channel is dead if the images explain less than this share of the variance of what is drawn in it."""
ENOUGH = 4
"""With fewer images than these no channel is called dead: the spread is too uncertain."""


class LatentSummary(NamedTuple):
    """The latents of so many images."""

    images: int
    mean: float
    """Of all numbers that were drawn."""
    std: float
    """Of all numbers that were drawn."""
    signal: tuple[float, ...]
    """Of each channel: the variance over images of the posterior's mean, averaged over positions. What differs only
    between positions or channels is no signal."""
    noise: tuple[float, ...]
    """Of each channel: the variance of the posterior, averaged over images and positions."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each channel, the share of the variance at a position that the images explain: 0 to 1."""
        pairs = zip(self.signal, self.noise, strict=True)
        return tuple(signal / (signal + noise) if signal + noise else 0.0 for signal, noise in pairs)

    @property
    def dead(self) -> tuple[int, ...]:
        """The channels that carry next to nothing of an image; none, where there are too few images to know."""
        if self.images < ENOUGH:
            return ()
        return tuple(channel for channel, share in enumerate(self.shares) if share < DEAD)

    def figures(self) -> dict[str, float]:
        """By the names that logs have. `signal_std` is the root of the signal's mean over channels; one image has no
        signal."""
        figures = {"latent_mean": self.mean, "latent_std": self.std}
        if self.images > 1:
            figures["signal_std"] = (sum(self.signal) / len(self.signal)) ** 0.5
        return figures | {"dead_channels": float(len(self.dead))}


class LatentStatistics:
    """Sums over images that arrive in batches, in float64 and on the images' device, so that nothing waits for it.

    `sums` is one tensor, so that processes can add theirs, and `images` is how many they are of.
    """

    def __init__(self, shape: Sequence[int], device: torch.device):
        """`shape` is that of the latents of one image: C, h, w."""
        self.shape, self.images = shape, 0
        channels, height, width = shape
        self.sums = torch.zeros(channels * (height * width + 4), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, mean: Tensor, log_variance: Tensor, latents: Tensor) -> Self:
        """Adds a batch, each (B, C, h, w); returns itself."""
        mean, latents = mean.double(), latents.double()
        by_channel = (mean.square(), log_variance.double().exp(), latents, latents.square())
        self.sums += torch.cat([mean.sum(0).flatten(), *(values.sum((0, 2, 3)) for values in by_channel)])
        self.images += len(mean)
        return self

    def summary(self) -> LatentSummary:
        """What has been seen. Waits for the device, once."""
        channels, height, width = self.shape
        positions, numbers = height * width, self.images * height * width
        by_place, by_channel = self.sums.split((channels * positions, 4 * channels))
        mean_squares, noise, drawn, drawn_squares = by_channel.view(4, channels) / numbers
        explained = mean_squares - (by_place.view(channels, positions) / self.images).square().mean(1)
        signal = explained.clamp(min=0) * self.images / max(self.images - 1, 1)
        mean = drawn.mean()
        std = (drawn_squares.mean() - mean.square()).clamp(min=0).sqrt()
        mean, std, *rest = torch.cat([torch.stack([mean, std]), signal, noise]).tolist()
        return LatentSummary(self.images, mean, std, tuple(rest[:channels]), tuple(rest[channels:]))
