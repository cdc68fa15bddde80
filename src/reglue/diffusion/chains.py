"""The Markov chains of diffusion models that count time in whole steps: DDPM's (DiT) and Stable Diffusion's (U-ViT).

A state of a chain, √ᾱ_n x + √(1−ᾱ_n) ε, is one of any path, α_t x + σ_t ε, where σ_t/α_t = √((1−ᾱ_n)/ᾱ_n), but for its
scale. So whatever samples, guides or controls along a path does so with a network that was trained on a chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reglue.diffusion.modalities import expand_as

Table = NDArray[np.floating[Any]]
"""float64."""
BIN, OPEN = 1 / 255, 0.999
"""Half the width of a bin of 8-bit data in [−1, 1], and beyond what the outermost bins have no end."""
LEAST = 1e-12
"""Of probabilities whose logarithm is taken."""


class Posterior(NamedTuple):
    """A normal distribution of the state one step nearer to data."""

    mean: Tensor
    log_variance: Tensor


@dataclass(frozen=True, eq=False)
class Chain:
    """A chain of steps, the first nearly data. Methods count steps n from 0, whatever their numbers."""

    betas: Table
    """β_n, (steps,) float64."""
    first: int = 0
    """The number by which networks know the first step: 0, or 1 where 0 stands for data."""

    @classmethod
    def through(cls, alphas_cumprod: Table) -> Self:
        """The chain with these ᾱ, which fall: some of those of another one, for fewer steps (IDDPM, section 4)."""
        return cls(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))

    def respaced(self, kept: Sequence[int]) -> Chain:
        """The chain of some of the steps. Its networks know them by the numbers that they have here."""
        return Chain.through(self.alphas_cumprod[list(kept)])

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Table:
        """ᾱ_n = Π (1 − β), (steps,) float64, falling."""
        return np.cumprod(1 - self.betas)

    @cached_property
    def before(self) -> Table:
        """ᾱ_{n−1}, (steps,) float64: 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def ratios(self) -> Table:
        """σ/α of every step, (steps,) float64, rising."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    @cached_property
    def log_variances(self) -> Table:
        """log β̃_n with β̃ = β(1 − ᾱ_{n−1})/(1 − ᾱ_n), the variance of the state before x_n where the data is known.

        (steps,) float64. There is none before the first step: that of the second stands in for it.
        """
        variances = self.betas * (1 - self.before) / (1 - self.alphas_cumprod)
        variances[0] = variances[1] if self.steps > 1 else self.betas[0]
        return np.log(variances)

    @cached_property
    def _knots(self) -> Table:
        return -np.log(self.alphas_cumprod)

    def number(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The number, a float64, of the step with the ratio σ/α; log ᾱ is linear between steps, and ends are kept.

        α and σ are float64 of any shape: float32 would be wrong by 5e-4 of a step.
        """
        knots = on_device(self._knots, alpha.device)  # rising
        wanted = torch.log1p((sigma / alpha).square())
        after = torch.searchsorted(knots, wanted.contiguous()).clamp(1, self.steps - 1)
        before, behind = knots[after - 1], knots[after]
        return self.first + (after - 1 + (wanted - before) / (behind - before)).clamp(0, self.steps - 1)

    def ratio(self, number: float) -> float:
        """σ/α at the number of a step or between two: the inverse of `number`."""
        log = np.interp(number - self.first, np.arange(self.steps), np.log(self.alphas_cumprod))
        return float(np.sqrt(np.expm1(-log)))

    def log_variance(self, variance: Tensor | None, n: Tensor, like: Tensor) -> Tensor:
        """log σ² of p(x_{n−1} | x_n) by what a network says of it: f log β + (1 − f) log β̃ with f = (w + 1)/2.

        w (B, …) is unbounded (IDDPM, arXiv 2102.09672, eq. 15); None for −1. n is (B,) or (1,).
        """
        least, most = (_at(table, n, like) for table in (self.log_variances, np.log(self.betas)))
        return least if variance is None else least + (variance + 1) / 2 * (most - least)

    def posterior(self, x: Tensor, data: Tensor, n: Tensor, variance: Tensor | None = None) -> Posterior:
        """Of the state before x = x_n (B, …) for data x₀, known or predicted (DDPM, arXiv 2006.11239, eq. 7).

        Its mean is √ᾱ_{n−1} β/(1 − ᾱ_n)·x₀ + √(1 − β) (1 − ᾱ_{n−1})/(1 − ᾱ_n)·x_n; for n and the variance see
        `log_variance`.
        """
        of_data = self.betas * np.sqrt(self.before) / (1 - self.alphas_cumprod)
        of_state = np.sqrt(1 - self.betas) * (1 - self.before) / (1 - self.alphas_cumprod)
        mean = _at(of_data, n, x) * data + _at(of_state, n, x) * x
        return Posterior(mean, self.log_variance(variance, n, x))

    def bound(self, error: Tensor, variance: Tensor, data: Tensor, n: Tensor) -> Tensor:
        """The term of the variational bound of steps n (B,), in bits for each element: (B,) float32.

        `error` is ε̂ − ε. The term is the divergence KL(q(x_{n−1} | x_n, x₀) ‖ p(x_{n−1} | x_n)), whose means differ by
        β/√((1 − β)(1 − ᾱ))·(ε̂ − ε). For n = 0 it is −log p(x₀ | x_0) of data in bins of 8 bits, whatever it is.
        """
        error, variance, data = error.float(), variance.float(), data.float()
        off = _at(self.betas / np.sqrt((1 - self.betas) * (1 - self.alphas_cumprod)), n, error) * error
        of_q, of_p = self.log_variance(None, n, error), self.log_variance(variance, n, error)
        divergence = (of_p - of_q - 1 + (of_q - of_p).exp() + off.square() * (-of_p).exp()) / 2
        nats = torch.where(expand_as(n == 0, error), -log_likelihood(data, off, of_p / 2), divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def log_likelihood(data: Tensor, off: Tensor, log_deviation: Tensor) -> Tensor:
    """log of what a normal distribution with mean data − off has in the bin of each element of data in [−1, 1]."""
    lower, upper = (_below((off + side) * (-log_deviation).exp()) for side in (-BIN, BIN))
    share = torch.where(data > OPEN, 1 - lower, torch.where(data < -OPEN, upper, upper - lower))
    return share.clamp(min=LEAST).log()


def _below(x: Tensor) -> Tensor:
    """The share of a standard normal distribution below x, nearly, as published (IDDPM's code has no erf)."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def on_device(table: Table, device: torch.device) -> Tensor:
    """A table as a tensor on a device, for which nothing waits."""
    return torch.as_tensor(table).to(device, non_blocking=True)


def _at(table: Table, n: Tensor, like: Tensor) -> Tensor:
    """Values of a float64 table at steps n (B,), in the precision of `like` (B, …) and broadcasting to it."""
    return expand_as(on_device(table, n.device)[n].to(like.dtype), like)


def kept_steps(steps: int, spacing: int | str) -> list[int]:
    """Which ones of the steps of a chain are kept, from 0 on, for fewer (IDDPM's code).

    A number: that many, from the first to the last. `10,20,40`: that many in each third of the chain. `ddim50`: every
    twentieth of 1,000, if such a stride gives that many. Raises ValueError for more than there are, and for no stride.
    """
    text = str(spacing)
    if text.startswith("ddim"):
        wanted = int(text.removeprefix("ddim"))
        stride = next((stride for stride in range(1, steps) if len(range(0, steps, stride)) == wanted), 0)
        if not stride:
            raise ValueError(f"no stride makes {wanted} of {steps} steps")
        return [*range(0, steps, stride)]
    counts = [int(count) for count in text.split(",")]
    kept: list[int] = []
    begin = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise ValueError(f"{count} of {size} steps")
        stride, place = (size - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            kept.append(begin + round(place))
            place += stride  # By addition, as published: its rounding decides ties.
        begin += size
    return kept


DDPM = Chain(np.linspace(1e-4, 0.02, 1000))
"""DDPM's (arXiv 2006.11239), as DiT uses it (arXiv 2212.09748)."""
STABLE_DIFFUSION = Chain(cast(Any, np.linspace(0.00085**0.5, 0.012**0.5, 1000)) ** 2, first=1)
"""Stable Diffusion's, as U-ViT uses it (arXiv 2209.12152): its networks know 0 as data."""
