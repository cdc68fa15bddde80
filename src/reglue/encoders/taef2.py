"""TAEF2, the tiny autoencoder of FLUX.2's latent space: two plain sequences whose indices are the checkpoint's keys.

Eight times fewer pixels per side, deterministic, latents of about unit standard deviation. Pixels are in [0, 1] here.
The network is described, and its weights are published, by the author of TAESD (MIT licence).
"""

import torch
from torch import Tensor, nn


class ClampSmoothly(nn.Module):
    """3·tanh(x/3): the decoder's guard against latents that no image has."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return 3 * torch.tanh(x / 3)


class Block(nn.Module):
    """Three convolutions and a shortcut, after an optional pool of channels that lets a pixel see its statistics."""

    def __init__(self, width: int, pooled: bool = False):
        super().__init__()
        # The names `pool` and `conv`, and the indices inside, are the checkpoint's.
        self.pool = (
            nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )
            if pooled
            else None
        )
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def taef2_encoder(width: int, latent_channels: int) -> nn.Sequential:
    """Images (B, 3, 8H, 8W) in [0, 1] → latents (B, latent_channels, H, W)."""
    return nn.Sequential(
        _conv(3, width),
        Block(width),
        *_stage(_conv(width, width, stride=2, bias=False), width),
        *_stage(_conv(width, width, stride=2, bias=False), width),
        *_stage(_conv(width, width, stride=2, bias=False), width, pooled=True),
        _conv(width, latent_channels),
    )


def taef2_decoder(width: int, latent_channels: int) -> nn.Sequential:
    """Latents (B, latent_channels, H, W) → images (B, 3, 8H, 8W), in [0, 1] but for overshoot."""
    return nn.Sequential(
        ClampSmoothly(),
        *_stage(_conv(latent_channels, width), width, nn.ReLU(), pooled=True),
        nn.Upsample(scale_factor=2),
        *_stage(_conv(width, width, bias=False), width),
        nn.Upsample(scale_factor=2),
        *_stage(_conv(width, width, bias=False), width),
        nn.Upsample(scale_factor=2),
        _conv(width, width, bias=False),
        Block(width),
        _conv(width, 3),
    )


def _stage(entry: nn.Conv2d, width: int, *between: nn.Module, pooled: bool = False) -> list[nn.Module]:
    return [entry, *between, *(Block(width, pooled) for _ in range(3))]


def _conv(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)
