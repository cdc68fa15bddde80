"""The U-ViT backbone (arXiv 2209.12152): everything is a token, and long skips join early blocks to late ones."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor, nn

from reglue.diffusion.backbones.backbone import Backbone, rotation
from reglue.diffusion.backbones.parts import Attention, mlp, norm
from reglue.diffusion.embeddings import TimeEmbedding
from reglue.diffusion.predictions import PREDICTIONS
from reglue.diffusion.specs import Blocks, DenoiserConfig

NORM_EPSILON = 1e-5
LARGEST_TIME = 1000.0
"""The time of pure noise: a token that layers do not embed must tell times apart."""


class Block(nn.Module):
    """Attention and a network of two layers, behind a layer that takes in the tokens of an early block."""

    def __init__(self, width: int, heads: int, blocks: Blocks = Blocks(), *, skips: bool = False) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * width, width) if skips else None
        self.attention_norm = norm(width, blocks, NORM_EPSILON, affine=True)
        self.attention = Attention(width, heads, blocks, bias=False)
        self.mlp_norm = norm(width, blocks, NORM_EPSILON, affine=True)
        self.mlp = mlp(width, blocks, nn.GELU())

    def forward(self, x: Tensor, rotation: Tensor | None = None, early: Tensor | None = None) -> Tensor:
        """x (B, N, D), the `rotation_of` the places and an early block's tokens (B, N, D) → (B, N, D)."""
        if self.skip is not None and early is not None:
            x = self.skip(torch.cat([x, early], dim=-1))
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class UViT(Backbone):
    """depth/2 early blocks, one in the middle and depth/2 late ones, over patches, time and condition as tokens.

    The token of the condition and that of time stand between the leading tokens and the patches. The places of all of
    them are learned.
    """

    fixed_positions = False

    def __init__(self, config: DenoiserConfig) -> None:
        early, width, parts = config.depth // 2, config.width, config.parts
        super().__init__(Block(width, config.heads, parts, skips=number > early) for number in range(2 * early + 1))
        self.early = early
        self.leading, self.inserted = len(config.tokens), 1 + bool(config.conditions)
        self.positions = nn.Embedding(self.leading + self.inserted + prod(config.token_grid), width)
        self.norm = norm(width, parts, NORM_EPSILON, affine=True)
        self.register_buffer("rotation", rotation(config, self.inserted), persistent=False)
        self.rotation: Tensor | None
        self.hidden_of_time = 4 * width if parts.time_mlp else 0
        self.time_scale = LARGEST_TIME / PREDICTIONS[config.prediction].largest_time

    def time_embedding(self, width: int) -> TimeEmbedding:
        """Sinusoids of the tokens' width, of time counted to 1000; no layers, unless asked for."""
        return TimeEmbedding(width, self.hidden_of_time, width, self.time_scale)

    def small_layers(self) -> Iterable[nn.Module]:
        """All linear layers, and the places."""
        return [module for module in self.modules() if isinstance(module, nn.Linear | nn.Embedding)]

    def forward(
        self, tokens: Tensor, time: Tensor, condition: Tensor, tap_after: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backbone.forward`."""
        inserted = [condition.unsqueeze(1)] if self.inserted > 1 else []
        leading, patches = tokens.tensor_split([self.leading], dim=1)
        x = torch.cat([leading, *inserted, time.unsqueeze(1), patches], dim=1) + self.positions.weight
        tap: Tensor | None = None
        skipped: list[Tensor] = []
        for number in range(1, len(self.blocks) + 1):
            late = [skipped.pop()] if number > self.early + 1 else []
            x = self.through(number, x, self.rotation, *late)
            if number <= self.early:
                skipped.append(x)
            if number == tap_after:
                tap = x
        return self._without_inserted(self.norm(x)), None if tap is None else self._without_inserted(tap)

    def _without_inserted(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.leading], x[:, self.leading + self.inserted :]], dim=1)
