"""Time schedules: from the progress of a sample to the time of each of its modalities.

To add one, write a `Schedule` and register it in `SCHEDULES`; recipes name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor

from reglue.diffusion.modalities import TensorTimes, Times


class Schedule(ABC):
    """Which time each modality has when the clock of the sampler, or of a training sample, shows t."""

    edges: tuple[float, ...] = ()
    """The clock's times, strictly between 0 and 1, at which a modality begins or ends to move."""
    draws: int = 1
    """How many uniform numbers a training sample's times are made of; the first one is its clock."""

    @abstractmethod
    def times(self, clock: float, names: Iterable[str]) -> Times:
        """Times in [0, 1] of the modalities `names`, non-decreasing in `clock`, from all 0 at 0 to all 1 at 1."""

    def training_times(self, draws: Sequence[Tensor], names: Iterable[str]) -> TensorTimes:
        """The times (B,) of training samples, of as many draws (B,) in [0, 1] as the schedule asks for.

        Those that the first one's clock shows, unless the schedule trains otherwise than it samples.
        """
        names = list(names)
        each = [self.times(clock, names) for clock in map(float, draws[0])]
        return {name: draws[0].new_tensor([times[name] for times in each]) for name in names}


class Shared(Schedule):
    """All modalities have the clock's time: every published method but SFD and Latent Forcing."""

    def times(self, clock: float, names: Iterable[str]) -> Times:
        """See `Schedule.times`."""
        return dict.fromkeys(names, clock)

    def training_times(self, draws: Sequence[Tensor], names: Iterable[str]) -> TensorTimes:
        """See `Schedule.training_times`."""
        return dict.fromkeys(names, draws[0])


SCHEDULES: dict[str, Schedule] = {"shared": Shared()}
