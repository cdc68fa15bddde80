"""What heads see in latents, beside what they see in the decoded images.

ReaLS (arXiv 2502.00359) reads segmentation and depth off generated latents: its alignment network turns them into a
vision encoder's features, and heads made for those work on them without more training. A run that learns REGLUE's local
map (arXiv 2512.16636) generates compressed features, which the compressor's decoder turns back. The encoder itself is
the measure of both: the same head on its features of the decoded image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reglue.config import LocalSemantics
from reglue.diffusion.modalities import LATENT
from reglue.encoders.alignment import FILE as ALIGNMENT_FILE
from reglue.encoders.alignment import AlignmentNetwork, at_usual_length
from reglue.encoders.autoencoders import Autoencoder
from reglue.encoders.compressors import Compressor, resize
from reglue.encoders.vision import EncoderSpec, VisionEncoder, VisionFeatures
from reglue.errors import UserError
from reglue.files import parse_json
from reglue.names import Estimator
from reglue.perception.heads import Head, features_of_codes
from reglue.reals.samples import ImageSamples, all_of, to_images, to_pixels
from reglue.samples import Drawing

View = Literal["alignment", "local", "drawn", "original", "encoder"]
"""Whose features a head reads: an estimator's, or the encoder's, of the original or of the decoded image."""
Seen = tuple[VisionFeatures, tuple[int, ...]]
"""Features, and the encoder's blocks that they are of."""


@dataclass(frozen=True)
class Subject:
    """What is looked into: a run, or an autoencoder by itself."""

    autoencoder: Autoencoder
    size: tuple[int, int]
    """Of the images in pixels."""
    estimates: Mapping[Estimator, EncoderSpec]
    """The estimators that it has, with the encoder whose features each estimates: its layers are those."""
    alignment: AlignmentNetwork | None
    compressor: Compressor | None = None
    draw: Callable[[Tensor, range], Tensor] | None = None
    """Raw latents (B, C, H, W) of images by number to raw local maps (B, K, H, W) that a run draws given them."""

    def from_latents(self, latents: Tensor) -> Seen:
        """What the alignment network estimates from raw latents (B, C, H, W)."""
        assert self.alignment is not None
        semantics = at_usual_length(self.alignment(latents), self.alignment.spec)
        features = VisionFeatures(semantics.class_token, semantics.patches, semantics.class_token)
        return features, self.estimates["alignment"].layers

    def from_local(self, code: Tensor, estimator: Estimator = "local") -> Seen:
        """What the compressor decodes from a raw local map (B, K, H, W): see `features_of_codes`."""
        assert self.compressor is not None
        return features_of_codes(code, self.compressor, self.estimates[estimator])


def aligned_encoder(alignment: AlignmentNetwork, folder: Path) -> EncoderSpec:
    """The encoder whose features an alignment network estimates: those of the last layer alone."""
    try:
        encoder = parse_json(json.dumps(alignment.spec.encoder), EncoderSpec)
    except ValueError as error:
        raise UserError(
            f"{folder / ALIGNMENT_FILE} does not say whose features it gives ({error}); run `reglue autoencode` again"
        ) from error
    return replace(encoder, layers=(encoder.depth - 1,))


class Scene(NamedTuple):
    """Some images, and everything that heads may look at."""

    pixels: Tensor
    """uint8 (B, 3, H, W): the decoded images."""
    seen: dict[View, Seen]

    def maps(self, heads: Mapping[str, Head], views: Mapping[View, list[str]]) -> dict[tuple[str, View], Tensor]:
        """The map (B, H, W) of every head, by its name, from each of its views, on the CPU."""
        height, width = self.pixels.shape[-2:]
        return {
            (name, view): heads[name].predict(*self.seen[view], (height, width)).cpu()
            for view, names in views.items()
            for name in names
        }


@torch.no_grad()
def drawn_scenes(
    drawing: Drawing, subject: Subject, encoder: VisionEncoder, batches: Sequence[range], what: str = "perceive"
) -> Iterator[Scene]:
    """Batches of the images of a drawing."""
    model, local = drawing.model, LocalSemantics.modality
    for state in drawing.states(batches, what):
        pixels = model.pixels(state, drawing.sampling.rounding).permute(0, 3, 1, 2).contiguous()
        code = model.raw(state, local) if local in state else None
        yield _scene(subject, encoder, pixels, model.raw(state, LATENT), code)


@torch.no_grad()
def encoded_scenes(
    samples: ImageSamples, subject: Subject, encoder: VisionEncoder, batch_size: int, device: torch.device
) -> Iterator[Scene]:
    """Images as the autoencoder of a subject decodes them, in batches, and as they were."""
    grid, done = subject.autoencoder.spec.latent_size(subject.size), 0
    for originals, noise in all_of(samples, batch_size, 0, device):
        latents = subject.autoencoder.encode(to_images(originals)).draw(noise)
        seen, code = encoder.describe(originals), None
        if subject.compressor and "local" in subject.estimates:
            layers = subject.estimates["local"].layers
            each = dict(zip(encoder.spec.layers, seen.features.split(encoder.spec.width, dim=1), strict=True))
            # As a model meets it: compressed, and brought to the grid of the latents.
            code = resize(subject.compressor.encode(torch.cat([each[layer] for layer in layers], dim=1)), grid)
        scene = _scene(subject, encoder, to_pixels(subject.autoencoder.decode(latents)), latents, code)
        scene.seen["original"] = (seen, encoder.spec.layers)
        if subject.draw and "drawn" in subject.estimates:
            scene.seen["drawn"] = subject.from_local(subject.draw(latents, range(done, done + len(latents))), "drawn")
        done += len(latents)
        yield scene


def _scene(subject: Subject, encoder: VisionEncoder, pixels: Tensor, latents: Tensor, code: Tensor | None) -> Scene:
    """Everything that is seen of decoded `pixels`, of raw `latents`, and of a raw local map."""
    seen: dict[View, Seen] = {"encoder": (encoder.describe(pixels), encoder.spec.layers)}
    if "alignment" in subject.estimates:
        seen["alignment"] = subject.from_latents(latents)
    if "local" in subject.estimates and code is not None:
        seen["local"] = subject.from_local(code)
    return Scene(pixels, seen)
