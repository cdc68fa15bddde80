"""A recipe: what is trained, how, and how it is sampled. Each published method is one value of it (`papers.py`).

A part whose weight is 0 is not there: the model has no such channels, token or projector. Sizes that belong to the data
(latent channels, grids, classes, token width) are not here; they come from the store.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from reglue.diffusion.schedules import Schedule, schedule_of
from reglue.diffusion.specs import (
    CLASS,
    LATENT,
    Blocks,
    DenoiserConfig,
    Modality,
    Normalisation,
    PathName,
    ProjectorKind,
    registered,
)
from reglue.errors import UserError, option, require
from reglue.sampling import AutoPrecision, Precision, Sampling, refuse_unknown

Compile = Literal["auto", "no", "blocks", "model"]
EmaWarmup = Literal["auto", "yes", "no"]
TimeDistribution = Literal["uniform", "logit-normal"]

FORGOTTEN, YOUNG = 0.01, 0.03
"""Shares of a moving average that the weights it began with hold: so little is nothing, and so much shows in images."""


@dataclass(frozen=True)
class ModelSize:
    """Depth, width and heads of a transformer, its patch size, and after which block it is aligned."""

    depth: int
    width: int
    heads: int
    patch: int
    alignment_depth: int


MODEL_SIZES = {
    "tiny": ModelSize(6, 128, 2, 2, 2),
    "small": ModelSize(8, 192, 3, 2, 3),
    "evening": ModelSize(10, 256, 4, 2, 4),
    "S/2": ModelSize(12, 384, 6, 2, 4),
    "B/2": ModelSize(12, 768, 12, 2, 4),
    "L/2": ModelSize(24, 1024, 16, 2, 8),
    "XL/2": ModelSize(28, 1152, 16, 2, 8),
}
PATCHES = ("1", "4", "8")
"""Sides of patches that the sizes of a letter were published with, besides 2."""


def model_size(name: str) -> ModelSize:
    """The sizes behind `B/2`, `evening` or an explicit `DEPTHxWIDTHxHEADS/PATCH`, such as `8x192x6/2`.

    Those of a letter have patches of 1, 4 and 8 too. An explicit size is aligned after a third of its blocks, as the
    published ones are (rounded up). Raises UserError for an unknown name.
    """
    if name in MODEL_SIZES:
        return MODEL_SIZES[name]
    letter, _, patch = name.partition("/")
    if f"{letter}/2" in MODEL_SIZES and patch in PATCHES:
        return replace(MODEL_SIZES[f"{letter}/2"], patch=int(patch))
    if match := re.fullmatch(r"(\d+)x(\d+)x(\d+)/(\d+)", name):
        depth, width, heads, patch = map(int, match.groups())
        if min(depth, width, heads, patch) > 0:
            return ModelSize(depth, width, heads, patch, alignment_depth=-(-depth // 3))
    raise UserError(
        f"{option('model')} {name}: choose {', '.join(MODEL_SIZES)}, or DEPTHxWIDTHxHEADS/PATCH such as 8x192x6/2"
    )


@dataclass(frozen=True)
class Part:
    """A term of the loss with its weight."""

    prefix: ClassVar[str] = ""
    """What stands before the names of its options."""
    weight: float = 0.0
    """Weight of this term in the loss; 0, without a schedule that raises it, leaves the part out of the model."""
    schedule: tuple[tuple[int, float], ...] = ()
    """Changes of the weight during training: pairs of a step and the weight from then on."""

    def __post_init__(self) -> None:
        require(self, "weight", prefix=self.prefix, at_least=0)
        schedule = option(self.prefix + "schedule")
        for step, weight in self.schedule:
            if not 0 <= weight < math.inf:
                raise UserError(f"{schedule} {weight}: choose weights of at least 0")
            if step < 0:
                raise UserError(f"{schedule} {step}: choose steps of at least 0")
        steps = [step for step, _ in self.schedule]
        if steps != sorted({*steps}):
            given = " ".join(f"{step} {weight}" for step, weight in self.schedule)
            raise UserError(f"{schedule} {given}: give the steps in ascending order, each once")

    @property
    def present(self) -> bool:
        """Whether the model has this part: whether it has a weight at any step."""
        return any(self.weight_at(step) > 0 for step in (0, *(start for start, _ in self.schedule)))

    def weight_at(self, step: int) -> float:
        """The weight in force at a training step."""
        return next((weight for start, weight in reversed(self.schedule) if step >= start), self.weight)


@dataclass(frozen=True)
class LearnedPart(Part):
    """A modality that the model learns, with its own term of the loss."""

    modality: ClassVar[str]
    """The name of the modality."""
    kind: ClassVar[Literal["map", "token"]]
    # Without annotations: some kinds of part have these as options, in an order of their own.
    is_class_token = False
    dropout = 0.0
    unit_variance = False
    one_scale = False

    @property
    def column(self) -> str:
        """The column of the store that training reads."""
        return self.modality

    def as_modality(self, channels: int, normalisation: Normalisation | None = None) -> Modality:
        """What the model learns, at so many channels."""
        return Modality(
            self.modality, self.kind, channels, self.column, normalisation, self.dropout, self.is_class_token
        )


@dataclass(frozen=True)
class Latent(LearnedPart):
    """The autoencoder's latents: always there."""

    prefix = "latent."
    modality, kind = LATENT, "map"
    weight: float = 1.0
    unit_variance: bool = False
    """Scale each channel to mean 0 and standard deviation 1 on the store's images, in place of the autoencoder's own
    shift and scale: for images unlike those that the autoencoder was trained on."""
    one_scale: bool = False
    """With unit_variance: one mean and standard deviation for all channels, as in ReaLS (arXiv 2502.00359)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_scale and not self.unit_variance:
            raise UserError(
                f"{option('latent.one_scale')} applies to the store's statistics alone: "
                f"add {option('latent.unit_variance')}, or leave it out"
            )


@dataclass(frozen=True)
class LocalSemantics(LearnedPart):
    """The compressed map of the vision encoder's features, as channels beside the latents (ReDi, REGLUE)."""

    prefix = "local."
    modality, kind = "local", "map"
    compressor: str = "conv-16"
    """Name of the compressor in the store, made by `reglue compress`."""
    dropout: float = 0.0
    """Share of samples trained without the map, for representation guidance (ReDi: 0.2, in models made for it)."""
    unit_variance: bool = False
    """Divide the map by its standard deviation, per channel (the published methods do not)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dropout", prefix=self.prefix, at_least=0, less_than=1)

    @property
    def column(self) -> str:
        """The compressor's codes."""
        return f"local.{self.compressor}"


