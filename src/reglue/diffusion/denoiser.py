"""The joint denoiser: one transformer over maps and tokens of several modalities (REGLUE, arXiv 2512.16636)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reglue.diffusion.backbones import BACKBONES, BackboneSizes
from reglue.diffusion.backbones.backbone import NORM_EPSILON
from reglue.diffusion.conditions import CLASS, CONDITIONS, Condition
from reglue.diffusion.embeddings import TimeEmbedding, position_embedding
from reglue.diffusion.modalities import LATENT, Modality, State
from reglue.diffusion.paths import PATHS, PathName
from reglue.diffusion.predictions import PREDICTIONS
from reglue.seeds import torch_generator


class Prediction(NamedTuple):
    """What a denoiser predicts of a noisy state."""

    velocity: State
    """dx/dt per modality, in the shapes of the state."""
    tap: Tensor | None
    """Hidden tokens after the alignment block, (B, N, width): that of the class token first, where the model has one,
    then the patches. None if the model has no alignment."""


class DenoiserFunction(Protocol):
    """Anything that predicts velocities: what guidance asks of a denoiser."""

    def null(self, batch: int) -> Condition:
        """The condition that stands for none, (batch, …) each."""
        ...

    def __call__(self, state: State, time: Tensor, condition: Condition) -> Prediction:
        """`state` at `time` (B,) in [0, 1], given `condition` (B, …) each."""
        ...


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Every size of a denoiser, and the parts it is built from.

    Raises ValueError, with what to change, for sizes that do not fit together and parts that do not exist.
    """

    modalities: tuple[Modality, ...]
    """What the model learns; the first one is the latents."""
    grid: tuple[int, int]
    """(H, W) of the maps, in latent pixels."""
    conditions: Mapping[str, int] = field(default_factory=dict[str, int])
    """The size of each condition: for `class`, the number of classes, 0 for unconditional."""
    depth: int
    width: int
    heads: int
    patch: int = 2
    """Side of a square patch, in latent pixels."""
    backbone: str = "sit"
    prediction: str = "velocity"
    path: PathName = "linear"
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
        rows, columns = self.grid
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
        names = [modality.name for modality in self.modalities]
        if not names or names[0] != LATENT or len({*names}) < len(names):
            raise ValueError(f"modalities {names}: the first must be {LATENT!r}, and all need different names")
        for kind, name, known in (
            ("backbone", self.backbone, BACKBONES),
            ("prediction", self.prediction, PREDICTIONS),
            *(("condition", name, CONDITIONS) for name in self.conditions),
        ):
            if name not in known:
                raise ValueError(f"{kind} {name} is unknown; registered are {', '.join(known)}")

    @property
    def maps(self) -> tuple[Modality, ...]:
        """The modalities that share the patches, in the order of their channels."""
        return tuple(modality for modality in self.modalities if modality.kind == "map")

    @property
    def tokens(self) -> tuple[Modality, ...]:
        """The modalities with a token of their own, in the order of these tokens."""
        return tuple(modality for modality in self.modalities if modality.kind == "token")

    @property
    def channels(self) -> int:
        """Of all maps together."""
        return sum(modality.channels for modality in self.maps)

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        return self.grid[0] // self.patch, self.grid[1] // self.patch

    @property
    def classes(self) -> int:
        """How many classes the model knows; 0 for unconditional."""
        return self.conditions.get(CLASS, 0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each modality, without the batch."""
        return {m.name: (m.channels, *(self.grid if m.kind == "map" else ())) for m in self.modalities}

    def modality(self, name: str) -> Modality | None:
        """The modality of a name, if the model has it."""
        return next((modality for modality in self.modalities if modality.name == name), None)


class TokenEmbedding(nn.Module):
    """LayerNorm(Linear(noisy token)): the leading token of REG (arXiv 2507.01467)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)

    def forward(self, token: Tensor) -> Tensor:
        """(B, D) → one token (B, 1, width)."""
        return self.norm(self.linear(token)).unsqueeze(1)


class Projector(nn.Sequential):
    """Hidden tokens to the vision encoder's width; used in training only (REPA, arXiv 2410.06940, section 3)."""

    def __init__(self, width: int, hidden: int, target_width: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target_width)
        )


