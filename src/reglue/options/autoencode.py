"""The options of `reglue autoencode`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from reglue.errors import UserError, require
from reglue.files import TakesPaths
from reglue.options import ready
from reglue.reals.config import Architecture, AutoencoderRecipe, check_size


@dataclass(frozen=True)
class Autoencode(TakesPaths):
    """Train an autoencoder, from scratch or from a published one, whose latents are aligned with a vision encoder
    (ReaLS).

    The result is a folder for `reglue prepare --autoencoder`. The same command again resumes with the same bits. Many
    GPUs share the work: torchrun … -m reglue autoencode …
    """

    images: Positional[Path]
    """Images of any kind that `reglue prepare` takes; their classes are ignored."""
    out: Positional[Path]
    """Folder of the autoencoder: new, or one to resume."""
    recipe: Annotated[AutoencoderRecipe, tyro.conf.arg(name="")] = field(default_factory=AutoencoderRecipe)
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Start from this AutoencoderKL: a short name, a name on the hub (OWNER/REPOSITORY) or a folder in diffusers'
    layout. Default: from scratch."""
    resolution: int | tuple[int, int] = 256
    """Side of the images in pixels, or height and width. Images are scaled to cover it, then cropped."""
    encoder: str = "dinov2-b-reg"
    """Vision encoder to align with: starter, a short name, timm:NAME, NAME@FILE, a folder or a file of weights.
    DINOv2's published heads read encoders without registers, such as dinov2-b. encoder_distance and frechet_distance
    are measured by it too, although training reduces them; --measure-lpips and --measure-inception use networks that
    training has not seen."""
    final_norm: bool = True
    """Align with features after the encoder's final norm. DINOv2's published depth heads read those before it."""
    validation: float | Path = 0.05
    """Share of the images held out for evaluation, or another folder of images."""
    validation_images: int = 5000
    """Evaluate on at most this many of them."""
    measure_lpips: tuple[Path, ...] = ()
    """Measure LPIPS even if it is not the loss: its files, as for --perceptual.network."""
    measure_inception: str | None = None
    """Measure rFID too: inception, whose weights are downloaded, or a file of them, as for --feature-network of `reglue
    evaluate`. It is measured on the held-out images, at most --validation-images; published figures use 50000."""
    statistics_images: int = 10_000
    """Number of training images, drawn at random, over which the latents' mean and standard deviation are computed."""
    seed: int = 0
    """Seed of the initial weights, the held-out images, the order of the others and all noise."""
    evaluate_every: int | None = None
    """Steps between evaluations, with pictures. Default: one epoch."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl, where training ends if the latents collapse or diverge."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Number of checkpoints to keep; 0 keeps all."""
    track: tuple[str, ...] = ()
    """Where figures, pictures and the recipe go too, beside metrics.jsonl: tensorboard, wandb, trackio, or registered
    trackers of your own. They write to this machine alone unless your own settings for them say otherwise."""
    workers: int = 2
    """Threads that decode images ahead, per process of torchrun; 0 decodes when needed."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    deterministic: bool = True
    """The same bits from the same command on a GPU too, as far as PyTorch can: gradients of attention and of resampling
    may differ in their last bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "validation_images", "statistics_images", at_least=2)
        require(self, "resolution", "evaluate_every", "log_every", "checkpoint_every", at_least=1)
        require(self, "workers", "seed", "keep", at_least=0)
        if self.recipe.optimisation.compile in ("blocks", "auto"):
            raise UserError(
                f"--optimisation.compile {self.recipe.optimisation.compile} is for transformers; choose model for an "
                "autoencoder, or no"
            )
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise UserError(
                f"--validation {self.validation}: choose a share between 0 and 1, such as 0.05, or a folder"
            )
        if self.source is not None and self.recipe.architecture != Architecture():
            raise UserError("--architecture is for training from scratch; leave it out with --from, which has its own")
        if self.recipe.adversary.present:
            check_size(self.size, self.recipe.adversary.layers)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def written(self) -> str:
        """The last line: see `options`."""
        return ready(self.out, "prepare", self.images, "store", "--autoencoder", self.out)
