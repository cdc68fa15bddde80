"""Chains against a second way to write them: DDPM's and DDIM's steps as published, in the chain's own terms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reglue.diffusion.chains import DDPM, Chain, kept_steps, log_likelihood
from reglue.diffusion.denoiser import Prediction
from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import State, Times
from reglue.diffusion.paths import PATHS, Path
from reglue.diffusion.predictions import PREDICTIONS
from reglue.diffusion.samplers import ddim, ddpm, respaced_times
from solving import solve

SHAPE = (2, 3, 4, 4)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What stands for a network: ε̂ and w of a state of the chain."""
    return torch.tanh(1.5 * x + n / 1000), torch.sin(3 * x + n / 700)


class OfChain(Velocity):
    """Its velocity on a path."""

    def __init__(self, path: Path, learned: bool = True) -> None:
        self.path, self.learned = path, learned
        self.known_times = PREDICTIONS["noise"].known_times(path)

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        return self.predict(state, times).velocity

    def predict(self, state: State, times: Times, decided_at: Times | None = None) -> Prediction:
        t = torch.full((len(state["latent"]),), times["latent"], dtype=torch.float64)
        seen, number = PREDICTIONS["noise"].network_input(state, {"latent": t}, self.path)
        noise, variance = network(seen["latent"], round(number["latent"][0].item()))
        velocity = PREDICTIONS["noise"].to_velocity({"latent": noise}, state, {"latent": t}, self.path)
        return Prediction(velocity, None, {"latent": variance} if self.learned else None)


def published(x: Tensor, steps: int, noise: list[Tensor], eta: float | None, clip: float | None) -> Tensor:
    """Ancestral steps, or DDIM's with eta, as their papers write them."""
    kept = kept_steps(1000, steps)
    cumprod = DDPM.alphas_cumprod[kept]
    for i in reversed(range(steps)):
        now, before = cumprod[i], cumprod[i - 1] if i else 1.0
        beta, (e, w) = 1 - now / before, network(x, kept[i])
        data = (x - math.sqrt(1 - now) * e) / math.sqrt(now)
        data = data if clip is None else data.clamp(-clip, clip)
        if eta is None:
            mean = beta * math.sqrt(before) / (1 - now) * data
            mean = mean + (1 - before) * math.sqrt(1 - beta) / (1 - now) * x
            small, f = beta * (1 - before) / (1 - now), (w + 1) / 2
            std = (beta**f * small ** (1 - f)).sqrt() if i else torch.zeros_like(x)
        else:
            e = (x - math.sqrt(now) * data) / math.sqrt(1 - now)
            std = eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before) * torch.ones_like(x)
            mean = math.sqrt(before) * data + (1 - before - std**2).clamp(min=0).sqrt() * e
        x = mean + (std * noise[steps - 1 - i] if i else 0)
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
def test_steps_are_the_published_ones_on_every_path(path: Any, clip: float | None, eta: float | None) -> None:
    steps, on = 7, PATHS[path]
    velocity, noise = OfChain(on), [normal(seed) for seed in range(steps)]
    latest = on.coefficients(torch.tensor(velocity.latest, dtype=torch.float64))
    step = partial(ddpm, clip=clip) if eta is None else partial(ddim, eta=eta, clip=clip)
    times = respaced_times(velocity.known_times, steps)
    given: Iterator[State] = iter([{"latent": x} for x in noise])
    ours = solve(step, velocity, {"latent": latest.norm * normal(9)}, times, given)["latent"]
    torch.testing.assert_close(ours, published(normal(9), steps, noise, eta, clip), rtol=1e-6, atol=1e-7)


def test_without_a_learned_variance_ddpm_is_ddim_with_all_of_its_noise() -> None:
    velocity, times = OfChain(PATHS["linear"], learned=False), [0.95, 0.8, 0.3, 0.1, 0.0]
    ours, theirs = (
        solve(step, velocity, {"latent": normal(1)}, times, iter([{"latent": normal(seed)} for seed in (2, 3, 4)]))
        for step in (ddpm, partial(ddim, eta=1.0))
    )
    torch.testing.assert_close(ours, theirs)


@given(steps=st.integers(2, 1000), shift=st.sampled_from([1.0, 0.5, 3.0]))
def test_respaced_times_keep_their_ends_and_their_number(steps: int, shift: float) -> None:
    known = PREDICTIONS["noise"].known_times(PATHS["linear"])
    times = respaced_times(known, steps, shift)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (known[-1], 0.0)
    assert all(a > b for a, b in pairwise(times))
    if shift == 1:
        assert times[-2] == known[0]


def test_which_steps_are_kept() -> None:
    assert kept_steps(1000, 6) == [0, 200, 400, 599, 799, 999]
    assert kept_steps(1000, 1) == [0]
    assert kept_steps(1000, 1000) == [*range(1000)]
    assert kept_steps(1000, "ddim50") == [*range(0, 1000, 20)]
    sections = kept_steps(1000, "10,20,40")
    assert len(sections) == 70
    assert [sections[i] for i in (0, 9, 10, 29, 30, 69)] == [0, 333, 334, 666, 667, 999]
    for spacing in ("1001", "500,501", "ddim999"):
        with pytest.raises(ValueError, match="steps"):
            kept_steps(1000, spacing)


def test_a_chain_through_some_steps_has_their_alphas() -> None:
    kept = [10, 500, 900]
    few = DDPM.respaced(kept)
    np.testing.assert_allclose(few.alphas_cumprod, DDPM.alphas_cumprod[kept])
    assert few.log_variances[0] == few.log_variances[1]
    np.testing.assert_allclose(Chain.through(DDPM.alphas_cumprod).betas, DDPM.betas)


def test_the_bound_is_the_divergence_of_two_normal_distributions() -> None:
    n, error, w = torch.tensor([1, 700]), normal(1) / 3, normal(2)
    data, noise = normal(3), normal(4)
    cumprod = torch.from_numpy(DDPM.alphas_cumprod)[n].view(-1, 1, 1, 1)
    x = cumprod.sqrt() * data + (1 - cumprod).sqrt() * noise
    predicted = (x - (1 - cumprod).sqrt() * (noise + error)) / cumprod.sqrt()
    q, p = DDPM.posterior(x, data, n), DDPM.posterior(x, predicted, n, w)
    two = [torch.distributions.Normal(d.mean, (d.log_variance / 2).exp().expand_as(d.mean)) for d in (q, p)]
    bits = torch.distributions.kl_divergence(*two).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(DDPM.bound(error, w, data, n).double(), bits, rtol=1e-4, atol=1e-5)


@given(mean=st.floats(-1, 1), deviation=st.floats(0.01, 0.5))
def test_the_bins_share_what_there_is(mean: float, deviation: float) -> None:
    data = torch.linspace(-1, 1, 256, dtype=torch.float64)
    of_data = log_likelihood(data, data - mean, torch.tensor(deviation, dtype=torch.float64).log()).exp()
    assert of_data.sum().item() == pytest.approx(1, abs=1e-6)
