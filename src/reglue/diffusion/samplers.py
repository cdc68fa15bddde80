"""Samplers: steps of a velocity function, and the one loop over time that takes them.

A step knows no labels, no networks and no randomness of its own. The state keeps its precision: give float64 to
accumulate in float64, as the published samplers do. To add a sampler, write a step and register it in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from reglue.diffusion.controls import Control, Controlled
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import LATENT, State, Times
from reglue.diffusion.paths import Path
from reglue.diffusion.specs import MEAN_VELOCITY, Diffusion
from reglue.diffusion.specs import StatePrecision as StatePrecision
from reglue.errors import UserError

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
        if then[LATENT] > now[LATENT]:
            drawn, memory = next(noise), {}
            t, earlier = ({n: torch.tensor(at[n], dtype=torch.float64) for n in state} for at in (now, then))
            state = {n: velocity.path.returned(x, t[n], earlier[n], drawn[n]) for n, x in state.items()}
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
    """Heun's second-order method: two evaluations per step, and one in the last, which ends in the data."""
    dt, v = {name: next_times[name] - times[name] for name in state}, velocity(state, times)
    ahead = {name: x + dt[name] * v[name] for name, x in state.items()}
    if is_data(next_times):
        return ahead
    v_next = velocity(ahead, next_times, decided_at=times)
    return {name: x + dt[name] * (v[name] + v_next[name]) / 2 for name, x in state.items()}


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
    evaluates anyway, makes it Heun's. Discontinuities should be on the grid (`aligned_times`), or the order there is 1.
    """
    # A step that begins at a discontinuity is on the side of its middle.
    middle = {name: (t + next_times[name]) / 2 for name, t in times.items()}
    v = velocity(state, times, decided_at=middle)
    before = memory.get("before")
    if before and any(middle[LATENT] <= edge <= before[1][LATENT] for edge in velocity.discontinuities):
        before = None
    result: State = {}
    for name, x in state.items():
        dt, slope = next_times[name] - times[name], v[name]
        if before:
            times_before, _, v_before, was_euler = before
            moved, change = times[name] - times_before[name], v[name] - v_before[name]
            if was_euler:
                x = x + moved / 2 * change
            if moved:
                slope = slope + dt / moved / 2 * change
        result[name] = x + dt * slope
    memory["before"] = times, middle, v, before is None
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
    start, end = times[LATENT], next_times[LATENT]
    middle = {name: (t + next_times[name]) / 2 for name, t in times.items()}
    # Every modality moves with the time of the latents, each at its own rate.
    rates = {name: 1.0 if t == start and next_times[name] == end else (next_times[name] - t) / (end - start)
             for name, t in times.items()}  # fmt: skip

    def slopes(now: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        t = now.item()
        at = {name: t if rates[name] == 1 else times[name] + rates[name] * (t - start) for name in names}
        v = velocity(dict(zip(names, values, strict=True)), at, decided_at=middle)
        return tuple(v[name] if rates[name] == 1 else rates[name] * v[name] for name in names)

    ends = torch.tensor([start, end], dtype=torch.float64, device=values[0].device)
    try:
        solved = odeint(slopes, values, ends, rtol=relative_tolerance, atol=absolute_tolerance, method="dopri5")
    except AssertionError as error:  # so torchdiffeq says that its step has become 0, or is not a number
        raise UserError(
            f"dopri5 finds no step that keeps its tolerances, {relative_tolerance:g} relative and "
            f"{absolute_tolerance:g} absolute ({error}); raise them, or keep the state in float64"
        ) from error
    return {name: value[-1] for name, value in zip(names, solved, strict=True)}


def is_data(times: Times) -> bool:
    """Whether every modality has arrived at the data."""
    return not any(times.values())


def adaptive_solver() -> Callable[..., tuple[Tensor, ...]]:
    """torchdiffeq's `odeint`. Raises UserError if it is not installed."""
    try:
        return import_module("torchdiffeq").odeint
    except ModuleNotFoundError:
        raise UserError(
            "the sampler dopri5 needs torchdiffeq: run `pip install 'reglue[ode]'`, or choose another sampler"
        ) from None


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


def aligned_times(steps: int, shift: float = 1.0, discontinuities: Sequence[float] = ()) -> list[float]:
    """`uniform_times` with the inner time nearest to each discontinuity moved onto it.

    Where fewer inner times than discontinuities are there, or two are nearest to one time, one stays between times.
    """
    times = uniform_times(steps, shift)
    for edge in discontinuities:
        nearest = min(range(1, len(times) - 1), key=lambda i: abs(times[i] - edge), default=None)
        if nearest is not None and times[nearest] not in discontinuities:
            times[nearest] = edge
    return times


def whole_intervals(steps: int, shift: float = 1.0, discontinuities: Sequence[float] = ()) -> list[float]:
    """From 1 to 0 with nothing but the discontinuities between, for methods that choose their own steps."""
    return [1.0, *sorted(discontinuities, reverse=True), 0.0]


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
    """What is there without noise, (B, …) each."""

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
    "adams-bashforth": Sampler(adams_bashforth, aligned_times),
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
