"""The vision encoder's tokens that hidden tokens are aligned with: cached in the store, decoded from codes, or online.

Each kind first reads what it needs of the store's rows, on the CPU and from any thread, and then makes tokens of it on
the device where they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from reglue.config import Recipe
from reglue.data.images import UnreadableImage
from reglue.data.store import Store, dequantised
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.encoders.compressors import load_compressor
from reglue.encoders.vision import EncoderSpec, VisionFeatures, load_encoder
from reglue.errors import UserError, option
from reglue.names import codes_column

SPATIAL_EPSILON = 1e-6


def target_of(tokens: VisionFeatures, recipe: Recipe, config: DenoiserConfig) -> Tensor:
    """The encoder's raw tokens (B, N, D) float32 for a model's tokens: resampled if the grids differ."""
    patches = tokens.features
    if patches.shape[2:] != config.token_grid:
        patches = F.interpolate(patches.float(), config.token_grid, mode="bilinear", antialias=True)
    if (share := recipe.alignment.spatial_norm) is not None:  # iREPA (arXiv 2512.10794)
        std, mean = torch.std_mean(patches.float(), dim=(2, 3), correction=0, keepdim=True)
        patches = (patches - share * mean) / (std + SPATIAL_EPSILON)
    patches = patches.flatten(2).transpose(1, 2)
    leading = int(any(modality.is_class_token for modality in config.tokens))
    # Float16 to float32, another order and the token in front: in one pass over the largest tensor of a step.
    target = patches.new_empty((len(patches), leading + patches.shape[1], patches.shape[2]), dtype=torch.float32)
    target[:, leading:] = patches
    if leading:
        target[:, 0] = tokens.class_token
    return target


class AlignmentTargets(ABC):
    """A source of the encoder's tokens for rows of a store.

    A network that makes them computes as the caller's autocast says, as the published code's encoder does.
    """

    @abstractmethod
    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """What the tokens of rows (B,) are made of, each (B, …) on the CPU. Many threads may call it at once."""

    @abstractmethod
    def tokens(self, read: Mapping[str, Tensor]) -> VisionFeatures:
        """What the encoder says in its last layer, raw, made of what `read` gave and on the device where that is."""


def target_columns(recipe: Recipe) -> tuple[str, ...]:
    """The store's columns that a recipe's alignment reads."""
    if not recipe.alignment.present or recipe.alignment.targets == "online":
        return ()
    return "cls", codes_column(target_compressor(recipe), "features") if decoded(recipe) else "features"


def target_compressor(recipe: Recipe) -> str:
    """The compressor whose decoder makes the targets, where they are decoded."""
    return recipe.alignment.compressor or recipe.local.compressor


def decoded(recipe: Recipe) -> bool:
    """Whether a recipe's targets come from a compressor's decoder."""
    return recipe.alignment.present and recipe.alignment.targets == "decoded"


def alignment_targets(store: Store, recipe: Recipe, device: torch.device) -> AlignmentTargets:
    """The targets that a recipe asks for. Raises UserError for a compressor, encoder or images that are not at hand."""
    encoder = store.manifest.encoder
    assert encoder is not None
    if recipe.alignment.targets == "online":
        return OnlineTargets(store, encoder, device)
    if recipe.alignment.targets == "decoded":
        return DecodedTargets(store, encoder, target_compressor(recipe), device)
    return CachedTargets(store, encoder)


class CachedTargets(AlignmentTargets):
    """The features that the store holds, of which nothing but the last layer is read."""

    def __init__(self, store: Store, encoder: EncoderSpec) -> None:
        self.store = store
        self.last_layer = slice(-encoder.width, None)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """`cls` and, as they are stored, the tensors of `features`."""
        return {**self.store.read("cls", rows), **self.store.read_stored("features", rows, self.last_layer)}

    def tokens(self, read: Mapping[str, Tensor]) -> VisionFeatures:
        """See `AlignmentTargets.tokens`."""
        return VisionFeatures(read["cls"], dequantised(read)["features"])


class DecodedTargets(AlignmentTargets):
    """What a compressor's decoder makes of the codes in the store: neither features nor encoder are needed.

    The class token is the encoder's own.
    """

    def __init__(self, store: Store, encoder: EncoderSpec, name: str, device: torch.device) -> None:
        """Raises UserError if the compressor is missing, or is not the one that made the store's codes."""
        self.store, self.column = store, codes_column(name, "features")
        self.last_layer = slice(-encoder.width, None)
        folder = store.folder / "compressors" / name
        compressor = load_compressor(folder, f"delete {folder} and run `reglue compress` again")
        if compressor.spec() != store.manifest.compressors[name]:
            raise UserError(f"the compressor in {folder} did not make column {self.column}; put back the one that did")
        if compressor.layers and compressor.layers[-1] != encoder.depth - 1:
            raise UserError(
                f"compressor {name} has layers {list(compressor.layers)}, not the last one ({encoder.depth - 1}) that "
                f"alignment needs; name another with {option('alignment.compressor')}, or choose "
                f"{option('alignment.targets')} cached"
            )
        self.compressor = compressor.requires_grad_(False).to(device)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """`cls` and the codes `local`."""
        return {**self.store.read("cls", rows), **self.store.read(self.column, rows)}

    @torch.no_grad()
    def tokens(self, read: Mapping[str, Tensor]) -> VisionFeatures:
        """See `AlignmentTargets.tokens`."""
        return VisionFeatures(read["cls"], self.compressor.decode(read["local"].float(), self.last_layer))


class OnlineTargets(AlignmentTargets):
    """What the encoder itself says of the images."""

    def __init__(self, store: Store, encoder: EncoderSpec, device: torch.device) -> None:
        """Raises UserError for images that have changed or are a stream, and for an encoder with other weights."""
        self.store, self.source = store, store.manifest.source
        self.images = self.source.open()
        if self.images.sequential:
            raise UserError(
                f"{self.source.path} is a stream, which is read in order only; choose "
                f"{option('alignment.targets')} cached"
            )
        self.index_of = {name: index for index, name in enumerate(self.images.names)}
        last_layer = (encoder.depth - 1,)
        self.encoder = load_encoder(
            encoder.name, self.source.resolution, last_layer, device, final_norm=encoder.final_norm
        )
        if self.encoder.spec.weights_sha256 != encoder.weights_sha256:
            raise UserError(
                f"encoder {encoder.name} is not the one that {store.folder} was prepared with: its weights differ"
            )

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """The images' `pixels` (B, 3, height, width), uint8. Raises UserError for one that is gone or damaged."""
        pixels: list[Tensor] = []
        for name in self.store.names(rows):
            known = name in self.index_of
            image = self.images.load(self.index_of[name], self.source.resolution) if known else None
            if image is None or isinstance(image, UnreadableImage):
                raise UserError(
                    f"{Path(self.source.path) / name} is gone or damaged; online alignment needs the images"
                )
            pixels.append(image)
        return {"pixels": torch.stack(pixels)}

    def tokens(self, read: Mapping[str, Tensor]) -> VisionFeatures:
        """See `AlignmentTargets.tokens`."""
        return self.encoder.describe(read["pixels"])
