"""What the denoiser, compilation, FSDP and recomputation ask of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # type: ignore[reportUnknownVariableType]

from reglue.diffusion.embeddings import TimeEmbedding, rotation_of
from reglue.diffusion.specs import DenoiserConfig

NORM_EPSILON = 1e-6


def rotation(config: DenoiserConfig, inserted: int = 0) -> Tensor | None:
    """The `rotation_of` the places, behind tokens that the backbone inserts, where blocks are to have one."""
    if not config.parts.rope:
        return None
    width, leading = config.width // config.heads, len(config.tokens) + inserted
    return rotation_of(config.token_grid, width, leading, config.position_grid)


class Backbone(nn.Module, ABC):
    """Blocks in a row over tokens (B, N, width)."""

    fixed_positions = True
    """Whether tokens come with the fixed embedding of their places; a backbone that learns one of its own has none."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        """What is compiled, sharded and recomputed one by one."""
        self.recomputed_blocks = 0
        """So many blocks, from the first on, keep no activations for the backward pass but compute them again."""

    @abstractmethod
    def forward(
        self, tokens: Tensor, time: Tensor, condition: Tensor, tap_after: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N, width) and the embeddings of time and condition (B, width) → tokens, and a tap.

        The tap is the tokens after block `tap_after`, counted from 1; None for 0.
        """

    def time_embedding(self, width: int) -> TimeEmbedding:
        """The module from time (B,) to the embedding that `forward` takes."""
        return TimeEmbedding(width)

    def zero_layers(self) -> Iterable[nn.Module]:
        """The linear layers that begin at zero."""
        return ()

    def small_layers(self) -> Iterable[nn.Module]:
        """The layers that begin as N(0, 0.02²)."""
        return ()

    def through_blocks(self, x: Tensor, *given: Tensor, tap_after: int = 0) -> tuple[Tensor, Tensor | None]:
        """Run all blocks, each called as block(x, *given). Returns the tokens and the tap, as `forward`."""
        tap = None
        for number in range(1, len(self.blocks) + 1):
            x = self.through(number, x, *given)
            if number == tap_after:
                tap = x
        return x, tap

    def through(self, number: int, x: Tensor, *given: Tensor | None) -> Tensor:
        """block(x, *given) for the block of a number, counted from 1."""
        block = self.blocks[number - 1]
        if number <= self.recomputed_blocks and torch.is_grad_enabled():
            # Nothing in a block is random, so the state of the generators need not be kept.
            return checkpoint(block, x, *given, use_reentrant=False, preserve_rng_state=False)
        return block(x, *given)
