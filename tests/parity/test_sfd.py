"""SFD's published numbers: two times, forward pass, guidance, losses, samplers; Latent Forcing's times of training."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from golden_files import Golden, assert_close
from torch import Tensor

from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.guidance import Guidance, Velocity, guided_velocity
from reglue.diffusion.modalities import LATENT, State, Times
from reglue.diffusion.objective import (
    COSINE,
    TrainingSample,
    alignment_loss,
    cosine_losses,
    loss_terms,
    velocity_losses,
    weighted_sum,
)
from reglue.diffusion.paths import LINEAR
from reglue.diffusion.samplers import adaptive_solver, dopri5, integrate
from reglue.diffusion.schedules import schedule_of
from reglue.papers import SFD
from reglue.published.weights import OfficialModel, export_official, import_official

LOCAL = "local"
SCALE = 1.5


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("sfd")


@pytest.fixture(scope="module")
def denoiser(golden: Golden) -> Denoiser:
    return golden.denoiser()


def guide_of(golden: Golden) -> OfficialModel:
    weights = {k.removeprefix("guide.weights."): v for k, v in golden.tensors.items() if k.startswith("guide.weights.")}
    return import_official(weights, latent_channels=texture_channels(golden), alignment_depth=1)


def texture_channels(golden: Golden) -> int:
    return golden.about["in_channels"] - golden.about["semantic_chans"]


def to_state(golden: Golden, x: Tensor) -> State:
    channels = texture_channels(golden)
    return {LATENT: x[:, :channels], LOCAL: x[:, channels:]}


def joined(state: State) -> Tensor:
    return torch.cat([state[LATENT], state[LOCAL]], dim=1)


def test_the_file_comes_in_and_goes_out(golden: Golden) -> None:
    for official, published in ((golden.official(), golden.published), (guide_of(golden), {})):
        assert (official.family, official.config.times) == ("sfd", "lead")
        assert official.config.parts.qk_norm == golden.about["use_qknorm"]
        again = export_official(official.family, official.config, official.weights)
        assert not published or again.keys() == published.keys()
        for name, value in published.items():
            assert_close(again[name], value)


def times_of(golden: Golden) -> dict[str, Tensor]:
    return {LATENT: 1 - golden["input.t"], LOCAL: 1 - golden["input.t_semantic"]}


@torch.no_grad()
def test_forward_pass_and_guidance(golden: Golden, denoiser: Denoiser) -> None:
    state, times = to_state(golden, golden["input.x"]), times_of(golden)
    prediction = denoiser(state, times, golden.condition)
    assert_close(-joined(prediction.velocity), golden["forward.velocity"])
    assert_close(denoiser.projector(prediction.tap), golden["forward.projection"])
    null = joined(denoiser(state, times, denoiser.null(len(golden["input.y"]))).velocity)
    weak = joined(guide_of(golden).denoiser()(state, times, golden.condition).velocity)
    for worse, key in ((null, "cfg"), (weak, "autoguidance")):
        assert_close(-(worse + SCALE * (joined(prediction.velocity) - worse)), golden[f"forward.{key}"])


@torch.no_grad()
def test_every_loss_term(golden: Golden, denoiser: Denoiser) -> None:
    about = golden.about
    data, noise = to_state(golden, golden["loss.x"]), to_state(golden, golden["loss.noise"])
    schedule = schedule_of(SFD.times, {"delta": about["semfirst_delta_t"]})
    time = {name: t.float() for name, t in schedule.training_times([1 - golden["loss.time"].double()], data).items()}
    assert_close(1 - time[LATENT], golden["loss.t_texture"])
    assert_close(1 - time[LOCAL], golden["loss.t_semantic"])
    noisy, velocity = LINEAR.interpolate(data, noise, time)
    assert_close(joined(noisy), golden["loss.x_t"])
    prediction = denoiser(noisy, time, golden.condition)
    shares = SFD.loss_weights(0, {name: x.shape[1:] for name, x in data.items()})
    assert shares[LOCAL] / shares[LATENT] == pytest.approx(
        about["semantic_weight"] * about["semantic_chans"] / texture_channels(golden)
    )
    losses = velocity_losses(prediction.velocity, velocity)
    weighted = torch.stack([shares[name] * loss for name, loss in losses.items()])
    assert_close(weighted.sum(0), golden["loss.velocity_term"])
    assert_close(cosine_losses(prediction.velocity, velocity), golden["loss.cos_term"])
    target = golden["loss.target"].flatten(2).transpose(1, 2)
    projected = denoiser.projector(prediction.tap)
    each = [alignment_loss(ours, of_encoder) for ours, of_encoder in zip(projected, target, strict=True)]
    assert_close(1 + torch.stack(each), golden["loss.align_term"])
    sample = TrainingSample(data, noise, time, golden.condition, target)
    terms = loss_terms(denoiser, LINEAR, sample, cosine=True)
    # Our term of alignment is −cos, theirs 1 − cos.
    assert_close(weighted_sum(terms, shares) + SFD.alignment.weight, golden["loss.total"].squeeze())
    assert {*terms} == {*shares} >= {COSINE}


SAMPLES: dict[str, Guidance] = {
    "euler": Guidance(),
    "euler_14": Guidance(),
    "euler_shift": Guidance(),
    "euler_cfg": Guidance(SCALE),
    "euler_cfg_interval": Guidance(SCALE, interval=(0.0, 0.75)),
    "euler_autoguidance": Guidance(auto_scale=SCALE),
    "euler_autoguidance_split": Guidance(auto_scales={LATENT: 1.8, LOCAL: 1.2}),
}


def velocity_of(golden: Golden, guidance: Guidance) -> Velocity:
    denoiser, weaker = golden.denoiser(), guide_of(golden).denoiser()
    return guided_velocity(denoiser, golden.condition, denoiser.config.modalities, guidance, weaker)


def theirs(delta: float, clock: float) -> Times:
    """Their clock runs from 0 to 1 + Δ."""
    return {LATENT: 1 - max(0.0, clock - delta), LOCAL: 1 - min(1.0, clock)}


@pytest.mark.parametrize("case", SAMPLES)
@torch.no_grad()
def test_samples(golden: Golden, case: str) -> None:
    """Their steps count whole where they begin while a modality moves, so that it comes to another end than ours."""
    delta, state = golden.about["semfirst_delta_t"], to_state(golden, golden["sample.x_init"].double())
    velocity, clocks = velocity_of(golden, SAMPLES[case]), golden[f"sample.{case}.times"]
    begins = torch.tensor(delta, dtype=torch.float32)
    for now, then in pairwise(clocks):
        moves = {LATENT: now >= begins, LOCAL: now <= 1}
        v, step = velocity(state, theirs(delta, now.item())), (now - then).double()
        state = {name: x + step * v[name] if moves[name] else x for name, x in state.items()}
    assert_close(joined(state), golden[f"sample.{case}.out"])


@torch.no_grad()
def test_samples_of_dopri5(golden: Golden) -> None:
    """Theirs goes over the jumps where a modality begins and ends, and roundings decide where its steps fall."""
    delta, clocks = golden.about["semfirst_delta_t"], golden["sample.dopri5.times"]
    velocity = velocity_of(golden, Guidance())

    def field(clock: Tensor, x: Tensor) -> Tensor:
        v = velocity(to_state(golden, x), theirs(delta, clock.item()))
        return -torch.cat([v[LATENT] * (clock >= delta), v[LOCAL] * (clock <= 1)], dim=1)

    def off_by(seed: int) -> float:
        x = golden["sample.x_init"]
        nudged = x + 1e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        result = adaptive_solver()(field, nudged, clocks, rtol=1e-3, atol=1e-6, method="dopri5")[-1]
        return float((result - golden["sample.dopri5.out"]).norm() / result.norm())

    assert any(off_by(seed) < 1e-2 for seed in range(8))


@torch.no_grad()
def test_our_dopri5_ends_at_the_edges_and_is_exact(golden: Golden) -> None:
    schedule = schedule_of("lead", {"delta": golden.about["semfirst_delta_t"]})
    clocks, velocity = [1.0, *sorted(schedule.edges, reverse=True), 0.0], velocity_of(golden, Guidance())

    def drawn(dtype: torch.dtype, tolerance: float) -> Tensor:
        state = to_state(golden, golden["sample.x_init"].to(dtype))
        step = partial(dopri5, relative_tolerance=tolerance)
        return joined(integrate(step, velocity, state, [schedule.times(clock, state) for clock in clocks])).double()

    exact = drawn(torch.float64, 1e-6)
    assert (drawn(torch.float32, 1e-3) - exact).norm() / exact.norm() < 2e-3


def test_every_sampling_case_of_the_file_is_checked(golden: Golden) -> None:
    cases = {key.split(".")[1] for key in golden.tensors if key.startswith("sample.") and key.endswith(".out")}
    assert cases == {*SAMPLES, "dopri5"}


def test_times_of_training_of_latent_forcing() -> None:
    golden = Golden("latentforcing")
    semantic, pixel, test, tested, choice, noised = golden["time.draws"]
    first = choice < 0.4
    t_pixel = torch.where(test < 0.1, tested / 2, (pixel * 0.8 - 0.4).sigmoid())
    clock = 1 - torch.where(first, (semantic - 1.2).sigmoid(), t_pixel)
    cascade = schedule_of("cascade", {})
    times = cascade.training_times([clock], (LATENT, LOCAL), (choice, 1 - noised))
    assert_close(1 - times[LATENT], golden["time.t"])
    assert_close(1 - times[LOCAL], golden["time.t_semantic"])
    learned = cascade.learned(times)
    assert torch.equal(learned[LOCAL], golden["time.choose_semantic"])
    assert torch.equal(learned[LATENT], ~golden["time.choose_semantic"])
