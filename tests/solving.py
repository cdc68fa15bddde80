"""Sampling along velocities that tests write as plain functions of a state and one time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import State, Times
from reglue.diffusion.samplers import integrate
from reglue.diffusion.schedules import SCHEDULES

Plain = Callable[..., State]
"""(state, time, decided_at=None) to the velocity."""


class Following(Velocity):
    """A plain function, or a velocity whose times are one number, as what samplers follow."""

    def __init__(self, function: Plain, discontinuities: Sequence[float] = ()) -> None:
        self.function, self.discontinuities = function, tuple(discontinuities)

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        return self.function(state, times["latent"], *(() if decided_at is None else (decided_at["latent"],)))


def solve(
    step: Any,
    velocity: Plain | Velocity,
    state: State,
    times: Sequence[float],
    noise: Iterator[State] = iter(()),
    discontinuities: Sequence[float] = (),
    **options: Any,
) -> State:
    """`integrate` over times that all modalities share."""
    followed = velocity if isinstance(velocity, Velocity) else Following(velocity, discontinuities)

    def configured(*arguments: Any) -> State:
        return step(*arguments, **options)

    return integrate(configured, followed, state, at(times, state), noise=noise)


def at(times: Sequence[float], state: State) -> list[Times]:
    """The times of every modality, shared."""
    return [SCHEDULES["shared"].times(t, state) for t in times]