@dataclass(frozen=True)
class ClassToken(LearnedPart):
    """The vision encoder's class token, as a token of its own in front (REG, REGLUE)."""

    prefix = "class_token."
    modality, kind, is_class_token = "cls", "token", True
    compressor: str | None = None
    """Name of a compressor in the store (`reglue compress --column cls`), whose codes are learned in place of the
    published token itself. The alignment's target is always the token."""
    unit_variance: bool = False
    """Divide the token by its standard deviation, per channel (the published methods do not)."""

    @property
    def column(self) -> str:
        """The tokens, or their codes."""
        return "cls" if self.compressor is None else f"cls.{self.compressor}"


RESERVED = frozenset({"alignment", "cosine", "gradient_norm", "images_per_second", "learning_rate", "loss"})
RESERVED |= {"posterior", "step", "time", "type", "variance"}
"""Names that logs, batches and modules use for other things."""


@dataclass(frozen=True)
class OtherModality(LearnedPart):
    """A modality of your own: a column of the store, learned beside the others."""

    prefix = "others."
    modality: str = ""
    """Its name, which states, losses and guidance scales know it by."""
    kind: Literal["map", "token"] = "map"
    """map: channels beside the latents, resized to their grid. token: a token of its own in front."""
    source: str = ""
    """The column of the store: (B, C, h, w) for a map, (B, C) for a token."""
    dropout: float = 0.0
    """Share of samples that are trained without it, for representation guidance."""
    unit_variance: bool = False
    """Scale it to mean 0 and standard deviation 1, per channel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dropout", prefix=self.prefix, at_least=0, less_than=1)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.modality) or self.modality in RESERVED:
            raise UserError(
                f"modality {self.modality!r}: choose a name of small letters, digits and _, and none of "
                f"{', '.join(sorted(RESERVED))}"
            )
        if not self.source:
            raise UserError(f"modality {self.modality} needs a column of the store (source)")

    @property
    def column(self) -> str:
        """What was given as `source`."""
        return self.source


@dataclass(frozen=True)
class Alignment(Part):
    """Hidden tokens aligned with the vision encoder's, class token included where the model has one (REPA)."""

    prefix = "alignment."
    after_block: int | None = None
    """Block after which hidden tokens are aligned, counted from 1. Default: the published one for the model's size."""
    hidden: int = 2048
    """Hidden width of the projector."""
    projector: ProjectorKind = "mlp"
    """From hidden tokens to the encoder's: mlp, three layers for every token by itself; convolution, one of 3×3 over
    the patches (iREPA, arXiv 2512.10794)."""
    spatial_norm: float | None = None
    """Subtract so much of their mean over an image's patches from the targets, and divide by their standard deviation
    over the patches: iREPA's is 0.6. Default: the encoder's tokens as they are."""
    targets: Literal["cached", "decoded", "online"] = "cached"
    """cached: features from the store (--features). decoded: features decoded from the compressor's codes in the store.
    online: computed from the images in every step."""
    compressor: str | None = None
    """With targets decoded: name of the compressor in the store. Default: that of --local.compressor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "after_block", "hidden", prefix=self.prefix, at_least=1)
        require(self, "spatial_norm", prefix=self.prefix, at_least=0, at_most=1)
        if self.compressor is not None and self.targets != "decoded":
            raise UserError(
                f"{option('alignment.compressor')} {self.compressor} is for {option('alignment.targets')} decoded "
                "alone; leave it out"
            )


@dataclass(frozen=True)
class LearnedVariance(Part):
    """The variance of a step, learned beside the noise (DiT, after IDDPM), by the variational bound."""

    prefix = "variance."
    weight: float = 1.0
    """Weight of the bound, in bits for each number, where there is a variance: with learn_sigma and predicted noise. It
    trains nothing else."""


@dataclass(frozen=True)
class Cosine(Part):
    """1 − cos of the predicted and the true velocity of all maps, at each position, beside their squared errors
    (LightningDiT, arXiv 2501.01423)."""

    prefix = "cosine."


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and what surrounds it, for any network."""

    steps: int = 400_000
    """Training steps, counted from the start of the run."""
    batch_size: int = 256
    """Images per step, over all processes and accumulated parts."""
    accumulate: int = 1
    """Micro-batches per step in each process, to save memory (gradient accumulation)."""
    learning_rate: float = 1e-4
    """Of AdamW, after the warm-up."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """Schedule of the learning rate after the warm-up; cosine ends at 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    weight_decay: float = 0.0
    """Of AdamW, decoupled from the gradient."""
    epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    clip: float = 0.0
    """Clip the norm of the gradient to this; 0 does not clip."""
    ema: float = 0.9999
    """Decay of the moving average of the weights, per step."""
    ema_warmup: EmaWarmup = "auto"
    """Begin with a shorter average: over the last tenth of the steps so far, until that is longer than the average of
    ema. auto: in runs so short that ema would leave 1 % of the initial weights in it, which no published one is."""
    precision: AutoPrecision = "auto"
    """Precision of matrix products. tf32: float32, whose products a GPU rounds to TF32. auto: bfloat16 where the
    processor or GPU multiplies it faster, float32 elsewhere; a run keeps what it began with."""
    compile: Compile = "no"
    """torch.compile: slower to start, faster after. blocks: one block of the transformer, used for all of them. model:
    the whole network with its losses, slowest to start. auto: blocks on a GPU, and on a CPU for 1000 steps or more, if
    there is a compiler; no otherwise."""

    def __post_init__(self) -> None:
        prefix = "optimisation."
        require(self, "steps", "batch_size", "accumulate", prefix=prefix, at_least=1)
        require(self, "learning_rate", prefix=prefix, more_than=0)
        require(self, "warmup", "weight_decay", "clip", prefix=prefix, at_least=0)
        require(self, "epsilon", prefix=prefix, more_than=0)
        require(self, "betas", "ema", prefix=prefix, at_least=0, less_than=1)

    def settled(self, before: Self | None = None, precision: Precision | None = None) -> Self:
        """The same with what is left open decided: as it was `before`, if a run is continued.

        Else by the steps, and by the `precision` that suits the device.
        """
        result = self
        if self.ema_warmup == "auto":
            needed = self.ema**self.steps > FORGOTTEN
            result = replace(result, ema_warmup=before.ema_warmup if before else "yes" if needed else "no")
        if self.precision == "auto":
            result = replace(result, precision=before.precision if before else precision or "auto")
        return result

    def ema_at(self, step: int) -> float:
        """Decay of the moving average at an update, counted from 0, once it is `settled`.

        Warming up, the average after t updates weighs what the i-th left by i⁸, nearly: a power-function average over
        the last tenth of them (EDM2, arXiv 2312.02696, section 3.1).
        """
        return min(self.ema, (1 + step) / (10 + step)) if self.ema_warmup == "yes" else self.ema

    def initial_share(self, steps: int) -> float:
        """How much of the average after so many updates is the weights that it began with: the product of the decays.

        From 0 to 1; 0 for less than a millionth.
        """
        share = 1.0
        for step in range(steps):
            share *= self.ema_at(step)
            if share < 1e-6:
                return 0.0
        return share