class Denoiser(nn.Module):
    """Predicts the velocity of every modality of a noisy state.

    Maps share the patches, as channels; each token modality is a token of its own in front. Pure: no dropout, of
    conditions or otherwise.
    """

    def __init__(self, config: DenoiserConfig, seed: int = 0) -> None:
        """Initial weights are a function of the seed, and of nothing that was drawn before."""
        super().__init__()
        self.config = config
        width = config.width
        outputs = config.patch**2 * config.channels * (2 if config.learn_sigma else 1)
        sizes = BackboneSizes(config.depth, width, config.heads, len(config.tokens), config.token_grid)
        with torch.random.fork_rng(devices=[]):  # type: ignore[reportUnknownMemberType]
            torch.manual_seed(seed)  # type: ignore[reportUnknownMemberType], for what `initialise` leaves alone
            self.patches = nn.Conv2d(config.channels, width, config.patch, config.patch)
            self.time_embedding = TimeEmbedding(width)
            self.conditions = nn.ModuleDict(
                {name: CONDITIONS[name].embedding(size, width) for name, size in config.conditions.items()}
            )
            self.tokens = nn.ModuleDict({m.name: TokenEmbedding(m.channels, width) for m in config.tokens})
            self.backbone = BACKBONES[config.backbone](sizes)
            self.velocity = nn.Linear(width, outputs)
            self.token_velocities = nn.ModuleDict({m.name: nn.Linear(width, m.channels) for m in config.tokens})
            if config.alignment_depth and config.alignment_width:
                self.projector = Projector(width, config.alignment_hidden, config.alignment_width)
        positions = position_embedding(config.token_grid, width, len(config.tokens), config.position_grid)
        self.register_buffer("positions", positions, persistent=config.learned_positions)
        self.positions: Tensor
        self.initialise(seed)

    def null(self, batch: int) -> Condition:
        """The condition that stands for none, (batch, …) each, on the model's device."""
        device = self.positions.device
        return {name: CONDITIONS[name].null(size, batch).to(device) for name, size in self.config.conditions.items()}

    def forward(self, state: State, time: Tensor, condition: Condition) -> Prediction:
        """Velocities of `state` at `time` (B,) in [0, 1], given `condition` (B, …) each."""
        config = self.config
        tokens = self.patches(torch.cat([state[m.name] for m in config.maps], dim=1)).flatten(2).transpose(1, 2)
        if config.tokens:
            tokens = torch.cat([*(self.tokens[m.name](state[m.name]) for m in config.tokens), tokens], dim=1)
        time_embedding = self.time_embedding(time)
        embeddings = [embed(condition[name]) for name, embed in self.conditions.items()]
        if not embeddings:
            embeddings = [torch.zeros_like(time_embedding)]
        conditioning = torch.stack(embeddings).sum(0) if len(embeddings) > 1 else embeddings[0]
        tokens, tap = self.backbone(tokens + self.positions, time_embedding, conditioning, config.alignment_depth)

        output: State = {m.name: self.token_velocities[m.name](tokens[:, i]) for i, m in enumerate(config.tokens)}
        image = self.unpatchify(self.velocity(tokens[:, len(config.tokens) :]))
        parts = image.tensor_split([*accumulate(m.channels for m in config.maps)], dim=1)  # The last is unused.
        output |= {m.name: part for m, part in zip(config.maps, parts, strict=False)}
        output = {name: output[name] for name in state}
        velocity = PREDICTIONS[config.prediction].to_velocity(output, state, time, PATHS[config.path])
        return Prediction(velocity, self._aligned(tap))

    def _aligned(self, tap: Tensor | None) -> Tensor | None:
        """The hidden tokens that alignment pairs with the encoder's: without tokens that it knows nothing of."""
        tokens = self.config.tokens
        if tap is None or all(m.is_class_token for m in tokens):
            return tap
        paired = [tap[:, i : i + 1] for i, m in enumerate(tokens) if m.is_class_token]
        return torch.cat([*paired, tap[:, len(tokens) :]], dim=1)

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
        small = {self.time_embedding[0], self.time_embedding[2], *self.conditions.values()}
        zero = {self.velocity, *self.token_velocities.values(), *self.backbone.zero_layers()}
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
