"""What the denoiser, compilation, FSDP and recomputation ask of a backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # type: ignore[reportUnknownVariableType]

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class BackboneSizes:
    """Every size that a backbone may depend on."""

    depth: int
    width: int
    heads: int
    leading: int
    """Tokens in front of the patches."""
    grid: tuple[int, int]
    """(rows, columns) of the patches."""


class Backbone(nn.Module, ABC):
    """Blocks in a row over tokens (B, N, width)."""

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

    def zero_layers(self) -> Iterable[nn.Module]:
        """The linear layers that begin at zero."""
        return ()

    def through_blocks(self, x: Tensor, *given: Tensor, tap_after: int = 0) -> tuple[Tensor, Tensor | None]:
        """Run all blocks, each called as block(x, *given). Returns the tokens and the tap, as `forward`."""
        tap = None
        for number, block in enumerate(self.blocks, start=1):
            if number <= self.recomputed_blocks and torch.is_grad_enabled():
                # Nothing in a block is random, so the state of the generators need not be kept.
                x = checkpoint(block, x, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *given)
            if number == tap_after:
                tap = x
        return x, tap
