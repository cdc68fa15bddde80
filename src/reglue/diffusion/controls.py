"""Controls: what may look at a sample, and change it, while `integrate` draws it.

To add one, write a `Control` and pass it to `ImageModel.generate` or `integrate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import Prediction
from reglue.diffusion.guidance import Velocity
from reglue.diffusion.modalities import HIDDEN, LATENT, State, Times, expand_as
from reglue.diffusion.noise import Draws
from reglue.diffusion.paths import LINEAR, Path


class Control:
    """Hooks around every step; each may be left out."""

    discontinuities: tuple[float, ...] = ()
    """The clock's times at which the `velocity` hook is not continuous, strictly between 0 and 1."""
    differentiates: bool = False
    """Whether the `velocity` hook gets a velocity through which gradients flow to the state; they cost memory."""
    hidden: Tensor | None = None
    """For the `velocity` hook: the hidden tokens of the same evaluation, `Prediction.tap`, if the model is aligned."""

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
        self.path, self.known_times = inner.path, inner.known_times
        edges = {*inner.discontinuities, *(edge for control in controls for edge in control.discontinuities)}
        self.discontinuities = tuple(sorted(edges))

    def __call__(self, state: State, times: Times, decided_at: Times | None = None) -> State:
        """See `Velocity.__call__`."""
        return self.predict(state, times, decided_at).velocity

    def predict(self, state: State, times: Times, decided_at: Times | None = None) -> Prediction:
        """See `Velocity.predict`."""
        if any(control.differentiates for control in self.controls):
            state = {name: x.detach().requires_grad_() for name, x in state.items()}
            with torch.enable_grad():
                predicted = self.inner.predict(state, times, decided_at)
        else:
            predicted = self.inner.predict(state, times, decided_at)
        velocity = predicted.velocity
        for control in self.controls:
            if control.differentiates:
                control.hidden = predicted.tap
            velocity = control.velocity(velocity, state, times)
            if control.differentiates:
                control.hidden = None  # Or the graph of this evaluation would outlive it.
        velocity, variance = (
            {name: value.detach() for name, value in (part or {}).items()} for part in (velocity, predicted.variance)
        )
        return Prediction(velocity, None, variance)


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


Until = float | Mapping[str, float]
"""Times at which modalities are let go: one for all, or by name; those without a name are held to the end."""


def still_held(names: Iterable[str], times: Times, until: Until) -> tuple[str, ...]:
    """The modalities that a step from `times` holds, each by its own time."""
    return tuple(name for name in names if times[name] > let_go(until, name))


def edges_of(until: Until) -> tuple[float, ...]:
    """The discontinuities that letting go of modalities makes."""
    times = until.values() if isinstance(until, Mapping) else (until,)
    return tuple(sorted({time for time in times if 0 < time < 1}))


def let_go(until: Until, name: str) -> float:
    """When one is."""
    return until.get(name, 0.0) if isinstance(until, Mapping) else until


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
        until: Until = 0.0,
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
        self.discontinuities = edges_of(until)
        self.drawn: State = {}
        self.held: tuple[str, ...] = ()
        self.last: Times = {}

    def of(self, images: slice) -> Control:
        """See `Control.of`."""
        known = {name: value[images] for name, value in self.known.items()}
        where = {name: part[images] for name, part in self.where.items()}
        return Clamp(known, self.noise.of(images), where, until=self.until, fresh=self.fresh, path=self.path)

    def before(self, state: State, times: Times) -> State:
        """See `Control.before`."""
        if not self.drawn or self.fresh or any(times[name] > last for name, last in self.last.items()):
            self.drawn = self.noise.next(state)
        self.last = {name: times[name] for name in self.known}
        self.held = still_held(self.known, times, self.until)
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


class Loss(Protocol):
    """What data should be like."""

    def __call__(self, data: State) -> State:
        """The loss (B,) of data (B, …), in parts by the modality with whose time each is let go. Gradients flow.

        Beside its modalities, `data` has the hidden tokens (B, N, width) of the network as `HIDDEN`, if it is aligned.
        """
        ...

    def of(self, images: slice) -> Loss:
        """That of some of the images."""
        ...


