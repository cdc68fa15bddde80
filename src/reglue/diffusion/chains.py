"""The Markov chains of diffusion models that count time in whole steps: DDPM's (DiT) and Stable Diffusion's (U-ViT).

A state of a chain, √ᾱ_n x + √(1−ᾱ_n) ε, is one of any path, α_t x + σ_t ε, where σ_t/α_t = √((1−ᾱ_n)/ᾱ_n), but for its
scale. So whatever samples, guides or controls along a path does so with a network that was trained on a chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Table = NDArray[np.floating[Any]]
"""float64."""


@dataclass(frozen=True)
class Chain:
    """A chain of so many steps, the first nearly data, and the numbers by which its networks know them."""

    first_beta: float
    last_beta: float
    steps: int = 1000
    of_roots: bool = False
    """Whether the square roots of β are equally spaced, and not β itself."""
    first: int = 0
    """The number of the first step: 0, or 1 where 0 stands for data."""

    @cached_property
    def betas(self) -> Table:
        """β_n, (steps,) float64."""
        power = 0.5 if self.of_roots else 1.0
        return np.linspace(self.first_beta**power, self.last_beta**power, self.steps, dtype=np.float64) ** (1 / power)

    @cached_property
    def alphas_cumprod(self) -> Table:
        """ᾱ_n = Π (1 − β), (steps,) float64, falling."""
        return np.cumprod(1 - self.betas)

    @cached_property
    def ratios(self) -> Table:
        """σ/α of every step, (steps,) float64, rising."""
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def number(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The number, a float64, of the step with the ratio σ/α; log ᾱ is linear between steps, and ends are kept.

        α and σ are float64 of any shape: float32 would be wrong by 5e-4 of a step.
        """
        knots = alpha.new_tensor(-np.log(self.alphas_cumprod))  # rising
        wanted = torch.log1p((sigma / alpha).square())
        after = torch.searchsorted(knots, wanted.contiguous()).clamp(1, self.steps - 1)
        before, behind = knots[after - 1], knots[after]
        return self.first + (after - 1 + (wanted - before) / (behind - before)).clamp(0, self.steps - 1)


DDPM = Chain(1e-4, 0.02)
"""DDPM's (arXiv 2006.11239), as DiT uses it (arXiv 2212.09748)."""
STABLE_DIFFUSION = Chain(0.00085, 0.012, of_roots=True, first=1)
"""Stable Diffusion's, as U-ViT uses it (arXiv 2209.12152): its networks know 0 as data."""
