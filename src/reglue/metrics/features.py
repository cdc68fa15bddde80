"""From images to the features that distances are measured on: feature networks, and the features of a set."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.encoders.known import KNOWN_ENCODERS
from reglue.encoders.vision import InputRule, VisionEncoder, load_encoder
from reglue.metrics.distances import GaussianStatistics
from reglue.names import FeatureKind

FD_DINOV2_ENCODER = "dinov2-l"
FD_DINOV2_SIZE = 224
"""Side in pixels of what the network of FD-DINOv2 is shown."""


class Description(NamedTuple):
    """What a feature network gives for a batch of images."""

    features: Tensor
    """(B, D)."""
    spatial: Tensor | None
    """(B, S): a flattened map of features, for sFID."""
    logits: Tensor | None
    """(B, C): class scores, for the Inception Score."""


class FeatureNetwork(ABC):
    """A frozen network that describes images."""

    name: str
    """What loads it again."""
    sha256: str
    """Of its file of weights."""
    distance_name: str
    """What the field calls the Fréchet distance of its features."""
    features_name: str
    """What its features are."""
    width: int
    """D, numbers per image."""
    spatial_width: int = 0
    """S, numbers per image for sFID; 0 if it has none."""
    image_size: tuple[int, int] | None = None
    """Height and width of the images that it takes; None if they may be of any size."""
    input_rule: str
    """How it brings images to its own input, in words."""
    without_logits: str = ""
    """Why it has no class scores; empty if it has."""

    @abstractmethod
    def describe(self, pixels: Tensor) -> Description:
        """Describe uint8 images (B, 3, H, W), of `image_size` if the network has one; results are on its device."""


@dataclass
class FeatureSet:
    """What a network gives for a set of images."""

    features: Tensor
    """(N, D) float32 on the CPU."""
    logits: Tensor | None
    """(N, C) float32 on the CPU."""
    spatial: GaussianStatistics | None
    """Mean and covariance of the spatial features."""
    spatial_features: Tensor | None = None
    """(N, S) float32 on the CPU: those themselves, if they were to be kept."""


def describe_images(network: FeatureNetwork, batches: Iterable[Tensor], *, keep_spatial: bool = False) -> FeatureSet:
    """The features of images that come as uint8 batches (B, 3, H, W), of which one at a time is held.

    Spatial features double the memory; they are kept on request, and otherwise become statistics alone.
    """
    features, logits, kept = [torch.empty(0, network.width)], [], [torch.empty(0, network.spatial_width)]
    spatial, waiting = GaussianStatistics(network.spatial_width), []
    for pixels in batches:
        found = network.describe(pixels)
        features.append(found.features.float().cpu())
        if found.logits is not None:
            logits.append(found.logits.float().cpu())
        if found.spatial is not None:
            waiting.append(found.spatial.float().cpu())
            kept += waiting[-1:] if keep_spatial else []
            # Some hundred rows at once, since each update touches the whole of a large matrix.
            if sum(map(len, waiting)) >= 512:
                spatial.update(torch.cat(waiting))
                waiting = []
    if waiting:
        spatial.update(torch.cat(waiting))
    has_spatial = network.spatial_width > 0
    return FeatureSet(
        features=torch.cat(features),
        logits=torch.cat(logits) if logits else None,
        spatial=spatial if has_spatial else None,
        spatial_features=torch.cat(kept) if keep_spatial and has_spatial else None,
    )


class EncoderFeatures(FeatureNetwork):
    """A vision encoder with the preprocessing that stores are made with, for images of one size."""

    without_logits = "a vision encoder has no classes"

    def __init__(self, encoder: VisionEncoder, kind: FeatureKind = "class-token"):
        spec = encoder.spec
        self.encoder, self.kind = encoder, kind
        self.name, self.sha256, self.width = spec.name, spec.weights_sha256, spec.width
        self.distance_name = f"Fréchet distance ({Path(spec.name).name})"
        self.features_name = kind
        self.image_size = spec.image_size
        self.input_rule = f"{spec.interpolation} to {spec.input_size[0]}×{spec.input_size[1]} without antialias"

    def describe(self, pixels: Tensor) -> Description:
        """Class tokens, or means over the patches of the last layer."""
        found = self.encoder.describe(pixels.to(self.encoder.image_mean.device))
        patches = found.features[:, -self.width :]
        return Description(found.class_token if self.kind == "class-token" else patches.mean((2, 3)), None, None)


class DinoV2Features(FeatureNetwork):
    """The features of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675): class token of DINOv2 ViT-L/14.

    Images of any size are stretched to 224×224 by Pillow (bicubic, with antialias) and standardised with ImageNet's
    statistics. One difference from the published figures remains: timm resamples the position embeddings with
    antialias, the original network without. It is called FD-DINOv2 only if the weights come by name from the hub:
    a file may hold a fine-tuned network.
    """

    features_name = "class-token"
    input_rule = f"bicubic to {FD_DINOV2_SIZE}×{FD_DINOV2_SIZE} with antialias (Pillow)"
    without_logits = EncoderFeatures.without_logits

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        # The size of image that an encoder shows to its network as 224 pixels, patch for patch.
        image_size = FD_DINOV2_SIZE * InputRule().image_pixels_per_patch // KNOWN_ENCODERS[FD_DINOV2_ENCODER].patch_size
        self.encoder = load_encoder(name, image_size, device=device)
        spec = self.encoder.spec
        assert spec.input_size == (FD_DINOV2_SIZE, FD_DINOV2_SIZE)
        self.name, self.sha256, self.width = spec.name, spec.weights_sha256, spec.width
        self.distance_name = _dinov2_distance_name(spec.name)

    @torch.no_grad()
    def describe(self, pixels: Tensor) -> Description:
        """The class token after the final norm."""
        side = (FD_DINOV2_SIZE, FD_DINOV2_SIZE)
        images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        resized = np.stack([np.array(image.resize(side, Image.Resampling.BICUBIC)) for image in images])
        encoder = self.encoder
        inputs = torch.from_numpy(resized).permute(0, 3, 1, 2).to(encoder.image_mean)
        tokens = encoder.network.forward_features((inputs / 255 - encoder.image_mean) / encoder.image_std)
        return Description(tokens[:, 0], None, None)


def _dinov2_distance_name(name: str) -> str:
    by_name = (FD_DINOV2_ENCODER, f"timm:{KNOWN_ENCODERS[FD_DINOV2_ENCODER].architecture}")
    return "FD-DINOv2" if name in by_name else f"Fréchet distance ({Path(name).name}, preprocessed as for FD-DINOv2)"


def load_encoder_features(
    name: str, image_size: tuple[int, int], kind: FeatureKind, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """The features of any vision encoder that `load_encoder` takes. Raises UserError as it does.

    The class token of DINOv2 ViT-L/14 is taken as FD-DINOv2 does, whatever `image_size`.
    """
    if kind == "class-token" and name.partition("@")[0] == FD_DINOV2_ENCODER:
        return DinoV2Features(name, device)  # At once, since it takes images of sizes that fit no grid of patches.
    encoder = load_encoder(name, image_size, device=device)
    if kind == "class-token" and encoder.spec.architecture == KNOWN_ENCODERS[FD_DINOV2_ENCODER].architecture:
        return DinoV2Features(name, device)
    return EncoderFeatures(encoder, kind)
