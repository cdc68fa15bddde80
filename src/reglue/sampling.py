"""How images are drawn from a trained model: every option of it is declared here, and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from tyro.conf import Positional

from reglue.diffusion.specs import OWN_PARTS, Diffusion, Guidance, StatePrecision, Unconditional, registered
from reglue.errors import UnknownPart, UserError, option, require
from reglue.files import TakesPaths
from reglue.names import Weights
from reglue.overrides import overrides_of

Precision = Literal["float32", "tf32", "bfloat16"]
AutoPrecision = Literal["auto", Precision]
"""auto becomes one of the others where it is known what computes: `training.precision`."""
Rounding = Literal["truncate", "round"]
GUIDERS = "guidance.GUIDERS"
MODALITY_SCALES = {"local_scale": "local map", "cls_scale": "class token"}
"""The options of `Sampling` that are about one modality, NAME_scale, and what it is called in messages."""


@dataclass(frozen=True)
class Sampling:
    """How images are drawn from a trained model: the one declaration of these options, for recipes and all commands."""

    sampler: str = "euler-maruyama"
    """euler, heun, euler-maruyama, adams-bashforth, dpm-solver (as U-ViT's, for models of noise) or dopri5; ddpm or
    ddim, along the steps of the chain that the model was trained on, if it was; mean-velocity, for students alone."""
    steps: int = 250
    """Intervals of the time grid: as many evaluations, except that Heun takes two in each. dopri5 chooses its
    own."""
    time_shift: float = 1.0
    """Times of the grid are t = s·u / (1 + (s − 1)·u) for equally spaced u: above 1, more of them are near noise, below
    1, near data; 1 is published. dopri5 has no grid."""
    diffusion: Diffusion = "time"
    """How much noise euler-maruyama adds, w_t: 2t for time, as REPA, REG and REGLUE do; 2σ_t for sigma, as SiT and ReDi
    do. On the linear path both are the same."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts; 0 is data, 1 is noise."""
    local_scale: float | None = None
    """Guidance scale of the local map; 1 leaves it conditional. Default: the guidance scale."""
    cls_scale: float | None = None
    """Guidance scale of the class token; 1 leaves it conditional. Default: the guidance scale."""
    other_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """Guidance scales of other modalities, by name."""
    representation_scale: float = 1.0
    """Scale of representation guidance, for models trained with dropped local maps; 1 is none."""
    auto_scale: float = 1.0
    """Scale of autoguidance by a weaker model; 1 is none."""
    auto_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """Autoguidance scales of single modalities, by name: `latent 1.8 local 1.2`."""
    unconditional: Unconditional = "class"
    """What classifier-free guidance leads away from: the model without its class, or without everything: semantics are
    noise for it too, at t = 1 (for models of independent times)."""
    guided_channels: int | Literal["all"] = "all"
    """Guide this many latent channels, the first ones, or all. SiT's recipe guides 3, as published for an autoencoder
    of four; with more channels, all is the better choice."""
    guiders: Mapping[str, float] = field(default_factory=dict[str, float])
    """Scales of registered guiders of your own, by name."""
    rounding: Rounding = "truncate"
    """Rounding of pixels to 8 bits: truncate 255·(x+1)/2, as REPA, REG and REGLUE do, or round 127.5·x+128, as SiT and
    ReDi do."""
    tile: int = 512
    """Side in pixels of the overlapping tiles in which larger images are decoded, so that memory does not grow with
    them; their seams are blended. Images up to this size are decoded whole; 0 decodes all of them so."""
    state_precision: StatePrecision | None = None
    """Precision in which steps are summed. Default: float64 for euler, heun and euler-maruyama, as published, float32
    for the others."""
    precision: AutoPrecision = "auto"
    """Precision of the network's matrix products. auto: bfloat16 where the processor or GPU multiplies it faster,
    float32 elsewhere."""
    relative_tolerance: float = 1e-3
    """Error that dopri5 allows per step, as a share of the values."""
    absolute_tolerance: float = 1e-6
    """Error that dopri5 allows per step in any case."""

    def __post_init__(self) -> None:
        # Named as for `sample` and in Python; for `train` there is more in front.
        require(self, "steps", at_least=1)
        require(self, "time_shift", "relative_tolerance", "absolute_tolerance", more_than=0)
        scales = ("guidance_scale", "local_scale", "cls_scale", "other_scales", "representation_scale", "auto_scale")
        require(self, *scales, "auto_scales", at_least=0)
        require(self, "guiders")
        require(self, "tile", at_least=0)
        if self.guided_channels != "all":
            require(self, "guided_channels", at_least=1)
        lowest, highest = self.guidance_interval
        if not 0 <= lowest <= highest <= 1:
            raise UserError(f"{option('guidance_interval')} {lowest} {highest}: choose 0 ≤ lowest ≤ highest ≤ 1")
        refuse_unknown(option("sampler"), self.sampler, registered("samplers.SAMPLERS"))
        own = OWN_PARTS[GUIDERS]  # These have scales of their own.
        for name in self.guiders:
            refuse_unknown("guider", name, [known for known in registered(GUIDERS) if known not in own])
        for name in self.other_scales:
            if f"{name}_scale" in MODALITY_SCALES:
                raise UserError(f"{option('other_scales')} {name}: use {option(f'{name}_scale')}")
        for part in fields(self):
            value, choices = getattr(self, part.name), CHOICES.get(part.name)
            if choices and value is not None and value not in choices:
                raise UserError(f"{option(part.name)} {value}: choose {', '.join(choices)}")

    @property
    def guidance(self) -> Guidance:
        """The same as guidance asks for it."""
        named = {name.removesuffix("_scale"): getattr(self, name) for name in MODALITY_SCALES}
        return Guidance(
            scale=self.guidance_scale,
            scales={name: scale for name, scale in named.items() if scale is not None} | dict(self.other_scales),
            interval=self.guidance_interval,
            representation_scale=self.representation_scale,
            auto_scale=self.auto_scale,
            auto_scales=self.auto_scales,
            unconditional=self.unconditional,
            guided_channels=None if self.guided_channels == "all" else self.guided_channels,
            others=self.guiders,
        )

    def unguided(self) -> Sampling:
        """The same without classifier-free guidance."""
        nothing = dict.fromkeys(MODALITY_SCALES, None)
        return replace(self, guidance_scale=1.0, other_scales={}, **nothing)

    def changed(self, **overrides: Any) -> Sampling:
        """The same with what is given (not None) in place of its own. Raises UserError for what cannot be."""
        return replace(self, **{name: value for name, value in overrides.items() if value is not None})


class SamplingChanges(TypedDict, total=False):
    """The fields of `Sampling` as keywords, for editors: what is None changes nothing."""

    sampler: str | None
    steps: int | None
    time_shift: float | None
    diffusion: Diffusion | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    local_scale: float | None
    cls_scale: float | None
    other_scales: Mapping[str, float] | None
    representation_scale: float | None
    auto_scale: float | None
    auto_scales: Mapping[str, float] | None
    unconditional: Unconditional | None
    guided_channels: int | Literal["all"] | None
    guiders: Mapping[str, float] | None
    rounding: Rounding | None
    tile: int | None
    state_precision: StatePrecision | None
    precision: AutoPrecision | None
    relative_tolerance: float | None
    absolute_tolerance: float | None


CHOICES = {
    "diffusion": get_args(Diffusion),
    "unconditional": get_args(Unconditional),
    "rounding": get_args(Rounding),
    "state_precision": get_args(StatePrecision),
    "precision": get_args(AutoPrecision),
}
"""The options of sampling with a few possible values."""
SamplingOverrides: Any = overrides_of(Sampling)
"""The base of options that may change single values of a `Sampling`: its fields by keyword, None for those that do
not."""


@dataclass(frozen=True)
class Draw(SamplingOverrides, TakesPaths):
    """Which images of a run are drawn, and how: the sampling options that are not given are those of its recipe."""

    run: Positional[Path]
    """Folder of the run, OWNER/NAME of one on the Hugging Face hub, or starter or flowers of this package."""
    out: Path
    """A folder for PNG files, or a file that ends in .npz."""
    count: int = 50
    """Number of images."""
    seed: int = 0
    """Image i depends on the seed and i alone."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: the classes in turn. random: drawn by seed and index."""
    classes: tuple[str, ...] = ()
    """Only these classes, by number or name. Default: all."""
    step: int | None = None
    """Checkpoint to use. Default: the last."""
    weights: Weights = "ema"
    """Its averaged weights (ema) or the trained ones (model)."""
    weaker_run: Path | None = None
    """A weaker run on the same store, for autoguidance by --auto-scale (2 if not given)."""
    autoencoder: str | None = None
    """Decode with another autoencoder than the run's own."""
    batch_size: int = 32
    """Images per batch in each process; changes images by rounding alone."""
    compile: bool = False
    """Compile the network: slower to start, faster after; changes images by rounding alone."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "count", "batch_size", at_least=1)
        require(self, "seed", "step", at_least=0)
        Sampling().changed(**{part.name: getattr(self, part.name) for part in fields(Sampling)})  # It checks them.


def refuse_unknown(what: str, name: str, known: Collection[str]) -> None:
    """Raise UnknownPart, listing what is registered, for a name that is not."""
    if name not in known:
        remedy = f"choose {', '.join(known)}" if known else "none is registered"
        raise UnknownPart(f"{what} {name}: {remedy}")
