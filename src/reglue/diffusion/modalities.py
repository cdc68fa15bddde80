"""What a sample is made of: a state with one tensor per modality.

Paths, losses, guidance, samplers, training data and records map over modalities, so that nothing is written once per
modality, and a new one is a value of `Modality`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
Times = Mapping[str, float]
"""The time of each modality in a sampler: 0 is data, 1 is noise."""

LATENT = "latent"
"""The name of the autoencoder's latents, which every model learns and images are decoded from."""


@dataclass(frozen=True)
class Normalisation:
    """What a model sees of a modality: (x − shift)·scale, one shift and scale per channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, x: Tensor) -> Tensor:
        """Raw (B, C, …) to what the model learns."""
        shift, scale = self.tensors(x)
        return (x - shift) * scale

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        shift, scale = self.tensors(x)
        return x / scale + shift

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale in the type, on the device and broadcasting to the shape of x (B, C, …)."""
        view = (1, -1, *[1] * (x.ndim - 2))
        shift, scale = (torch.tensor(v, dtype=x.dtype, device=x.device).view(view) for v in (self.shift, self.scale))
        return shift, scale


@dataclass(frozen=True)
class Modality:
    """One part of the state that a model learns."""

    name: str
    """Its key in states, losses and options."""
    kind: Literal["map", "token"]
    """map: (B, channels, H, W) on the grid of the latents, channels beside theirs in every patch. token: (B, channels),
    a token of its own in front of the patches."""
    channels: int
    column: str = ""
    """The store's column that training reads; empty for a model that was imported."""
    normalisation: Normalisation | None = None
    """None where the model learns the values as they are."""
    dropout: float = 0.0
    """Share of samples that are trained without this modality, for representation guidance."""
    is_class_token: bool = False
    """Whether it is the vision encoder's class token, with which alignment pairs it."""

    def normalise(self, x: Tensor) -> Tensor:
        """Raw (B, channels, …) to what the model learns."""
        return self.normalisation.normalise(x) if self.normalisation else x

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return self.normalisation.denormalise(x) if self.normalisation else x


def concatenate_states(states: list[State]) -> State:
    """Stack batches of states, or of conditions, along the batch axis."""
    return {name: torch.cat([state[name] for state in states]) for name in states[0]}


def split_state(state: State, parts: int) -> list[State]:
    """Undo `concatenate_states` for parts of equal size."""
    pieces = {name: value.chunk(parts) for name, value in state.items()}
    return [{name: value[i] for name, value in pieces.items()} for i in range(parts)]


def batch_size(state: State) -> int:
    """B of a state."""
    return next(iter(state.values())).shape[0]


def expand_as(per_sample: Tensor, like: Tensor) -> Tensor:
    """View a (B,) tensor so that it multiplies a (B, …) tensor sample by sample."""
    return per_sample.view(-1, *[1] * (like.ndim - 1))
