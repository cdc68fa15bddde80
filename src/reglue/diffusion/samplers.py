"""Samplers: steps of a velocity function, and the one loop over time that takes them.

A step knows no labels, no networks and no randomness of its own. The state keeps its precision: give float64 to
accumulate in float64, as the published samplers do. To add a sampler, write a step and register it in `SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from reglue.diffusion.chains import STABLE_DIFFUSION, Chain, kept_steps
from reglue.diffusion.controls import Control, Controlled
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import LATENT, State, Times
from reglue.diffusion.paths import Coefficients, Path
from reglue.diffusion.specs import MEAN_VELOCITY, Diffusion
from reglue.diffusion.specs import StatePrecision as StatePrecision
from reglue.errors import UserError
from reglue.extras import need

LAST_NOISY_TIME = 0.04
"""Where the stochastic samplers of SiT and REPA stop adding noise."""

DIFFUSIONS: dict[Diffusion, Callable[[Path, Tensor], float]] = {
    "time": lambda path, t: 2 * t.item(),
    "sigma": lambda path, t: 2 * path.coefficients(t).sigma.item(),
}
"""w_t of the reverse-time SDE, of a path and a time () float64: that of the code of REPA, REG and REGLUE, and of SiT's
and ReDi's, both twice what the papers print. They are equal on the linear path."""
Memory = dict[str, Any]
"""What a step may keep for the next one; empty at the start."""


class Step(Protocol):
    """One step of a sampler."""

    def __call__(
        self,
        velocity: Velocity,
        state: State,
        times: Times,
        next_times: Times,
        memory: Memory,
        noise: Iterator[State],
        /,
    ) -> State:
        """The state at `next_times` from that at `times`, each modality by its own difference of time."""
        ...


def integrate(
    step: Step,
    velocity: Velocity,
    state: State,
    times: Sequence[Times],
    controls: Sequence[Control] = (),
    noise: Iterator[State] = iter(()),
) -> State:
    """The one loop over time: from the first of `times`, at which `state` is, to the last.

    It may begin at any time. `noise` yields the standard normal states that stochastic steps ask for. Controls see
    each state before and after a step, and each velocity. Where times rise, the state returns to what it may have come
    from (`Path.returned`, `returning`), with noise of `noise` too.
    """
    followed = Controlled(velocity, controls) if controls else velocity
    memory: Memory = {}
    for now, then in pairwise(times):
        if rising := [name for name in state if then[name] > now[name]]:
            drawn, memory = next(noise), {}
            t, earlier = ({n: torch.tensor(at[n], dtype=torch.float64) for n in rising} for at in (now, then))
            state |= {n: velocity.path.returned(state[n], t[n], earlier[n], drawn[n]) for n in rising}
            continue
        for control in controls:
            state = control.before(state, now)
        state = step(followed, state, now, then, memory, noise)
        for control in controls:
            state = control.after(state, then)
    return state


def euler(
    velocity: Velocity, state: State, times: Times, next_times: Times, memory: Memory, noise: Iterator[State]
) -> State:
    """Euler's method for dx/dt = v: one evaluation per step."""
    v = velocity(state, times)
    return {name: x + (next_times[name] - times[name]) * v[name] for name, x in state.items()}


def heun(
    velocity: Velocity, state: State, times: Times, next_times: Times, memory: Memory, noise: Iterator[State]
) -> State:
    """Heun's second-order method: two evaluations per step, and one in the last, which ends in the data.

    A modality that ends before the others does so by the first evaluation too: at its data no velocity is learned.
    """
    dt, v = {name: next_times[name] - times[name] for name in state}, velocity(state, times)
    ahead = {name: x + dt[name] * v[name] for name, x in state.items()}
    if is_data(next_times):
        return ahead
    v_next = velocity(ahead, next_times, decided_at=times)
    return {
        name: x + dt[name] * (v[name] + v_next[name]) / 2 if next_times[name] else ahead[name]
        for name, x in state.items()
    }


def mean_velocity(
    velocity: Velocity, state: State, times: Times, next_times: Times, memory: Memory, noise: Iterator[State]
) -> State:
    """x_r = x_t − (t − r)·u, for the mean velocity u over [r, t] that a student predicts: one evaluation per step."""
    v = velocity(state, {**times, SPAN: times[LATENT] - next_times[LATENT]})
    return {name: x + (next_times[name] - times[name]) * v[name] for name, x in state.items()}


