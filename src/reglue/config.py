"""A recipe: what is trained and how. Each published method is one value of it (`papers.py`).

A part whose weight is 0 is not there: the model has no such channels, token or projector. Sizes that belong to the data
(latent channels, grids, classes, token width) are not here; they come from the store.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.guidance import Guidance
from reglue.diffusion.modalities import StateShape
from reglue.diffusion.paths import PathName
from reglue.errors import UserError, require

SamplerName = Literal["euler", "heun", "euler-maruyama", "adams-bashforth", "dopri5"]
Precision = Literal["float32", "tf32", "bfloat16"]
StatePrecision = Literal["float32", "float64"]
Rounding = Literal["truncate", "round"]
Compile = Literal["auto", "no", "blocks", "model"]


@dataclass(frozen=True)
class ModelSize:
    """Depth, width and heads of a transformer, its patch size, and after which block it is aligned."""

    depth: int
    width: int
    heads: int
    patch: int
    alignment_depth: int


MODEL_SIZES = {
    "S/2": ModelSize(12, 384, 6, 2, 4),
    "B/2": ModelSize(12, 768, 12, 2, 4),
    "L/2": ModelSize(24, 1024, 16, 2, 8),
    "XL/2": ModelSize(28, 1152, 16, 2, 8),
}


def model_size(name: str) -> ModelSize:
    """The sizes behind `B/2` or an explicit `DEPTHxWIDTHxHEADS/PATCH`, such as `8x192x6/2`.

    An explicit size is aligned after a third of its blocks, as the published ones are (rounded up). Raises UserError
    for an unknown name.
    """
    if name in MODEL_SIZES:
        return MODEL_SIZES[name]
    if match := re.fullmatch(r"(\d+)x(\d+)x(\d+)/(\d+)", name):
        depth, width, heads, patch = map(int, match.groups())
        if min(depth, width, heads, patch) > 0:
            return ModelSize(depth, width, heads, patch, alignment_depth=-(-depth // 3))
    raise UserError(f"--model {name}: choose {', '.join(MODEL_SIZES)}, or DEPTHxWIDTHxHEADS/PATCH such as 8x192x6/2")


@dataclass(frozen=True)
class Part:
    """A term of the loss with its weight."""

    prefix: ClassVar[str] = "--"
    """What stands before its options on the command line."""
    weight: float = 0.0
    """Weight of this term in the loss; 0 leaves the part out of the model."""
    schedule: tuple[tuple[int, float], ...] = ()
    """Changes of the weight: pairs of a step and the weight from then on."""

    def __post_init__(self) -> None:
        require(self, "weight", prefix=self.prefix, at_least=0)
        for _, weight in self.schedule:
            if not 0 <= weight < math.inf:
                raise UserError(f"{self.prefix}schedule {weight}: choose weights of at least 0")
        steps = [step for step, _ in self.schedule]
        if steps != sorted(steps):
            raise UserError(f"weight schedule {self.schedule}: the steps must ascend")

    @property
    def present(self) -> bool:
        """Whether the model has this part."""
        return self.weight > 0

    def weight_at(self, step: int) -> float:
        """The weight in force at a training step."""
        return next((weight for start, weight in reversed(self.schedule) if step >= start), self.weight)


@dataclass(frozen=True)
class Latent(Part):
    """The autoencoder's latents: always there."""

    prefix = "--latent."
    weight: float = 1.0
    unit_variance: bool = False
    """Scale each channel to mean 0 and standard deviation 1 on the store's images, in place of the autoencoder's own
    shift and scale: for images unlike those that the autoencoder was made for."""
    one_scale: bool = False
    """With unit_variance: one mean and standard deviation over all channels, as ReaLS has it (arXiv 2502.00359)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_scale and not self.unit_variance:
            raise UserError(
                "--latent.one-scale is about the store's statistics: add --latent.unit-variance, or leave it out"
            )


@dataclass(frozen=True)
class LocalSemantics(Part):
    """The compressed map of the vision encoder's features, as channels beside the latents (ReDi, REGLUE)."""

    prefix = "--local."
    compressor: str = "conv-16"
    """Name of the compressor in the store: what `reglue compress` made."""
    dropout: float = 0.0
    """Share of samples that are trained without the map, for representation guidance (ReDi: 0.2)."""
    unit_variance: bool = False
    """Divide the map by its standard deviation, per channel (the published methods do not)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dropout", prefix=self.prefix, at_least=0, less_than=1)


@dataclass(frozen=True)
class ClassToken(Part):
    """The vision encoder's class token, as a token of its own in front (REG, REGLUE)."""

    prefix = "--class-token."
    compressor: str | None = None
    """Name of a compressor in the store (`reglue compress --column cls`), whose codes are learned in place of the token
    itself, as published. The alignment's target is the token itself in any case."""
    unit_variance: bool = False
    """Divide the token by its standard deviation, per channel (the published methods do not)."""


