"""What is worked on: the sizes of published models, and networks and stores of random numbers in these sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from common import Comparison
from reglue.commands.demo import DEMO_RECIPE
from reglue.config import Recipe
from reglue.data.manifest import Contents, Source
from reglue.data.store import Store, quantised
from reglue.data.store_writer import StoreWriter, add_codes
from reglue.diffusion.conditions import CLASS
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import LATENT, Modality
from reglue.encoders.autoencoders import AutoencoderSpec
from reglue.encoders.compressors import ConvCompressor
from reglue.encoders.vision import EncoderSpec
from reglue.papers import RECIPES
from reglue.sampling import Precision

DOWNSAMPLING, LATENT_CHANNELS = 8, 4
"""Of the SD-VAE."""
CLASSES = 1000
"""ImageNet's; the published code has the null label fixed at 1000."""
DEPTH, LAYERS = 12, (8, 9, 10, 11)
"""Blocks of DINOv2-B, and those whose features REGLUE compresses."""
Data = Literal["imagenet", "demo", "toy"]


@dataclass(frozen=True)
class OfModel(Comparison):
    """Options of a benchmark of a denoiser."""

    data: Data = "imagenet"
    """Sizes: ImageNet at 256 px (SD-VAE, DINOv2-B, 16 channels), or those of `reglue demo`."""
    model: str | None = None
    """B/2, XL/2, … or DEPTHxWIDTHxHEADS/PATCH. Default: B/2, or the demo's own."""
    precision: tuple[Precision, ...] = ("bfloat16",)
    """Of our matrix products; each is a contestant, as is each of `--compile`."""

    def workload(self) -> Workload:
        """What is asked for."""
        return Workload.of("toy") if self.toy else Workload.of(self.data, self.model)


@dataclass(frozen=True)
class Workload:
    """A recipe and the sizes of its data."""

    recipe: Recipe
    config: DenoiserConfig
    local_channels: int
    token_width: int
    """Of the vision encoder."""

    @staticmethod
    def of(
        data: Data, model: str | None = None, recipe: str = "reglue", size: tuple[int, int] = (256, 256)
    ) -> Workload:
        """A published recipe in ImageNet's sizes (SD-VAE, DINOv2-B; `size` in pixels), the demo's or a toy's."""
        default, local_channels, token_width, hidden = {
            "imagenet": ("B/2", 8 if recipe == "redi" else 16, 768, 2048),
            "demo": ("6x128x2/2", 8, 128, 256),
            "toy": ("2x32x2/2", 4, 32, 64),
        }[data]
        base = DEMO_RECIPE if data == "demo" and recipe == "reglue" else RECIPES[recipe]
        sized = replace(
            base,
            model=model or default,
            local=replace(base.local, compressor=f"conv-{local_channels}"),
            alignment=replace(base.alignment, hidden=hidden),
        )
        grid = (size[0] // DOWNSAMPLING, size[1] // DOWNSAMPLING) if data == "imagenet" else (8, 8)
        channels = {LATENT: LATENT_CHANNELS, "local": local_channels, "cls": token_width}
        learned = tuple(
            Modality(part.modality, part.kind, channels[part.modality], part.column, is_class_token=part.is_class_token)
            for part in sized.learned_parts
        )
        config = sized.denoiser_config(learned, grid, {CLASS: CLASSES}, token_width)
        return Workload(sized, config, local_channels, token_width)

    def random_model(self) -> Denoiser:
        """A model whose every weight is random: as initialised, its outputs are zero and compare with nothing."""
        model = Denoiser(self.config)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        return model

    def random_store(self, folder: Path, rows: int, features_dtype: Literal["float16", "int8"] = "float16") -> Store:
        """A store of random rows, with four layers of a vision encoder and a compressor's codes.

        The features of all rows are alike, which no reader notices.
        """
        grid = self.config.grid
        size = (grid[0] * DOWNSAMPLING, grid[1] * DOWNSAMPLING)
        tokens, width, half = self.config.token_grid, self.token_width, (0.5,) * 3
        contents = Contents(
            source=Source("random", "0", size, tuple(map(str, range(CLASSES))), rows),
            autoencoder=AutoencoderSpec(
                "random", "AutoencoderKL", "0", LATENT_CHANNELS, DOWNSAMPLING, (0.0,) * 4, (0.18215,) * 4
            ),
            encoder=EncoderSpec(
                *("random", "random", "0", width, DEPTH, LAYERS, 14, tokens, size, size, half, half, "bicubic", False),
                steps=("normalise", "resize"),
                final_norm=True,
                pooling="class token or mean",
                prefix_tokens=5,
                registers=4,
            ),
            features=True,
            features_dtype=features_dtype,
            latent_dtype="float32",
            shard_rows=256,
            statistics_images=16,
            statistics_seed=0,
        )
        writer = StoreWriter(folder, contents)
        features = torch.randn(1, len(LAYERS) * width, *tokens)
        of_a_row = quantised(features) if features_dtype == "int8" else {"features": features.half()}
        for block in writer.pending:
            count = len(block)
            latent = torch.randn(2, count, LATENT_CHANNELS, *grid)
            columns = {
                "label": {"label": torch.randint(CLASSES, (count,))},
                "latent": {"mean": latent[0], "std": latent[1].abs() * 0.1},
                "cls": {"cls": torch.randn(count, width)},
                "features": {name: value.expand(count, *value.shape[1:]) for name, value in of_a_row.items()},
            }
            writer.write(block, [f"{index}.png" for index in block], [], columns)
        store = writer.finish(torch.arange(min(rows, 16)))
        name = self.recipe.local.compressor
        spec = ConvCompressor(len(LAYERS) * width, 256, self.local_channels).save(folder / "compressors" / name)
        counts = (shard.rows for shard in store.manifest.columns["label"].shards)
        return add_codes(store, name, spec, (torch.randn(count, self.local_channels, *tokens) for count in counts))