def adams_bashforth(
    velocity: Velocity, state: State, times: Times, next_times: Times, memory: Memory, noise: Iterator[State]
) -> State:
    """The two-step method of Adams and Bashforth on any grid: second order for one evaluation per step.

    A step follows the velocity extrapolated to its middle, v + (Δt / 2Δt₋)·(v − v₋) (Hairer, Nørsett and Wanner,
    Solving ordinary differential equations I, section III.5). The first step, and the first behind each discontinuity
    of the velocity, has nothing to extrapolate from: it is Euler's, until the velocity at its end, which the next step
    evaluates anyway, makes it Heun's. So it is for a modality that begins later than others. Discontinuities should be
    on the grid (`aligned_times`), or the order there is 1.
    """
    # A step that begins at a discontinuity is on the side of its middle.
    middle = {name: (t + next_times[name]) / 2 for name, t in times.items()}
    v = velocity(state, times, decided_at=middle)
    times_before, middle_before, v_before, by_euler = memory.get("before", (times, middle, v, ()))
    result, euler_now = State(), set[str]()
    for name, x in state.items():
        dt, slope, moved = next_times[name] - times[name], v[name], times[name] - times_before[name]
        if moved and not any(middle[name] <= edge <= middle_before[name] for edge in velocity.discontinuities):
            change = v[name] - v_before[name]
            if name in by_euler and times[name]:
                x = x + moved / 2 * change
            slope = slope + dt / moved / 2 * change
        else:
            euler_now.add(name)
        result[name] = x + dt * slope
    memory["before"] = times, middle, v, euler_now
    return result


def euler_maruyama(
    velocity: Velocity,
    state: State,
    times: Times,
    next_times: Times,
    memory: Memory,
    noise: Iterator[State],
    *,
    diffusion: Diffusion = "time",
) -> State:
    """Euler–Maruyama for the reverse-time SDE dx = (v − ½ w_t s) dt + √w_t dW (SiT, section 2.4).

    `diffusion` names w_t, of `DIFFUSIONS`. The last step takes the mean only.
    """
    v = velocity(state, times)
    fresh = None if is_data(next_times) else next(noise)
    result: State = {}
    for name, x in state.items():
        t, dt = times[name], next_times[name] - times[name]
        if not dt:  # This modality has its data already, or has not begun.
            result[name] = x
            continue
        now = torch.tensor(t, dtype=torch.float64)  # on the CPU, whatever the device: nothing waits for a number
        w = DIFFUSIONS[diffusion](velocity.path, now)
        drift = v[name] - w / 2 * velocity.path.velocity_to_score(v[name], x, now)
        result[name] = x + drift * dt
        if fresh is not None and next_times[name] > 0:
            result[name] = result[name] + (w * -dt) ** 0.5 * fresh[name]
    return result


