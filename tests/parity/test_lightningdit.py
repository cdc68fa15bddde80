"""LightningDiT's published numbers: forward pass, losses, times, statistics of latents, samplers."""

from __future__ import annotations

import pytest
import torch
from golden_files import Golden, assert_close

from reglue.data.batches import TIME_DISTRIBUTIONS
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Guidance, guided_velocity
from reglue.diffusion.modalities import LATENT
from reglue.diffusion.objective import COSINE, TrainingSample, cosine_losses, loss_terms, velocity_losses
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.samplers import euler, uniform_times
from reglue.diffusion.specs import Normalisation
from reglue.published.weights import export_official
from solving import solve

CFG = Guidance(6.7, guided_channels=3)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("lightningdit")


@pytest.fixture(scope="module")
def denoiser(golden: Golden) -> Denoiser:
    return golden.denoiser()


def test_the_file_comes_in_and_goes_out(golden: Golden) -> None:
    official, about = golden.official(), golden.about
    assert official.family == "lightningdit"
    parts = official.config.parts
    given = ("use_rmsnorm", "use_qknorm", "use_rope", "use_swiglu", "wo_shift", "learn_sigma")
    assert [about[name] for name in given] == [
        *(parts.rms_norm, parts.qk_norm, parts.rope, parts.swiglu, not parts.shift, official.config.learn_sigma)
    ]
    published = export_official(official.family, official.config, official.weights)
    assert published.keys() == golden.published.keys()
    for name, value in golden.published.items():
        assert_close(published[name], value)


@torch.no_grad()
def test_forward_pass(golden: Golden, denoiser: Denoiser) -> None:
    state, time = {LATENT: golden["input.x"]}, 1 - golden["input.t"]
    assert_close(-denoiser(state, time, golden.condition).velocity[LATENT], golden["forward.velocity"])
    conditional, null = (denoiser(state, time, c).velocity[LATENT] for c in (golden.condition, denoiser.null(3)))
    guided = conditional.clone()
    guided[:, :3] += 5.7 * (conditional - null)[:, :3]
    assert_close(-guided, golden["forward.cfg"][: len(guided)])


@torch.no_grad()
def test_every_loss_term(golden: Golden, denoiser: Denoiser) -> None:
    data, noise, time = {LATENT: golden["loss.x"]}, {LATENT: golden["loss.noise"]}, 1 - golden["loss.time"]
    noisy, velocity = LINEAR.interpolate(data, noise, time)
    predicted = denoiser(noisy, time, golden.condition).velocity
    assert_close(velocity_losses(predicted, velocity)[LATENT], golden["loss.velocity_term"])
    assert_close(cosine_losses(predicted, velocity), golden["loss.cos_term"])
    terms = loss_terms(denoiser, LINEAR, TrainingSample(data, noise, time, golden.condition), cosine=True)
    assert terms.keys() == {LATENT, COSINE}
    assert_close(terms[LATENT] + terms[COSINE], golden["loss.total"].squeeze())


def test_times_of_training(golden: Golden) -> None:
    uniform = torch.special.ndtr(golden["time.normal"].double())
    assert_close(TIME_DISTRIBUTIONS["logit-normal"](uniform), golden["time.logit_normal"])


def test_latents_are_normalised_by_channel(golden: Golden) -> None:
    latents, over = golden["norm.latents"], (0, 2, 3)
    mean, std = latents.mean(over), latents.std(over)
    assert_close(mean.view(1, -1, 1, 1), golden["norm.mean"])
    assert_close(std.view(1, -1, 1, 1), golden["norm.std"])
    normalisation = Normalisation(tuple(mean.tolist()), tuple((1 / std).tolist()))
    assert_close(normalisation.normalise(latents), golden["norm.out"])


SAMPLED = {
    "euler": (Guidance(), 1.0),
    "euler_shift": (Guidance(), 1 / 0.3),
    "euler_cfg": (CFG, 1.0),
    "euler_shift_cfg_interval": (Guidance(6.7, interval=(0.0, 0.875), guided_channels=3), 1 / 0.3),
}


@pytest.mark.parametrize("case", SAMPLED)
@torch.no_grad()
def test_samplers(case: str, golden: Golden, denoiser: Denoiser) -> None:
    guidance, shift = SAMPLED[case]
    times = 1 - golden[f"sample.{case}.times"].double()
    grid = torch.tensor(uniform_times(len(times) - 1, shift), dtype=torch.float64)
    torch.testing.assert_close(grid, times, rtol=0, atol=1e-6)
    velocity = guided_velocity(denoiser, golden.condition, denoiser.config.modalities, guidance)
    result = solve(euler, velocity, {LATENT: golden["sample.x_init"]}, times.tolist())
    assert_close(result[LATENT], golden[f"sample.{case}.out"])


def test_every_sampling_case_of_the_file_is_checked(golden: Golden) -> None:
    assert SAMPLED.keys() == {k.split(".")[1] for k in golden.tensors if k.startswith("sample.") and k.count(".") > 1}
