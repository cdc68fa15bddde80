"""The SiT backbone (arXiv 2401.08740; blocks as in DiT, arXiv 2212.09748), and its published names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from reglue.diffusion.backbones.activation import Gelu
from reglue.diffusion.backbones.attention import attention
from reglue.diffusion.backbones.backbone import NORM_EPSILON, Backbone, BackboneSizes


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift, for tokens x (B, N, D) and shift, scale (B, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


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
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a GELU network of four times the width, both modulated by adaLN-Zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON, elementwise_affine=False)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), Gelu(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D) and the activated condition SiLU(c) (B, D) → (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attention(modulate(self.norm(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift_m, scale_m))


class SiT(Backbone):
    """Blocks conditioned on time and condition by adaLN-Zero, closed by a modulated norm."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__(Block(sizes.width, sizes.heads) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width, eps=NORM_EPSILON, elementwise_affine=False)
        self.modulation = nn.Linear(sizes.width, 2 * sizes.width)

    def zero_layers(self) -> Iterable[nn.Module]:
        """The modulations: every block begins as the identity."""
        return [self.modulation, *(block.modulation for block in self.blocks if isinstance(block, Block))]

    def forward(
        self, tokens: Tensor, time: Tensor, condition: Tensor, tap_after: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backbone.forward`."""
        c = F.silu(time + condition)
        x, tap = self.through_blocks(tokens, c, tap_after=tap_after)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale), tap


KEYS = {
    "blocks.{i}.attn.qkv": "blocks.{i}.attention.qkv",
    "blocks.{i}.attn.proj": "blocks.{i}.attention.out",
    "blocks.{i}.mlp.fc1": "blocks.{i}.mlp.0",
    "blocks.{i}.mlp.fc2": "blocks.{i}.mlp.2",
    "blocks.{i}.adaLN_modulation.1": "blocks.{i}.modulation",
    "final_layer.adaLN_modulation.1": "modulation",
}
"""Published name → ours, within the backbone. {i} stands for the number of a block."""
