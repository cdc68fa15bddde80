"""Images to the joint states that a run learned: its autoencoder, its vision encoder and its compressors together."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.data.images import crop_to, laid_over, read_picture, upright
from reglue.data.targets import target_of
from reglue.diffusion.modalities import LATENT, Modality, State
from reglue.encoders.autoencoders import Autoencoder
from reglue.encoders.compressors import Compressor, as_map, resize
from reglue.encoders.vision import VisionEncoder, VisionFeatures, load_encoder
from reglue.errors import UserError, one_line, option
from reglue.run import RunRecord, decoder, find_compressor

Picture = str | Path | Image.Image
"""An image: its file, or itself."""


def open_picture(picture: Picture) -> Image.Image:
    """An image upright, as `prepare` decodes it, in RGBA if it has transparency. Raises UserError if it is none."""
    if not isinstance(picture, str | Path | Image.Image):  # In Python, anything.
        raise UserError(
            f"an image is a file or one of Pillow's, not a {type(picture).__name__}; give Image.fromarray(…)"
        )
    try:
        return upright(picture) if isinstance(picture, Image.Image) else read_picture(Path(picture))
    except Exception as error:  # Decoders raise nearly anything on malformed bytes, not OSError alone.
        name = "the image" if isinstance(picture, Image.Image) else picture
        raise UserError(f"{name} cannot be read ({one_line(error)}); give an image file") from error


def as_pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image (RGB or RGBA) scaled and cropped to (height, width), as `prepare` does: uint8 (1, 3, height, width)."""
    try:
        cropped = crop_to(laid_over(image, "white"), size)
    except ValueError as error:
        raise UserError(f"an image cannot be edited: {error}") from error
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)[None].contiguous()


@dataclass(frozen=True)
class ImageEncoder:
    """What makes the state of an image, with networks on one device."""

    record: RunRecord
    autoencoder: Autoencoder
    encoder: VisionEncoder | None
    """None for a run that learns latents alone."""
    compressors: dict[str, Compressor]
    """Of the modalities that are learned as codes."""

    @classmethod
    def load(
        cls,
        record: RunRecord,
        folder: Path | None,
        decodes: Autoencoder,
        device: torch.device,
        encoder: str | None = None,
        target: bool = False,
    ) -> ImageEncoder:
        """The networks of a run. `decodes` is the autoencoder at hand, which is taken if it is the run's own.

        `encoder` names the vision encoder, if it has moved; with `target` it is there in any case. Raises UserError,
        saying what is missing, if one is, and for an encoder that is not the run's.
        """
        config = record.denoiser
        compressors: dict[str, Compressor] = {}
        for modality in config.modalities[1:]:
            if modality.name in record.compressors:
                compressor = find_compressor(record, folder, modality.name)
                if compressor is None:
                    raise UserError(
                        f"the compressor of {modality.name} is neither in the run's folder nor in its store "
                        f"{record.store}; put the store back, or its folder compressors/{modality.name} into the run's"
                    )
                compressors[modality.name] = compressor.to(device)
            elif not _is_class_token(modality):
                raise UserError(f"this run learns {modality.name}, which no encoder makes of an image; it cannot edit")
        vision = _vision_encoder(record, device, encoder) if target or len(config.modalities) > 1 else None
        expected = record.autoencoder
        seen = decodes.spec if expected.weights_sha256 else replace(decodes.spec, weights_sha256=None)
        own = seen == expected and record.decoder is None
        autoencoder = decodes if own else decoder(replace(record, decoder=None), device, folder=folder)
        return cls(record, autoencoder, vision, compressors)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> State:
        """The state of uint8 images (B, 3, H, W) at the run's resolution, as the model learns it, without noise."""
        config = self.record.denoiser
        pixels = pixels.to(self.device)
        seen = self.encoder.describe(pixels) if self.encoder else None
        state: State = {}
        for modality in config.modalities:
            if modality.name == LATENT:
                raw = self.autoencoder.encode(pixels.float() / 127.5 - 1).mean
            else:
                assert seen is not None
                assert self.encoder is not None
                raw = seen.class_token
                if compressor := self.compressors.get(modality.name):
                    if compressor.column == "features":
                        raw = seen.features[:, self.encoder.spec.channels_of(compressor.layers)]
                    raw = compressor.encode(as_map(raw))
                    raw = raw if modality.kind == "map" else raw[:, :, 0, 0]
            value = modality.normalise(raw.float())
            if modality.kind == "map" and value.shape[2:] != config.grid:
                value = resize(value, config.grid)
            state[modality.name] = value
        return state

    @torch.no_grad()
    def target(self, pixels: Tensor) -> Tensor:
        """What the run's hidden tokens were aligned with (B, N, D), of uint8 images: see `target_of`."""
        assert self.encoder is not None
        features, class_token = self.encoder.last_layer(self.encoder.describe(pixels.to(self.device)))
        return target_of(VisionFeatures(class_token, features), self.record.recipe, self.record.denoiser)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.autoencoder.parameters()).device


def _is_class_token(modality: Modality) -> bool:
    return modality.is_class_token or modality.column == "cls"


def _vision_encoder(record: RunRecord, device: torch.device, name: str | None) -> VisionEncoder:
    """The vision encoder of a run. Raises UserError if it is not known, cannot be loaded, or is another one."""
    expected = record.encoder
    if expected is None:
        raise UserError("the run does not say which vision encoder it learned from; train or import it with one")
    found = load_encoder(
        name or expected.name, record.resolution, expected.layers, device, final_norm=expected.final_norm
    )
    compared = [part.name for part in fields(expected) if part.compare]
    different = [part for part in compared if getattr(found.spec, part) != getattr(expected, part)]
    if different:
        raise UserError(
            f"encoder {name or expected.name} is not the one that the run learned from, {', '.join(different)} differ: "
            f"give that one with {option('encoder')}"
        )
    return found
