"""What an autoencoder makes of held-out images: figures, pictures, and signs of trouble."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.data.pictures import enlarge, heat_of, titled_grid
from reglue.encoders.alignment import LatentSemantics, cosine_similarities, similarity_maps
from reglue.encoders.vision import VisionEncoder, load_encoder
from reglue.errors import UserError, option
from reglue.metrics.distances import GaussianStatistics, frechet_distance
from reglue.metrics.inception import Inception, load_inception
from reglue.metrics.latents import DEAD, ENOUGH, LatentStatistics, LatentSummary
from reglue.metrics.perceptual import Lpips, encoder_distance, load_lpips
from reglue.metrics.reconstruction import psnr, ssim
from reglue.names import INCEPTION
from reglue.reals.config import Perceptual
from reglue.reals.samples import ImageSamples, to_images, to_pixels
from reglue.reals.trainable import AlignedAutoencoder, Reconstruction
from reglue.sampling import Precision
from reglue.training.precision import autocast, matmul_precision

SMALLEST = 16
"""Pixels along a side that LPIPS needs: its network halves them four times."""
SHOWN = 8
"""Held-out images per picture."""
CELL = 112
"""Least side of an image in it in pixels."""
COLLAPSED = 0.001
"""Latents have collapsed if the images explain less than this share of the variance of every channel: a tenth of what
makes one dead, since in a network that has just begun they explain 1 to 3 %, and half of that after some steps …"""
VANISHED, BLOWN_UP = 1e-4, 1e3
"""… and they are of no use if their standard deviation is below or above these."""


class Measured(NamedTuple):
    """What has been found on a set of images."""

    figures: dict[str, float]
    latents: LatentSummary


class Judges(NamedTuple):
    """The frozen networks."""

    encoder: VisionEncoder
    """Describes the last block, and one after each quarter before it."""
    perceptual: Lpips | None
    """Of the loss; None where that is by the encoder."""
    lpips: Lpips | None
    """Measures only, as does the next."""
    inception: Inception | None


def load_judges(
    name: str,
    size: tuple[int, int],
    perceptual: Perceptual,
    device: torch.device,
    lpips: Sequence[Path] = (),
    inception: str | None = None,
    *,
    final_norm: bool = True,
) -> Judges:
    """The vision encoder of a name, and the networks of LPIPS and rFID that are asked for.

    `lpips` are the files of LPIPS to measure by, those of the loss if there are none; `inception` is a file or the
    name of the network of rFID. Raises UserError for what cannot be loaded.
    """
    encoder = load_encoder(name, size, device=device, final_norm=final_norm)
    depth = encoder.spec.depth
    layers = tuple(sorted({max(1, depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}))
    encoder = VisionEncoder(encoder.network, replace(encoder.spec, layers=layers)).to(device)
    if (lpips or not perceptual.by_encoder) and min(size) < SMALLEST:
        without = f"leave out {option('measure_lpips')}" if lpips else f"use {option('perceptual.network')} encoder"
        raise UserError(
            f"{option('resolution')} {size[0]}×{size[1]}: LPIPS needs at least {SMALLEST} pixels along each side; "
            f"{without}"
        )
    of_loss = None if perceptual.by_encoder else load_lpips([Path(file) for file in perceptual.network]).to(device)
    measured = load_lpips([Path(file) for file in lpips], "measure_lpips").to(device) if lpips else of_loss
    return Judges(encoder, of_loss, measured, _inception(inception, device) if inception else None)


def _inception(name: str, device: torch.device) -> Inception:
    """The network of rFID by its file or its name."""
    if name != INCEPTION and not Path(name).is_file():
        raise UserError(
            f"{option('measure_inception')} {name}: no such file; give {INCEPTION}, or a file of its weights"
        )
    file = None if name == INCEPTION else Path(name)
    return load_inception(file, device, otherwise=f"{option('measure_inception')} FILE")


@torch.no_grad()
def evaluate(
    model: AlignedAutoencoder, judges: Judges, batches: Iterable[tuple[Tensor, Tensor]], precision: Precision
) -> Measured:
    """Figures of an autoencoder on images: means over the images, and Fréchet distances between the two sets.

    `rfid` is that of the Inception's features, between the reconstructions of these images and the same images; it
    falls with their number, so only figures of equally many compare. `frechet_distance` is that of the class tokens of
    the encoder of the training, as `encoder_distance` is one by its patches: what has been trained for looks better.
    Beside the cosines stand those with the features of the image before (`…_unrelated`): what a prediction gets that
    says nothing of its image.

    Reconstructions are of drawn latents, as a decoder meets them, and are measured after rounding to 8 bits.
    `latent_std` is the standard deviation of all that is drawn from the posterior, `signal_std` that of its means over
    images, at the same channel and position.
    """
    spec = judges.encoder.spec
    tokens: list[list[Tensor]] = []
    pooled: list[list[Tensor]] = []
    before: tuple[Tensor, Tensor] | None = None
    latents: LatentStatistics | None = None
    per_image: dict[str, list[Tensor]] = {}
    for pixels, noise in batches:
        originals = to_images(pixels)
        with matmul_precision(pixels.device, precision), autocast(pixels.device, precision):
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
            others, before = _shifted(before, targets)
            rest = LatentSemantics(*(estimates[len(pixels) - len(others[0]) :] for estimates in out.semantics))
            found["patch_cosine_unrelated"], found["class_cosine_unrelated"] = cosine_similarities(rest, *others)
        for name, values in found.items():
            per_image.setdefault(name, []).append(values.double().cpu())
        if judges.inception:
            pooled.append([judges.inception.describe(shown).features.float().cpu() for shown in (pixels, pixels_out)])
        tokens.append([seen.class_token.float().cpu(), seen_out.class_token.float().cpu()])
        latents = latents or LatentStatistics(out.mean.shape[1:], pixels.device)
        latents.update(out.mean, out.log_variance, out.latents)
    distances = {"frechet_distance": tokens, "rfid": pooled}
    assert latents is not None
    summary = latents.summary()
    figures = {name: torch.cat(values).mean().item() for name, values in per_image.items()}
    figures |= {name: _distance(pairs) for name, pairs in distances.items() if pairs}
    return Measured(figures | summary.figures(), summary)


def _shifted(
    before: tuple[Tensor, Tensor] | None, now: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What images were described by before each of a batch (B, …), and the last of it for the next call.

    The very first image has none before it, so that the first batch gives one less.
    """
    joined = now if before is None else tuple(torch.cat(both) for both in zip(before, now, strict=True))
    patches, class_token = joined
    return (patches[:-1], class_token[:-1]), (patches[-1:], class_token[-1:])


