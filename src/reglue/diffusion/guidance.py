"""Guidance: from a denoiser to the velocity function that a sampler follows.

Every kind of guidance moves the conditional velocity away from that of a worse model: one without the condition
(classifier-free), one without the semantic maps (representation guidance, ReDi section 3.4), or a weaker network
(autoguidance, arXiv 2406.02507):

    v = v_c + Σ (w − 1)·(v_c − v_worse)

A scale of 1 is no guidance and costs nothing. To add a kind, write a `Guider` and register in `GUIDERS` what builds it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import DenoiserFunction, Prediction
from reglue.diffusion.modalities import (
    LATENT,
    Modality,
    State,
    TensorTimes,
    Times,
    batch_size,
    concatenate_states,
    split_state,
    times_of_each,
)
from reglue.diffusion.paths import LINEAR, Path
from reglue.diffusion.specs import Guidance as Guidance
from reglue.seeds import torch_generator


class Velocity(ABC):
    """What a sampler follows."""

    path: Path = LINEAR
    """The interpolant, which scores and predictions of the data depend on."""
    discontinuities: tuple[float, ...] = ()
    """The times, strictly between 0 and 1, at which the velocity of a modality that has come to them jumps."""
    known_times: tuple[float, ...] = ()
    """The times of the chain that its network was trained on, rising; none where it knows them all."""

    @property
    def latest(self) -> float:
        """The noisiest time that it knows, where samples begin."""
        return max(self.known_times, default=1.0)

    @abstractmethod
    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        """dx/dt of `state` at `times`, in its shapes and precision.

        `times` may have the length of the step as `SPAN`: then it is the mean of dx/dt over it, if the network knows.

        `decided_at` decides in place of `times` whether guidance applies, for a step is guided as a whole or not at
        all: it is where the step began in the published Heun sampler, and the step's middle where steps end at
        discontinuities.
        """

    def predict(self, state: State, times: Times, decided_at: Times | None = None) -> Prediction:
        """The same, with what a network may give beside it: a learned variance, hidden tokens."""
        return Prediction(self(state, times, decided_at), None)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation of a network is given."""

    network: DenoiserFunction
    state: State
    condition: Condition
    times: Times

    def without(self, names: Iterable[str], by_noise: bool) -> Evaluation:
        """The same without some modalities: with zeros in their place, or `by_noise`, at t = 1."""
        state, times = dict(self.state), dict(self.times)
        for name in names:
            x = state[name]
            state[name] = noise_like(name, x.shape[1:], x.dtype, x.device).expand_as(x) if by_noise else 0 * x
            times[name] = 1.0 if by_noise else times[name]
        return replace(self, state=state, times=times)


