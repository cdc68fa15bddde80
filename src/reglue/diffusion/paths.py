"""Interpolants between data (t = 0) and noise (t = 1): x_t = α_t x + σ_t ε (SiT, arXiv 2401.08740, section 3.1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from reglue.diffusion.modalities import State, TensorTimes, expand_as, times_of_each
from reglue.diffusion.specs import PathName as PathName


class Coefficients(NamedTuple):
    """α_t, σ_t and their time derivatives, in the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def norm(self) -> Tensor:
        """√(α² + σ²): x_t by it is the state of a chain, whose variance stays that of the data, if that is 1."""
        return (self.alpha.square() + self.sigma.square()).sqrt()

    @property
    def kept(self) -> Tensor:
        """ᾱ = α² / (α² + σ²), as chains call the share of the data."""
        return (self.alpha / self.norm).square()


class Path(ABC):
    """A path from data at t = 0 to noise at t = 1."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """The coefficients at the times t in [0, 1]."""

    def interpolate(self, data: State, noise: State, t: Tensor | TensorTimes) -> tuple[State, State]:
        """Noisy states and their velocities for times t (B,), one for all modalities or one for each.

        Returns (x_t, v) with x_t = α x + σ ε and v = α' x + σ' ε, all in the shapes of `data`.
        """
        states: State = {}
        velocities: State = {}
        times = times_of_each(t, data)
        for name, x in data.items():
            c = Coefficients(*(expand_as(part.to(x.dtype), x) for part in self.coefficients(times[name])))
            states[name] = c.alpha * x + c.sigma * noise[name]
            velocities[name] = c.d_alpha * x + c.d_sigma * noise[name]
        return states, velocities

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """The time t at which σ_t/α_t is a ratio of at least 0."""

    def returned(self, x: Tensor, t: Tensor, earlier: Tensor, noise: Tensor) -> Tensor:
        """What x at time t may have come from at a time that is nearer to noise, t < t′ (RePaint, arXiv 2201.09865).

        a x + √(σ_t′² − a² σ_t²) ξ with a = α_t′/α_t and standard normal ξ: what the path has there, given x.
        """
        now, then = self.coefficients(t), self.coefficients(earlier)
        a = then.alpha / now.alpha
        return a * x + (then.sigma**2 - (a * now.sigma) ** 2).clamp(min=0).sqrt() * noise

    def velocity_to_score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The score ∇ log p_t(x) = −ε / σ that belongs to a velocity; t in (0, 1], broadcast against x."""
        return -self.velocity_to_noise(v, x, t) / self.coefficients(t).sigma

    def velocity_to_noise(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise ε that a velocity at x comes from: (α v − α' x) / (α σ' − α' σ); t broadcasts against x."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        return (alpha * v - d_alpha * x) / (alpha * d_sigma - d_alpha * sigma)

    def velocity_to_data(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The data x₀ that a velocity at x points to: (σ' x − σ v) / (α σ' − α' σ); t broadcasts against x."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        return (d_sigma * x - sigma * v) / (alpha * d_sigma - d_alpha * sigma)


class LinearPath(Path):
    """α = 1 − t, σ = t: the velocity is ε − x."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `Path.coefficients`."""
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def time_of(self, ratio: Tensor) -> Tensor:
        """See `Path.time_of`."""
        return ratio / (1 + ratio)


class CosinePath(Path):
    """α = cos(πt/2), σ = sin(πt/2)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """See `Path.coefficients`."""
        angle = t * (pi / 2)
        cos, sin = torch.cos(angle), torch.sin(angle)
        return Coefficients(cos, sin, -pi / 2 * sin, pi / 2 * cos)

    def time_of(self, ratio: Tensor) -> Tensor:
        """See `Path.time_of`."""
        return torch.atan(ratio) * (2 / pi)


LINEAR = LinearPath()
PATHS: dict[PathName, Path] = {"linear": LINEAR, "cosine": CosinePath()}