def _distance(pairs: list[list[Tensor]]) -> float:
    """The Fréchet distance between two sets of features, which come as pairs of batches (B, D); NaN if one is not
    finite."""
    sets = [torch.cat(batches) for batches in zip(*pairs, strict=True)]
    if not all(bool(features.isfinite().all()) for features in sets):
        return math.nan
    return frechet_distance(*(GaussianStatistics(features.shape[1]).update(features).gaussian for features in sets))


def check_latents(latents: LatentSummary, step: int, sound: int | None) -> None:
    """Raises UserError if the latents carry nothing, or have grown beyond use.

    `sound` is the step of the last checkpoint, which the message names; None if there is none.
    """
    kept = f"the checkpoint of step {sound} is the last sound one" if sound else "there is no sound checkpoint yet"
    best = max(latents.shares)
    when = f"at step {step} (standard deviation {latents.std:.3g}; of the best channel, images explain {best:.2%})"
    rate, weight = option("optimisation.learning_rate"), option("kl.weight")
    if not math.isfinite(latents.std) or latents.std > BLOWN_UP:
        raise UserError(f"the latents have blown up {when}; raise {weight} or lower {rate}, in a new folder; {kept}")
    if latents.std < VANISHED:
        raise UserError(f"the latents have vanished {when}; raise {weight}, in a new folder; {kept}")
    if latents.images >= ENOUGH and best < COLLAPSED:
        raise UserError(
            f"the latents have collapsed {when}; lower {weight}, or {rate} if that is small already, in a new folder; "
            f"{kept}"
        )


def warning_of_dead_channels(latents: LatentSummary, step: int) -> str | None:
    """A line that names the channels that say nothing of an image; None if all say something."""
    if not latents.dead:
        return None
    named, count = ", ".join(map(str, latents.dead)), len(latents.signal)
    return (
        f"warning: step {step}: images explain less than {DEAD:.0%} of the variance of latent channels {named} "
        f"(of 0 to {count - 1}): they are dead, unless training has just begun; if they stay so, lower "
        f"{option('kl.weight')} or choose fewer channels"
    )


@torch.no_grad()
def draw(
    model: AlignedAutoencoder, encoder: VisionEncoder, held_out: ImageSamples, device: torch.device
) -> Image.Image:
    """Some held-out images as a picture of rows: originals, reconstructions, and how alike each place is to the middle.

    The likeness is the cosine of the encoder's patches, of what the alignment network makes of the latents (if there is
    one), and of the latents themselves, from dark (opposite) to light (alike). Each row begins with what it shows.
    """
    rows = torch.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).long().tolist()
    pixels, noise = (torch.stack(tensors).to(device) for tensors in zip(*(held_out[row] for row in rows), strict=True))
    out: Reconstruction = model(to_images(pixels), noise)
    maps = {"likeness to the middle: encoder": encoder.describe(pixels).features[:, -encoder.spec.width :]}
    maps |= {"likeness to the middle: aligned latents": out.semantics.patches} if out.semantics else {}
    maps["likeness to the middle: latents"] = out.latents
    shown = {"original": pixels, "reconstruction": to_pixels(out.images)}
    pictures = [images.permute(0, 2, 3, 1).cpu().numpy() for images in shown.values()]
    pictures += [enlarge(heat_of(similarity_maps(features)), held_out.size) for features in maps.values()]
    factor = -(-CELL // min(held_out.size))
    cells = np.concatenate(pictures).repeat(factor, 1).repeat(factor, 2)
    return Image.fromarray(titled_grid(cells, len(rows), row_titles=[*shown, *maps]))


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
        with matmul_precision(pixels.device, precision), autocast(pixels.device, precision):
            posterior = model.network.encode(to_images(pixels)).latent_dist  # type: ignore[reportAttributeAccessIssue]
        latents = posterior.mean.float() + posterior.std.float() * noise
        statistics.update(latents.reshape(-1, 1))
    return statistics.mean.item(), statistics.covariance.sqrt().item()
