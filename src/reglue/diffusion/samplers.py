"""Samplers: pure functions of a velocity function, a state and a time grid from 1 (noise) to 0 (data).

They know no labels, no networks and no randomness of their own. The state keeps its precision: give float64 to
accumulate in float64, as the published samplers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor

from reglue.diffusion.guidance import VelocityFunction
from reglue.diffusion.modalities import State
from reglue.diffusion.paths import LINEAR, Path
from reglue.errors import UserError

LAST_NOISY_TIME = 0.04
"""Where the stochastic samplers of SiT and REPA stop adding noise."""


def shifted(u: float, shift: float) -> float:
    """t = s·u / (1 + (s − 1)·u): s > 1 moves the times of a grid towards noise, s < 1 towards data (SD3, eq. 23)."""
    return u if shift == 1 else u / (u + (1 - u) / shift)  # the same, with exact ends


def uniform_times(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 1 to 0, for the deterministic samplers: equally spaced, then `shifted`."""
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


def stochastic_times(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` times from 1 to 0.04, then 0: `steps` evaluations, the last of them without noise.

    They are equally spaced before they are `shifted`, which leaves both ends where they are.
    """
    span = 1 - shifted(LAST_NOISY_TIME, 1 / shift)  # 1/s undoes s
    return [shifted(1 - span * i / max(steps - 1, 1), shift) for i in range(steps)] + [0.0]


def aligned(times: Sequence[float], discontinuities: Sequence[float]) -> list[float]:
    """The grid with the inner time nearest to each jump of the velocity moved onto it.

    Where fewer inner times than discontinuities are there, or two discontinuities are nearest to one of them, a jump stays between times.
    """
    moved = list(times)
    for jump in discontinuities:
        nearest = min(range(1, len(moved) - 1), key=lambda i: abs(moved[i] - jump), default=None)
        if nearest is not None and moved[nearest] not in discontinuities:
            moved[nearest] = jump
    return moved


def euler(velocity: VelocityFunction, state: State, times: Sequence[float]) -> State:
    """Euler's method for dx/dt = v: one evaluation per interval."""
    for t, t_next in pairwise(times):
        v = velocity(state, t)
        state = {name: x + (t_next - t) * v[name] for name, x in state.items()}
    return state


def heun(velocity: VelocityFunction, state: State, times: Sequence[float]) -> State:
    """Heun's second-order method: two evaluations per interval, and one in the last, which ends in the data."""
    for t, t_next in pairwise(times):
        dt, v = t_next - t, velocity(state, t)
        ahead = {name: x + dt * v[name] for name, x in state.items()}
        if t_next > times[-1]:
            v_next = velocity(ahead, t_next, step_start=t)
            ahead = {name: x + dt * (v[name] + v_next[name]) / 2 for name, x in state.items()}
        state = ahead
    return state


def adams_bashforth(
    velocity: VelocityFunction, state: State, times: Sequence[float], discontinuities: Sequence[float] = ()
) -> State:
    """The two-step method of Adams and Bashforth on any grid: second order for one evaluation per interval.

    A step follows the velocity extrapolated to its middle, v + (Δt / 2Δt₋)·(v − v₋) (Hairer, Nørsett and Wanner,
    Solving ordinary differential equations I, section III.5). The first step is Euler's, and so is the first behind
    each of the `discontinuities`, times at which the velocity is not continuous. They should be on the grid (`aligned`), or the
    order there is 1.
    """
    before: tuple[float, float, State] | None = None
    for t, t_next in pairwise(times):
        # A step that begins at a jump is on the side of its middle.
        middle = (t + t_next) / 2
        v = velocity(state, t, step_start=middle)
        slope = v
        if before is not None and not any(middle <= jump <= before[1] for jump in discontinuities):
            t_before, _, v_before = before
            ratio = (t_next - t) / (t - t_before) / 2
            slope = {name: v[name] + ratio * (v[name] - v_before[name]) for name in v}
        state = {name: x + (t_next - t) * slope[name] for name, x in state.items()}
        before = t, middle, v
    return state


def dopri5(
    velocity: VelocityFunction,
    state: State,
    discontinuities: Sequence[float] = (),
    relative_tolerance: float = 1e-3,
    absolute_tolerance: float = 1e-6,
) -> State:
    """The adaptive method of Dormand and Prince, of fifth order, from t = 1 to 0 (torchdiffeq's; SiT's default).

    The step is chosen for the whole batch, so its images depend on each other: give one image at a time. Each modality
    keeps the tolerances on its own. Steps end at the `discontinuities`, times at which the velocity is not continuous. Raises
    UserError if torchdiffeq is missing, or if no step is short enough for the tolerances.
    """
    odeint = adaptive_solver()
    names, values = list(state), tuple(state.values())
    for t, t_next in pairwise([1.0, *sorted(discontinuities, reverse=True), 0.0]):
        middle = (t + t_next) / 2

        def slopes(now: Tensor, values: tuple[Tensor, ...], middle: float = middle) -> tuple[Tensor, ...]:
            v = velocity(dict(zip(names, values, strict=True)), now.item(), step_start=middle)
            return tuple(v[name] for name in names)

        ends = torch.tensor([t, t_next], dtype=torch.float64, device=values[0].device)
        try:
            solved = odeint(slopes, values, ends, rtol=relative_tolerance, atol=absolute_tolerance, method="dopri5")
        except AssertionError as error:  # so torchdiffeq says that its step has become 0, or is not a number
            raise UserError(
                f"dopri5 finds no step that keeps its tolerances, {relative_tolerance:g} relative and "
                f"{absolute_tolerance:g} absolute ({error}); raise them, or keep the state in float64"
            ) from error
        values = tuple(value[-1] for value in solved)
    return dict(zip(names, values, strict=True))


def adaptive_solver() -> Callable[..., tuple[Tensor, ...]]:
    """torchdiffeq's `odeint`. Raises UserError if it is not installed."""
    try:
        return import_module("torchdiffeq").odeint
    except ModuleNotFoundError:
        raise UserError(
            "the sampler dopri5 needs torchdiffeq: run `pip install 'reglue[ode]'`, or choose another --sampler"
        ) from None


def euler_maruyama(
    velocity: VelocityFunction,
    state: State,
    times: Sequence[float],
    noise: Iterator[State],
    path: Path = LINEAR,
    diffusion: Callable[[float], float] = lambda t: 2 * t,
) -> State:
    """Euler–Maruyama for the reverse-time SDE dx = (v − ½ w_t s) dt + √w_t dW (SiT, section 2.4), from noise to data.

    `noise` yields one standard normal state per interval but the last, which takes the mean only. `diffusion` is w_t;
    the published code has w_t = 2t, twice what the papers print.
    """
    for t, t_next in pairwise(times):
        w, dt = diffusion(t), t_next - t
        now = torch.tensor(t, dtype=torch.float64)  # on the CPU, whatever the device: nothing waits for a number
        v = velocity(state, t)
        drift = {name: v[name] - w / 2 * path.velocity_to_score(v[name], x, now) for name, x in state.items()}
        state = {name: x + drift[name] * dt for name, x in state.items()}
        if t_next > times[-1]:
            xi = next(noise)
            state = {name: x + (w * -dt) ** 0.5 * xi[name] for name, x in state.items()}
    return state
