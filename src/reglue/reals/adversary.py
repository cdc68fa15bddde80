"""The adversary of an autoencoder: a discriminator of patches, and how much it may say.

PatchGAN (arXiv 1611.07004) with the hinge loss and the adaptive weight of VQGAN (arXiv 2012.09841, eq. 7).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_WEIGHT = 1e4
"""The adaptive weight is no larger, as in VQGAN."""


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) in [−1, 1] → scores (B, 1, h, w), one per overlapping patch: positive says real.

    Group normalisation stands where PatchGAN has batch normalisation, so that a score does not depend on the other
    images of the batch, nor training on how the batch is spread over processes.
    """

    def __init__(self, width: int, layers: int):
        super().__init__()
        widths = [width * min(2**depth, 8) for depth in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for depth, (before, after) in enumerate(pairwise(widths), 1):
            parts += [
                nn.Conv2d(before, after, 4, stride=2 if depth < layers else 1, padding=1, bias=False),
                nn.GroupNorm(_groups(after), after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.layers(images)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss for its scores of real images and of reconstructions."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|∇ of the reconstruction loss| / |∇ of the adversarial loss|, both by the decoder's last layer (VQGAN, eq. 7)."""
    ratio = reconstruction_gradient.norm() / (adversarial_gradient.norm() + 1e-4)
    return torch.clamp(ratio, 0, MAX_WEIGHT).detach()


def _groups(channels: int) -> int:
    """The largest number of groups up to 32 that divides the channels into four or more each."""
    return next(groups for groups in range(max(1, min(32, channels // 4)), 0, -1) if channels % groups == 0)
