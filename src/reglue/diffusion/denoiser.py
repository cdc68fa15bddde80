"""The joint denoiser: one transformer over maps and tokens of several modalities (REGLUE, arXiv 2512.16636)."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.diffusion.backbones import BACKBONES
from reglue.diffusion.backbones.backbone import NORM_EPSILON
from reglue.diffusion.conditions import CONDITIONS, Condition
from reglue.diffusion.embeddings import TimeOffsets, position_embedding
from reglue.diffusion.modalities import LATENT, State, TensorTimes, times_of_each
from reglue.diffusion.paths import PATHS
from reglue.diffusion.predictions import PREDICTIONS
from reglue.diffusion.specs import DenoiserConfig as DenoiserConfig
from reglue.seeds import torch_generator


class Prediction(NamedTuple):
    """What a denoiser predicts of a noisy state."""

    velocity: State
    """dx/dt per modality, in the shapes of the state."""
    tap: Tensor | None
    """Hidden tokens after the alignment block, (B, N, width): that of the class token first, where the model has one,
    then the patches. None if the model has no alignment."""
    variance: State | None = None
    """Of maps, where it is learned, in their shapes: w of log σ² = (w + 1)/2·log β + (1 − w)/2·log β̃ (IDDPM, arXiv
    2102.09672, eq. 15)."""


class DenoiserFunction(Protocol):
    """Anything that predicts velocities: what guidance asks of a denoiser."""

    def null(self, batch: int) -> Condition:
        """The condition that stands for none, (batch, …) each."""
        ...

    def __call__(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        """`state` at `time` (B,) in [0, 1], one or that of each modality, given `condition` (B, …) each."""
        ...


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


class ConvolutionalProjector(nn.Conv2d):
    """The same by one 3×3 convolution over the patches, and its middle for tokens in front (iREPA, 2512.10794)."""

    def __init__(self, width: int, target_width: int, grid: tuple[int, int]) -> None:
        super().__init__(width, target_width, 3, padding=1)  # type: ignore[reportUnknownMemberType]
        self.grid = grid

    def forward(self, input: Tensor) -> Tensor:
        """(B, N, width) → (B, N, target_width)."""
        patches = self.grid[0] * self.grid[1]
        leading, image = input.tensor_split([input.shape[1] - patches], dim=1)
        image = super().forward(image.transpose(1, 2).reshape(len(input), -1, *self.grid))
        alone = F.linear(leading, self.weight[:, :, 1, 1], self.bias)
        return torch.cat([alone, image.flatten(2).transpose(1, 2)], dim=1)


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
        with torch.random.fork_rng(devices=[]):  # type: ignore[reportUnknownMemberType]
            torch.manual_seed(seed)  # type: ignore[reportUnknownMemberType], for what `initialise` leaves alone
            backbone = BACKBONES[config.backbone](config)
            self.patches = nn.Conv2d(config.channels, width, config.patch, config.patch)
            self.time_embedding = backbone.time_embedding(width)
            apart = [m.name for m in config.modalities[1:]] if config.times != "shared" else []
            self.time_offsets = TimeOffsets(width, apart, config.span)
            self.conditions = nn.ModuleDict(
                {name: CONDITIONS[name].embedding(size, width) for name, size in config.conditions.items()}
            )
            self.tokens = nn.ModuleDict({m.name: TokenEmbedding(m.channels, width) for m in config.tokens})
            self.backbone = backbone
            self.velocity = nn.Linear(width, outputs)
            if config.parts.convolution:
                channels = outputs // config.patch**2
                self.convolution = nn.Conv2d(channels, channels, 3, padding=1)
            self.token_velocities = nn.ModuleDict({m.name: nn.Linear(width, m.channels) for m in config.tokens})
            if config.alignment_depth and config.alignment_width:
                if config.alignment_projector == "mlp":
                    self.projector = Projector(width, config.alignment_hidden, config.alignment_width)
                else:
                    self.projector = ConvolutionalProjector(width, config.alignment_width, config.token_grid)
        positions = position_embedding(config.token_grid, width, len(config.tokens), config.position_grid)
        self.register_buffer("positions", positions, persistent=config.learned_positions)
        self.positions: Tensor
        self.initialise(seed)

    def null(self, batch: int) -> Condition:
        """The condition that stands for none, (batch, …) each, on the model's device."""
        device = self.positions.device
        return {name: CONDITIONS[name].null(size, batch).to(device) for name, size in self.config.conditions.items()}

    def forward(self, state: State, time: Tensor | TensorTimes, condition: Condition) -> Prediction:
        """Velocities of `state` at `time` (B,) in [0, 1], given `condition` (B, …) each.

        `time` is one for all modalities, or has that of each by name, and what is left to the end of a step as `SPAN`.
        """
        config, prediction, path = self.config, PREDICTIONS[self.config.prediction], PATHS[self.config.path]
        times = times_of_each(time, state)
        seen, known = prediction.network_input(state, times, path)
        tokens = self.patches(torch.cat([seen[m.name] for m in config.maps], dim=1)).flatten(2).transpose(1, 2)
        if config.tokens:
            tokens = torch.cat([*(self.tokens[m.name](seen[m.name]) for m in config.tokens), tokens], dim=1)
        time_embedding = self.time_embedding(known[LATENT])
        time_embedding = self.time_offsets(time_embedding, known, self.time_embedding)
        embeddings = [embed(condition[name]) for name, embed in self.conditions.items()]
        if not embeddings:
            embeddings = [torch.zeros_like(time_embedding)]
        conditioning = torch.stack(embeddings).sum(0) if len(embeddings) > 1 else embeddings[0]
        if self.backbone.fixed_positions:
            tokens = tokens + self.positions
        tokens, tap = self.backbone(tokens, time_embedding, conditioning, config.alignment_depth)

        output: State = {m.name: self.token_velocities[m.name](tokens[:, i]) for i, m in enumerate(config.tokens)}
        image, variance = self.unpatchify(self.velocity(tokens[:, len(config.tokens) :])), None
        if config.parts.convolution:
            image = self.convolution(image)
        if config.learn_sigma:
            image, second = image.chunk(2, dim=1)
            variance = self._by_map(second) if prediction.learns_variance else None
        output |= self._by_map(image)
        velocity = prediction.to_velocity({name: output[name] for name in state}, state, times, path)
        return Prediction(velocity, self._aligned(tap), variance)

    def _by_map(self, image: Tensor) -> State:
        """The channels (B, C, H, W) of all maps, map by map."""
        parts = image.tensor_split([*accumulate(m.channels for m in self.config.maps[:-1])], dim=1)
        return {m.name: part for m, part in zip(self.config.maps, parts, strict=True)}

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
        small = {*self.time_embedding, *self.conditions.values(), *self.backbone.small_layers()}
        zero = {self.velocity, *self.token_velocities.values(), *self.backbone.zero_layers()}
        zero |= {*self.time_offsets.zero_layers()}
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
