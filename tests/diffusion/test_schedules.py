"""Times of their own for modalities: schedules, samplers and guidance, on Gaussians whose joint velocity is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reglue.config import Recipe
from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Prediction
from reglue.diffusion.guidance import Guidance, Velocity, guided_velocity
from reglue.diffusion.modalities import Modality, State, TensorTimes, Times
from reglue.diffusion.samplers import SAMPLERS, aligned, integrate, uniform_times
from reglue.diffusion.schedules import SCHEDULES, Cascade, Independent, Known, Lead, Schedule, schedule_of
from reglue.errors import UserError
from reglue.pipeline import from_noise
from reglue.sampling import Sampling

NAMES = ("latent", "local")
MEAN = torch.tensor([0.5, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.30, 0.24], [0.24, 0.25]], dtype=torch.float64)
"""Of the latent and the local value of an image, one number each."""
SHAPES = dict.fromkeys(NAMES, (1,))
KINDS: dict[str, Schedule] = {**SCHEDULES, "lead 0.7": Lead(0.7), "known": Known(frozenset({"local"}))}


class Gaussian(Velocity):
    """E[ε | x_t] − E[x₀ | x_t], linear in x_t, for any combination of times."""

    def __init__(self, spoilt: bool = False) -> None:
        self.spoilt = spoilt

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        t = torch.tensor([times[name] for name in NAMES], dtype=torch.float64)
        x = torch.cat([state[name] for name in NAMES], dim=1)
        kept = torch.diag(1 - t)
        whitened = torch.linalg.solve(kept @ COVARIANCE @ kept + torch.diag(t**2), (x - (1 - t) * MEAN).T).T
        v = t * whitened - (MEAN + (1 - t) * whitened @ COVARIANCE)
        # Where there is no noise, none is learned: whatever a sampler makes of it must not show.
        v = torch.where((t == 0) & self.spoilt, torch.full_like(v, 1e6), v)
        return {"latent": v[:, :1], "local": v[:, 1:]}


def noise(images: int = 6) -> State:
    drawn = torch.randn(2, images, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return dict(zip(NAMES, drawn, strict=True))


def drawn(name: str, schedule: Schedule, steps: int, state: State | None = None, **options: Any) -> State:
    sampler, state = SAMPLERS[name], noise() if state is None else state
    grid = aligned(sampler.grid(steps, 1.0, schedule.edges), schedule.edges)
    draws = torch.Generator().manual_seed(7)
    fresh = iter(lambda: {n: torch.randn(x.shape, generator=draws, dtype=x.dtype) for n, x in state.items()}, None)
    # The adaptive method evaluates the end of an interval as if it went on behind it.
    velocity = Gaussian(spoilt=not sampler.adaptive)
    times = [schedule.times(clock, NAMES) for clock in grid]
    return integrate(partial(sampler.step, **options), velocity, state, times, noise=fresh)


# ---- schedules


@given(clock=st.floats(0, 1), other=st.floats(0, 1))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "known"])
def test_times_rise_with_the_clock_from_data_to_noise(kind: str, clock: float, other: float) -> None:
    schedule = KINDS[kind]
    first, last = sorted((clock, other))
    earlier, later = schedule.times(first, NAMES), schedule.times(last, NAMES)
    assert all(0 <= earlier[name] <= later[name] <= 1 for name in NAMES)
    assert schedule.times(0.0, NAMES) == dict.fromkeys(NAMES, 0)
    assert schedule.times(1.0, NAMES) == dict.fromkeys(NAMES, 1)
    assert all(earlier[name] <= earlier["latent"] for name in NAMES)  # What leads is nearer to data.


def test_modalities_begin_and_end_exactly_at_the_edges() -> None:
    for schedule in (Lead(0.15), Lead(), Lead(0.5), Lead(1.0), Cascade()):
        arrived, begin = min(schedule.edges), max(schedule.edges)
        assert schedule.times(arrived, NAMES)["local"] == 0
        assert schedule.times(begin, NAMES)["latent"] == 1
    assert Lead(0.0).edges == ()
    assert Lead(0.0).times(0.37, NAMES) == dict.fromkeys(NAMES, 0.37)
    lead = Lead()
    for u in (0.1, 0.5, 0.9):  # As SFD writes it, of progress u.
        times = lead.times(1 - u, NAMES)
        assert times["local"] == pytest.approx(max(0, 1 - 1.3 * u))
        assert times["latent"] == pytest.approx(min(1, 1.3 - 1.3 * u))


@given(time=st.floats(0.01, 0.99))
def test_the_clock_is_found_by_times(time: float) -> None:
    assert SCHEDULES["shared"].clocks_at(time, NAMES) == {time}
    for schedule in (Lead(), Cascade()):
        for clock in schedule.clocks_at(time, NAMES):
            assert any(t == pytest.approx(time) for t in schedule.times(clock, NAMES).values())


def test_what_training_sees() -> None:
    uniform = [torch.rand(1000, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    cascade = Cascade(share=0.3, noise=0.2)
    times = cascade.training_times(uniform[:1], NAMES, uniform[1:])
    learned, first = cascade.learned(times), times["latent"] == 1
    assert first.double().mean() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(times["local"][first], uniform[0][first])
    assert torch.equal(times["latent"][~first], uniform[0][~first])
    assert 0.19 < times["local"][~first].max() < 0.2
    assert torch.equal(learned["local"], first)
    assert torch.equal(learned["latent"], ~first)
    independent = Independent()
    assert independent.clocks(NAMES) == 2
    assert independent.training_times(uniform[:2], NAMES) == dict(zip(NAMES, uniform[:2], strict=True))


def test_what_a_model_can_draw_given_the_rest() -> None:
    three = (*NAMES, "cls")
    given = {kind: KINDS[kind].given({"local"}, NAMES) for kind in SCHEDULES}
    assert given == {"shared": None, "lead": None, "cascade": Known(frozenset({"local"})),
                     "independent": Known(frozenset({"local"}))}  # fmt: skip
    assert Cascade().given({"local"}, three) is None
    assert Cascade().given({"latent"}, NAMES) is None
    assert Independent().given({"latent", "cls"}, three)


@pytest.mark.parametrize(
    ("times", "options", "told"),
    [
        ("shared", {"delta": 0.1}, "times_options delta: shared takes no options"),
        ("lead", {"speed": 0.1}, "times_options speed: lead takes delta"),
        ("lead", {"delta": 1.5}, r"times_options delta 1.5: choose 0 to 1"),
        ("cascade", {"delta": 0.5}, "times_options delta: cascade takes share, noise"),
        ("cascade", {"share": float("nan")}, "times_options share nan: choose 0 to 1"),
        ("sideways", {}, "times sideways: choose shared, lead, cascade, independent"),
    ],
)
def test_mistakes_in_schedules(times: str, options: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Recipe("mine", times=times, times_options=options)
    assert schedule_of("lead", {"delta": 0.15}) == Lead(0.15)


# ---- samplers


@pytest.mark.parametrize("kind", ["lead", "lead 0.7", "cascade", "known"])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("adams-bashforth", 2)])
def test_samplers_keep_their_order_with_edges(name: str, order: int, kind: str) -> None:
    state = noise() if kind != "known" else {**noise(), "local": torch.full((6, 1), 0.4, dtype=torch.float64)}
    exact = drawn("dopri5", KINDS[kind], 1, state, relative_tolerance=1e-9, absolute_tolerance=1e-12)

    def off_by(steps: int) -> float:
        found = drawn(name, KINDS[kind], steps, state)
        return max((found[n] - exact[n]).abs().max().item() for n in NAMES)

    # Edges on the grid make its steps uneven, and errors less regular than their order.
    assert order - 0.3 < math.log(off_by(60) / off_by(240), 4) < order + 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_the_distribution_under_every_schedule(name: str, kind: str) -> None:
    """Mean and covariance of the data; where the local value is known, those of p(latent | local), exactly."""
    images, value = 3000, 0.4
    state = noise(images)
    if kind == "known":
        state["local"] = torch.full((images, 1), value, dtype=torch.float64)
    found = drawn(name, KINDS[kind], 200 if name == "dpm-solver" else 60, state)
    x = torch.cat([found[n] for n in NAMES], dim=1)
    if kind == "known":
        assert bool((found["local"] == value).all())
        slope = COVARIANCE[0, 1] / COVARIANCE[1, 1]
        mean, variance = MEAN[0] + slope * (value - MEAN[1]), COVARIANCE[0, 0] - slope * COVARIANCE[0, 1]
        torch.testing.assert_close(x[:, 0].mean(), mean, rtol=0, atol=0.03)
        torch.testing.assert_close(x[:, 0].var(), variance, rtol=0.1, atol=0)
    else:
        torch.testing.assert_close(x.mean(0), MEAN, rtol=0, atol=0.03)
        torch.testing.assert_close(torch.cov(x.T), COVARIANCE, rtol=0, atol=0.04)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("repeats", [0, 1])
def test_edges_are_on_the_grid_that_is_drawn_by(name: str, repeats: int) -> None:
    """Returns too, where one modality stands still."""
    met: set[tuple[float, float]] = set()

    class Noting(Gaussian):
        def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
            met.add((times["latent"], times["local"]))
            return super().__call__(state, times)

    sampling = Sampling(name, 20, state_precision="float64")
    found = from_noise(Noting(), 0, range(3), SHAPES, sampling, torch.device("cpu"), Lead(), repeats=repeats)
    assert all(x.isfinite().all() and x.abs().max() < 5 for x in found.values())
    assert any(latent == 1 and 0 < local < 1 for latent, local in met)
    if not SAMPLERS[name].adaptive:
        assert any(local == 0 and latent < 1 for latent, local in met)
        assert any(latent == 1 and local == pytest.approx(1 - 0.3) for latent, local in met)


# ---- guidance


@dataclass
class Recorder:
    """A denoiser that notes its times, and answers with the class (9 for none), with the latents' time where local is
    noise."""

    asked: list[dict[str, list[float]]] = field(default_factory=list)

    def null(self, batch: int) -> Condition:
        return {"class": torch.full((batch,), 9)}

    def __call__(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        times = dict.fromkeys(state, time) if isinstance(time, Tensor) else time
        self.asked.append({name: t.tolist() for name, t in times.items()})
        value = condition["class"].double() + (times["local"] == 1) * 10
        return Prediction({name: value.view(-1, 1, 1, 1).expand_as(x).to(x.dtype) for name, x in state.items()}, None)


def guided(guidance: Guidance, times: Times, any_times: bool = False) -> tuple[dict[str, float], Recorder]:
    """The velocity of one image of class 1, by modality."""
    denoiser, condition = Recorder(), {"class": torch.tensor([1])}
    modalities = tuple(Modality(name, "map", 1) for name in NAMES)
    weaker = Recorder()
    weaker.null = denoiser.null
    velocity = guided_velocity(denoiser, condition, modalities, guidance, weaker, any_times=any_times)
    state = {name: torch.zeros(1, 1, 2, 2) for name in NAMES}
    return {name: v.mean().item() for name, v in velocity(state, times).items()}, denoiser


def test_the_interval_is_about_the_time_of_each_modality() -> None:
    guidance = Guidance(3.0, interval=(0.2, 0.6))
    strong, plain = 1 + 2 * (1 - 9), 1
    assert guided(guidance, {"latent": 0.5, "local": 0.1})[0] == {"latent": strong, "local": plain}
    assert guided(guidance, {"latent": 0.8, "local": 0.5})[0] == {"latent": plain, "local": strong}
    found, denoiser = guided(guidance, {"latent": 0.8, "local": 0.1})
    assert (found, len(denoiser.asked[0]["latent"])) == ({"latent": plain, "local": plain}, 1)
    # What is data already needs no guidance, and no evaluation for it.
    found, denoiser = guided(Guidance(3.0, interval=(0.0, 0.6)), {"latent": 0.8, "local": 0.0})
    assert (found, len(denoiser.asked[0]["latent"])) == ({"latent": plain, "local": plain}, 1)


def test_the_unconditional_branch_may_see_noise_for_semantics() -> None:
    times = {"latent": 0.5, "local": 0.2}
    found, denoiser = guided(Guidance(3.0, unconditional="everything"), times, any_times=True)
    assert denoiser.asked == [{"latent": [0.5, 0.5], "local": [0.2, 1.0]}]
    assert found == dict.fromkeys(NAMES, 1 + 2 * (1 - 19))
    # So does the worse model of representation guidance, of models that know semantics as noise.
    found, denoiser = guided(Guidance(representation_scale=3.0), times, any_times=True)
    assert denoiser.asked == [{"latent": [0.5, 0.5], "local": [0.2, 1.0]}]
    assert found == dict.fromkeys(NAMES, 1 + 2 * (1 - 11))


def test_autoguidance_has_a_scale_for_each_modality() -> None:
    class Weak(Recorder):
        def __call__(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
            return Prediction({name: x + 5 for name, x in state.items()}, None)

    modalities = tuple(Modality(name, "map", 1) for name in NAMES)
    guidance = Guidance(auto_scale=1.5, auto_scales={"local": 1.0})
    assert guidance.asks_for_weaker
    assert not Guidance(auto_scales={"local": 1.0}).asks_for_weaker
    velocity = guided_velocity(Recorder(), {"class": torch.tensor([1])}, modalities, guidance, Weak())
    state = {name: torch.zeros(1, 1, 2, 2) for name in NAMES}
    found = velocity(state, dict.fromkeys(NAMES, 0.5))
    assert {name: v.mean().item() for name, v in found.items()} == {"latent": 1 + 0.5 * (1 - 5), "local": 1}


def test_grids_that_are_too_short_for_their_edges() -> None:
    for steps in (1, 2, 3):
        grid = aligned(uniform_times(steps), Lead().edges)
        assert len(grid) == steps + 1
        assert grid == sorted(grid, reverse=True)
        found = drawn("euler", Lead(), steps)
        assert all(x.isfinite().all() for x in found.values())
