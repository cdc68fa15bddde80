"""What is worked on: sizes of published models, and random stores and networks of these sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import timm
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reglue.commands.demo import DEMO_RECIPE
from reglue.config import Recipe
from reglue.data.manifest import Contents, Source
from reglue.data.store import Store, quantised
from reglue.data.store_writer import StoreWriter, add_codes
from reglue.data.targets import AlignmentTargets, Tokens
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import CLS, LATENT, LOCAL
from reglue.diffusion.objective import ALIGNMENT
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, load_autoencoder
from reglue.encoders.compressors import ConvCompressor
from reglue.encoders.vision import EncoderSpec, VisionEncoder, load_encoder
from reglue.errors import UserError
from reglue.papers import RECIPES

DOWNSAMPLING = 8
"""Of the SD-VAE."""
DEPTH, LAYERS = 12, (8, 9, 10, 11)
"""Blocks of DINOv2-B, and those whose features REGLUE compresses."""
Data = Literal["imagenet", "demo", "toy"]


@dataclass(frozen=True)
class Workload:
    """A recipe and the sizes of its data."""

    recipe: Recipe
    config: DenoiserConfig
    local_channels: int
    token_width: int
    """Of the vision encoder."""

    @staticmethod
    def of(data: Data, model: str | None = None, recipe: str = "reglue") -> Workload:
        """A published recipe on ImageNet's sizes at 256 px (SD-VAE, DINOv2-B), or on the demo's or a toy's."""
        if data == "imagenet":
            return imagenet(recipe, model or "B/2")
        base = DEMO_RECIPE if recipe == "reglue" else replace(RECIPES[recipe], model=DEMO_RECIPE.model)
        small = base if model is None else replace(base, model=model)
        if data == "demo":
            return sized(small, grid=(8, 8), local_channels=8, token_width=128)
        return sized(replace(small, model=model or "2x32x2/2"), grid=(8, 8), local_channels=4, token_width=32)

    def random_model(self, seed: int = 0) -> Denoiser:
        """A model whose every weight is random: as it is initialised, its outputs are zero and compare with nothing."""
        torch.manual_seed(seed)
        model = Denoiser(self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.02)
        return model


