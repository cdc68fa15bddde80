"""Time schedules: from the progress of a sample to the time of each of its modalities.

To add one, write a `Schedule` and register it in `SCHEDULES`; recipes name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from reglue.diffusion.modalities import Times


class Schedule(ABC):
    """Which time each modality has when the clock of the sampler, or of a training sample, shows t."""

    @abstractmethod
    def times(self, clock: float, names: Iterable[str]) -> Times:
        """Times in [0, 1] of the modalities `names`, non-decreasing in `clock`, from all 0 at 0 to all 1 at 1."""


class Shared(Schedule):
    """All modalities have the clock's time: every published method but SFD and Latent Forcing."""

    def times(self, clock: float, names: Iterable[str]) -> Times:
        """See `Schedule.times`."""
        return dict.fromkeys(names, clock)


SCHEDULES: dict[str, Schedule] = {"shared": Shared()}
