"""The SiT backbone (arXiv 2401.08740; blocks as in DiT, arXiv 2212.09748): tokens and a condition in, tokens out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint  # type: ignore[reportUnknownVariableType]

NORM_EPSILON = 1e-6
FREQUENCIES = 256
MAX_PERIOD = 10_000.0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift, for tokens x (B, N, D) and shift, scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def position_embedding(
    grid: tuple[int, int], width: int, leading: int = 0, counted_in: tuple[int, int] | None = None
) -> Tensor:
    """Fixed sin-cos embedding of a token grid, (1, leading + rows·columns, width), float32.

    The first half of the channels encodes the column, the second half the row; per axis sines, then cosines, with
    frequencies 1 / 10000^(i / (width/4)) in float64. Leading tokens (the class token) get zeros. Row i of R stands at
    i, or at i·R'/R with `counted_in` (R', C'): within the range that a smaller grid covers (DiffFit, arXiv 2304.06648).
    """
    counted = [
        torch.arange(tokens, dtype=torch.float64) * ((unit or tokens) / tokens)
        for tokens, unit in zip(grid, counted_in or (None, None), strict=True)
    ]
    rows, columns = torch.meshgrid(*counted, indexing="ij")
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    positions = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(positions, (0, 0, leading, 0)).float().unsqueeze(0)


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of t (B,) in [0, 1], not scaled by 1000: (B, 256), cosines, then sines."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention with a bias on query, key and value, and no normalisation of query and key."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a GELU network of four times the width, both modulated by adaLN-Zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D) and the activated condition SiLU(c) (B, D) → (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attention(modulate(self.norm(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift_m, scale_m))


class Transformer(nn.Module):
    """Blocks in a row, conditioned on time and label, closed by a modulated norm."""

    def __init__(self, depth: int, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embedding = nn.Embedding(classes + 1, width)  # the last row is the null label
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.recomputed_blocks = 0
        """So many blocks, from the first on, keep no activations for the backward pass but compute them again."""

    def forward(self, x: Tensor, time: Tensor, label: Tensor, tap_after: int = 0) -> tuple[Tensor, Tensor | None]:
        """Tokens x (B, N, D), time (B,), label (B,) int64 → tokens (B, N, D) and those after block `tap_after`.

        Blocks are counted from 1; `tap_after=0` taps nothing and returns None for it.
        """
        condition = F.silu(self.time_embedding(time_features(time)) + self.label_embedding(label))
        tap = None
        for number, block in enumerate(self.blocks, start=1):
            if number <= self.recomputed_blocks and torch.is_grad_enabled():
                # Nothing in a block is random, so the state of the generators need not be kept.
                x = checkpoint(block, x, condition, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, condition)
            if number == tap_after:
                tap = x
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale), tap