@dataclass(frozen=True)
class Alignment(Part):
    """Hidden tokens aligned with the vision encoder's, class token included where the model has one (REPA)."""

    prefix = "--alignment."
    after_block: int | None = None
    """After which block, counted from 1; the published depth for the model's size if not given."""
    hidden: int = 2048
    """Hidden width of the projector."""
    targets: Literal["cached", "decoded", "online"] = "cached"
    """cached: features from the store (--features). decoded: what the compressor's decoder makes of the codes in the
    store, without features. online: computed from the images in every step."""
    compressor: str | None = None
    """With targets decoded: name of the compressor in the store. Default: that of --local.compressor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "after_block", "hidden", prefix=self.prefix, at_least=1)
        if self.compressor is not None and self.targets != "decoded":
            raise UserError(f"--alignment.compressor {self.compressor} is for --alignment.targets decoded alone")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and what surrounds it, for any network."""

    steps: int = 400_000
    batch_size: int = 256
    """Images per step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Parts that a process cuts its share of the batch into, to save memory."""
    learning_rate: float = 1e-4
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; cosine falls to 0 at the last step."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = 0.9999
    """Decay of the moving average of the weights, per step."""
    ema_warmup: bool = False
    """Begin with a shorter average, min(decay, (1 + step) / (10 + step)), for short runs."""
    precision: Precision = "float32"
    """Precision of the matrix products. tf32: float32 whose products a GPU rounds to TF32, and float32 elsewhere."""
    compile: Compile = "no"
    """Compile with torch.compile, slower to start and faster after. blocks: one block of the transformer, which serves
    for all of them. model: the whole network and its losses at once, which takes longest to start. auto: blocks on a
    GPU, no on a CPU."""

    def __post_init__(self) -> None:
        prefix = "--optimisation."
        require(self, "steps", "batch_size", "accumulate", prefix=prefix, at_least=1)
        require(self, "learning_rate", prefix=prefix, more_than=0)
        require(self, "warmup", "weight_decay", "epsilon", "clip", prefix=prefix, at_least=0)
        require(self, "betas", "ema", prefix=prefix, at_least=0, less_than=1)


