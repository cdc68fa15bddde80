"""DiT agrees with its own implementation: network, both terms of the loss, the chain and its respacing, and samplers.

Its state x is ours by √((1 − t)² + t²), and the times are those of the chain's steps on our path.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from golden_files import Golden, assert_close
from torch import Tensor

from reglue.diffusion.chains import DDPM, Chain, kept_steps
from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Guidance, GuidedVelocity, guided_velocity
from reglue.diffusion.modalities import LATENT, expand_as
from reglue.diffusion.objective import (
    VARIANCE,
    TrainingSample,
    loss_terms,
    variance_losses,
    velocity_losses,
    weighted_sum,
)
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.predictions import PREDICTIONS
from reglue.diffusion.samplers import ddim, ddpm, euler, respaced_times
from reglue.published.weights import export_official
from solving import solve

NOISE = PREDICTIONS["noise"]
KNOWN = NOISE.known_times(LINEAR)
GUIDED = Guidance(1.5, guided_channels=3)


@pytest.fixture(scope="module")
def dit() -> Golden:
    return Golden("dit")


@pytest.fixture(scope="module")
def denoiser(dit: Golden) -> Denoiser:
    return dit.denoiser()


def needs(golden: Golden, *keys: str) -> None:
    if missing := [key for key in keys if key not in golden]:
        pytest.skip(f"the file has no {', '.join(missing)}")


def times_of(n: Tensor) -> Tensor:
    return torch.tensor(KNOWN, dtype=torch.float64)[n]


def scales(n: Tensor, like: Tensor) -> Tensor:
    """From a state of the chain to one of the path."""
    return expand_as(LINEAR.coefficients(times_of(n)).norm, like)


def predicted(denoiser: Denoiser, x: Tensor, n: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """ε̂, w and x̂ of states of the chain, (B, C, H, W) each."""
    t, state = times_of(n), x.double() * scales(n, x)
    with torch.no_grad():
        output = denoiser({LATENT: state.float()}, t, condition)
    assert output.variance is not None
    v, t = output.velocity[LATENT].double(), expand_as(t, x)
    noise, data = LINEAR.velocity_to_noise(v, state, t), LINEAR.velocity_to_data(v, state, t)
    return noise, output.variance[LATENT].double(), data


def test_the_network(dit: Golden, denoiser: Denoiser) -> None:
    noise, variance, _ = predicted(denoiser, dit["input.x"], dit["input.t"], dit.condition)
    if "forward.output" in dit:
        assert_close(torch.cat([noise, variance], dim=1), dit["forward.output"])
    else:
        assert_close(noise, dit["forward.eps"])
        assert_close(variance, dit["forward.variance"])


def test_the_guided_network(dit: Golden, denoiser: Denoiser) -> None:
    """The first half is conditional, and so keeps its own last channels; the second half is not."""
    x, n = dit["input.x"], dit["input.t"]
    both: list[list[Tensor]] = []
    for i in range(len(x)):
        condition = {"class": dit["input.y"][i : i + 1]}
        t, state = KNOWN[n[i]], {LATENT: x[i : i + 1].double() * scales(n[i : i + 1], x[:1])}
        with torch.no_grad():
            guided = guided_velocity(denoiser, condition, denoiser.config.modalities, GUIDED).predict(
                state, {LATENT: t}
            )
        assert guided.variance is not None
        noise = LINEAR.velocity_to_noise(guided.velocity[LATENT], state[LATENT], torch.tensor(t, dtype=torch.float64))
        other, variance, _ = predicted(denoiser, x[i : i + 1], n[i : i + 1], denoiser.null(1))
        channels = torch.cat([noise[:, :3], other[:, 3:], variance], dim=1)
        both.append([torch.cat([noise, guided.variance[LATENT]], dim=1), channels])
    ours = torch.cat([torch.cat(half) for half in zip(*both, strict=True)])
    theirs = dit["forward.cfg_output" if "forward.cfg_output" in dit else "forward.cfg"]
    assert_close(ours[: len(theirs)], theirs)


def test_the_chain_and_its_respacing(dit: Golden) -> None:
    prefix = "schedule" if "schedule.betas" in dit else "table"
    names = {key.removeprefix(f"{prefix}.") for key in dit.tensors if key.startswith(f"{prefix}.")}
    whole: dict[str, np.ndarray[Any, Any]] = {"betas": DDPM.betas, "alphas_cumprod": DDPM.alphas_cumprod}
    for name in names:
        theirs = dit[f"{prefix}.{name}"].numpy()
        kind, _, spacing = name.rpartition("_")
        if kind in ("betas", "timestep_map", "map"):
            kept = kept_steps(DDPM.steps, spacing.replace("-", ",").replace("_", ","))
            ours = DDPM.respaced(kept).betas if kind == "betas" else np.array(kept)
        else:
            ours = whole.get(name, DDPM.log_variances)
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, err_msg=name)
    assert {"betas", "alphas_cumprod"} <= names


def sample_of(golden: Golden) -> TrainingSample:
    noise = {LATENT: golden["loss.noise"]}
    return TrainingSample({LATENT: golden["loss.x"]}, noise, times_of(golden["loss.t"]), golden.condition)


def test_both_terms_of_the_loss(dit: Golden, denoiser: Denoiser) -> None:
    sample = sample_of(dit)
    noisy, velocity = LINEAR.interpolate(sample.data, sample.noise, sample.time)
    theirs = dit["q_sample.out" if "q_sample.out" in dit else "loss.x_t"]
    assert_close(noisy[LATENT] / scales(dit["loss.t"], noisy[LATENT]), theirs)
    with torch.no_grad():
        output = denoiser(noisy, sample.time, sample.condition)
        times = {LATENT: times_of(dit["loss.t"])}
        weight = NOISE.weight(times[LATENT], LINEAR)
        assert weight is not None
        errors = velocity_losses(output.velocity, velocity)[LATENT].double() * weight
        bits = variance_losses(NOISE, output, velocity, sample.data, times, LINEAR)[LATENT]
    assert_close(errors, dit["loss.mse_term"])
    assert_close(bits, dit["loss.vb_term"])
    assert_close(errors + bits, dit["loss.total"])


def test_gradients_of_the_loss(dit: Golden) -> None:
    denoiser = dit.denoiser()
    terms = loss_terms(denoiser, LINEAR, sample_of(dit))
    weights = {LATENT: 1.0, VARIANCE: 1.0}
    assert_close(weighted_sum(terms, weights).detach(), dit["loss.total"].mean())
    weighted_sum(terms, weights).backward()
    gradients = {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}
    ours = export_official("dit", denoiser.config, denoiser.state_dict() | gradients)
    for key in (key for key in dit.tensors if key.startswith("gradient.")):
        assert_close(ours[key.removeprefix("gradient.")], dit[key])

    # The bound reaches the rows of the variance alone.
    denoiser.zero_grad()
    weighted_sum(loss_terms(denoiser, LINEAR, sample_of(dit)), {LATENT: 0.0, VARIANCE: 1.0}).backward()
    rows = denoiser.velocity.weight.grad
    assert rows is not None
    per_pixel = rows.unflatten(0, (-1, 2 * denoiser.config.channels))
    assert not per_pixel[:, : denoiser.config.channels].any()
    assert per_pixel[:, denoiser.config.channels :].any()


@pytest.mark.parametrize("prefix", ["posterior", "step"])
def test_the_posterior(dit: Golden, denoiser: Denoiser, prefix: str) -> None:
    needs(dit, f"{prefix}.mean")
    if prefix == "posterior":  # of six steps
        index, x = dit["posterior.index"], dit["input.x"]
        kept = kept_steps(DDPM.steps, 6)
        chain, numbers = DDPM.respaced(kept), torch.tensor(kept)[index]
    else:
        index, x, chain, numbers = dit["step.t"], dit["step.x"], DDPM, dit["step.t"]
    _, variance, data = predicted(denoiser, x, numbers, dit.condition)
    assert_close(data, dit[f"{prefix}.pred_xstart"])
    mean, log_variance = chain.posterior(x.double(), data, index, variance)
    assert_close(mean, dit[f"{prefix}.mean"])
    assert_close(log_variance, dit[f"{prefix}.log_variance"])


def velocity_of(golden: Golden, denoiser: Denoiser, guidance: Guidance = Guidance()) -> GuidedVelocity:
    return guided_velocity(denoiser, golden.condition, denoiser.config.modalities, guidance, known_times=KNOWN)


def start(golden: Golden) -> dict[str, Tensor]:
    norm = LINEAR.coefficients(torch.tensor(KNOWN[-1], dtype=torch.float64)).norm
    return {LATENT: norm * golden["sample.x_init"].double()}


def noises(golden: Golden, case: str) -> Iterator[dict[str, Tensor]]:
    """All but the last, which has no use. With guidance both halves of a batch draw, and the first is the sample."""
    for noise in golden[f"sample.{case}.noise"][:-1]:
        yield {LATENT: noise[: len(golden["input.y"])].double()}


CASES = {
    "ddpm": (ddpm, Guidance()),
    "ddpm_clip": (partial(ddpm, clip=1.0), Guidance()),
    "ddpm_cfg": (ddpm, GUIDED),
    "ddim": (ddim, Guidance()),
    "ddim_clip": (partial(ddim, clip=1.0), Guidance()),
    "ddim_cfg": (ddim, GUIDED),
    "ddim_eta": (partial(ddim, eta=0.5), Guidance()),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_samplers(dit: Golden, denoiser: Denoiser, case: str) -> None:
    needs(dit, f"sample.{case}.out")
    step, guidance = CASES[case]
    times = respaced_times(KNOWN, 6)
    drawn = noises(dit, case) if f"sample.{case}.noise" in dit else iter(())
    result = solve(step, velocity_of(dit, denoiser, guidance), start(dit), times, drawn)
    assert_close(result[LATENT], dit[f"sample.{case}.out"])


@torch.no_grad()
def test_every_state_on_the_way(dit: Golden, denoiser: Denoiser) -> None:
    needs(dit, "sample.ddpm.steps")
    times, noise = respaced_times(KNOWN, 6), noises(dit, "ddpm")
    state, velocity = start(dit), velocity_of(dit, denoiser)
    for now, then, theirs in zip(times[:-1], times[1:], dit["sample.ddpm.steps"], strict=True):
        state = solve(ddpm, velocity, state, [now, then], noise)
        norm = LINEAR.coefficients(torch.tensor(then, dtype=torch.float64)).norm
        assert_close(state[LATENT] / norm, theirs)


@torch.no_grad()
def test_ddim_is_eulers_method(dit: Golden, denoiser: Denoiser) -> None:
    result = solve(euler, velocity_of(dit, denoiser), start(dit), respaced_times(KNOWN, 6))
    assert_close(result[LATENT], dit["sample.ddim.out"])


def test_every_sampling_case_of_the_file_is_checked(dit: Golden) -> None:
    cases = {key.split(".")[1] for key in dit.tensors if key.startswith("sample.") and key.endswith(".out")}
    assert cases <= CASES.keys()


def test_export_gives_the_published_file_back(dit: Golden) -> None:
    official = dit.official()
    assert official.family == "dit"
    published = export_official(official.family, official.config, official.weights)
    assert published.keys() == dit.published.keys()
    for name, value in dit.published.items():
        assert torch.equal(published[name], value) or name == "pos_embed"
    assert_close(published["pos_embed"], dit.published["pos_embed"])


def test_a_chain_through_two_steps_is_their_posterior() -> None:
    few = Chain.through(DDPM.alphas_cumprod[[10, 500]])
    assert few.steps == 2
    np.testing.assert_allclose(np.cumprod(1 - few.betas), DDPM.alphas_cumprod[[10, 500]])
