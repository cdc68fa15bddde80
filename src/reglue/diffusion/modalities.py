"""What a sample is made of: a state with one tensor per modality.

Paths, losses, guidance, samplers, training data and records map over modalities, so that nothing is written once per
modality, and a new one is a value of `Modality`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from reglue.diffusion.specs import LATENT as LATENT
from reglue.diffusion.specs import Modality as Modality
from reglue.diffusion.specs import Normalisation as Normalisation

State = dict[str, Tensor]
HIDDEN = "hidden tokens"
"""Beside modalities: a denoiser's tokens that are aligned with the vision encoder's."""
Times = Mapping[str, float]
"""The time of each modality in a sampler: 0 is data, 1 is noise."""
TensorTimes = Mapping[str, Tensor]
"""That of each modality and sample, (B,) each."""


def times_of_each(time: Tensor | TensorTimes, names: Iterable[str]) -> TensorTimes:
    """One time (B,) for all modalities, or one for each, as one for each."""
    return dict.fromkeys(names, time) if isinstance(time, Tensor) else time


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
