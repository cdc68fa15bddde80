"""Train the starter kit's autoencoder: a small diffusers AutoencoderKL, four latent channels at a quarter of the size.

    python scripts/starter_kit/train_autoencoder.py --images imagenette-224.tar --out autoencoder

The loss is L1 on pixels and on their differences, with a little KL. At the end the latents' statistics are measured
and written into the configuration, so that normalised latents have mean 0 and standard deviation 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from shared import minimise, random_views
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 64
"""Side of a view in pixels; half of the batches are halved to half that side."""
WIDTHS = (16, 32, 64)
"""Channels per resolution, from the full one; each one more halves the grid."""
BATCH, LEARNING_RATE, EMA = 8, 2e-3, 0.998
KL, DIFFERENCES = 1e-4, 0.5
"""Weights beside the L1 of pixels: of the KL divergence to a standard normal, a mean over latent elements; and of the
L1 of differences of neighbouring pixels, which keeps edges sharp."""


@dataclass(frozen=True)
class TrainAutoencoder:
    """Options of the training."""

    images: Path
    """A tar file laid out as `train/class/image`."""
    out: Path
    """Folder to write, in the layout of diffusers."""
    minutes: float = 20.0
    """Time to train; the learning rate falls to zero over it."""
    views: int = 8_000
    """Crops and shapes to train on, made once."""
    image_limit: int = 5_000
    """Photographs to read."""
    threads: int = 1


def train_autoencoder(options: TrainAutoencoder) -> None:
    """Train, measure the latents, save."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    views = random_views(options.images, options.image_limit, options.views, SIZE, rng)
    config: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "down_block_types": ("DownEncoderBlock2D",) * len(WIDTHS),
        "up_block_types": ("UpDecoderBlock2D",) * len(WIDTHS),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "mid_block_add_attention": False,
    }
    autoencoder: Any = AutoencoderKL(**config)
    nn.Module.to(autoencoder, memory_format=torch.channels_last)
    average = copy.deepcopy(autoencoder).requires_grad_(False)
    optimiser = torch.optim.AdamW(autoencoder.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)

    for step, progress in minimise(optimiser, options.minutes):
        # The weights of the step before; at first all of the initial ones.
        with torch.no_grad():
            decay = min(EMA, step / (step + 9))
            torch._foreach_lerp_(list(average.parameters()), list(autoencoder.parameters()), 1 - decay)  # type: ignore[reportPrivateImportUsage]
        rows = rng.choice(len(views), BATCH, replace=False)
        images = random_scale(views[rows].float() / 127.5 - 1, rng).to(memory_format=torch.channels_last)
        posterior: DiagonalGaussianDistribution = autoencoder.encode(images).latent_dist
        decoded: Tensor = autoencoder.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        pixels = F.l1_loss(decoded, images)
        differences = sum(F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3))
        (pixels + DIFFERENCES * differences + KL * kl).backward()
        psnr = -10 * torch.log10(F.mse_loss(decoded.detach().clamp(-1, 1), images) / 4)
        progress.set_postfix(step=step, pixels=f"{pixels:.4f}", kl=f"{kl:.2f}", psnr=f"{psnr:.2f}")

    mean, std = latent_statistics(average, views[:2000])
    print(f"latent mean {mean:.4f}, standard deviation {std:.4f}")
    average.register_to_config(scaling_factor=1 / std, shift_factor=mean, force_upcast=False)
    average.half().save_pretrained(options.out)


def random_scale(images: Tensor, rng: np.random.Generator) -> Tensor:
    """The images at half size, or a crop of five eighths of their side."""
    if rng.random() < 0.5:
        return F.avg_pool2d(images, 2)
    side = images.shape[-1] * 5 // 8
    top, left = rng.integers(images.shape[-1] - side + 1, size=2)
    return images[:, :, top : top + side, left : left + side]


@torch.no_grad()
def latent_statistics(autoencoder: Any, views: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over all elements of sampled latents, in float64; the views at both sizes count."""
    parts = [part.float() / 127.5 - 1 for part in views.split(100)]
    sizes = [*parts, *(F.avg_pool2d(part, 2) for part in parts)]
    latents = torch.cat([autoencoder.encode(images).latent_dist.sample().double().flatten() for images in sizes])
    return latents.mean().item(), latents.std().item()


if __name__ == "__main__":
    train_autoencoder(tyro.cli(TrainAutoencoder, description=__doc__))