@dataclass(frozen=True)
class Optimisation(OptimiserConfig):
    """How a denoiser is trained."""

    time_shift: float = 1.0
    """Training times are t = s·u / (1 + (s − 1)·u) for uniform u: 1 is uniform, more is noisier (SD3, eq. 23)."""
    label_dropout: float = 0.1
    """Share of samples that are trained with the null label, for classifier-free guidance."""
    checkpoint_blocks: float = 0.0
    """Share of the blocks, from the first on, whose activations are computed again in the backward pass in place of
    being kept: less memory for up to a third more time, and the same gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        prefix = "--optimisation."
        require(self, "time_shift", prefix=prefix, more_than=0)
        require(self, "checkpoint_blocks", prefix=prefix, at_least=0, at_most=1)
        require(self, "label_dropout", prefix=prefix, at_least=0, less_than=1)


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a trained model."""

    sampler: SamplerName = "euler-maruyama"
    steps: int = 250
    """Intervals of the time grid; dopri5 chooses its own."""
    guidance: Guidance = field(default_factory=Guidance)
    rounding: Rounding = "truncate"
    """Pixels to 8 bits: truncate 255·(x+1)/2, as REPA, REG and REGLUE do, or round 127.5·x+128, as SiT and ReDi do."""
    time_shift: float = 1.0
    """Times of the grid are t = s·u / (1 + (s − 1)·u) for equally spaced u: more than 1 puts them nearer to noise, 1 is
    published. dopri5 has no grid."""
    state_precision: StatePrecision | None = None
    """Precision in which steps add up. If not given: float64 for euler, heun and euler-maruyama, as published, and
    float32 for the others."""
    precision: Precision | None = None
    """Precision of the network's matrix products; that of training if not given."""
    relative_tolerance: float = 1e-3
    """Error that dopri5 allows per step, as a share of the values."""
    absolute_tolerance: float = 1e-6
    """Error that dopri5 allows per step in any case."""

    def __post_init__(self) -> None:
        # Named as for `sample` and in Python; for `train` there is more in front.
        require(self, "steps", prefix="", at_least=1)
        require(self, "time_shift", "relative_tolerance", "absolute_tolerance", prefix="", more_than=0)

    @property
    def published_sampler(self) -> bool:
        """Whether published figures were made with this sampler."""
        return self.sampler in ("euler", "heun", "euler-maruyama")


@dataclass(frozen=True)
class Recipe:
    """One way to train a denoiser."""

    name: str
    model: str = "B/2"
    """S/2, B/2, L/2, XL/2 or DEPTHxWIDTHxHEADS/PATCH."""
    path: PathName = "linear"
    """Interpolant between data and noise."""
    learn_sigma: bool = False
    """Twice the output channels, half of them unused, as in SiT's published checkpoints."""
    position_grid: tuple[int, int] | None = None
    """Rows and columns of tokens in which positions are counted: a finer grid has its tokens in between. Default: the
    model's own grid, as published; with --from, that of the run it starts from, so that no position is new to it."""
    latent: Latent = field(default_factory=Latent)
    local: LocalSemantics = field(default_factory=LocalSemantics)
    class_token: ClassToken = field(default_factory=ClassToken)
    alignment: Alignment = field(default_factory=Alignment)
    optimisation: Optimisation = field(default_factory=Optimisation)
    sampling: Sampling = field(default_factory=Sampling)
    """What `reglue sample` does unless told otherwise; also used for previews."""

    def __post_init__(self) -> None:
        model_size(self.model)
        if not self.latent.present:
            raise UserError("--latent.weight must be positive: a latent diffusion model learns its latents")

    def loss_weights(self, step: int) -> dict[str, float]:
        """The weight of each term of the loss at a step, under the names of the terms."""
        parts = {"latent": self.latent, "local": self.local, "cls": self.class_token, "alignment": self.alignment}
        return {name: part.weight_at(step) for name, part in parts.items() if part.present}

    def denoiser_config(
        self,
        *,
        latent_channels: int,
        grid: tuple[int, int],
        classes: int,
        local_channels: int = 0,
        token_width: int = 0,
        class_token_width: int | None = None,
    ) -> DenoiserConfig:
        """Every size of this recipe's denoiser on given data; absent parts take no room.

        `grid` is that of the latents, `token_width` the width of the vision encoder; `class_token_width` is that of the
        learned class token, the encoder's if not given. Raises UserError where they do not fit together.
        """
        size = model_size(self.model)
        aligned, after_block = self.alignment.present, self.alignment.after_block
        learned_width = token_width if class_token_width is None else class_token_width
        try:
            return DenoiserConfig(
                shape=StateShape(
                    latent_channels=latent_channels,
                    grid=grid,
                    local_channels=local_channels if self.local.present else 0,
                    class_token_width=learned_width if self.class_token.present else 0,
                ),
                classes=classes,
                depth=size.depth,
                width=size.width,
                heads=size.heads,
                patch=size.patch,
                learn_sigma=self.learn_sigma,
                alignment_depth=(size.alignment_depth if after_block is None else after_block) if aligned else 0,
                alignment_width=token_width if aligned else 0,
                alignment_hidden=self.alignment.hidden,
                position_grid=self.position_grid,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
