"""What a network's output means: from what it predicts to a velocity. The loss is that of velocities.

To add one, write a `PredictionKind` and register it in `PREDICTIONS`; recipes name it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from reglue.diffusion.modalities import State
from reglue.diffusion.paths import Path


class PredictionKind(ABC):
    """A parameterisation of the network; conversions are exact."""

    @abstractmethod
    def to_velocity(self, output: State, state: State, time: Tensor, path: Path) -> State:
        """The velocity dx/dt that an output for `state` at `time` (B,) means."""


class VelocityPrediction(PredictionKind):
    """The network predicts the velocity itself, as SiT and all that follow it."""

    def to_velocity(self, output: State, state: State, time: Tensor, path: Path) -> State:
        """See `PredictionKind.to_velocity`."""
        return output


PREDICTIONS: dict[str, PredictionKind] = {"velocity": VelocityPrediction()}
