"""What training minimises: one velocity loss per modality and a light alignment loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Denoiser, Prediction
from reglue.diffusion.modalities import State, TensorTimes, expand_as, times_of_each
from reglue.diffusion.paths import Path
from reglue.diffusion.predictions import PREDICTIONS, PredictionKind

ALIGNMENT, COSINE, VARIANCE = "alignment", "cosine", "variance"


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
    learned: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """(B,) bool, False where a modality is seen, but its velocity is not asked for: where it is known already."""


def velocity_losses(predicted: State, target: State) -> State:
    """Squared error per modality and sample: {name: (B,)}, each a mean over the modality's own elements."""
    return {name: (predicted[name] - v).float().square().flatten(1).mean(1) for name, v in target.items()}


def variance_losses(
    kind: PredictionKind, predicted: Prediction, target: State, data: State, times: TensorTimes, path: Path
) -> State:
    """What trains the learned variance of each map, which it alone feels, in bits per element: {name: (B,)}."""
    return {
        name: kind.variance_loss(variance, predicted.velocity[name] - target[name], data[name], times[name], path)
        for name, variance in (predicted.variance or {}).items()
    }


def cosine_losses(predicted: State, target: State) -> Tensor:
    """1 − cos between velocities at a position, by the channels of all maps, (B,): means over positions, in [0, 2]."""
    ours, theirs = (
        torch.cat([v.float() for name, v in part.items() if target[name].ndim == 4], dim=1)
        for part in (predicted, target)
    )
    return (1 - F.cosine_similarity(ours, theirs, dim=1)).flatten(1).mean(1)


def alignment_loss(projection: Tensor, target: Tensor) -> Tensor:
    """−mean cos between projected hidden tokens and the encoder's tokens, both (B, N, d): a scalar in [−1, 1]."""
    return -F.cosine_similarity(projection.float(), target.float(), dim=-1).mean()


def loss_terms(denoiser: Denoiser, path: Path, sample: TrainingSample, cosine: bool = False) -> dict[str, Tensor]:
    """The unweighted terms of the loss as scalars: one per modality, `alignment` if the sample has targets, `variance`
    if the network learns one (the sum over maps), and `cosine` on request.

    A term is the squared error of the velocity, or of the noise where the network predicts that. Where a modality is
    hidden, the model sees zeros in its place and is not asked for its velocity, which cannot be predicted from nothing.
    """
    kind, times = PREDICTIONS[denoiser.config.prediction], times_of_each(sample.time, sample.data)
    noisy, velocity = path.interpolate(sample.data, sample.noise, sample.time)
    for name, keep in sample.keep.items():
        noisy[name] = noisy[name] * expand_as(keep, noisy[name])
    prediction = denoiser(noisy, sample.time, sample.condition)

    asked = sample.keep | {name: mask & sample.keep.get(name, mask) for name, mask in sample.learned.items()}

    def mean(losses: State) -> dict[str, Tensor]:
        return {name: (loss * asked[name] if name in asked else loss).mean() for name, loss in losses.items()}

    losses = velocity_losses(prediction.velocity, velocity)
    for name, t in times.items():
        if name in losses and (weight := kind.weight(t, path)) is not None:
            losses[name] = losses[name] * weight.to(losses[name].dtype)
    terms = mean(losses)
    if prediction.variance is not None:
        of_maps = mean(variance_losses(kind, prediction, velocity, sample.data, times, path))
        terms[VARIANCE] = torch.stack([*of_maps.values()]).sum()
    if cosine:
        parts = (
            {name: v * expand_as(asked[name], v) if name in asked else v for name, v in of.items()}
            for of in (prediction.velocity, velocity)
        )
        terms[COSINE] = cosine_losses(*parts).mean()
    if sample.alignment_target is not None:
        terms[ALIGNMENT] = alignment_loss(denoiser.projector(prediction.tap), sample.alignment_target)
    return terms


def weighted_sum(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Σ weight · term, a scalar."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
