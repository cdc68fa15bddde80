"""Samplers: pure functions of a velocity function, a state and a time grid from 1 (noise) to 0 (data).

They know no labels, no networks and no randomness of their own. The state keeps its precision: give float64 to
accumulate in float64, as the published samplers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from reglue.diffusion.guidance import VelocityFunction
from reglue.diffusion.modalities import State
from reglue.diffusion.paths import LINEAR, Path

LAST_NOISY_TIME = 0.04
"""Where the stochastic samplers of SiT and REPA stop adding noise."""


def uniform_times(steps: int) -> list[float]:
    """steps + 1 equally spaced times from 1 to 0, for the deterministic samplers."""
    return [1 - i / steps for i in range(steps + 1)]


def stochastic_times(steps: int) -> list[float]:
    """`steps` equally spaced times from 1 to 0.04, then 0: `steps` evaluations, the last of them without noise."""
    return [1 - (1 - LAST_NOISY_TIME) * i / max(steps - 1, 1) for i in range(steps)] + [0.0]


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
        now = torch.tensor(t, dtype=torch.float64)
        v = velocity(state, t)
        drift = {name: v[name] - w / 2 * path.velocity_to_score(v[name], x, now) for name, x in state.items()}
        state = {name: x + drift[name] * dt for name, x in state.items()}
        if t_next > times[-1]:
            xi = next(noise)
            state = {name: x + (w * -dt) ** 0.5 * xi[name] for name, x in state.items()}
    return state
