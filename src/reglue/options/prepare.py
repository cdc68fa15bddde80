"""The options of `reglue prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from reglue.data.reading import Reading, Subset
from reglue.errors import UserError, require
from reglue.files import TakesPaths
from reglue.options import ready
from reglue.sampling import Precision


@dataclass(frozen=True)
class Prepare(TakesPaths):
    """Encode images once, so that training never has to.

    The same command again continues where an interrupted one stopped. Many GPUs or machines with one disk share the
    work: torchrun … -m reglue prepare …
    """

    images: Positional[Path]
    """A folder of images, with one sub-folder per class, or none (unconditional). Or .tar (WebDataset) or .parquet
    files: a file, a folder or a pattern ('shard-{00..99}.tar'). Or a data set that `datasets` has saved, or
    hf:OWNER/NAME."""
    out: Positional[Path]
    """Folder of the store: new, empty, or begun by the same command."""
    resolution: int | tuple[int, int] = 256
    """Side of the prepared images in pixels, or height and width. Images are scaled to cover it, then cropped."""
    autoencoder: str = "sd-vae-ft-mse"
    """Autoencoder: starter, a short name, a name on the hub (OWNER/REPOSITORY[/SUBFOLDER]), a folder in diffusers'
    layout (AutoencoderKL, AsymmetricAutoencoderKL, AutoencoderKLFlux2, VQModel, AutoencoderTiny or AutoencoderDC), a
    checkpoint of Stable Diffusion, or NAME@FILE for a KL autoencoder in the latent space of that short name."""
    encoder: str = "dinov2-b-reg"
    """Vision encoder: starter, a short name, timm:NAME, NAME@FILE, a folder or a file of weights. none stores latents
    alone."""
    layers: tuple[int, ...] | None = None
    """Blocks of the encoder whose features are stored, counted from 0. Default: the last four."""
    final_norm: bool = True
    """Apply the encoder's final norm to the features of each of these blocks."""
    features: bool = False
    """Store the patch features too, which `reglue compress` learns from."""
    features_dtype: Literal["float16", "int8"] = "float16"
    """With --features: their precision on disk. int8 takes half the space, with one scale per channel and image."""
    statistics_images: int = 10_000
    """Number of images, drawn at random, over which means and standard deviations are computed."""
    flips: bool = False
    """Store the mirror image of every image too: twice the rows, time and disk space."""
    share: float = 1.0
    """Keep this share of each class, drawn at random, but at least one image."""
    per_class: int | None = None
    """Keep at most this many images of each class, drawn at random."""
    seed: int = 0
    """Seed of all random choices."""
    batch_size: int = 16
    """Images encoded at once: affects speed and memory, and results by rounding alone."""
    shard_size: int = 256
    """Images per file of the store. A shard is held in memory until it is written."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision in which latents are stored."""
    precision: Precision = "float32"
    """Precision of the networks' matrix products. bfloat16 is faster where the processor or GPU supports it; stored
    values then differ in the third digit."""
    workers: int | None = None
    """Processes that decode images, per process of torchrun; 0 decodes in the main process. Default: one per core, at
    most 16."""
    strict: bool = False
    """Stop at the first image that cannot be read, instead of reporting and skipping it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = Reading()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "resolution", "batch_size", "shard_size", "statistics_images", "per_class", at_least=1)
        require(self, "workers", "seed", at_least=0)
        require(self, "share", more_than=0, at_most=1)
        if self.features_dtype != "float16" and not self.features:
            raise UserError(f"--features-dtype {self.features_dtype} is about patch features: add --features")
        if self.images.is_dir() and self.out.resolve().is_relative_to(self.images.resolve()):
            raise UserError(
                f"{self.out} lies within {self.images}, where a store would be taken for a class; choose another folder"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the prepared images."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def subset(self) -> Subset | None:
        """Which images are taken; None for all."""
        return None if self.share == 1 and self.per_class is None else Subset(self.share, self.per_class, self.seed)

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        recipe = ("train", "sit", "--store", self.out, "--out", "run")
        return ready(self.out, *(("compress", self.out) if self.features else recipe))
