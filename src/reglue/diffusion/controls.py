"""Controls: what may look at a sample, and change it, while `integrate` draws it.

To add one, write a `Control` and pass it to `ImageModel.generate` or `integrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from reglue.diffusion.conditions import Condition
from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import LATENT, State, Times
from reglue.diffusion.noise import Draws
from reglue.diffusion.paths import LINEAR, Path


class Control:
    """Hooks around every step; each may be left out."""

    discontinuities: tuple[float, ...] = ()
    """The clock's times at which the `velocity` hook is not continuous, strictly between 0 and 1."""

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
        self.path, self.latest = inner.path, inner.latest
        edges = {*inner.discontinuities, *(edge for control in controls for edge in control.discontinuities)}
        self.discontinuities = tuple(sorted(edges))

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


class Clamp(Control):
    """Holds what is known, a modality or a part of one: at every time it is on the path from noise to its x*.

    What is known, K, is replaced in every step by α x*^K + σ ε^K (RePaint, arXiv 2201.09865; Blended Latent Diffusion,
    arXiv 2206.02779) and follows the velocity of that path, so that solvers of higher order keep theirs. At t = 0 it is
    x* exactly. Everything else is drawn to fit: from p(unknown | *noisy* known), which is close to p(unknown | known).
    """

    def __init__(
        self,
        known: State,
        noise: Draws,
        where: Mapping[str, Tensor] | None = None,
        *,
        until: float = 0.0,
        fresh: bool = False,
        path: Path = LINEAR,
    ) -> None:
        """`known` has x* (B, …) of the modalities to hold, as the model learns them.

        `where` says, of those that are held in part, where: bool, broadcast against x*. Steps that begin after `until`
        are held, later ones let go. Solvers of an ODE meet the same ε^K in all steps; `fresh` draws it anew in each, as
        the stochastic samplers want it. After a return to an earlier time it is new in any case.
        """
        self.known, self.noise, self.where = known, noise, dict(where or {})
        self.until, self.fresh, self.path = until, fresh, path
        self.discontinuities = (until,) if 0 < until < 1 else ()
        self.drawn: State = {}
        self.held: tuple[str, ...] = ()
        self.last = 1.0

    def of(self, images: slice) -> Control:
        """See `Control.of`."""
        known = {name: value[images] for name, value in self.known.items()}
        where = {name: part[images] for name, part in self.where.items()}
        return Clamp(known, self.noise.of(images), where, until=self.until, fresh=self.fresh, path=self.path)

    def before(self, state: State, times: Times) -> State:
        """See `Control.before`."""
        if not self.drawn or self.fresh or times[LATENT] > self.last:
            self.drawn = self.noise.next(state)
        self.last = times[LATENT]
        self.held = tuple(name for name in self.known if times[name] > self.until)
        return self.after(state, times)

    def velocity(self, velocity: State, state: State, times: Times) -> State:
        """See `Control.velocity`."""
        return self._put(velocity, times, derivative=True)

    def after(self, state: State, times: Times) -> State:
        """See `Control.after`."""
        return self._put(state, times)

    def _put(self, values: State, times: Times, derivative: bool = False) -> State:
        """The values with those of the path, or of its derivative, in place of what is known."""
        result = dict(values)
        for name in self.held:
            c = self.path.coefficients(torch.tensor(times[name], dtype=torch.float64))
            alpha, sigma = (c.d_alpha, c.d_sigma) if derivative else (c.alpha, c.sigma)
            known = alpha.item() * self.known[name].to(values[name]) + sigma.item() * self.drawn[name]
            where = self.where.get(name)
            result[name] = known if where is None else torch.where(where, known, values[name])
        return result


class FlowEdit(Control):
    """Changes the condition of data X with little change of the rest (FlowEdit, arXiv 2412.08629), without inversion.

    The edit Z follows dZ/dt = v(Z_t, c′) − v(X_t, c) with X_t = α X + σ ε and Z_t = Z + X_t − X. What is drawn here is
    Z_t, which is Z at t = 0. One ε serves all steps, so that solvers keep their orders.
    """

    def __init__(
        self, source: Callable[[Condition], Velocity], condition: Condition, data: State, noise: Draws
    ) -> None:
        """`source` makes of a condition c (B, …) the velocity that X follows; `data` is X, (B, …) each."""
        self.source, self.condition, self.data, self.noise = source, condition, data, noise
        self.followed: Velocity | None = None
        self.drawn: State = {}

    def of(self, images: slice) -> Control:
        """See `Control.of`."""
        condition, data = ({n: v[images] for n, v in part.items()} for part in (self.condition, self.data))
        return FlowEdit(self.source, condition, data, self.noise.of(images))

    def before(self, state: State, times: Times) -> State:
        """See `Control.before`."""
        if self.followed:
            return state
        self.followed, self.drawn = self.source(self.condition), self.noise.next(state)
        self.data = {name: value.to(state[name]) for name, value in self.data.items()}
        return self._path(times)[0]

    def velocity(self, velocity: State, state: State, times: Times) -> State:
        """See `Control.velocity`."""
        assert self.followed
        noisy, derivative = self._path(times)
        source = self.followed(noisy, times)
        return {name: v + derivative[name] - source[name] for name, v in velocity.items()}

    def _path(self, times: Times) -> tuple[State, State]:
        """X_t and its derivative."""
        assert self.followed
        states: State = {}
        derivatives: State = {}
        for name, x in self.data.items():
            c = self.followed.path.coefficients(torch.tensor(times[name], dtype=torch.float64))
            states[name] = c.alpha.item() * x + c.sigma.item() * self.drawn[name]
            derivatives[name] = c.d_alpha.item() * x + c.d_sigma.item() * self.drawn[name]
        return states, derivatives
