"""Long work in a thread of its own: it says how far it is, shows what is being drawn, and can be stopped."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from PIL import Image

from reglue.diffusion.controls import Control, Previews
from reglue.diffusion.modalities import LATENT, State, Times
from reglue.diffusion.paths import PATHS
from reglue.errors import UserError
from reglue.pipeline import ImageModel

LEAST_PAUSE = 0.25
"""Seconds between two looks at what is being drawn; decoding takes a fifth of the time at most."""
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


@dataclass
class Work:
    """What the work is given: to report by, and to be stopped by."""

    report: Callable[[Report], object] = lambda _: None
    stopped: threading.Event = field(default_factory=threading.Event)
    what: str = ""

    def say(self, share: float, images: list[Image.Image] | None = None) -> None:
        """Report, if it is to go on. Raises Halted otherwise."""
        if self.stopped.is_set():
            raise Halted
        self.report(Report(share, self.what, images))

    def watching(self, model: ImageModel) -> Control:
        """A control that reports each step of a drawing, and its pictures now and then."""
        return _Watching(model, self)


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


def at_work(action: Callable[[Work], T], one_at_a_time: threading.Lock) -> Iterator[Report | Done[T] | Failed]:
    """Run an action in a thread and yield what it reports, then what it has come to.

    Whoever leaves the iterator stops the action, after the evaluation that it is at; no other one begins before.
    """
    news: queue.SimpleQueue[Report | Done[T] | Failed | None] = queue.SimpleQueue()
    work = Work(news.put)

    def run() -> None:
        with one_at_a_time:
            began = time.monotonic()
            try:
                news.put(Done(action(work), time.monotonic() - began))
            except Halted:
                pass
            except UserError as error:
                news.put(Failed(str(error)))
            except Exception as error:
                traceback.print_exc()
                news.put(Failed(f"a defect ({type(error).__name__}); its traceback is where the studio was started"))
            finally:
                news.put(None)

    threading.Thread(target=run, daemon=True).start()
    try:
        while (one := news.get()) is not None:
            yield one
    finally:
        work.stopped.set()
