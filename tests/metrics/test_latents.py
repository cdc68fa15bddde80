"""What latents carry: signals and noises of made-up posteriors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reglue.metrics.latents import LatentStatistics, LatentSummary

SHAPE = (4, 3, 5)


def summary(mean: torch.Tensor, log_variance: torch.Tensor, batch: int) -> LatentSummary:
    latents = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    statistics = LatentStatistics(SHAPE, torch.device("cpu"))
    for parts in zip(*(values.split(batch) for values in (mean, log_variance, latents)), strict=True):
        statistics.update(*parts)
    return statistics.summary()


@settings(max_examples=20)
@given(batch=st.integers(1, 12), offset=st.sampled_from([0.0, 1e3]))
def test_figures_are_those_of_their_definitions_in_any_batches(batch: int, offset: float) -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(12, *SHAPE) + offset, torch.randn(12, *SHAPE)
    latents = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    found = summary(mean, log_variance, batch)
    assert found.signal == pytest.approx(mean.double().var(0).mean((1, 2)).tolist(), rel=1e-6)
    assert found.noise == pytest.approx(log_variance.double().exp().mean((0, 2, 3)).tolist(), rel=1e-6)
    figures = found.figures()
    assert figures["latent_mean"] == pytest.approx(float(latents.double().mean()), abs=1e-6)
    assert figures["latent_std"] == pytest.approx(float(latents.double().std(correction=0)), rel=1e-6)
    assert figures["signal_std"] == pytest.approx(float(mean.double().var(0).mean().sqrt()), rel=1e-6)


def test_what_is_the_same_in_every_image_is_no_signal() -> None:
    """Channels: offsets of places alone; a constant; a weak signal in weaker noise; a strong one."""
    torch.manual_seed(0)
    mean, log_variance = torch.zeros(64, *SHAPE), torch.zeros(64, *SHAPE)
    mean[:, 0] = torch.randn(3, 5) * 10
    mean[:, 1] = 5
    mean[:, 2:] = torch.randn(64, 2, 3, 5)
    mean[:, 2] *= 0.01
    log_variance[:, 2] = -9
    found = summary(mean, log_variance, 64)
    assert found.dead == (0, 1)
    assert found.shares == pytest.approx((0, 0, 0.45, 0.5), abs=0.05)
    assert found.figures()["dead_channels"] == 2


def test_few_images_call_no_channel_dead() -> None:
    found = summary(torch.zeros(3, *SHAPE), torch.zeros(3, *SHAPE), 3)
    assert found.signal == (0, 0, 0, 0)
    assert found.dead == ()
    assert "signal_std" not in summary(torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), 1).figures()
