"""What training minimises: one velocity loss per modality and a light alignment loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import State, TensorTimes, expand_as, times_of_each
from reglue.diffusion.paths import Path
from reglue.diffusion.predictions import PREDICTIONS

ALIGNMENT = "alignment"


@dataclass(frozen=True)
class TrainingSample:
    """A batch with everything random about it already drawn, so that the loss is a pure function of it."""

    data: State
    """The state at t = 0."""
    noise: State
    """ε in the same shapes."""
    time: Tensor | TensorTimes
    """(B,) in [0, 1]: one for all modalities, or that of each."""
    condition: Condition
    """(B, …) each, what is dropped already replaced by its null."""
    alignment_target: Tensor | None = None
    """The vision encoder's tokens (B, N, d), class token first where the model has one."""
    keep: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """(B,) bool, False where a modality is hidden from the model, for representation guidance (ReDi, 2504.16064)."""


def velocity_losses(predicted: State, target: State) -> State:
    """Squared error per modality and sample: {name: (B,)}, each a mean over the modality's own elements."""
    return {name: (predicted[name] - v).float().square().flatten(1).mean(1) for name, v in target.items()}


def alignment_loss(projection: Tensor, target: Tensor) -> Tensor:
    """−mean cos between projected hidden tokens and the encoder's tokens, both (B, N, d): a scalar in [−1, 1]."""
    return -F.cosine_similarity(projection.float(), target.float(), dim=-1).mean()


def loss_terms(denoiser: Denoiser, path: Path, sample: TrainingSample) -> dict[str, Tensor]:
    """The unweighted terms of the loss as scalars: one per modality, and `alignment` if the sample has targets.

    A term is the squared error of the velocity, or of the noise where the network predicts that. Where a modality is
    hidden, the model sees zeros in its place and is not asked for its velocity, which cannot be predicted from nothing.
    """
    noisy, velocity = path.interpolate(sample.data, sample.noise, sample.time)
    for name, keep in sample.keep.items():
        noisy[name] = noisy[name] * expand_as(keep, noisy[name])
    prediction = denoiser(noisy, sample.time, sample.condition)
    losses = velocity_losses(prediction.velocity, velocity)
    for name, t in times_of_each(sample.time, losses).items():
        if (weight := PREDICTIONS[denoiser.config.prediction].weight(t, path)) is not None:
            losses[name] = losses[name] * weight.to(losses[name].dtype)
    terms = {name: (loss * sample.keep[name] if name in sample.keep else loss).mean() for name, loss in losses.items()}
    if sample.alignment_target is not None:
        terms[ALIGNMENT] = alignment_loss(denoiser.projector(prediction.tap), sample.alignment_target)
    return terms


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Σ weight · term, a scalar."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
