"""Samples that are led to a small loss, through the network: on a Gaussian, whose velocity is known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from test_clamp import IMAGES, SHAPES, Gaussian, clamp, noise
from torch import Tensor

from reglue.diffusion.controls import Controlled, LossGuidance, SquaredError, Unlikeness
from reglue.diffusion.denoiser import Prediction
from reglue.diffusion.modalities import State, Times
from reglue.diffusion.noise import Draws
from reglue.diffusion.paths import PATHS
from reglue.diffusion.samplers import SAMPLERS, integrate
from solving import at

KNOWN = {"local": torch.full((IMAGES, 1), 0.4, dtype=torch.float64)}
PATH_NAMES = ["linear", "cosine"]


def led(scale: float, path: str = "linear", **options: object) -> LossGuidance:
    return LossGuidance(SquaredError(KNOWN), scale, path=PATHS[path], **options)  # type: ignore[index, reportArgumentType]


@pytest.mark.parametrize("path", PATH_NAMES)
@pytest.mark.parametrize(("latent", "local"), [(0.5, 0.5), (0.7, 0.3), (0.95, 0.99), (1.0, 0.2), (1.0, 1.0)])
def test_it_adds_the_gradient_of_the_loss_times_its_factor(path: str, latent: float, local: float) -> None:
    velocity, control, times = Gaussian(PATHS[path]), led(0.01, path), {"latent": latent, "local": local}  # type: ignore[index]
    state = noise()
    control.before(state, times)
    own = velocity(state, times)
    moved = Controlled(velocity, [control])(state, times)

    def loss(changed: State) -> Tensor:
        v, t = velocity(changed, times), torch.tensor(local, dtype=torch.float64)
        return (velocity.path.velocity_to_data(v["local"], changed["local"], t) - 0.4).square().sum() / 2

    for name, t in times.items():
        c = velocity.path.coefficients(torch.tensor(t, dtype=torch.float64))
        factor = c.sigma * (c.alpha * c.d_sigma - c.d_alpha * c.sigma) / max(c.alpha.item(), 0.1)
        if path == "linear" and t < 0.9:
            assert factor.item() == pytest.approx(t / (1 - t))
        for i in range(IMAGES):
            step = torch.zeros_like(state[name])
            step[i] = 1e-5
            slope = (loss({**state, name: state[name] + step}) - loss({**state, name: state[name] - step})) / 2e-5
            change = (moved[name] - own[name])[i].item()
            assert change == pytest.approx(0.01 * factor.item() * slope.item(), rel=1e-4, abs=1e-9)
        assert not moved[name].requires_grad


def test_it_never_moves_farther_than_the_velocity() -> None:
    times = {"latent": 0.999, "local": 0.999}
    control, state = led(1e9), noise()
    control.before(state, times)
    own, moved = Gaussian()(state, times), Controlled(Gaussian(), [control])(state, times)
    sizes = [torch.cat([*part.values()], 1).norm(dim=1) for part in (own, {n: moved[n] - own[n] for n in own})]
    torch.testing.assert_close(*sizes)


def draw(name: str, steps: int, scale: float, path: str = "linear", until: float = 0.0) -> State:
    velocity, control = Gaussian(PATHS[path]), led(scale, path, until=until)  # type: ignore[index]
    draws, sampler = Draws(5, "steps", range(IMAGES), SHAPES), SAMPLERS[name]
    times = at(sampler.grid(steps, 1.0, Controlled(velocity, [control]).discontinuities), noise())
    with torch.no_grad():
        return integrate(sampler.step, velocity, noise(), times, [control], iter(partial(draws.next, noise()), None))


@pytest.mark.parametrize(
    ("name", "order", "path", "until"),
    [
        ("euler", 1, "linear", 0.0),
        ("heun", 2, "linear", 0.0),
        ("adams-bashforth", 2, "cosine", 0.0),
        ("adams-bashforth", 2, "linear", 0.37),
    ],
)
def test_samplers_keep_their_order(name: str, order: int, path: str, until: float) -> None:
    finely = draw("adams-bashforth", 600, 1.0, path, until)["latent"]
    errors = [(draw(name, steps, 1.0, path, until)["latent"] - finely).abs().max().item() for steps in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 0.75 * 2**order, errors


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_a_greater_scale_leads_nearer_and_takes_the_rest_along(name: str) -> None:
    misses, latents = [], []
    for scale in (0.0, 1.0, 5.0, 25.0):
        drawn = draw(name, 40, scale)
        misses.append((drawn["local"] - 0.4).abs().mean().item())
        latents.append(drawn["latent"].std().item())
    assert all(later < before for before, later in pairwise(misses)), misses
    assert misses[-1] < 0.5 * misses[0]
    assert latents[-1] < 0.7 * latents[0]  # They are correlated.


def test_each_part_is_let_go_at_its_own_time() -> None:
    known = {name: torch.zeros(IMAGES, 1, dtype=torch.float64) for name in SHAPES}
    alone = {name: LossGuidance(SquaredError({name: known[name]}), 1.0) for name in SHAPES}
    both = LossGuidance(SquaredError(known), 1.0, until={"local": 0.6})
    assert both.discontinuities == (0.6,)

    def change(control: LossGuidance, t: float) -> Tensor:
        times, state = dict.fromkeys(SHAPES, t), noise()
        control.before(state, times)
        return Controlled(Gaussian(), [control])(state, times)["latent"] - Gaussian()(state, times)["latent"]

    torch.testing.assert_close(change(both, 0.5), change(alone["latent"], 0.5))
    assert not torch.allclose(change(both, 0.7), change(alone["latent"], 0.7))
    assert change(LossGuidance(SquaredError(known), 1.0, until=0.9), 0.5).abs().max() == 0


@dataclass
class Two:
    """Two losses that count twice and three times."""

    target: Tensor

    def of(self, images: slice) -> Two:
        return Two(self.target[images])

    def __call__(self, data: State) -> State:
        return {name: (data[name] - self.target).square().flatten(1).sum(1) for name in data}


def test_losses_of_ones_own_in_parts_beside_what_is_held() -> None:
    """What is held stays held, whatever a loss says, and images do not depend on each other."""
    times = at(SAMPLERS["heun"].grid(10, 1.0, ()), noise())

    def drawn(images: slice, target: float = 0.0) -> State:
        start = {name: x[images] for name, x in noise().items()}
        controls = [LossGuidance(Two(torch.full((IMAGES, 1), target)), 0.5), clamp()]
        return integrate(SAMPLERS["heun"].step, Gaussian(), start, times, [c.of(images) for c in controls])

    whole = drawn(slice(0, IMAGES))
    assert torch.equal(whole["local"], torch.full_like(whole["local"], 0.4))
    apart = [drawn(slice(i, i + 1))["latent"] for i in range(IMAGES)]
    torch.testing.assert_close(torch.cat(apart), whole["latent"], rtol=1e-12, atol=1e-12)
    assert bool((drawn(slice(0, IMAGES), target=1.0)["latent"] > whole["latent"]).all())


class Seeing(Gaussian):
    """It has one hidden token, (1, x) of the latents."""

    def predict(self, state: State, times: Times, decided_at: Times | None = None) -> Prediction:
        x = state["latent"]
        return Prediction(self(state, times), torch.cat([torch.ones_like(x), x], dim=1)[:, None])


def test_hidden_tokens_are_led_through_their_own_graph() -> None:
    """cos((1, x), (0, 1)) = x/√(1 + x²), whose slope is (1 + x²)^(−3/2); tokens that are not chosen lead nowhere."""
    state, times = noise(), {"latent": 0.5, "local": 0.5}
    chosen = torch.arange(IMAGES)[:, None] > 0
    loss = Unlikeness(lambda tokens: tokens, torch.tensor([0.0, 1.0]).expand(IMAGES, 1, 2), chosen)
    control = LossGuidance(loss, 0.01)
    control.before(state, times)
    own, moved = Gaussian()(state, times), Controlled(Seeing(), [control])(state, times)
    x = state["latent"]
    expected = -0.01 * (1 + x.square()) ** -1.5
    expected[0] = 0
    torch.testing.assert_close(moved["latent"] - own["latent"], expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(moved["local"], own["local"])
    assert control.hidden is None