@lru_cache(maxsize=8)
def noise_like(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The noise (1, …) that hides a modality: one for all images and times, so that what is integrated is an ODE."""
    return torch.randn(1, *shape, generator=torch_generator(0, f"hidden {name}")).to(device, dtype)


@dataclass(frozen=True)
class Guided:
    """What guiders are built for: the model that is guided."""

    denoiser: DenoiserFunction
    condition: Condition
    modalities: Sequence[Modality]
    weaker: DenoiserFunction | None = None
    """The second network of autoguidance."""
    any_times: bool = False
    """Whether the model knows all combinations of times, so that noise hides a modality from it."""


class Guider(ABC):
    """One kind of guidance, away from a worse model."""

    @abstractmethod
    def worse(self, conditional: Evaluation) -> Evaluation:
        """What the worse model is given, in place of what the conditional one is."""

    @abstractmethod
    def scale(self, modality: str, like: Tensor) -> float | Tensor:
        """The scale w of a modality, a number or a tensor that broadcasts to `like` (B, C, …)."""

    def move(self, velocity: State, conditional: State, worse: State) -> State:
        """The velocity, moved away from that of the worse model: v + (w − 1)·(v_c − v_worse)."""
        return {
            name: v + (self.scale(name, v) - 1) * (conditional[name] - worse[name].to(v.dtype))
            for name, v in velocity.items()
        }


@dataclass(frozen=True)
class ClassifierFree(Guider):
    """Away from the model without its condition (arXiv 2207.12598)."""

    guidance: Guidance
    null: Condition
    hidden: Sequence[str] = ()
    """Modalities that the model without a condition does not see either: they are noise for it."""

    def worse(self, conditional: Evaluation) -> Evaluation:
        """The same state without its condition."""
        return replace(conditional.without(self.hidden, by_noise=True), condition=self.null)

    def scale(self, modality: str, like: Tensor) -> float | Tensor:
        """One number per modality, or 1 for the latent channels that are not guided."""
        channels = self.guidance.guided_channels
        if modality != LATENT or channels is None:
            return self.guidance.scale_of(modality)
        per_channel = torch.ones(like.shape[1], dtype=like.dtype, device=like.device)
        per_channel[:channels] = self.guidance.scale_of(modality)
        return per_channel.view(1, -1, 1, 1)


@dataclass(frozen=True)
class Representation(Guider):
    """Away from the model that does not see some modalities (ReDi, arXiv 2504.16064, section 3.4)."""

    representation_scale: float
    hidden: Sequence[str]
    by_noise: bool = False

    def worse(self, conditional: Evaluation) -> Evaluation:
        """The same state without the hidden modalities: see `Evaluation.without`."""
        return conditional.without(self.hidden, self.by_noise)

    def scale(self, modality: str, like: Tensor) -> float:
        """One for all."""
        return self.representation_scale


@dataclass(frozen=True)
class Auto(Guider):
    """Away from a weaker network (arXiv 2406.02507)."""

    guidance: Guidance
    weaker: DenoiserFunction

    def worse(self, conditional: Evaluation) -> Evaluation:
        """The same to the weaker network."""
        return replace(conditional, network=self.weaker)

    def scale(self, modality: str, like: Tensor) -> float:
        """One number per modality."""
        return self.guidance.auto_scales.get(modality, self.guidance.auto_scale)


def classifier_free(guidance: Guidance, model: Guided) -> Guider | None:
    """Classifier-free guidance, if any modality has a scale that asks for it."""
    asked = any(guidance.scale_of(modality.name) != 1 for modality in model.modalities)
    hidden = [modality.name for modality in model.modalities[1:]] if guidance.unconditional == "everything" else []
    # The null is made once, not in every step.
    return ClassifierFree(guidance, model.denoiser.null(batch_size(model.condition)), hidden) if asked else None


def dropped_modalities(modalities: Sequence[Modality]) -> list[str]:
    """What some samples were trained without."""
    return [modality.name for modality in modalities if modality.dropout]


def hidden_modalities(modalities: Sequence[Modality]) -> list[str]:
    """What representation guidance hides: the modalities that training dropped, or else all maps but the latents."""
    dropped = dropped_modalities(modalities)
    return dropped or [modality.name for modality in modalities[1:] if modality.kind == "map"]


def representation(guidance: Guidance, model: Guided) -> Guider | None:
    """Representation guidance, if the scale asks for it."""
    scale, by_noise = guidance.representation_scale, model.any_times and not dropped_modalities(model.modalities)
    return Representation(scale, hidden_modalities(model.modalities), by_noise) if scale != 1 else None


def auto(guidance: Guidance, model: Guided) -> Guider | None:
    """Autoguidance, if a scale asks for it and there is a weaker network."""
    return Auto(guidance, model.weaker) if model.weaker and guidance.asks_for_weaker else None


GUIDERS: dict[str, Callable[[Guidance, Guided], Guider | None]] = {
    "classifier-free": classifier_free,
    "representation": representation,
    "auto": auto,
}
"""What builds a guider, or None where `Guidance` does not ask for it."""


class GuidedVelocity(Velocity):
    """The velocity of a denoiser under a condition, moved by guiders.

    All evaluations of one network are one batch, and none is made that the scales and the interval do not ask for.
    The networks see `dtype`; velocities come back in the precision of the state, so that a sampler may keep its state
    in float64.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        condition: Condition,
        guiders: Sequence[Guider] = (),
        interval: tuple[float, float] = (0.0, 1.0),
        path: Path = LINEAR,
        dtype: torch.dtype = torch.float32,
        known_times: tuple[float, ...] = (),
    ) -> None:
        self.denoiser, self.condition, self.guiders = denoiser, condition, guiders
        self.interval, self.path, self.dtype, self.known_times = interval, path, dtype, known_times
        edges = tuple(edge for edge in sorted({*interval}) if 0 < edge < 1)
        self.discontinuities = edges if guiders else ()

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        """See `Velocity.__call__`."""
        return self.predict(state, times, decided_at).velocity

    def predict(self, state: State, times: Times, decided_at: Times | None = None) -> Prediction:
        """See `Velocity.predict`. The interval is about the time of each modality; what is data already needs none.

        Variance and hidden tokens are the conditional model's, which is not guided.
        """
        lowest, highest = self.interval
        seen = {name: x.to(self.dtype) for name, x in state.items()}
        conditional = Evaluation(self.denoiser, seen, self.condition, times)
        decisive = times if decided_at is None else decided_at
        guided = {name for name in state if lowest <= decisive[name] <= highest and decisive[name] > 0}
        guiders = self.guiders if guided else ()
        own, *worse = self._evaluate([conditional, *(guider.worse(conditional) for guider in guiders)])
        velocity = {name: own.velocity[name].to(x.dtype) for name, x in state.items()}
        result = velocity
        for guider, other in zip(guiders, worse, strict=True):
            moved = guider.move(result, velocity, other.velocity)
            result = {name: moved[name] if name in guided else v for name, v in result.items()}
        variance = {name: w.to(state[name].dtype) for name, w in (own.variance or {}).items()}
        return Prediction(result, own.tap, variance)

    def _evaluate(self, evaluations: Sequence[Evaluation]) -> list[Prediction]:
        """What is predicted, in order: one batch for each network."""
        results: dict[int, Prediction] = {}
        for network in {id(e.network): e.network for e in evaluations}.values():
            own = [i for i, e in enumerate(evaluations) if e.network is network]
            states, conditions = ([getattr(evaluations[i], part) for i in own] for part in ("state", "condition"))
            state = concatenate_states(states) if len(own) > 1 else states[0]
            condition = concatenate_states(conditions) if len(own) > 1 else conditions[0]
            times = [evaluations[i].times for i in own]
            if all(each == times[0] for each in times):
                time = tensor_times(times[0], state)
            else:
                apart = zip(times, states, strict=True)
                time = concatenate_states([dict(times_of_each(tensor_times(t, x), t)) for t, x in apart])
            predicted = network(state, time, condition)
            velocities, variances = (
                split_state(part or {}, len(own)) for part in (predicted.velocity, predicted.variance)
            )
            taps = [None] * len(own) if predicted.tap is None else predicted.tap.chunk(len(own))
            found = zip(velocities, taps, variances, strict=True)
            results |= {i: Prediction(*each) for i, each in zip(own, found, strict=True)}
        return [results[i] for i in range(len(evaluations))]


