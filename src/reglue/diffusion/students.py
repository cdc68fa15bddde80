"""Students: denoisers that are told how far a step goes and predict the mean velocity of it, to sample in a few steps.

A student's loss is that of a velocity, towards another target: where its step has no length, the velocity of the path;
elsewhere what makes it agree with itself. To add one, write a `Student` and register it in `STUDENTS`; recipes name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reglue.diffusion.conditions import Condition
from reglue.diffusion.denoiser import DenoiserFunction
from reglue.diffusion.embeddings import SPAN
from reglue.diffusion.modalities import State, concatenate_states, expand_as, split_state
from reglue.diffusion.specs import Guidance

MEAN, STD = -0.4, 1.0
"""Of the logits of MeanFlow's times."""
SHORTEST = 1 / 128
"""The step of a shortcut model that is taken for the velocity itself."""


def quantile(share: Tensor) -> Tensor:
    """The standard normal number below which a share of them is, of any shape."""
    return torch.special.ndtri(share)  # type: ignore[reportUnknownMemberType, reportUnknownVariableType]


@dataclass(frozen=True)
class Lesson:
    """What a student's target is made from: noisy samples, and what the networks are given with them."""

    noisy: State
    """(B, …) each, zeros where a modality is hidden."""
    velocity: State
    """Of the path, likewise."""
    time: Tensor
    """t (B,): where the step begins."""
    span: Tensor
    """d (B,): how far it goes, to t − d."""
    condition: Condition
    keep: State
    """(B,) bool, where modalities are not hidden, of those that may be."""

    def of(self, rows: Tensor) -> Lesson:
        """That of some samples, by their numbers."""
        noisy, velocity, condition, keep = (
            {name: value.index_select(0, rows) for name, value in part.items()}
            for part in (self.noisy, self.velocity, self.condition, self.keep)
        )
        return Lesson(noisy, velocity, self.time[rows], self.span[rows], condition, keep)