@dataclass(frozen=True)
class Optimisation(OptimiserConfig):
    """How a denoiser is trained."""

    time_shift: float = 1.0
    """Training times are t = s·u / (1 + (s − 1)·u) for u in [0, 1]; above 1 is noisier (SD3, eq. 23)."""
    time_distribution: TimeDistribution = "uniform"
    """Of u: uniform, or logit-normal, 1 / (1 + exp(−n)) for standard normal n, which has most of its times in the
    middle (SD3, LightningDiT)."""
    clean_loss: bool = False
    """Where modalities have times of their own: keep the loss of one that is without noise already, as SFD does."""
    label_dropout: float = 0.1
    """Share of samples trained without their class, for classifier-free guidance."""
    checkpoint_blocks: float = 0.0
    """Share of the blocks whose activations are recomputed in the backward pass (activation checkpointing): less memory
    for up to a third more time, with the same gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        prefix = "optimisation."
        require(self, "time_shift", prefix=prefix, more_than=0)
        require(self, "checkpoint_blocks", prefix=prefix, at_least=0, at_most=1)
        require(self, "label_dropout", prefix=prefix, at_least=0, less_than=1)


@dataclass(frozen=True)
class Recipe:
    """One way to train a denoiser."""

    name: str
    """Recorded in the run."""
    model: str = "B/2"
    """S/2, B/2, L/2, XL/2, as published, also with patches of 1, 4 or 8; tiny, small or evening, named by what a laptop
    needs; or DEPTHxWIDTHxHEADS/PATCH."""
    backbone: str = "sit"
    """The transformer: sit; lightning, which is sit with RMSNorm, rotary positions and SwiGLU; uvit; or a registered
    one of your own."""
    blocks: Blocks = field(default_factory=Blocks)
    path: PathName = "linear"
    """Interpolant between data and noise."""
    prediction: str = "velocity"
    """What the network predicts: velocity, data, or noise, on the chain of DDPM (noise, as DiT) or of Stable Diffusion
    (noise-sd, as U-ViT)."""
    times: str = "shared"
    """Schedule of the modalities' times: shared, one for all; lead, all else is ahead of the latents by delta (0.3), as
    in SFD; cascade, all else is drawn first, and learned by a share (0.4) of the samples, while the others see it with
    a noise of 0.25 at most, as in Latent Forcing; independent, each has its own."""
    times_options: Mapping[str, float] = field(default_factory=dict[str, float])
    """Options of that schedule, by name: `delta 0.15` for lead, `share 0.5 noise 0.1` for cascade."""
    one_mean: bool = False
    """Take one mean over the elements of all modalities, in which each has its weight, as SFD does; otherwise every
    modality has a mean of its own, whatever its size."""
    learn_sigma: bool = False
    """Twice the output channels. The second half is a variance where noise is predicted, as in DiT, and is unused
    elsewhere, as in SiT's published checkpoints."""
    position_grid: tuple[int, int] | None = None
    """Grid of tokens in which positions are counted; the tokens of a finer grid lie between. Default: the model's own,
    as published; with --from, that of the other run, so that no position is new."""
    latent: Latent = field(default_factory=Latent)
    local: LocalSemantics = field(default_factory=LocalSemantics)
    class_token: ClassToken = field(default_factory=ClassToken)
    others: tuple[OtherModality, ...] = ()
    """Modalities of your own."""
    conditions: Mapping[str, float] = field(default_factory=dict[str, float])
    """Registered conditions besides the class, by name, and the share of samples trained without each. Samples trained
    without their class are trained without the others too, for the unconditional branch of guidance."""
    alignment: Alignment = field(default_factory=Alignment)
    variance: LearnedVariance = field(default_factory=LearnedVariance)
    cosine: Cosine = field(default_factory=Cosine)
    optimisation: Optimisation = field(default_factory=Optimisation)
    sampling: Sampling = field(default_factory=Sampling)
    """The defaults of `reglue sample`, also used for previews."""

    def __post_init__(self) -> None:
        model_size(self.model)
        require(self, "position_grid", at_least=1)
        refuse_unknown(option("backbone"), self.backbone, registered("backbones.BACKBONES"))
        refuse_unknown(option("prediction"), self.prediction, registered("predictions.PREDICTIONS"))
        refuse_unknown(option("times"), self.times, registered("schedules.SCHEDULES"))
        try:
            schedule_of(self.times, self.times_options)
        except ValueError as error:
            raise UserError(f"{option('times_options')} {error}") from None
        for name, share in self.conditions.items():
            refuse_unknown("condition", name, registered("conditions.CONDITIONS"))
            if name == CLASS or not 0 <= share < 1:
                remedy = (
                    f"use {option('optimisation.label_dropout')}" if name == CLASS else "choose at least 0, below 1"
                )
                raise UserError(f"{option('conditions')} {name} {share}: {remedy}")
        if not self.latent.present:
            raise UserError(
                f"{option('latent.weight')} 0: choose more than 0, since every model here learns the latents"
            )
        if len(names := [part.modality for part in self.learned_parts]) > len({*names}):
            raise UserError(f"modalities {', '.join(names)}: all need different names")
        for scales in ("other_scales", "auto_scales"):
            for name in getattr(self.sampling, scales):
                if name not in names:
                    raise UserError(f"{option(f'sampling.{scales}')} {name}: this recipe learns {', '.join(names)}")

    @property
    def schedule(self) -> Schedule:
        """That of the modalities' times."""
        return schedule_of(self.times, self.times_options)

    @property
    def learned_parts(self) -> tuple[LearnedPart, ...]:
        """The parts that are modalities of the model, the latents first."""
        return tuple(part for part in (self.latent, self.local, self.class_token, *self.others) if part.present)

    @property
    def condition_dropout(self) -> dict[str, float]:
        """All conditions by name, and the share of samples that are trained without each."""
        return {CLASS: self.optimisation.label_dropout, **self.conditions}

    def loss_weights(self, step: int, shapes: Mapping[str, Sequence[int]] = {}) -> dict[str, float]:
        """The weight of each term of the loss at a step, under the names of the terms.

        `shapes` are those of the modalities, for `one_mean`: there they share the mean by their sizes.
        """
        parts: dict[str, Part] = {part.modality: part for part in self.learned_parts}
        if self.alignment.present:
            parts["alignment"] = self.alignment
        if self.learn_sigma and self.prediction not in ("velocity", "data"):
            parts["variance"] = self.variance
        if self.cosine.present:
            parts["cosine"] = self.cosine
        sizes = {name: math.prod(shape) for name, shape in shapes.items()} if self.one_mean else {}
        shares = {name: size / sum(sizes.values()) for name, size in sizes.items()}
        return {name: part.weight_at(step) * shares.get(name, 1) for name, part in parts.items()}

    def denoiser_config(
        self,
        modalities: tuple[Modality, ...],
        grid: tuple[int, int],
        conditions: Mapping[str, int],
        token_width: int = 0,
    ) -> DenoiserConfig:
        """Every size of this recipe's denoiser on given data.

        `grid` is that of the latents, `token_width` the width of the vision encoder. Raises UserError where they do not
        fit together.
        """
        size = model_size(self.model)
        aligned, after_block = self.alignment.present, self.alignment.after_block
        try:
            return DenoiserConfig(
                modalities=modalities,
                grid=grid,
                conditions=conditions,
                depth=size.depth,
                width=size.width,
                heads=size.heads,
                patch=size.patch,
                backbone=self.backbone,
                blocks=self.blocks,
                prediction=self.prediction,
                path=self.path,
                times=self.times,
                learn_sigma=self.learn_sigma,
                alignment_depth=(size.alignment_depth if after_block is None else after_block) if aligned else 0,
                alignment_width=token_width if aligned else 0,
                alignment_hidden=self.alignment.hidden,
                alignment_projector=self.alignment.projector,
                position_grid=self.position_grid,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
