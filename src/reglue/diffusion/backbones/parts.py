"""What the blocks of all backbones are made of, with the options of `specs.Blocks`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.diffusion.backbones.attention import attention
from reglue.diffusion.specs import Blocks

RMS_EPSILON = 1e-6
HEAD_EPSILON = 1e-5
"""Of the LayerNorm of query and key."""
MLP_RATIO = 4


def norm(width: int, blocks: Blocks, epsilon: float, affine: bool) -> nn.Module:
    """The norm of tokens (…, width): RMSNorm, always with weights, or LayerNorm, which may have none."""
    if blocks.rms_norm:
        return nn.RMSNorm(width, eps=RMS_EPSILON)
    return nn.LayerNorm(width, eps=epsilon, elementwise_affine=affine)


class SwiGlu(nn.Module):
    """SiLU(a)·b for the halves a and b of the last axis (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, 2D) → (…, D)."""
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b


def mlp(width: int, blocks: Blocks, gelu: nn.Module) -> nn.Sequential:
    """The network of a block: four times the width with a GELU, or 2/3 of that, rounded down, with SwiGLU."""
    hidden = MLP_RATIO * width
    if not blocks.swiglu:
        return nn.Sequential(nn.Linear(width, hidden), gelu, nn.Linear(hidden, width))
    hidden = 2 * hidden // 3
    return nn.Sequential(nn.Linear(width, 2 * hidden), SwiGlu(), nn.Linear(hidden, width))


class Attention(nn.Module):
    """Multi-head self-attention, query and key normalised head by head and rotated by their places on request."""

    def __init__(self, width: int, heads: int, blocks: Blocks = Blocks(), *, bias: bool = True) -> None:
        """`bias` is that of query, key and value."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.norms = nn.ModuleDict()
        if blocks.qk_norm:
            self.norms = nn.ModuleDict({of: norm(width // heads, blocks, HEAD_EPSILON, affine=True) for of in "qk"})
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """x (B, N, D) and the `rotation_of` N places → (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.norms:
            q, k = self.norms["q"](q), self.norms["k"](k)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        # Where products are in half precision, norms and rotations are not.
        return self.out(attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2))


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of channels (2j, 2j + 1) of x (…, N, D) by cosines and sines (2, N, D/2) (arXiv 2104.09864)."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
