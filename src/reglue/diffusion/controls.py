"""Controls: what may look at a sample, and change it, while `integrate` draws it.

To add one, write a `Control` and pass it to `ImageModel.generate` or `integrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import State, Times
from reglue.diffusion.paths import LINEAR, Path


class Control:
    """Hooks around every step; each may be left out."""

    def before(self, state: State, times: Times) -> State:
        """The state that the step from `times` begins with."""
        return state

    def velocity(self, velocity: State, state: State, times: Times) -> State:
        """What the sampler follows in place of `velocity`, after every evaluation at `state`."""
        return velocity

    def after(self, state: State, times: Times) -> State:
        """The state that the step has led to, at `times`."""
        return state

    def of(self, images: slice) -> Control:
        """The same control for some of the images that it was made for."""
        return self


class Controlled(Velocity):
    """A velocity function with the `velocity` hooks of controls."""

    def __init__(self, inner: Velocity, controls: Sequence[Control]) -> None:
        self.inner, self.controls = inner, controls
        self.path, self.discontinuities = inner.path, inner.discontinuities

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        """See `Velocity.__call__`."""
        velocity = self.inner(state, times, decided_at)
        for control in self.controls:
            velocity = control.velocity(velocity, state, times)
        return velocity


class Progress(Control):
    """Calls a function after every evaluation."""

    def __init__(self, on_evaluation: Callable[[], object]) -> None:
        self.on_evaluation = on_evaluation

    def velocity(self, velocity: State, state: State, times: Times) -> State:
        """See `Control.velocity`."""
        self.on_evaluation()
        return velocity


class Previews(Control):
    """Shows, after every few steps, the data that the last evaluation pointed to."""

    def __init__(self, show: Callable[[State, Times], object], every: int = 1, path: Path = LINEAR) -> None:
        """`show` gets the predicted data x̂₀ and the times that the step has led to; `path` is the model's."""
        self.show, self.every, self.path = show, every, path
        self.steps, self.predicted = 0, State()

    def of(self, images: slice) -> Control:
        """The same, which counts steps from the start."""
        return Previews(self.show, self.every, self.path)

    def velocity(self, velocity: State, state: State, times: Times) -> State:
        """See `Control.velocity`."""
        t = {name: torch.tensor(time, dtype=torch.float64) for name, time in times.items()}
        self.predicted = {n: self.path.velocity_to_data(v, state[n], t[n]) for n, v in velocity.items()}
        return velocity

    def after(self, state: State, times: Times) -> State:
        """See `Control.after`."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.show(self.predicted, times)
        return state
