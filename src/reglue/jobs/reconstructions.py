"""What an autoencoder makes of held-out images: figures, pictures, and signs of trouble."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.data.pictures import enlarge, heat_of, image_grid
from reglue.data.samples import ImageSamples, to_images, to_pixels
from reglue.errors import UserError
from reglue.files import replacing
from reglue.latents.alignment import cosine_similarities, similarity_maps
from reglue.latents.recipe import Perceptual
from reglue.latents.trainable import AlignedAutoencoder, Reconstruction
from reglue.metrics.distances import GaussianStatistics, frechet_distance
from reglue.metrics.perceptual import Lpips, encoder_distance, load_lpips
from reglue.metrics.reconstruction import psnr, ssim
from reglue.runs import ranks
from reglue.runs.ranks import Precision
from reglue.semantics.encoders import VisionEncoder, load_encoder

SHOWN = 8
"""Held-out images per picture."""
COLLAPSED = 0.01
"""Latents have collapsed if the posterior's means vary by less than this share of the latents' standard deviation …"""
VANISHED, BLOWN_UP = 1e-4, 1e3
"""… and are of no use if that standard deviation is below or above these."""


class Judges(NamedTuple):
    """The frozen networks."""

    encoder: VisionEncoder
    """Describes the last block, and one after each quarter before it."""
    lpips: Lpips | None


def load_judges(
    name: str, size: tuple[int, int], perceptual: Perceptual, device: torch.device, *, final_norm: bool = True
) -> Judges:
    """The vision encoder of a name, and LPIPS if that is asked for. Raises UserError for what cannot be loaded."""
    encoder = load_encoder(name, size, device=device, final_norm=final_norm)
    depth = encoder.spec.depth
    layers = tuple(sorted({max(1, depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}))
    encoder = VisionEncoder(encoder.network, replace(encoder.spec, layers=layers)).to(device)
    lpips = None if perceptual.by_encoder else load_lpips([Path(file) for file in perceptual.network]).to(device)
    if lpips and min(size) < 16:
        raise UserError(
            f"--resolution {size[0]}×{size[1]}: LPIPS needs 16 pixels at least; use --perceptual.network encoder"
        )
    return Judges(encoder, lpips)


@torch.no_grad()
def evaluate(
    model: AlignedAutoencoder, judges: Judges, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision
) -> dict[str, float]:
    """Figures of an autoencoder on images: means over the images, and the Fréchet distance between the two sets.

    That distance is of the vision encoder's class tokens, so it is no rFID, which is of the Inception's features.

    Reconstructions are of drawn latents, as a decoder meets them, and are measured after rounding to 8 bits.
    `signal_std` is the standard deviation of the posterior's means, `latent_std` that of what is drawn from it.
    """
    spec = judges.encoder.spec
    sets = [GaussianStatistics(spec.width) for _ in range(2)]
    latents, signal = GaussianStatistics(1), GaussianStatistics(1)
    per_image: dict[str, list[Tensor]] = {}
    for pixels, noise in batches:
        originals = to_images(pixels)
        with ranks.autocast(pixels.device, precision):
            out: Reconstruction = model(originals, noise)
        pixels_out = to_pixels(out.images)
        seen, seen_out = judges.encoder.describe(pixels), judges.encoder.describe(pixels_out)
        found = {
            "psnr": psnr(pixels, pixels_out),
            "ssim": ssim(pixels, pixels_out),
            "encoder_distance": encoder_distance(seen.features, seen_out.features, len(spec.layers)),
            "kl": out.kl(),
        }
        if judges.lpips:
            found["lpips"] = judges.lpips(originals, to_images(pixels_out))
        if out.semantics:
            targets = judges.encoder.last_layer(seen)
            found["patch_cosine"], found["class_cosine"] = cosine_similarities(out.semantics, *targets)
        for name, values in found.items():
            per_image.setdefault(name, []).append(values.double().cpu())
        for statistics, tokens in zip(sets, (seen, seen_out), strict=True):
            statistics.update(tokens.class_token)
        latents.update(out.latents.reshape(-1, 1))
        signal.update(out.mean.reshape(-1, 1))
    return {
        **{name: torch.cat(values).mean().item() for name, values in per_image.items()},
        "frechet_distance": (
            frechet_distance(*(one.gaussian for one in sets)) if bool(sets[1].mean.isfinite().all()) else math.nan
        ),
        "latent_mean": latents.mean.item(),
        "latent_std": latents.covariance.sqrt().item(),
        "signal_std": signal.covariance.sqrt().item(),
    }


def check_latents(figures: dict[str, float], step: int) -> None:
    """Raises UserError if the latents carry nothing, or have grown beyond use."""
    std, signal = figures["latent_std"], figures["signal_std"]
    told = f"at step {step} (standard deviation {std:.3g}, of which the images explain {signal:.3g})"
    if not math.isfinite(std) or std > BLOWN_UP:
        raise UserError(
            f"the latents have blown up {told}; raise --kl.weight or lower the learning rate, in a new folder"
        )
    if std < VANISHED:
        raise UserError(f"the latents have vanished {told}; raise --kl.weight, in a new folder")
    if signal < COLLAPSED * std:
        raise UserError(f"the latents have collapsed {told}; lower --kl.weight, in a new folder")


@torch.no_grad()
def draw(
    path: Path, model: AlignedAutoencoder, encoder: VisionEncoder, held_out: ImageSamples, device: torch.device
) -> None:
    """Some held-out images as a picture of rows: originals, reconstructions, and how alike each place is to the middle.

    The likeness is the cosine of the encoder's patches, of what the alignment network makes of the latents (if there is
    one), and of the latents themselves.
    """
    rows = torch.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).long().tolist()
    pixels, noise = (torch.stack(tensors).to(device) for tensors in zip(*(held_out[row] for row in rows), strict=True))
    out: Reconstruction = model(to_images(pixels), noise)
    maps = [encoder.describe(pixels).features[:, -encoder.spec.width :]]
    maps += [out.semantics.patches] if out.semantics else []
    maps.append(out.latents)
    pictures = [images.permute(0, 2, 3, 1).cpu().numpy() for images in (pixels, to_pixels(out.images))]
    pictures += [enlarge(heat_of(similarity_maps(features)), held_out.size) for features in maps]
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as beside:
        Image.fromarray(image_grid(np.concatenate(pictures), columns=len(rows))).save(beside, format="png")


def semantic_lengths(encoder: VisionEncoder, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Root mean square length of an encoder's features at a patch of images, and of their class tokens."""
    squares, count = torch.zeros(2, dtype=torch.float64), 0
    for pixels, _ in batches:
        patches, class_token = encoder.last_layer(encoder.describe(pixels))
        sums = [patches.double().square().sum(1).mean((1, 2)).sum(), class_token.double().square().sum()]
        squares, count = squares + torch.stack(sums).cpu(), count + len(pixels)
    of_patches, of_class_tokens = (squares / count).sqrt().tolist()
    return of_patches, of_class_tokens


@torch.no_grad()
def latent_mean_std(
    model: AlignedAutoencoder, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision
) -> tuple[float, float]:
    """Mean and standard deviation over all numbers of the latents that images give, in float64."""
    statistics = GaussianStatistics(1)
    for pixels, noise in batches:
        with ranks.autocast(pixels.device, precision):
            posterior = model.network.encode(to_images(pixels)).latent_dist  # type: ignore[reportAttributeAccessIssue]
        latents = posterior.mean.float() + posterior.std.float() * noise
        statistics.update(latents.reshape(-1, 1))
    return statistics.mean.item(), statistics.covariance.sqrt().item()
