"""Every published method agrees with its own implementation, through the importer that users use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from golden_files import Golden, assert_close
from torch import Tensor

from reglue.diffusion.guidance import Guidance, Velocity, guided_velocity
from reglue.diffusion.modalities import LATENT, State, Times
from reglue.diffusion.objective import ALIGNMENT, TrainingSample, alignment_loss, loss_terms, velocity_losses
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.samplers import euler, euler_maruyama, heun, stochastic_times, uniform_times
from reglue.published.weights import export_official
from solving import solve

LOCAL, CLS = "local", "cls"


def to_state(golden: Golden, x: Tensor, cls: Tensor | None) -> State:
    channels = golden.official().config.modalities[0].channels
    state = {LATENT: x[..., :channels, :, :]}
    if x.shape[-3] > channels:
        state[LOCAL] = x[..., channels:, :, :]
    if cls is not None:
        state[CLS] = cls
    return state


def channels_of(state: State) -> Tensor:
    return torch.cat([state[name] for name in (LATENT, LOCAL) if name in state], dim=1)


@torch.no_grad()
def test_forward_pass(golden: Golden) -> None:
    denoiser = golden.denoiser()
    state = to_state(golden, golden["input.x"], golden.get("input.cls"))
    t = golden["input.t"]
    prediction = denoiser(state, 1 - t if golden.from_noise else t, golden.condition)
    velocity = channels_of(prediction.velocity)
    assert_close(-velocity if golden.from_noise else velocity, golden["forward.velocity"])
    if "forward.cls_velocity" in golden:
        assert_close(prediction.velocity[CLS], golden["forward.cls_velocity"])
    if "forward.projection" in golden:
        assert_close(denoiser.projector(prediction.tap), golden["forward.projection"])


@torch.no_grad()
def test_every_loss_term(golden: Golden) -> None:
    denoiser = golden.denoiser()
    data = to_state(golden, golden["loss.x"], golden.get("loss.cls"))
    noise = to_state(golden, golden["loss.noise"], golden.get("loss.noise_cls"))
    time = golden["loss.time"].flatten()
    if golden.from_noise:
        time = 1 - time
    noisy, velocity = LINEAR.interpolate(data, noise, time)
    prediction = denoiser(noisy, time, golden.condition)
    losses = velocity_losses(prediction.velocity, velocity)
    if "loss.total" in golden:
        assert_close(torch.stack(list(losses.values())).sum(0), golden["loss.total"])
    for name, key in ((LATENT, "latent_term"), (LOCAL, "local_term"), (CLS, "cls_term")):
        if f"loss.{key}" in golden:
            assert_close(losses[name], golden[f"loss.{key}"].flatten())
    if "loss.align_term" in golden:
        ours = alignment_loss(denoiser.projector(prediction.tap), golden["loss.target"])
        assert_close(ours, golden["loss.align_term"].squeeze())
    # What training calls gives the same numbers, averaged.
    terms = loss_terms(denoiser, LINEAR, TrainingSample(data, noise, time, golden.condition, golden.get("loss.target")))
    for name, loss in losses.items():
        assert_close(terms[name], loss.mean())
    assert (ALIGNMENT in terms) == ("loss.target" in golden)


def noises(golden: Golden, name: str) -> Iterator[State]:
    cls = golden.get(f"sample.{name}.noise_cls")
    for step, noise in enumerate(golden[f"sample.{name}.noise"]):
        yield to_state(golden, noise, None if cls is None else cls[step])


def start(golden: Golden, dtype: torch.dtype) -> State:
    state = to_state(golden, golden["sample.x_init"], golden.get("sample.cls_init"))
    return {name: value.to(dtype) for name, value in state.items()}


PUBLISHED_CFG = Guidance(scale=2.3, interval=(0.0, 0.85))
STOCHASTIC = {
    "sde": Guidance(),
    "sde_sigma": Guidance(),
    "sde_cfg": PUBLISHED_CFG,
    "sde_cfg_cls_off": Guidance(2.3, {CLS: 1.0}, (0.0, 0.85)),
}


def guided(golden: Golden, guidance: Guidance) -> Velocity:
    denoiser = golden.denoiser()
    return guided_velocity(denoiser, golden.condition, denoiser.config.modalities, guidance)


@pytest.mark.parametrize("case", STOCHASTIC)
@torch.no_grad()
def test_euler_maruyama(golden: Golden, case: str) -> None:
    if f"sample.{case}.out" not in golden:
        pytest.skip(f"{golden.method} has no case {case}")
    velocity = guided(golden, STOCHASTIC[case])
    times = stochastic_times(1 + len(golden[f"sample.{case}.noise"]))
    result = solve(euler_maruyama, velocity, start(golden, torch.float64), times, noises(golden, case))
    assert_close(channels_of(result), golden[f"sample.{case}.out"])


@torch.no_grad()
def test_reglue_vae_only_guidance_with_its_quirks(golden_of: type[Golden]) -> None:
    golden = golden_of("reglue")
    # Their flag computes cond + w (cond − uncond), which is our scale w + 1, and forgets itself in the last step.
    during = guided(golden, Guidance(3.3, {LOCAL: 1.0, CLS: 1.0}, (0.0, 0.85)))
    at_last = guided(golden, PUBLISHED_CFG)
    times = stochastic_times(1 + len(golden["sample.sde_vae_cfg.noise"]))

    class Quirky(Velocity):
        def __call__(self, state: State, now: Times, decided_at: Times | None = None) -> State:
            return (at_last if now[LATENT] == times[-2] else during)(state, now, decided_at)

    result = solve(euler_maruyama, Quirky(), start(golden, torch.float64), times, noises(golden, "sde_vae_cfg"))
    assert_close(channels_of(result), golden["sample.sde_vae_cfg.out"])


DETERMINISTIC = {
    "repa": {"ode": (euler, Guidance(), 6), "heun_cfg": (heun, Guidance(scale=1.8, interval=(0.0, 0.7)), 6)},
    "sit": {
        "ode_euler": (euler, Guidance(), 6),
        "ode_euler_cfg": (euler, Guidance(scale=1.5, guided_channels=3), 6),
    },
    "redi": {
        "ode_euler": (euler, Guidance(), 6),
        "ode_euler_cfg": (euler, Guidance(scale=1.5), 6),
        "ode_euler_vae_cfg": (euler, Guidance(2.4, {LOCAL: 1.0}), 6),
        "ode_euler_rg": (euler, Guidance(representation_scale=1.5), 6),
    },
}


@pytest.mark.parametrize(("method", "case"), [(m, c) for m, cases in DETERMINISTIC.items() for c in cases])
@torch.no_grad()
def test_deterministic_samplers(golden_of: type[Golden], method: str, case: str) -> None:
    golden = golden_of(method)
    sampler, guidance, steps = DETERMINISTIC[method][case]
    result = solve(sampler, guided(golden, guidance), start(golden, torch.float64), uniform_times(steps))
    assert_close(channels_of(result), golden[f"sample.{case}.out"])


def test_every_sampling_case_of_the_files_is_checked(golden: Golden) -> None:
    cases = {key.split(".")[1] for key in golden.tensors if key.startswith("sample.") and key.endswith(".out")}
    assert cases <= STOCHASTIC.keys() | DETERMINISTIC.get(golden.method, {}).keys() | {"sde_vae_cfg"}


def test_the_family_is_recognised_by_shape(golden: Golden) -> None:
    assert golden.official().family == golden.method


def test_export_gives_the_published_file_back(golden: Golden) -> None:
    official = golden.official()
    published = export_official(official.family, official.config, official.weights)
    assert published.keys() == golden.published.keys()
    for name, value in golden.published.items():
        assert_close(published[name], value)
