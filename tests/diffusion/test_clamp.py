"""Holding what is known while the rest is drawn: on Gaussians, whose joint velocity is known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from reglue.diffusion.controls import Clamp, Controlled, FlowEdit
from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import State, Times
from reglue.diffusion.noise import Draws
from reglue.diffusion.paths import PATHS, Path
from reglue.diffusion.samplers import SAMPLERS, Start, begin_at, integrate, returning
from solving import at

MEAN = torch.tensor([0.5, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.30, 0.24], [0.24, 0.25]], dtype=torch.float64)
"""Of the latent and the local value of an image, one number each."""
IMAGES = 6
SHAPES = {"latent": (1,), "local": (1,)}


class Gaussian(Velocity):
    """α' E[x₀ | x_t] + σ' E[ε | x_t], both linear in x_t."""

    def __init__(self, path: Path = PATHS["linear"]) -> None:
        self.path = path

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        c = self.path.coefficients(torch.tensor(times["latent"], dtype=torch.float64))
        x = torch.cat([state["latent"], state["local"]], dim=1)
        spread = c.alpha**2 * COVARIANCE + c.sigma**2 * torch.eye(2, dtype=torch.float64)
        whitened = torch.linalg.solve(spread, (x - c.alpha * MEAN).T).T
        data, noise = MEAN + c.alpha * whitened @ COVARIANCE, c.sigma * whitened
        v = c.d_alpha * data + c.d_sigma * noise
        return {"latent": v[:, :1], "local": v[:, 1:]}


def noise(images: int = IMAGES, seed: int = 1) -> State:
    draws = Draws(seed, "test", range(images), SHAPES)
    return draws.next(dict.fromkeys(SHAPES, torch.empty(0, dtype=torch.float64)))


def clamp(value: float = 0.4, images: int = IMAGES, **options: object) -> Clamp:
    known = {"local": torch.full((images, 1), value, dtype=torch.float64)}
    draws = Draws(2, "known", range(images), {"local": (1,)})
    return Clamp(known, draws, **options)  # type: ignore[reportArgumentType]


def draw(name: str, steps: int, path: str = "linear", until: float = 0.0, **options: Any) -> Tensor:
    """The latents, where the local values are held."""
    velocity, control = Gaussian(PATHS[path]), clamp(until=until, path=PATHS[path])  # type: ignore[index]
    followed = Controlled(velocity, [control])
    times = at(SAMPLERS[name].grid(steps, 1.0, followed.discontinuities), noise())
    drawn = integrate(partial(SAMPLERS[name].step, **options), velocity, noise(), times, [control])
    if not until:
        assert torch.equal(drawn["local"], torch.full_like(drawn["local"], 0.4))
    return drawn["latent"]


@pytest.mark.parametrize(
    ("name", "path", "until", "order"),
    [
        ("euler", "linear", 0.0, 1),
        ("heun", "linear", 0.0, 2),
        ("adams-bashforth", "linear", 0.0, 2),
        ("heun", "cosine", 0.0, 2),
        ("adams-bashforth", "cosine", 0.0, 2),
        ("adams-bashforth", "linear", 0.37, 2),
    ],
)
def test_samplers_keep_their_order(name: str, path: str, until: float, order: int) -> None:
    exact = draw("adams-bashforth", 1600, path, until)
    errors = [(draw(name, steps, path, until) - exact).abs().max().item() for steps in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.25), errors


def test_dopri5_follows_the_known_too() -> None:
    for until in (0.0, 0.37):
        finely = draw("dopri5", 1, until=until, relative_tolerance=1e-6)
        torch.testing.assert_close(finely, draw("adams-bashforth", 1000, until=until), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*SAMPLERS])
def test_what_is_drawn_fits_what_is_known(name: str) -> None:
    """The mean of the unknown moves with the known, towards that of p(unknown | known)."""
    images, sampler = 20, SAMPLERS[name]  # The same noise for both: all is linear, so it cancels.
    times = at(sampler.grid(40, 1.0, ()), noise())
    means = []
    for value in (-0.8, 0.2):
        draws = Draws(5, "steps", range(images), SHAPES)
        fresh = iter(lambda draws=draws: draws.next(noise(1)), None)
        control = clamp(value, images, fresh=sampler.stochastic)
        drawn = integrate(sampler.step, Gaussian(), noise(images), times, [control], fresh)
        assert bool((drawn["local"] == value).all())
        means.append(drawn["latent"].mean().item())
    slope = (COVARIANCE[0, 1] / COVARIANCE[1, 1]).item()
    assert 0.4 * slope < means[1] - means[0] < 1.1 * slope


def test_resampling_brings_the_unknown_nearer_to_what_fits() -> None:
    """Holding samples p(unknown | noisy known); going back and forth lessens that bias (RePaint)."""
    images, sampler = 20, SAMPLERS["euler"]
    slopes = []
    for repeats in (0, 2, 8):
        means = []
        for value in (-0.8, 0.2):
            draws = Draws(5, "returns", range(images), SHAPES)
            fresh = iter(lambda draws=draws: draws.next(noise(1)), None)
            times = at(returning(sampler.grid(60, 1.0, ()), repeats, 6), noise())
            control = clamp(value, images)
            drawn = integrate(sampler.step, Gaussian(), noise(images), times, [control], fresh)
            means.append(drawn["latent"].mean().item())
        slopes.append(means[1] - means[0])
    slope = (COVARIANCE[0, 1] / COVARIANCE[1, 1]).item()
    misses = [abs(slope - found) for found in slopes]
    assert misses[0] > 1.3 * misses[1] > 1.3 * misses[2], slopes


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_return_has_the_noise_of_its_time(path: str) -> None:
    way, images = PATHS[path], 200_000  # type: ignore[index]
    generator = torch.Generator().manual_seed(0)
    data, first, second = (torch.randn(images, generator=generator, dtype=torch.float64) for _ in range(3))
    now, then = (torch.tensor(t, dtype=torch.float64) for t in (0.3, 0.7))
    c, later = way.coefficients(now), way.coefficients(then)
    back = way.returned(c.alpha * data + c.sigma * first, now, then, second)
    assert (back - later.alpha * data).std().item() == pytest.approx(later.sigma.item(), rel=0.01)
    assert torch.dot(back, data).item() / images == pytest.approx(later.alpha.item(), abs=0.01)


@pytest.mark.parametrize("grid", [[1.0, 0.5, 0.0], [0.6, 0.4, 0.2, 0.0], [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]])
@pytest.mark.parametrize("stretch", [1, 2, 3, 10])
def test_returns_go_over_everything_that_often(grid: list[float], stretch: int) -> None:
    assert returning(grid, 0, stretch) == grid
    times = returning(grid, 2, stretch)
    steps = [(a, b) for a, b in pairwise(times) if b < a]
    first = {*pairwise(grid[: 1 + stretch])} if grid[0] == 1 else set()
    for step in pairwise(grid):
        assert steps.count(step) == (1 if step in first else 3)


def test_where_masks_say_and_for_some_of_the_images() -> None:
    known = {"local": torch.arange(IMAGES, dtype=torch.float64)[:, None].repeat(1, 4)}
    where = {"local": torch.tensor([[True, False, True, False]]).expand(IMAGES, 4)}
    state = {"local": torch.full((IMAGES, 4), 9.0), "latent": torch.zeros(IMAGES, 1)}
    whole = Clamp(known, Draws(0, "known", range(IMAGES), {"local": (4,)}), where)
    parts = [whole.of(slice(start, start + 2)) for start in range(0, IMAGES, 2)]

    def seen(control: object, images: Sequence[int]) -> list[Tensor]:
        own = {name: value[list(images)] for name, value in state.items()}
        times = {"local": 0.25, "latent": 0.25}
        assert isinstance(control, Clamp)
        results = [control.before(own, times), control.velocity(own, own, times)]
        return [result["local"] for result in (*results, control.after(own, dict.fromkeys(times, 0.0)))]

    together = seen(whole, range(IMAGES))
    apart = [seen(part, range(2 * n, 2 * n + 2)) for n, part in enumerate(parts)]
    for n, values in enumerate(together):
        assert torch.equal(values, torch.cat([part[n] for part in apart]))
        assert bool((values[:, [1, 3]] == 9).all())
    before, velocity, after = (values[:, [0, 2]].double() for values in together)
    torch.testing.assert_close(before - 0.25 * velocity, known["local"][:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert torch.equal(after, known["local"][:, [0, 2]])


def test_a_start_for_some_of_the_images() -> None:
    start = Start(0.5, {"latent": torch.arange(4.0)[:, None]})
    assert start.of(slice(1, 3)).data["latent"].flatten().tolist() == [1, 2]
    assert start.of(slice(1, 3)).time == 0.5


class Moved(Velocity):
    """A Gaussian whose latents are moved by the condition."""

    def __init__(self, condition: dict[str, Tensor]) -> None:
        self.by = condition["shift"]

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        t = times["latent"]
        still = {**state, "latent": state["latent"] - (1 - t) * self.by}
        moved = Gaussian()(still, times)
        return {**moved, "latent": moved["latent"] - self.by}


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("adams-bashforth", 2), ("dopri5", None)])
@pytest.mark.parametrize("begin", [1.0, 0.6])
def test_an_edit_of_the_flow_moves_what_the_condition_moves(name: str, order: int | None, begin: float) -> None:
    """And nothing else: from the same condition to the same, an image stays."""
    data = {n: 0.3 * x for n, x in noise(seed=4).items()}
    still, moved = {"shift": torch.zeros(IMAGES, 1)}, {"shift": torch.full((IMAGES, 1), 0.5)}

    def edited(steps: int, condition: dict[str, Tensor]) -> State:
        control = FlowEdit(Moved, still, data, Draws(2, "known", range(IMAGES), SHAPES))
        grid = begin_at(SAMPLERS[name].grid(steps, 1.0, ()), begin)
        return integrate(SAMPLERS[name].step, Moved(condition), noise(), at(grid, noise()), [control])

    for modality, value in edited(10, still).items():
        torch.testing.assert_close(value, data[modality], rtol=1e-6, atol=1e-6)
    result = edited(40, moved)
    change = result["latent"] - data["latent"]
    assert bool((change > 0.1).all())
    if order:
        steps = [40, 80, 160, 1600]
        values = [edited(n, moved)["latent"] for n in steps]
        errors = [(value - values[-1]).abs().max().item() for value in values[:-1]]
        assert errors[0] < 1e-9 or all(a / b > 0.7 * 2**order for a, b in pairwise(errors)), errors
