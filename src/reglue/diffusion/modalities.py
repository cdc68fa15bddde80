"""What a sample is made of: a state with one tensor per modality.

Paths, losses, guidance and samplers map over the keys of a state, so that nothing is written once per modality. A
recipe without a modality has no such key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]

LATENT = "latent"
"""Normalised latents of the autoencoder, (B, C, H, W)."""
LOCAL = "local"
"""Compressed features of the vision encoder on the grid of the latents, (B, K, H, W)."""
CLS = "cls"
"""The vision encoder's class token, (B, D)."""


@dataclass(frozen=True)
class StateShape:
    """The sizes of one sample; a modality with size 0 is absent."""

    latent_channels: int
    """C"""
    grid: tuple[int, int]
    """(H, W) of the latents, in latent pixels."""
    local_channels: int = 0
    """K"""
    class_token_width: int = 0
    """D"""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each modality that is there, without the batch."""
        shapes: dict[str, tuple[int, ...]] = {LATENT: (self.latent_channels, *self.grid)}
        if self.local_channels:
            shapes[LOCAL] = (self.local_channels, *self.grid)
        if self.class_token_width:
            shapes[CLS] = (self.class_token_width,)
        return shapes


def concatenate_states(states: list[State]) -> State:
    """Stack batches of states along the batch axis."""
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
