"""Long work in a thread of its own: it says how far it is, shows what is being drawn, and can be stopped."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from PIL import Image

from reglue.diffusion.controls import Control, Previews
from reglue.diffusion.modalities import LATENT, State, Times
from reglue.diffusion.paths import PATHS
from reglue.errors import UserError
from reglue.pipeline import ImageModel

LEAST_PAUSE = 0.25
"""Seconds between two looks at what is being drawn; decoding takes a fifth of the time at most."""
PATIENCE = 0.5
"""Seconds between two looks of who waits at the line before them."""
MOST_WAITING = 16
"""More than these are sent away: each holds a thread of the page, which has 40."""
T = TypeVar("T")


class Halted(Exception):  # noqa: N818, since it is no error
    """The visitor has stopped the work, or has left."""


@dataclass(frozen=True)
class Report:
    """How far the work is."""

    share: float
    """From 0 to 1."""
    what: str = ""
    """Of several things, which one."""
    images: list[Image.Image] | None = None
    """What the data look like that the model points to now, x̂₀."""


@dataclass(frozen=True)
class Waiting:
    """The work has not begun."""

    before: int
    """How many others go first."""


@dataclass(frozen=True)
class Stopped:
    """The visitor has stopped the work."""


@dataclass(eq=False)
class Work:
    """What the work is given: to report by, and to be stopped by."""

    report: Callable[[Any], object] = lambda _: None
    stopped: threading.Event = field(default_factory=threading.Event)
    what: str = ""

    def stop(self) -> None:
        """End it after the evaluation that it is at; whoever looks at it is told at once."""
        self.stopped.set()
        self.report(Stopped())

    def say(self, share: float, images: list[Image.Image] | None = None) -> None:
        """Report, if it is to go on. Raises Halted otherwise."""
        if self.stopped.is_set():
            raise Halted
        self.report(Report(share, self.what, images))

    def watching(self, model: ImageModel) -> Control:
        """A control that reports each step of a drawing, and its pictures now and then."""
        return _Watching(model, self)


class Turns:
    """One piece of work at a time, in the order in which they came."""

    def __init__(self) -> None:
        """Nobody is there."""
        self._line: list[Work] = []
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, work: Work) -> Iterator[None]:
        """Wait for the turn of a piece of work, and say how many go first.

        Raises Halted if it is stopped before, and UserError if too many wait.
        """
        with self._moved:
            if sum(not other.stopped.is_set() for other in self._line) > MOST_WAITING:
                raise UserError(f"{MOST_WAITING} are waiting already; try again in a while")
            self._line.append(work)
        try:
            with self._moved:
                while (before := self._line.index(work)) and not work.stopped.is_set():
                    work.report(Waiting(before))
                    self._moved.wait(PATIENCE)
            if work.stopped.is_set():
                raise Halted
            yield
        finally:
            with self._moved:
                self._line.remove(work)
                self._moved.notify_all()


class _Watching(Previews):
    def __init__(self, model: ImageModel, work: Work) -> None:
        super().__init__(self._look, path=PATHS[model.record.denoiser.path])
        self.model, self.work = model, work
        self.first: float | None = None
        self.next_look = 0.0

    def of(self, images: slice) -> Control:
        return self

    def velocity(self, velocity: State, state: State, times: Times) -> State:
        if self.work.stopped.is_set():
            raise Halted
        self.first = times[LATENT] if self.first is None else self.first
        return super().velocity(velocity, state, times)

    def _look(self, predicted: State, times: Times) -> None:
        began = time.monotonic()
        images = None
        if began >= self.next_look and times[LATENT] > 0:
            images = [Image.fromarray(pixels) for pixels in self.model.decode(predicted, "round")]
            now = time.monotonic()
            self.next_look = now + max(LEAST_PAUSE, 4 * (now - began))
        self.work.say(1 - times[LATENT] / (self.first or 1.0), images)


@dataclass(frozen=True)
class Done(Generic[T]):
    """The work is done."""

    value: T
    seconds: float


@dataclass(frozen=True)
class Failed:
    """The work cannot be done, and why: one line."""

    reason: str


News = Report | Waiting | Stopped | Done[T] | Failed


def at_work(action: Callable[[Work], T], turns: Turns, works: list[Work] | None = None) -> Iterator[News[T]]:
    """Run an action in a thread when its turn comes, and yield what it reports, then what it has come to.

    It is one of `works` meanwhile, so that others can stop it, as whoever leaves the iterator does. It ends after the
    evaluation that it is at, and no other one begins before.
    """
    news: queue.SimpleQueue[News[T]] = queue.SimpleQueue()
    work, works = Work(news.put), [] if works is None else works

    def run() -> None:
        try:
            with turns.turn(work):
                began = time.monotonic()
                value, seconds = action(work), time.monotonic() - began
            news.put(Done(value, seconds))
        except Halted:
            news.put(Stopped())
        except UserError as error:
            news.put(Failed(str(error)))
        except Exception as error:
            traceback.print_exc()
            news.put(Failed(f"a defect ({type(error).__name__}); its traceback is where the studio was started"))

    works.append(work)
    threading.Thread(target=run, daemon=True).start()
    try:
        while isinstance(one := news.get(), Report | Waiting):
            yield one
        yield one
    finally:
        work.stopped.set()
        works.remove(work)
