"""Sinusoids: of time, and of the places of patches (SiT, arXiv 2401.08740, after DiT, arXiv 2212.09748)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256
SPAN = "span"
"""How far a step goes towards data, among the times that a denoiser is given."""
MAX_PERIOD = 10_000.0


def position_embedding(
    grid: tuple[int, int], width: int, leading: int = 0, counted_in: tuple[int, int] | None = None
) -> Tensor:
    """Fixed sin-cos embedding of a token grid, (1, leading + rows·columns, width), float32.

    The first half of the channels encodes the column, the second half the row; per axis sines, then cosines, with
    frequencies 1 / 10000^(i / (width/4)) in float64. Leading tokens (the class token) get zeros. Row i of R stands at
    i, or at i·R'/R with `counted_in` (R', C'): within the range that a smaller grid covers (DiffFit, arXiv 2304.06648).
    """
    rows, columns = _angles(grid, width, counted_in)
    positions = torch.cat([f(a) for a in (columns, rows) for f in (torch.sin, torch.cos)], dim=1)
    return F.pad(positions, (0, 0, leading, 0)).float().unsqueeze(0)


def rotation_of(
    grid: tuple[int, int], width: int, leading: int = 0, counted_in: tuple[int, int] | None = None
) -> Tensor:
    """Cosines and sines of the angles by which attention turns a head's pairs of channels, (2, leading + rows·columns,
    width/2), float32 (2-D rotary positions, as in LightningDiT, arXiv 2501.01423).

    The first half of the pairs is turned by the row, the second by the column, with the frequencies and in the places
    of `position_embedding`. Leading tokens are not turned.
    """
    angles = F.pad(torch.cat(_angles(grid, width, counted_in), dim=1), (0, 0, leading, 0))
    return torch.stack([angles.cos(), angles.sin()]).float()


def _angles(grid: tuple[int, int], width: int, counted_in: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Row and column of every place of a grid, each times width/4 frequencies: (rows·columns, width/4), float64."""
    counted = [
        torch.arange(tokens, dtype=torch.float64) * ((unit or tokens) / tokens)
        for tokens, unit in zip(grid, counted_in or (None, None), strict=True)
    ]
    rows, columns = torch.meshgrid(*counted, indexing="ij")
    frequencies = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    return rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies


def time_features(t: Tensor, size: int = FREQUENCIES) -> Tensor:
    """Sinusoids of t (B,), not scaled: (B, size), cosines, then sines."""
    half = size // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class TimeEmbedding(nn.Sequential):
    """Time (B,) to (B, width): sinusoids, then two layers; in [0, 1], unless the prediction counts it otherwise."""

    def __init__(self, width: int, hidden: int | None = None, features: int = FREQUENCIES, scale: float = 1.0) -> None:
        """Layers of `hidden` width between, that of the embedding if not given; with 0 there are no layers.

        The sinusoids are of `scale` times the time, and so many `features`: as many as the width without layers.
        """
        hidden = width if hidden is None else hidden
        super().__init__(*((nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, width)) if hidden else ()))
        self.features, self.scale = features, scale

    def forward(self, input: Tensor) -> Tensor:
        """(B,) → (B, width)."""
        x = time_features(input if self.scale == 1 else self.scale * input, self.features)
        for layer in self:
            x = layer(x)
        return x


class TimeOffsets(nn.ModuleDict):
    """What times besides that of the latents add to its embedding: 0 where all are the same, and untrained.

    Σ A_m·(E(t_m) − E(t_z)) over the other modalities m, and E′(d) for the length d of a step (MeanFlow, arXiv
    2505.13447), whose last layer begins at zero. A published network is this one with equal times and without lengths.
    """

    def __init__(self, width: int, names: Iterable[str], span: bool) -> None:
        """`names` are the modalities that may have a time of their own."""
        super().__init__({name: nn.Linear(width, width, bias=False) for name in names})
        if span:
            self[SPAN] = TimeEmbedding(width)

    def zero_layers(self) -> Iterable[nn.Module]:
        """The linear layers that begin at zero."""
        return [layer[-1] if isinstance(layer, TimeEmbedding) else layer for layer in self.values()]

    def forward(self, of_latents: Tensor, times: Mapping[str, Tensor], embed: nn.Module) -> Tensor:
        """E(t_z) (B, width), the times (B,) by name, and E, to the embedding of all of them (B, width)."""
        result = of_latents
        for name, layer in self.items():
            result = result + (layer(times[name]) if name == SPAN else layer(embed(times[name]) - of_latents))
        return result
