"""From images to the features that distances are measured on."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from reglue.semantics.encoders import VisionEncoder

FeatureKind = Literal["class-token", "patch-mean"]
"""What stands for an image: the class token after the final norm, or the mean of the last chosen layer's patches."""


def image_features(encoder: VisionEncoder, batches: Iterable[Tensor], kind: FeatureKind = "class-token") -> Tensor:
    """Features (N, width) float32 on the CPU of images that come as uint8 batches (B, 3, H, W) of the encoder's size.

    One batch is held at a time; no images give (0, width).
    """
    device = encoder.image_mean.device
    width = encoder.spec.width
    described = [torch.empty(0, width)]
    for pixels in batches:
        found = encoder.describe(pixels.to(device))
        feature = found.class_token if kind == "class-token" else found.features[:, -width:].mean((2, 3))
        described.append(feature.float().cpu())
    return torch.cat(described)
