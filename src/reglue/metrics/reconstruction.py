"""How well images are restored, pixel by pixel: PSNR and SSIM, of 8-bit images as a viewer sees them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PEAK = 255.0
WINDOW = 11
"""Pixels along a side of SSIM's window …"""
WINDOW_STD = 1.5
"""… and the standard deviation of its weights, as published."""
MAX_PSNR = 100.0
"""What equal images get, in dB, in place of infinity."""


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of uint8 images (B, C, H, W): 10·log₁₀(255² / mean squared error)."""
    error = (first.double() - second.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(PEAK**2 / error)).clamp(max=MAX_PSNR)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity (B,) of uint8 images (B, C, H, W); 1 for equal ones (Wang et al. 2004, eq. 13).

    Of each channel, over all places where the Gaussian window of 11×11 lies inside the image, with population
    statistics, then averaged: what scikit-image calls gaussian_weights. On images smaller than that the window is
    the largest odd one that fits.
    """
    _, channels, height, width = first.shape
    x, y = first.double(), second.double()
    rows, columns = _weights(height).to(x.device), _weights(width).to(x.device)

    def local_mean(values: Tensor) -> Tensor:
        down = F.conv2d(values, rows.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(down, columns.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x.square()
    variance_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _weights(side: int) -> Tensor:
    """The window's weights along a side of so many pixels, summing to 1."""
    radius = min(WINDOW // 2, (side - 1) // 2)
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-distance.square() / (2 * WINDOW_STD**2))
    return weights / weights.sum()