def tensor_times(times: Times, state: State) -> Tensor | TensorTimes:
    """Times for a network: one (B,) float64 where all modalities have the same, else one for each name."""
    size, device = batch_size(state), state[LATENT].device
    distinct = {t: torch.full((size,), t, dtype=torch.float64, device=device) for t in {*times.values()}}
    each = {name: distinct[t] for name, t in times.items()}
    return each[LATENT] if len(distinct) == 1 and each.keys() == state.keys() else each


def guided_velocity(
    denoiser: DenoiserFunction,
    condition: Condition,
    modalities: Sequence[Modality],
    guidance: Guidance = Guidance(),
    weaker: DenoiserFunction | None = None,
    path: Path = LINEAR,
    dtype: torch.dtype = torch.float32,
    known_times: tuple[float, ...] = (),
    any_times: bool = False,
) -> GuidedVelocity:
    """The velocity function of a denoiser under a condition (B, …), with every registered guidance that is asked for.

    `any_times` says whether the denoiser knows all combinations of times. Raises ValueError for a guider that is not
    registered.
    """
    if unknown := guidance.others.keys() - GUIDERS.keys():
        raise ValueError(f"guider {', '.join(sorted(unknown))} is unknown; registered are {', '.join(GUIDERS)}")
    model = Guided(denoiser, condition, modalities, weaker, any_times)
    built = [build(guidance, model) for build in GUIDERS.values()]
    return GuidedVelocity(denoiser, condition, [g for g in built if g], guidance.interval, path, dtype, known_times)