@dataclass(frozen=True)
class Student(ABC):
    """How a mean velocity is learned."""

    guidance: Guidance
    """What the student has in its weights."""
    share: float = 0.25
    """Of the samples whose step has a length."""
    mix: float = 0.0
    """How much of MeanFlow's guided velocity is the network's own."""

    @abstractmethod
    def times(self, draws: Sequence[Tensor], shift: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """t and d (B,) of training samples, from three uniform draws (B,) of each.

        `shift` moves times towards noise or data, as the recipe has it.
        """

    @abstractmethod
    def target(self, network: DenoiserFunction, averaged: DenoiserFunction, lesson: Lesson, spanning: Tensor) -> State:
        """What the mean velocities should be, in the shapes of the state and without gradients.

        `averaged` has the moving averages of the weights, and `spanning` the numbers of the samples with d > 0.
        """

    def weighed(self, loss: Tensor, size: int) -> Tensor:
        """The losses (B,) of a modality of `size` numbers, means of their squares, as they are learned from."""
        return loss

    def guided(self, network: DenoiserFunction, lesson: Lesson, mix: float) -> State:
        """The velocity that is learned in place of the path's v: w·v + (1 − w)·u(∅), and with κ, the `mix`,

            ω·v + κ·u(y) + (1 − ω − κ)·u(∅),  ω = w·(1 − κ)

        (MeanFlow, arXiv 2505.13447), where u are the network's own at d = 0. Samples without a condition, and those
        outside of the interval, keep v.
        """
        names = list(lesson.velocity)
        if all(self.guidance.scale_of(name) == 1 for name in names):
            return lesson.velocity
        null = network.null(len(lesson.time))
        low, high = self.guidance.interval
        moved = ~equal_rows(lesson.condition, null) & (low <= lesson.time) & (lesson.time <= high)
        conditions = [lesson.condition, null] if mix else [null]
        own = split_state(
            evaluate(
                network,
                concatenate_states([lesson.noisy] * len(conditions)),
                lesson.time.repeat(len(conditions)),
                torch.zeros_like(lesson.time).repeat(len(conditions)),
                concatenate_states(conditions),
            ),
            len(conditions),
        )
        result: State = {}
        for name, v in lesson.velocity.items():
            omega = self.guidance.scale_of(name) * (1 - mix)
            guided = omega * v + mix * own[0][name] + (1 - omega - mix) * own[-1][name]
            result[name] = torch.where(expand_as(moved, v), guided.to(v.dtype), v)
        return shown(result, lesson.keep)


class MeanFlow(Student):
    """The mean velocity u over [r, t], by its derivative (arXiv 2505.13447): u = v − (t − r)·du/dt."""

    def times(self, draws: Sequence[Tensor], shift: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """See `Student.times`: the later and the earlier of two, which are the same for all but a share."""
        first, second, choice = draws
        earlier, later = interval_of(quantile(first), quantile(second), choice, self.share)
        return shift(later), shift(later) - shift(earlier)

    def target(self, network: DenoiserFunction, averaged: DenoiserFunction, lesson: Lesson, spanning: Tensor) -> State:
        """See `Student.target`."""
        with untrained(lesson.time.device):
            velocity = self.guided(network, lesson, self.mix)
            if not len(spanning):
                return velocity
            some = replace(lesson, velocity=velocity).of(spanning)
            slope = derivative(network, some)
            return {
                name: v.index_add(0, spanning, (-expand_as(some.span, slope[name]) * slope[name]).to(v.dtype))
                for name, v in velocity.items()
            }

    def weighed(self, loss: Tensor, size: int) -> Tensor:
        """The value stays, for the log; the gradient is that of the `adaptive` loss of the sum of squares."""
        learned = adaptive(loss * size)
        return loss.detach() + learned - learned.detach()


class Shortcut(Student):
    """One step of 2d agrees with two of d (shortcut models, arXiv 2410.12557)."""

    def times(self, draws: Sequence[Tensor], shift: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """See `Student.times`: lengths are powers of two from 1/64 to 1, and times then multiples of them."""
        place, size, choice = draws
        lengths = round(-torch.tensor(SHORTEST).log2().item())
        span = 0.5 ** (size * lengths).floor()
        on_grid = span * (1 + (place / span).floor())
        has_length = choice < self.share
        return torch.where(has_length, on_grid, shift(place)), torch.where(has_length, span, 0.0)

    def target(self, network: DenoiserFunction, averaged: DenoiserFunction, lesson: Lesson, spanning: Tensor) -> State:
        """See `Student.target`. Both steps are the averaged weights', and the shortest ones are guided velocities."""
        if not len(spanning):
            return lesson.velocity
        with untrained(lesson.time.device):
            some = lesson.of(spanning)
            half = some.span / 2
            first = self.step(averaged, replace(some, span=half))
            ahead = {name: x - expand_as(half, x) * first[name] for name, x in some.noisy.items()}
            second = self.step(averaged, replace(some, noisy=ahead, time=some.time - half, span=half))
            return {
                name: v.index_copy(0, spanning, ((first[name] + second[name]) / 2).to(v.dtype))
                for name, v in lesson.velocity.items()
            }

    def step(self, network: DenoiserFunction, lesson: Lesson) -> State:
        """The mean velocity over one of the steps of a target."""
        shortest = lesson.span <= SHORTEST
        span = torch.where(shortest, 0.0, lesson.span)
        own = shown(evaluate(network, lesson.noisy, lesson.time, span, lesson.condition), lesson.keep)
        guided = self.guided(network, replace(lesson, velocity=own), 0.0)
        return {name: torch.where(expand_as(shortest, v), guided[name], v) for name, v in own.items()}


STUDENTS: dict[str, type[Student]] = {"meanflow": MeanFlow, "shortcut": Shortcut}


def interval_of(first: Tensor, second: Tensor, choice: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """r ≤ t (B,) from standard normal draws and a uniform one: r = t for all but a share of the samples."""
    a, b = (torch.sigmoid(STD * normal + MEAN) for normal in (first, second))
    later = torch.maximum(a, b)
    return torch.where(choice < 1 - share, later, torch.minimum(a, b)), later


def adaptive(loss: Tensor, power: float = 1.0, offset: float = 1e-3) -> Tensor:
    """L / (sg(L) + c)^p of losses (B,) that are sums of squares (MeanFlow's paper)."""
    return loss / (loss.detach() + offset) ** power


def derivative(network: DenoiserFunction, lesson: Lesson) -> State:
    """du/dt along the velocity, with the end of the step held: by one Jacobian-vector product."""

    def mean_velocity(noisy: State, time: Tensor, span: Tensor) -> State:
        return evaluate(network, noisy, time, span, lesson.condition)

    one = torch.ones_like(lesson.time)
    given = lesson.noisy, lesson.time, lesson.span
    return torch.func.jvp(mean_velocity, given, (lesson.velocity, one, one))[1]


def evaluate(network: DenoiserFunction, noisy: State, time: Tensor, span: Tensor, condition: Condition) -> State:
    """The mean velocities over [t − d, t] for t and d (B,), the time of all modalities."""
    return network(noisy, {**dict.fromkeys(noisy, time), SPAN: span}, condition).velocity


def shown(state: State, keep: State) -> State:
    """A state (B, …) with zeros where a modality is hidden: `keep` (B,) is False."""
    return {name: x * expand_as(keep[name], x) if name in keep else x for name, x in state.items()}


def equal_rows(a: Condition, b: Condition) -> Tensor:
    """(B,) bool: in which samples all conditions are the same."""
    each = [(a[name] == b[name]).flatten(1).all(1) if a[name].ndim > 1 else a[name] == b[name] for name in a]
    return torch.stack(each).all(0)


@contextmanager
def untrained(device: torch.device) -> Generator[None]:
    """For networks that make targets: no gradients, nothing compiled for them, and no weights kept in half precision,
    which would have no gradients for whoever comes next."""
    kind = device.type
    autocast = torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast:
        yield