def imagenet(recipe: str, model: str, size: tuple[int, int] = (256, 256)) -> Workload:
    """A published recipe on images of a size, in pixels, with the SD-VAE and DINOv2-B."""
    grid = (size[0] // DOWNSAMPLING, size[1] // DOWNSAMPLING)
    channels = {"redi": 8}.get(recipe, 16)
    return sized(replace(RECIPES[recipe], model=model), grid=grid, local_channels=channels, token_width=768)


def sized(recipe: Recipe, grid: tuple[int, int], local_channels: int, token_width: int) -> Workload:
    """A recipe on latents of four channels and ImageNet's classes."""
    config = recipe.denoiser_config(
        latent_channels=4,
        grid=grid,
        classes=1000,  # The published code has the null label fixed at 1000.
        local_channels=local_channels,
        token_width=token_width,
    )
    return Workload(recipe, config, local_channels, token_width)


DIFFERENT = 512
"""Random images that are made; more have other names for the same files, which are decoded all the same."""


def random_images(folder: Path, count: int, resolution: int) -> Path:
    """Smooth random images a little larger than the resolution, two classes."""
    random = np.random.default_rng(0)
    files = [folder / f"class-{i % 2}" / f"{i:05d}.jpg" for i in range(count)]
    for i, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        if i >= DIFFERENT:
            file.hardlink_to(files[i % DIFFERENT])
            continue
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((resolution + 64, resolution + 32), Image.Resampling.BICUBIC).save(file)
    return folder


def parallelise(images: Path, out: Path, count: int) -> int:
    """Links to so many images of a folder, in folders of the same names. Returns how many there are.

    Raises UserError if it is no folder, which is all that theirs reads.
    """
    if not images.is_dir():
        raise UserError(f"--images {images}: name a folder of images")
    every = sorted(file for file in images.resolve().rglob("*") if file.is_file())
    chosen = every[:: max(1, len(every) // count)][:count]
    for file in chosen:
        link = out / file.relative_to(images.resolve())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return len(chosen)


def random_store(
    folder: Path,
    workload: Workload,
    rows: int,
    features_dtype: str = "float16",
    shard_rows: int = 128,
) -> Store:
    """A store of random rows in the sizes of a workload, with four layers of a vision encoder and a compressor's codes.

    The features of all rows are alike, which no reader notices.
    """
    config, width = workload.config, workload.token_width
    channels = config.shape.latent_channels
    pixels = (config.shape.grid[0] * DOWNSAMPLING, config.shape.grid[1] * DOWNSAMPLING)
    tokens = config.token_grid
    half = (0.5,) * 3
    contents = Contents(
        source=Source("random", "0", pixels, tuple(str(i) for i in range(config.classes)), rows),
        autoencoder=AutoencoderSpec(
            "random", "AutoencoderKL", "0", channels, DOWNSAMPLING, (0.0,) * channels, (0.18215,) * channels
        ),
        encoder=EncoderSpec(
            *("random", "random", "0", width, DEPTH, LAYERS, 14, tokens, pixels, pixels, half, half, "bicubic", False),
            *(("normalise", "resize"), True, "class token or mean", 5, 4),
        ),
        features=True,
        features_dtype=features_dtype,
        latent_dtype="float32",
        shard_rows=shard_rows,
        statistics_images=16,
        statistics_seed=0,
    )
    writer = StoreWriter(folder, contents)
    features = torch.randn(1, len(LAYERS) * width, *tokens)
    of_one = quantised(features) if features_dtype == "int8" else {"features": features.half()}
    for block in writer.pending:
        count = len(block)
        latent = torch.randn(2, count, channels, *config.shape.grid)
        columns = {
            "label": {"label": torch.randint(config.classes, (count,))},
            "latent": {"mean": latent[0], "std": latent[1].abs() * 0.1},
            "cls": {"cls": torch.randn(count, width)},
            "features": {name: value.expand(count, *value.shape[1:]) for name, value in of_one.items()},
        }
        writer.write(block, [f"{index}.png" for index in block], [], columns)
    store = writer.finish(torch.arange(min(rows, 16)))
    name = workload.recipe.local.compressor
    spec = ConvCompressor(len(LAYERS) * width, 256, workload.local_channels).save(folder / "compressors" / name)
    shards = (shard.rows for shard in store.manifest.columns["label"].shards)
    return add_codes(store, name, spec, (torch.randn(count, workload.local_channels, *tokens) for count in shards))


class RandomOnline(AlignmentTargets):
    """Online targets whose images need no decoding: the encoder on random pixels, alike for all rows."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder = encoder
        self.pixels = torch.randint(256, (3, *encoder.spec.image_size), dtype=torch.uint8)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """See `AlignmentTargets.read`."""
        return {"pixels": self.pixels.repeat(len(rows), 1, 1, 1)}

    def tokens(self, read: Mapping[str, Tensor]) -> Tokens:
        """See `AlignmentTargets.tokens`."""
        described = self.encoder.describe(read["pixels"])
        return Tokens(described.class_token, described.features)


def autoencoder_of(workload: Workload, device: torch.device) -> Autoencoder:
    """What decodes a workload's latents: for ImageNet the SD-VAE's sizes with random weights, or the starter kit's."""
    if workload.config.shape.grid[0] * DOWNSAMPLING < 256:
        return load_autoencoder("starter", device=device)
    widths = (128, 256, 512, 512)
    network = AutoencoderKL(
        block_out_channels=widths,  # type: ignore[reportArgumentType], annotated there as tuples of one
        down_block_types=("DownEncoderBlock2D",) * len(widths),  # type: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * len(widths),  # type: ignore[reportArgumentType]
        layers_per_block=2,
        latent_channels=workload.config.shape.latent_channels,
    )
    with TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        return load_autoencoder(folder, device=device)


def loss_weights(recipe: Recipe) -> Mapping[str, float]:
    """The weights of the published loss."""
    weights = recipe.loss_weights(0)
    assert set(weights) == {LATENT, LOCAL, CLS, ALIGNMENT}
    return weights


def random_encoder(workload: Workload, layers: tuple[int, ...], device: torch.device) -> VisionEncoder:
    """DINOv2-B with registers (a tiny network for a toy) with random weights: its speed does not depend on them."""
    width = workload.token_width
    published = width == 768
    architecture = "vit_base_patch14_reg4_dinov2" if published else "vit_tiny_patch16_224"
    sizes: dict[str, Any] = (
        {"img_size": 224}
        if published
        else {"img_size": 64, "patch_size": 16, "embed_dim": width, "depth": DEPTH, "num_heads": 2}
    )
    network = timm.create_model(architecture, num_classes=0, **sizes)
    config = {
        "architecture": architecture,
        "model_args": sizes,
        "pretrained_cfg": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
        "reglue_input": {"image_pixels_per_patch": 16, "minimum_input": 16},
    }
    rows, columns = workload.config.token_grid
    with TemporaryDirectory() as folder:
        save_file(network.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return load_encoder(folder, (rows * 16, columns * 16), layers, device)