def dopri5(
    velocity: Velocity,
    state: State,
    times: Times,
    next_times: Times,
    memory: Memory,
    noise: Iterator[State],
    *,
    relative_tolerance: float = 1e-3,
    absolute_tolerance: float = 1e-6,
) -> State:
    """The adaptive method of Dormand and Prince, of fifth order, over a whole interval (torchdiffeq's; SiT's default).

    Its own steps are chosen for the whole batch, so its images depend on each other: give one image at a time. Each
    modality keeps the tolerances on its own. Raises UserError if torchdiffeq is missing, or if no step is short enough
    for the tolerances.
    """
    odeint = adaptive_solver()
    names, values = list(state), tuple(state.values())
    moving = max(names, key=lambda name: times[name] - next_times[name])
    start, end = times[moving], next_times[moving]
    if start == end:
        return state
    middle = {name: (t + next_times[name]) / 2 for name, t in times.items()}
    # Every modality moves with the time of the one that goes farthest, each at its own rate, or stands still.
    rates = {name: (next_times[name] - t) / (end - start) for name, t in times.items()}
    alike = {name for name, t in times.items() if t == start and next_times[name] == end}  # without any rounding

    def slopes(now: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        t = now.item()
        at = {name: t if name in alike else times[name] + rate * (t - start) for name, rate in rates.items()}
        v = velocity(dict(zip(names, values, strict=True)), at, decided_at=middle)
        return tuple(v[name] if name in alike else rates[name] * v[name] for name in names)

    ends = torch.tensor([start, end], dtype=torch.float64, device=values[0].device)
    try:
        solved = odeint(slopes, values, ends, rtol=relative_tolerance, atol=absolute_tolerance, method="dopri5")
    except AssertionError as error:  # so torchdiffeq says that its step has become 0, or is not a number
        raise UserError(
            f"dopri5 finds no step that keeps its tolerances, {relative_tolerance:g} relative and "
            f"{absolute_tolerance:g} absolute ({error}); raise them, or keep the state in float64"
        ) from error
    return {name: value[-1] for name, value in zip(names, solved, strict=True)}


def ddim(
    velocity: Velocity,
    state: State,
    times: Times,
    next_times: Times,
    memory: Memory,
    noise: Iterator[State],
    *,
    eta: float = 0.0,
    clip: float | None = None,
) -> State:
    """DDIM's step (arXiv 2010.02502, eq. 12) on any path: α_s x̂ + √(σ_s² − ω²) ε̂ + ω ξ from time t to s.

    ω = η σ_s √(1 − (α_t σ_s / α_s σ_t)²): nothing for η = 0, which is Euler's step on the linear path, and DDPM's β̃ for
    η = 1. `clip` keeps x̂ in [−clip, clip], and ε̂ is what leads there.
    """
    v = velocity(state, times)
    fresh = next(noise) if eta and not is_data(next_times) else None
    result: State = {}
    for name, x in state.items():
        if times[name] == next_times[name]:
            result[name] = x
            continue
        t, now, then = _between(velocity.path, times[name], next_times[name])
        data = _clipped(velocity.path.velocity_to_data(v[name], x, t), clip)
        spread = eta * then.sigma * (1 - (now.alpha * then.sigma / (then.alpha * now.sigma)) ** 2).sqrt()
        noise_left = (then.sigma**2 - spread**2).sqrt()
        result[name] = then.alpha * data + noise_left * (x - now.alpha * data) / now.sigma
        if fresh is not None:
            result[name] = result[name] + spread * fresh[name]
    return result


def ddpm(
    velocity: Velocity,
    state: State,
    times: Times,
    next_times: Times,
    memory: Memory,
    noise: Iterator[State],
    *,
    clip: float | None = None,
) -> State:
    """DDPM's ancestral step (arXiv 2006.11239, algorithm 2) on any path, with the variance that the network learned.

    Without one it is β̃. A step between two times is the last one of the chain that goes through both (IDDPM, arXiv
    2102.09672, section 4). `clip` keeps the predicted data in [−clip, clip].
    """
    predicted = velocity.predict(state, times)
    fresh = None if is_data(next_times) else next(noise)
    result: State = {}
    for name, x in state.items():
        if times[name] == next_times[name]:
            result[name] = x
            continue
        t, now, then = _between(velocity.path, times[name], next_times[name])
        data = _clipped(velocity.path.velocity_to_data(predicted.velocity[name], x, t), clip)
        chain = Chain.through(np.array([c.kept for c in ((then, now) if next_times[name] else (now,))]))
        last, variance = x.new_full((1,), chain.steps - 1, dtype=torch.long), (predicted.variance or {}).get(name)
        mean, log_variance = chain.posterior(x / now.norm, data, last, variance)
        if fresh is not None and next_times[name]:
            mean = mean + (log_variance / 2).exp() * fresh[name]
        result[name] = then.norm * mean
    return result


def _between(path: Path, t: float, s: float) -> tuple[Tensor, Coefficients, Coefficients]:
    """A time, and the coefficients of it and of the next: float64 on the CPU, for which no device waits."""
    now, then = (torch.tensor(time, dtype=torch.float64) for time in (t, s))
    return now, path.coefficients(now), path.coefficients(then)


def _clipped(data: Tensor, clip: float | None) -> Tensor:
    return data if clip is None else data.clamp(-clip, clip)


def dpm_solver(
    velocity: Velocity,
    state: State,
    times: Times,
    next_times: Times,
    memory: Memory,
    noise: Iterator[State],
    *,
    steps: float = math.inf,
    order: int = 3,
) -> State:
    """One evaluation of DPM-Solver++ (arXiv 2211.01095), predicting data: U-ViT's sampler, for any path.

    Its own steps are of as many evaluations as their order, 3 as long as more than three are left, then 2 or 1; the
    grid's times are their beginnings and what lies between. With λ = log(α/σ), h = λ_t − λ_s and φ = 1 − e^(−h), a step
    from s brings x to σ_t/σ_s·x + α_t·φ·x̂_s and, by the data x̂_j predicted at the latest λ_j, adds

        α_t·φ·h / 2(λ_j − λ_s)·(x̂_j − x̂_s)  for order 2,  α_t·(h − φ) / (λ_j − λ_s)·(x̂_j − x̂_s)  for order 3.

    The last time before data is as good as data: it is scaled, with the noise that is left in it, as U-ViT's code does.
    """
    t = {name: torch.tensor(time, dtype=torch.float64) for name, time in times.items()}
    if is_data(next_times):
        known = {name: velocity.path.coefficients(time) for name, time in t.items()}
        return {name: x / (known[name].alpha ** 2 + known[name].sigma ** 2).sqrt() for name, x in state.items()}
    v = velocity(state, times)
    data = {name: velocity.path.velocity_to_data(v[name], x, t[name]) for name, x in state.items()}
    left, ahead = memory.get("left", steps), memory.get("ahead", 0)
    if not ahead:
        # Without any data in the state there is no λ: the first step of a flow is of order 1.
        ahead = 1 if max(times.values()) == 1 else min(order, left if left < 3 else 2 if left == 3 else 3)
        memory |= {"order": ahead, "state": state, "times": times, "data": data}
    memory |= {"left": left - 1, "ahead": ahead - 1}
    return {
        name: _dpm_step(velocity.path, name, memory, x, data[name], times[name], next_times[name])
        for name, x in state.items()
    }


def _dpm_step(path: Path, name: str, memory: Memory, now: Tensor, data: Tensor, t: float, then: float) -> Tensor:
    """What one modality, `now` at time t, has become `then`, on the way from the beginning of a step in `memory`."""
    if then in (t, 0.0):
        return now if then == t else data
    (alpha_s, sigma_s), (alpha_j, sigma_j), (alpha, sigma) = (
        [part.item() for part in path.coefficients(torch.tensor(at, dtype=torch.float64))[:2]]
        for at in (memory["times"][name], t, then)
    )
    first = memory["data"][name]
    phi = 1 - sigma / alpha * alpha_s / sigma_s
    result = sigma / sigma_s * memory["state"][name] + alpha * phi * first
    if t == memory["times"][name]:
        return result
    lambda_s = math.log(alpha_s / sigma_s)
    h, h_j = math.log(alpha / sigma) - lambda_s, math.log(alpha_j / sigma_j) - lambda_s
    factor = phi * h / 2 if memory["order"] == 2 else h - phi
    return result + alpha * factor / h_j * (data - first)


def is_data(times: Times) -> bool:
    """Whether every modality has arrived at the data."""
    return not any(times.values())


def adaptive_solver() -> Callable[..., tuple[Tensor, ...]]:
    """torchdiffeq's `odeint`. Raises UserError if it is not installed."""
    need("the sampler dopri5", "torchdiffeq")
    return import_module("torchdiffeq").odeint


def shifted(u: float, shift: float) -> float:
    """t = s·u / (1 + (s − 1)·u): s > 1 moves the times of a grid towards noise, s < 1 towards data (SD3, eq. 23)."""
    return u if shift == 1 else u / (u + (1 - u) / shift)  # the same, with exact ends


def uniform_times(steps: int, shift: float = 1.0, discontinuities: Sequence[float] = ()) -> list[float]:
    """steps + 1 times from 1 to 0, for the deterministic samplers: equally spaced, then `shifted`."""
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


def stochastic_times(steps: int, shift: float = 1.0, discontinuities: Sequence[float] = ()) -> list[float]:
    """`steps` times from 1 to 0.04, then 0: `steps` evaluations, the last of them without noise.

    They are equally spaced before they are `shifted`, which leaves both ends where they are.
    """
    span = 1 - shifted(LAST_NOISY_TIME, 1 / shift)  # 1/s undoes s
    return [shifted(1 - span * i / max(steps - 1, 1), shift) for i in range(steps)] + [0.0]


def chain_times(steps: int, shift: float = 1.0, discontinuities: Sequence[float] = ()) -> list[float]:
    """Steps of Stable Diffusion's chain, equally spaced from the last to the first and then `shifted`, as times of the
    linear path; 1 in place of the last, and 0 behind the first: U-ViT's, for `steps` evaluations."""
    chain = STABLE_DIFFUSION
    numbers = [chain.first + (chain.steps - 1) * shifted(1 - i / steps, shift) for i in range(1, steps + 1)]
    return [1.0, *(ratio / (1 + ratio) for ratio in map(chain.ratio, numbers)), 0.0]


def aligned_times(steps: int, shift: float = 1.0, discontinuities: Sequence[float] = ()) -> list[float]:
    """`uniform_times`, `aligned` with the discontinuities."""
    return aligned(uniform_times(steps, shift), discontinuities)


def aligned(grid: Sequence[float], edges: Sequence[float]) -> list[float]:
    """A grid with the inner time nearest to each edge moved onto it.

    Where fewer inner times than edges are there, or two are nearest to one time, one stays between times.
    """
    times = [*grid]
    for edge in edges:
        nearest = min(range(1, len(times) - 1), key=lambda i: abs(times[i] - edge), default=None)
        if nearest is not None and times[nearest] not in edges:
            times[nearest] = edge
    return times


def whole_intervals(steps: int, shift: float = 1.0, discontinuities: Sequence[float] = ()) -> list[float]:
    """From 1 to 0 with nothing but the discontinuities between, for methods that choose their own steps."""
    return [1.0, *sorted(discontinuities, reverse=True), 0.0]


def respaced_times(known: Sequence[float], steps: int, shift: float = 1.0) -> list[float]:
    """So many of the times of a chain, which rise, from its last one on, then 0: as DiT's samplers keep them.

    Those between the last and 0 are `shifted`.
    """
    kept = kept_steps(len(known), steps) if steps > 1 else [len(known) - 1]
    times = [known[n] for n in reversed(kept)]
    return [*(t if shift == 1 else times[0] * shifted(t / times[0], shift) for t in times), 0.0]


def begin_at(grid: Sequence[float], start: float) -> list[float]:
    """The part of a grid below `start`, which becomes its first time: for samples that begin as noisy data."""
    return [start, *(t for t in grid if t < start)]


def returning(grid: Sequence[float], repeats: int, stretch: int) -> list[float]:
    """A grid that goes over every `stretch` steps once and then `repeats` times again (RePaint, arXiv 2201.09865).

    What begins at t = 1 is not repeated: nothing of the state would be left there.
    """
    times = [grid[0]]
    for start in range(0, len(grid) - 1, stretch):
        part = grid[start + 1 : start + 1 + stretch]
        times += [*part, *([grid[start], *part] * repeats if grid[start] < 1 else [])]
    return times


@dataclass(frozen=True)
class Start:
    """Where samples begin that do not begin as noise (SDEdit, arXiv 2108.01073)."""

    time: float
    """The clock's, in [0, 1]."""
    data: State
    """What is there without noise, (B, …) each; a modality that is not named begins as noise."""

    def of(self, images: slice) -> Start:
        """That of some of the images."""
        return Start(self.time, {name: value[images] for name, value in self.data.items()})


@dataclass(frozen=True)
class Sampler:
    """A step, and how it is used."""

    step: Step
    grid: Callable[[int, float, Sequence[float]], list[float]] = uniform_times
    """(steps, time shift, discontinuities of the velocity) to the times of the clock, from 1 to 0."""
    evaluations: Callable[[int], int | None] = lambda steps: steps
    """How often the velocity is evaluated in so many steps; None if nobody knows beforehand."""
    respaced: bool = False
    """Whether it goes along times of the chain that a network was trained on, where it was, in place of its grid."""
    stochastic: bool = False
    """Whether a step draws noise, all but the last."""
    check: Callable[[], object] = lambda: None
    """Raises UserError if what the step needs is not installed."""
    adaptive: bool = False
    """Whether steps depend on the whole batch, so that images are drawn one at a time."""
    spans: bool = False
    """Whether the network must know how far a step goes."""
    state_precision: StatePrecision = "float32"
    """In which steps add up unless told otherwise: float64 for the published samplers."""
    options: tuple[str, ...] = ()
    """The fields of `config.Sampling` that the step takes as keywords."""

    def configured(self, options: Mapping[str, Any]) -> Step:
        """The step with its options."""

        def step(*arguments: Any) -> State:
            return self.step(*arguments, **{name: options[name] for name in self.options})

        return step


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, state_precision="float64"),
    "heun": Sampler(heun, evaluations=lambda steps: 2 * steps - 1, state_precision="float64"),
    "euler-maruyama": Sampler(
        euler_maruyama, stochastic_times, stochastic=True, state_precision="float64", options=("diffusion",)
    ),
    "ddpm": Sampler(ddpm, respaced=True, stochastic=True, state_precision="float64"),
    "ddim": Sampler(ddim, respaced=True, state_precision="float64"),
    "adams-bashforth": Sampler(adams_bashforth, aligned_times),
    "dpm-solver": Sampler(dpm_solver, chain_times, options=("steps",)),
    "dopri5": Sampler(
        dopri5,
        whole_intervals,
        evaluations=lambda steps: None,
        check=adaptive_solver,
        adaptive=True,
        options=("relative_tolerance", "absolute_tolerance"),
    ),
    MEAN_VELOCITY: Sampler(mean_velocity, spans=True),
}
