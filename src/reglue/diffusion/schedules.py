"""Time schedules: from the progress of a sample to the time of each of its modalities.

To add one, write a `Schedule` and register it in `SCHEDULES`; recipes name it. One that has options is a frozen
dataclass of them. Recipes are read before PyTorch is imported, so this module does not import it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from reglue.diffusion.specs import LATENT

if TYPE_CHECKING:
    from torch import Tensor

    from reglue.diffusion.modalities import TensorTimes, Times


class Schedule(ABC):
    """Which time each modality has when the clock of the sampler, or of a training sample, shows t."""

    choices: int = 0
    """How many uniform numbers a training sample's times are made of, besides its clocks."""
    any_times: bool = False
    """Whether training shows all combinations of times, so that any modality may be known (t = 0) or hidden (t = 1)."""

    @property
    def edges(self) -> tuple[float, ...]:
        """The clock's times, strictly between 0 and 1, at which a modality begins or ends to move."""
        return ()

    @abstractmethod
    def times(self, clock: float, names: Iterable[str]) -> Times:
        """Times in [0, 1] of the modalities `names`, non-decreasing in `clock`, from all 0 at 0 to all 1 at 1."""

    def clocks(self, names: Iterable[str]) -> int:
        """How many times, as the recipe distributes them, a training sample's are made of."""
        return 1

    def training_times(
        self, clocks: Sequence[Tensor], names: Iterable[str], choices: Sequence[Tensor] = ()
    ) -> TensorTimes:
        """The times (B,) of training samples, of as many `clocks` and uniform `choices`, (B,) each in [0, 1], as asked.

        Those that the first clock shows, unless the schedule trains otherwise than it samples.
        """
        names = list(names)
        each = [self.times(clock, names) for clock in map(float, clocks[0])]
        return {name: clocks[0].new_tensor([times[name] for times in each]) for name in names}

    def learned(self, times: TensorTimes) -> Mapping[str, Tensor]:
        """Of which training samples, (B,) bool, a modality's velocity is learned: of all, where it is not named."""
        return {}

    def given(self, known: Iterable[str], names: Iterable[str]) -> Schedule | None:
        """What draws the other ones of `names` where some are known; None if training has not shown how."""
        return Known(frozenset(known)) if self.any_times else None

    def clocks_at(self, time: float, names: Iterable[str]) -> set[float]:
        """What the clock shows when a modality comes to `time`, in (0, 1), found by bisection: one number for each."""
        names, found = list(names), set[float]()
        for name in names:
            before, behind = 0.0, 1.0
            while before < (middle := (before + behind) / 2) < behind:
                before, behind = (middle, behind) if self.times(middle, names)[name] < time else (before, middle)
            found.add(behind)
        return found


class Shared(Schedule):
    """All modalities have the clock's time: every published method but SFD and Latent Forcing."""

    def times(self, clock: float, names: Iterable[str]) -> Times:
        """See `Schedule.times`."""
        return dict.fromkeys(names, clock)

    def training_times(
        self, clocks: Sequence[Tensor], names: Iterable[str], choices: Sequence[Tensor] = ()
    ) -> TensorTimes:
        """See `Schedule.training_times`."""
        return dict.fromkeys(names, clocks[0])


@dataclass(frozen=True)
class Lead(Schedule):
    """Everything but the latents is ahead of them by Δ (semantics first: SFD, arXiv 2512.04926).

    t_s = clip((1 + Δ)·c − Δ) and t_z = clip((1 + Δ)·c), when the clock shows c.
    """

    delta: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta {self.delta}: choose 0 to 1")

    @property
    def edges(self) -> tuple[float, ...]:
        """Where everything else has arrived, and where the latents begin."""
        return tuple(sorted({edge for edge in self._ends if 0 < edge < 1}))

    @property
    def _ends(self) -> tuple[float, float]:
        return self.delta / (1 + self.delta), 1 / (1 + self.delta)

    def times(self, clock: float, names: Iterable[str]) -> Times:
        """See `Schedule.times`."""
        arrived, begin = self._ends
        latents, ahead = min(clock / begin, 1.0), max((clock - arrived) / (1 - arrived), 0.0)
        return {name: latents if name == LATENT else ahead for name in names}


@dataclass(frozen=True)
class Cascade(Lead):
    """Everything but the latents first, and only then the latents (Latent Forcing, arXiv 2602.11401).

    A training sample learns the one, while the latents are noise, or the other, given all else nearly without noise.
    """

    delta: float = field(default=1.0, init=False)
    share: float = 0.4
    """Of the samples, so many learn what comes first."""
    noise: float = 0.25
    """The noisiest time that it has where the latents are learned."""

    choices = 2

    def __post_init__(self) -> None:
        for name in ("share", "noise"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} {value}: choose 0 to 1")

    def training_times(
        self, clocks: Sequence[Tensor], names: Iterable[str], choices: Sequence[Tensor] = ()
    ) -> TensorTimes:
        """See `Schedule.training_times`."""
        first = choices[0] < self.share
        latents, ahead = clocks[0].masked_fill(first, 1.0), clocks[0].where(first, self.noise * choices[1])
        return {name: latents if name == LATENT else ahead for name in names}

    def learned(self, times: TensorTimes) -> Mapping[str, Tensor]:
        """What comes first where the latents are noise, and the latents elsewhere."""
        first = times[LATENT] == 1
        return {name: ~first if name == LATENT else first for name in times}

    def given(self, known: Iterable[str], names: Iterable[str]) -> Schedule | None:
        """The latents alone can be drawn, and of all the rest."""
        return Known(frozenset(known)) if {*known} == {*names} - {LATENT} else None


class Independent(Shared):
    """A time of its own for each modality in training (UniDiffuser, arXiv 2303.06555); one for all in sampling."""

    any_times = True

    def clocks(self, names: Iterable[str]) -> int:
        """One for each modality."""
        return len([*names])

    def training_times(
        self, clocks: Sequence[Tensor], names: Iterable[str], choices: Sequence[Tensor] = ()
    ) -> TensorTimes:
        """See `Schedule.training_times`."""
        return dict(zip(names, clocks, strict=True))


@dataclass(frozen=True)
class Known(Schedule):
    """Some modalities are known: data, at t = 0, all along, while the others move with the clock.

    So samples are those of p(others | known), exactly, of models that were trained for it (`Schedule.given`).
    """

    known: frozenset[str]

    def times(self, clock: float, names: Iterable[str]) -> Times:
        """See `Schedule.times`."""
        return {name: 0.0 if name in self.known else clock for name in names}


SCHEDULES: dict[str, Schedule] = {
    "shared": Shared(),
    "lead": Lead(),
    "cascade": Cascade(),
    "independent": Independent(),
}


def schedule_of(name: str, options: Mapping[str, float]) -> Schedule:
    """A registered schedule, with options in place of its own. Raises ValueError for those that cannot be."""
    schedule = SCHEDULES[name]
    known = [part.name for part in fields(schedule) if part.init] if is_dataclass(schedule) else []
    for one in options:
        if one not in known:
            raise ValueError(f"{one}: {name} takes {', '.join(known) or 'no options'}")
    changed: Any = replace  # What has fields is a dataclass.
    return changed(schedule, **options) if options else schedule
