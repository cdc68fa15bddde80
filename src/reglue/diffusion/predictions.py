"""What a network's output means: from what it predicts to a velocity, which is all that losses and samplers see.

To add one, write a `PredictionKind` and register it in `PREDICTIONS`; recipes name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from reglue.diffusion.chains import DDPM, STABLE_DIFFUSION, Chain
from reglue.diffusion.modalities import State, TensorTimes, expand_as
from reglue.diffusion.paths import Coefficients, Path

SHORTEST = 0.05
"""σ_t below which the error of predicted data counts no more than here (Latent Forcing, arXiv 2602.11401)."""


class PredictionKind(ABC):
    """A parameterisation of the network; conversions are exact."""

    learns_variance = False
    """Whether the second half of the outputs is that of a learned variance, where the network has one."""

    @property
    def largest_time(self) -> float:
        """The number by which the network knows pure noise."""
        return 1.0

    @abstractmethod
    def to_velocity(self, output: State, state: State, times: TensorTimes, path: Path) -> State:
        """The velocity dx/dt that an output for `state` at `times` (B,) means."""

    def network_input(self, state: State, times: TensorTimes, path: Path) -> tuple[State, TensorTimes]:
        """What the network is given for `state` at `times`: the same, unless it knows states by another scale."""
        return state, times

    def known_times(self, path: Path) -> tuple[float, ...]:
        """The times of the steps of the chain that the network was trained on, rising; none where it knows them all."""
        return ()

    def latest(self, path: Path) -> float:
        """The noisiest time that the network knows, where samples begin."""
        return max(self.known_times(path), default=1.0)

    def training_time(self, t: Tensor, path: Path) -> Tensor:
        """The times (B,) of training samples for t, float64, drawn as from [0, 1]."""
        return t.float()

    def weight(self, t: Tensor, path: Path) -> Tensor | None:
        """What makes a squared error of the velocity one of the prediction, for t (B,); None for 1."""
        return None

    def variance_loss(self, variance: Tensor, error: Tensor, data: Tensor, t: Tensor, path: Path) -> Tensor:
        """What trains a learned variance (B, …), in bits for each element of a sample: (B,).

        `error` is that of the velocity of `data` at t (B,), through which nothing is to be learned.
        """
        raise NotImplementedError(f"{type(self).__name__} learns no variance")


class VelocityPrediction(PredictionKind):
    """The network predicts the velocity itself, as SiT and all that follow it."""

    def to_velocity(self, output: State, state: State, times: TensorTimes, path: Path) -> State:
        """See `PredictionKind.to_velocity`."""
        return output


class DataPrediction(PredictionKind):
    """The network predicts the data x; the loss stays that of velocities (Latent Forcing, arXiv 2602.11401)."""

    def to_velocity(self, output: State, state: State, times: TensorTimes, path: Path) -> State:
        """v = σ'/σ·x_t + (α' − σ'α/σ)·x̂, with σ of `SHORTEST` at least in denominators."""
        velocity: State = {}
        for name, x in output.items():
            c = coefficients(path, times[name], state[name])
            sigma = c.sigma.clamp(min=SHORTEST)
            velocity[name] = (c.d_sigma * state[name] + (c.d_alpha * c.sigma - c.d_sigma * c.alpha) * x) / sigma
        return velocity


@dataclass(frozen=True)
class NoisePrediction(PredictionKind):
    """The network predicts the noise ε of a chain's state, and its loss is that of ε (DDPM, arXiv 2006.11239)."""

    chain: Chain
    learns_variance = True

    @property
    def largest_time(self) -> float:
        """The number of steps of the chain."""
        return float(self.chain.steps)

    def to_velocity(self, output: State, state: State, times: TensorTimes, path: Path) -> State:
        """v = α'/α·x_t + (σ' − α'σ/α)·ε̂: (ε̂ − x_t)/(1 − t) on the linear path."""
        velocity: State = {}
        for name, noise in output.items():
            c = coefficients(path, times[name], state[name])
            velocity[name] = (c.d_alpha * state[name] + (c.d_sigma * c.alpha - c.d_alpha * c.sigma) * noise) / c.alpha
        return velocity

    def network_input(self, state: State, times: TensorTimes, path: Path) -> tuple[State, TensorTimes]:
        """x_t/√(α² + σ²), the chain's state, and the number of its step."""
        exact = {name: path.coefficients(times[name].double()) for name in state}
        scaled = {name: x / expand_as(exact[name].norm.to(x.dtype), x) for name, x in state.items()}
        return scaled, {**times, **{name: self.chain.number(c.alpha, c.sigma) for name, c in exact.items()}}

    def known_times(self, path: Path) -> tuple[float, ...]:
        """See `PredictionKind.known_times`: 0.0099 to 0.9937 for DDPM's chain on the linear path."""
        return tuple(path.time_of(torch.as_tensor(self.chain.ratios)).tolist())

    def training_time(self, t: Tensor, path: Path) -> Tensor:
        """That of a step of the chain, drawn uniformly, in float64."""
        steps = (t * self.chain.steps).long().clamp(max=self.chain.steps - 1)
        return path.time_of(t.new_tensor(self.chain.ratios)[steps])

    def weight(self, t: Tensor, path: Path) -> Tensor:
        """(α / (ασ' − α'σ))²: (1 − t)² on the linear path."""
        c = path.coefficients(t)
        return (c.alpha / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)).square()

    def variance_loss(self, variance: Tensor, error: Tensor, data: Tensor, t: Tensor, path: Path) -> Tensor:
        """The variational bound at the chain's step nearest to t (IDDPM, arXiv 2102.09672, section 3.4)."""
        c = path.coefficients(t.double())
        n = (self.chain.number(c.alpha, c.sigma) - self.chain.first).round().long()
        to_noise = expand_as(self.weight(t, path).sqrt().to(error.dtype), error)
        return self.chain.bound(error.detach() * to_noise, variance, data, n)


def coefficients(path: Path, t: Tensor, like: Tensor) -> Coefficients:
    """Those at times t (B,), in the precision of `like` (B, …) and broadcasting to it."""
    return Coefficients(*(expand_as(c.to(like.dtype), like) for c in path.coefficients(t)))


PREDICTIONS: dict[str, PredictionKind] = {
    "velocity": VelocityPrediction(),
    "data": DataPrediction(),
    "noise": NoisePrediction(DDPM),
    "noise-sd": NoisePrediction(STABLE_DIFFUSION),
}