class SquaredError:
    """½ Σ (x₀ − x*)² over what is known: minus the log density of a normal distribution around it."""

    def __init__(self, known: State, where: Mapping[str, Tensor] | None = None) -> None:
        """As for `Clamp`."""
        self.known, self.where = known, dict(where or {})

    def of(self, images: slice) -> Loss:
        """See `Loss.of`."""
        return SquaredError(*({n: v[images] for n, v in part.items()} for part in (self.known, self.where)))

    def __call__(self, data: State) -> State:
        """See `Loss.__call__`."""
        squares = {name: (data[name] - x.to(data[name])).square() for name, x in self.known.items()}
        counted = {name: x * self.where[name] if name in self.where else x for name, x in squares.items()}
        return {name: x.flatten(1).sum(1) / 2 for name, x in counted.items()}


class Unlikeness:
    """Σ (1 − cos) between aligned hidden tokens, through their projector, and the features to lead to (REPA-G).

    It is about the noisy state itself, through the blocks before the tap (arXiv 2602.03753).
    """

    def __init__(self, projector: Callable[[Tensor], Tensor], target: Tensor, chosen: Tensor) -> None:
        """`target` (B, N, D) are the encoder's tokens, as `alignment_loss` meets them; `chosen` (B, N) counts some."""
        self.projector, self.target, self.chosen = projector, target, chosen

    def of(self, images: slice) -> Loss:
        """See `Loss.of`."""
        return Unlikeness(self.projector, self.target[images], self.chosen[images])

    def __call__(self, data: State) -> State:
        """See `Loss.__call__`. It is let go with the latents."""
        likeness = F.cosine_similarity(self.projector(data[HIDDEN].float()), self.target, dim=-1)
        return {LATENT: ((1 - likeness) * self.chosen).sum(1)}


class LossGuidance(Control):
    """Leads to data of small loss ℓ: the score of p_t(x)·exp(−w ℓ(x̂₀)) in place of that of p_t.

    x̂₀ is what the velocity points to, guided if it is. On the linear path v ← v + w·t/(1 − t)·∇ℓ(x̂₀), in general
    v + w·σ (α σ' − α' σ)/α·∇ℓ(x̂₀), with the gradient in the noisy x_t, through the network (Diffusion Posterior
    Sampling, arXiv 2209.14687). Each modality moves by its own time. An evaluation costs two to three times as much.
    """

    differentiates = True

    def __init__(self, loss: Loss, scale: float, *, until: Until = 0.0, path: Path = LINEAR) -> None:
        """`scale` is w. A part of the loss counts in steps that begin after the time `until` of its modality."""
        self.loss, self.scale, self.until, self.path = loss, scale, until, path
        self.discontinuities = edges_of(until)
        self.began: Times = {}

    def of(self, images: slice) -> Control:
        """See `Control.of`."""
        return LossGuidance(self.loss.of(images), self.scale, until=self.until, path=self.path)

    def before(self, state: State, times: Times) -> State:
        """See `Control.before`."""
        self.began = times  # A step is led as a whole or not at all.
        return state

    def velocity(self, velocity: State, state: State, times: Times) -> State:
        """See `Control.velocity`."""
        at = {name: torch.tensor(t, dtype=torch.float64) for name, t in times.items()}
        with torch.enable_grad():
            data = {n: self.path.velocity_to_data(v, state[n], at[n]) for n, v in velocity.items()}
            parts = self.loss(data if self.hidden is None else {**data, HIDDEN: self.hidden})
            held = still_held(parts, self.began, self.until)
            if not held:
                return velocity
            total = torch.stack([parts[name].sum() for name in held]).sum()
        slopes = torch.autograd.grad(total, [state[n] for n in velocity], retain_graph=True, materialize_grads=True)
        moves = {n: self.scale * self._factor(at[n]) * slope for n, slope in zip(velocity, slopes, strict=True)}
        # Never farther than the velocity itself goes, or a large w would lead away from all data.
        squares = [[x.detach().square().flatten(1).sum(1) for x in part.values()] for part in (velocity, moves)]
        most, found = (torch.stack(of_each).sum(0) for of_each in squares)
        shorter = (most / found.clamp(min=1e-30)).sqrt().clamp(max=1)
        return {name: v.detach() + expand_as(shorter, v) * moves[name] for name, v in velocity.items()}

    def _factor(self, t: Tensor) -> float:
        """σ (α σ' − α' σ)/α, in which α is not smaller than `LEAST_ALPHA`."""
        c = self.path.coefficients(t)
        return (c.sigma * (c.alpha * c.d_sigma - c.d_alpha * c.sigma) / c.alpha.clamp(min=LEAST_ALPHA)).item()


LEAST_ALPHA = 0.1
"""Of the data in x_t, for the factor of loss guidance. Nearer to noise the gradient in x_t goes to 0 as α does, and a
network's own errors are all that would be enlarged."""


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
