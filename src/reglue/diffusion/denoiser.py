"""The joint denoiser: one transformer over latents, local semantics and a class token (REGLUE, arXiv 2512.16636)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reglue.diffusion.backbones.sit import NORM_EPSILON, Transformer, position_embedding
from reglue.diffusion.modalities import CLS, LATENT, LOCAL, State, StateShape
from reglue.seeds import torch_generator


class Prediction(NamedTuple):
    """What a denoiser says of a noisy state."""

    velocity: State
    """dx/dt per modality, in the shapes of the state."""
    tap: Tensor | None
    """Hidden tokens after the alignment block, (B, N, width), class token first; None if the model has no alignment."""


class DenoiserFunction(Protocol):
    """Anything that predicts velocities: what guidance asks of a denoiser."""

    @property
    def null_label(self) -> int:
        """The label that stands for no label."""
        ...

    def __call__(self, state: State, time: Tensor, label: Tensor) -> Prediction:
        """`state` at `time` (B,) in [0, 1], with `label` (B,) int64."""
        ...


@dataclass(frozen=True)
class DenoiserConfig:
    """Every size of a denoiser.

    Raises ValueError, with what to change, for sizes that do not fit together.
    """

    shape: StateShape
    """Sizes of one sample; they come from the store."""
    classes: int
    """Number of classes; 0 for unconditional."""
    depth: int
    width: int
    heads: int
    patch: int = 2
    """Side of a square patch, in latent pixels."""
    learn_sigma: bool = False
    """Twice the output channels, the second half unused: SiT's published checkpoints are so."""
    alignment_depth: int = 0
    """The block, counted from 1, after which tokens are aligned with the vision encoder; 0: no alignment."""
    alignment_width: int = 0
    """Width of the vision encoder's tokens that alignment projects to; 0: no alignment."""
    alignment_hidden: int = 2048
    """Hidden width of the projector."""
    learned_positions: bool = False
    """The position embedding comes with the weights, as in some imported models; else it is the fixed sin-cos one."""
    position_grid: tuple[int, int] | None = None
    """The (rows, columns) of tokens in which positions are counted; None for the model's own."""

    def __post_init__(self) -> None:
        rows, columns = self.shape.grid
        if rows % self.patch or columns % self.patch:
            raise ValueError(
                f"a latent grid of {rows}×{columns} does not divide into patches of {self.patch}; "
                "change the resolution or the patch size"
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"a width of {self.width} must be divisible by 4 and by the number of heads ({self.heads})"
            )
        if self.position_grid and min(self.position_grid) < 1:
            raise ValueError(f"a position grid of {self.position_grid} must have one row and one column at least")
        if self.alignment_depth > self.depth:
            raise ValueError(
                f"alignment after block {self.alignment_depth}, but the model has only {self.depth} blocks"
            )

    @property
    def channels(self) -> int:
        """Latent and local channels together."""
        return self.shape.latent_channels + self.shape.local_channels

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        return self.shape.grid[0] // self.patch, self.shape.grid[1] // self.patch


class ClassTokenEmbedding(nn.Module):
    """LayerNorm(Linear(noisy class token)): the leading token of REG (arXiv 2507.01467)."""

    def __init__(self, token_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(token_width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)

    def forward(self, cls: Tensor) -> Tensor:
        """(B, D) → one token (B, 1, width)."""
        return self.norm(self.linear(cls)).unsqueeze(1)


class Projector(nn.Sequential):
    """Hidden tokens to the vision encoder's width; used in training only (REPA, arXiv 2410.06940, section 3)."""

    def __init__(self, width: int, hidden: int, target_width: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target_width)
        )


class Denoiser(nn.Module):
    """Predicts the velocity of every modality of a noisy state.

    Latents and local semantics share the patches, as channels; the class token, where there is one, is a token of its
    own in front. Pure: no dropout, of labels or otherwise.
    """

    def __init__(self, config: DenoiserConfig, seed: int = 0) -> None:
        """Initial weights are a function of the seed, and of nothing that was drawn before."""
        super().__init__()
        self.config = config
        shape, width = config.shape, config.width
        outputs = config.patch**2 * config.channels * (2 if config.learn_sigma else 1)
        self.patches = nn.Conv2d(config.channels, width, config.patch, config.patch)
        self.transformer = Transformer(config.depth, width, config.heads, config.classes)
        self.velocity = nn.Linear(width, outputs)
        leading = 0
        if shape.class_token_width:
            self.class_token = ClassTokenEmbedding(shape.class_token_width, width)
            self.class_token_velocity = nn.Linear(width, shape.class_token_width)
            leading = 1
        if config.alignment_depth and config.alignment_width:
            self.projector = Projector(width, config.alignment_hidden, config.alignment_width)
        positions = position_embedding(config.token_grid, width, leading, config.position_grid)
        self.register_buffer("positions", positions, persistent=config.learned_positions)
        self.positions: Tensor
        self.initialise(seed)

    @property
    def null_label(self) -> int:
        """The label that stands for no label: the last row of the table."""
        return self.config.classes

    def forward(self, state: State, time: Tensor, label: Tensor) -> Prediction:
        """Velocities of `state` at `time` (B,) in [0, 1], given `label` (B,) int64 in [0, classes]."""
        config = self.config
        maps = [state[name] for name in (LATENT, LOCAL) if name in state]
        tokens = self.patches(torch.cat(maps, dim=1)).flatten(2).transpose(1, 2)
        if CLS in state:
            tokens = torch.cat([self.class_token(state[CLS]), tokens], dim=1)
        tokens, tap = self.transformer(tokens + self.positions, time, label, config.alignment_depth)

        velocity: State = {}
        if CLS in state:
            velocity[CLS] = self.class_token_velocity(tokens[:, 0])
            tokens = tokens[:, 1:]
        image = self.unpatchify(self.velocity(tokens))
        velocity[LATENT], velocity[LOCAL], _ = image.tensor_split(
            [config.shape.latent_channels, config.channels], dim=1
        )
        return Prediction({name: velocity[name] for name in state}, tap)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, rows·columns, p·p·channels), ordered (p_row, p_column, channel), → (B, channels, H, W)."""
        (rows, columns), p = self.config.token_grid, self.config.patch
        image = tokens.reshape(tokens.shape[0], rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(tokens.shape[0], -1, rows * p, columns * p)

    def initialise(self, seed: int) -> None:
        """The published initialisation: adaLN-Zero, the patch embedding as if it were Linear, zero output layers.

        Every layer draws from a stream of its own, told by its name: models of one seed begin with the same weights in
        whatever they share, other parts or not.
        """
        transformer = self.transformer
        small = {transformer.label_embedding, transformer.time_embedding[0], transformer.time_embedding[2]}
        zero = {self.velocity, transformer.modulation, *(block.modulation for block in transformer.blocks)}
        if self.config.shape.class_token_width:
            zero.add(self.class_token_velocity)
        for name, layer in self.named_modules():  # type: ignore[reportUnknownVariableType]
            if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
                continue
            if layer.weight.is_meta:
                return  # Names and shapes are asked for, and nothing can be drawn.
            drawn = torch_generator(seed, f"initial weights of {name}")
            if layer in small:
                nn.init.normal_(layer.weight, std=0.02, generator=drawn)
            elif layer in zero:
                nn.init.zeros_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight.flatten(1), generator=drawn)
            if not isinstance(layer, nn.Embedding) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
