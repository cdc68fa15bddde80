"""The SiT backbone (arXiv 2401.08740; blocks as in DiT, arXiv 2212.09748), and its published names.

With the parts that LightningDiT (arXiv 2501.01423) adds to it, each by itself, and its names for them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from reglue.diffusion.backbones.activation import Gelu
from reglue.diffusion.backbones.backbone import NORM_EPSILON, Backbone, rotation
from reglue.diffusion.backbones.parts import Attention, mlp, norm
from reglue.diffusion.specs import Blocks, DenoiserConfig


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift, for tokens x (B, N, D) and shift, scale (B, D)."""
    scaled = x * (1 + scale.unsqueeze(1))
    return scaled if shift is None else scaled + shift.unsqueeze(1)


class Block(nn.Module):
    """Attention and a network of two layers, both modulated by adaLN-Zero."""

    def __init__(self, width: int, heads: int, blocks: Blocks = Blocks()) -> None:
        super().__init__()
        self.shifts = blocks.shift
        self.attention_norm = norm(width, blocks, NORM_EPSILON, affine=False)
        self.attention = Attention(width, heads, blocks)
        self.mlp_norm = norm(width, blocks, NORM_EPSILON, affine=False)
        self.mlp = mlp(width, blocks, Gelu())
        self.modulation = nn.Linear(width, (6 if blocks.shift else 4) * width)

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor | None = None) -> Tensor:
        """x (B, N, D), the activated condition SiLU(c) (B, D) and the `rotation_of` the places → (B, N, D)."""
        modulation = self.modulation(condition)
        if self.shifts:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        else:
            shift_a = shift_m = None
            scale_a, gate_a, scale_m, gate_m = modulation.chunk(4, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attention(modulate(self.attention_norm(x), shift_a, scale_a), rotation)
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m))


class SiT(Backbone):
    """Blocks conditioned on time and condition by adaLN-Zero, closed by a modulated norm."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(Block(config.width, config.heads, config.parts) for _ in range(config.depth))
        self.norm = norm(config.width, config.parts, NORM_EPSILON, affine=False)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.register_buffer("rotation", rotation(config), persistent=False)
        self.rotation: Tensor | None

    def zero_layers(self) -> Iterable[nn.Module]:
        """The modulations: every block begins as the identity."""
        return [self.modulation, *(block.modulation for block in self.blocks if isinstance(block, Block))]

    def forward(
        self, tokens: Tensor, time: Tensor, condition: Tensor, tap_after: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backbone.forward`."""
        c = F.silu(time + condition)
        given = (c,) if self.rotation is None else (c, self.rotation)
        x, tap = self.through_blocks(tokens, *given, tap_after=tap_after)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return modulate(self.norm(x), shift, scale), tap


KEYS = {
    "blocks.{i}.norm1": "blocks.{i}.attention_norm",
    "blocks.{i}.attn.qkv": "blocks.{i}.attention.qkv",
    "blocks.{i}.attn.q_norm": "blocks.{i}.attention.norms.q",
    "blocks.{i}.attn.k_norm": "blocks.{i}.attention.norms.k",
    "blocks.{i}.attn.proj": "blocks.{i}.attention.out",
    "blocks.{i}.norm2": "blocks.{i}.mlp_norm",
    "blocks.{i}.mlp.fc1": "blocks.{i}.mlp.0",
    "blocks.{i}.mlp.fc2": "blocks.{i}.mlp.2",
    "blocks.{i}.adaLN_modulation.1": "blocks.{i}.modulation",
    "final_layer.norm_final": "norm",
    "final_layer.adaLN_modulation.1": "modulation",
}
"""Published name → ours, within the backbone. {i} stands for the number of a block."""
SWIGLU = {"blocks.{i}.mlp.w12": "blocks.{i}.mlp.0", "blocks.{i}.mlp.w3": "blocks.{i}.mlp.2"}
"""The same of LightningDiT's networks with SwiGLU."""
