"""What a denoiser is and how it is guided, as plain data: options are read and refused before PyTorch is imported."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

from reglue.errors import option

if TYPE_CHECKING:
    from torch import Tensor

PathName = Literal["linear", "cosine"]
StatePrecision = Literal["float32", "float64"]
ProjectorKind = Literal["mlp", "convolution"]
Diffusion = Literal["time", "sigma"]
"""How much noise the reverse-time SDE adds."""
Unconditional = Literal["class", "everything"]
"""What the worse model of classifier-free guidance lacks."""

LATENT = "latent"
"""The name of the autoencoder's latents, which every model learns and images are decoded from."""
CLASS = "class"
"""The name of the class label among the conditions."""

OWN_PARTS = {
    "backbones.BACKBONES": ("sit", "lightning", "uvit"),
    "conditions.CONDITIONS": (CLASS,),
    "guidance.GUIDERS": ("classifier-free", "representation", "auto"),
    "predictions.PREDICTIONS": ("velocity", "data", "noise", "noise-sd"),
    "samplers.SAMPLERS": (
        "euler",
        "heun",
        "euler-maruyama",
        "ddpm",
        "ddim",
        "adams-bashforth",
        "dpm-solver",
        "dopri5",
    ),
    "schedules.SCHEDULES": ("shared", "lead", "cascade", "independent"),
}
"""MODULE.TABLE of each registry → the parts that this package has in it."""


def registered(table: str) -> Collection[str]:
    """The names in a registry, one of `OWN_PARTS`. Nobody can have added to it before its module is imported."""
    module, _, name = table.partition(".")
    return getattr(sys.modules.get(f"{__package__}.{module}"), name, OWN_PARTS[table])


@dataclass(frozen=True)
class Blocks:
    """What a transformer is made of besides what its backbone always has."""

    rms_norm: bool = False
    """RMSNorm with weights in place of LayerNorm."""
    qk_norm: bool = False
    """Normalise query and key, head by head: keeps long trainings in half precision from diverging."""
    rope: bool = False
    """Rotary positions in attention, besides those that are added to the tokens."""
    swiglu: bool = False
    """SwiGLU of 2/3 the hidden width in place of GELU."""
    shift: bool = True
    """Modulate with shift, scale and gate; without, with scale and gate alone."""
    time_mlp: bool = False
    """uvit: the time token goes through a network of two layers."""
    convolution: bool = False
    """A 3×3 convolution over the predicted maps, as in U-ViT's M and L."""

    def beside(self, other: Blocks) -> Blocks:
        """What either has."""
        either = {f.name: getattr(self, f.name) | getattr(other, f.name) for f in fields(self)}
        return Blocks(**either | {"shift": self.shift and other.shift})


ALWAYS = {"lightning": Blocks(rms_norm=True, rope=True, swiglu=True)}
"""What backbones always have, by their names: lightning is SiT's with the parts of LightningDiT's published models."""


@dataclass(frozen=True)
class Normalisation:
    """What a model sees of a modality: (x − shift)·scale, one shift and scale per channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def normalise(self, x: Tensor) -> Tensor:
        """Raw (B, C, …) to what the model learns."""
        shift, scale = self.tensors(x)
        return (x - shift) * scale

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        shift, scale = self.tensors(x)
        return x / scale + shift

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale in the type, on the device and broadcasting to the shape of x (B, C, …)."""
        view = (1, -1, *[1] * (x.ndim - 2))
        shift, scale = (x.new_tensor(v).view(view) for v in (self.shift, self.scale))
        return shift, scale


@dataclass(frozen=True)
class Modality:
    """One part of the state that a model learns."""

    name: str
    """Its key in states, losses and options."""
    kind: Literal["map", "token"]
    """map: (B, channels, H, W) on the grid of the latents, channels beside theirs in every patch. token: (B, channels),
    a token of its own in front of the patches."""
    channels: int
    column: str = ""
    """The store's column that training reads; empty for a model that was imported."""
    normalisation: Normalisation | None = None
    """None where the model learns the values as they are."""
    dropout: float = 0.0
    """Share of samples that are trained without this modality, for representation guidance."""
    is_class_token: bool = False
    """Whether it is the vision encoder's class token, with which alignment pairs it."""

    def normalise(self, x: Tensor) -> Tensor:
        """Raw (B, channels, …) to what the model learns."""
        return self.normalisation.normalise(x) if self.normalisation else x

    def denormalise(self, x: Tensor) -> Tensor:
        """Inverse of `normalise`."""
        return self.normalisation.denormalise(x) if self.normalisation else x


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
    blocks: Blocks = Blocks()
    """What is asked for besides what the backbone always has: see `parts`."""
    prediction: str = "velocity"
    path: PathName = "linear"
    times: str = "shared"
    """The schedule of the modalities' times; all but `shared` give each an embedding of its own."""
    span: bool = False
    """Whether the network is told how far a step goes, and predicts the mean velocity of it (MeanFlow)."""
    learn_sigma: bool = False
    """Twice the output channels: the second half is a learned variance where noise is predicted (DiT), and unused
    elsewhere (SiT's published checkpoints are so)."""
    alignment_depth: int = 0
    """The block, counted from 1, after which tokens are aligned with the vision encoder; 0: no alignment."""
    alignment_width: int = 0
    """Width of the vision encoder's tokens that alignment projects to; 0: no alignment."""
    alignment_hidden: int = 2048
    """Hidden width of the projector."""
    alignment_projector: ProjectorKind = "mlp"
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
        if self.parts.rope and self.width // self.heads % 4:
            raise ValueError(
                f"rotary positions need heads whose width divides by 4, not {self.width} / {self.heads}; "
                f"leave out {option('blocks.rope')}, or change the model's size"
            )
        for part, missing, owner in (
            ("shift", self.backbone == "uvit" and not self.blocks.shift, "sit and lightning"),
            ("time_mlp", self.backbone in ("sit", "lightning") and self.blocks.time_mlp, "uvit"),
        ):
            if missing:
                raise ValueError(f"{option('blocks.' + part)} is a part of {owner}, which {self.backbone} has not")
        if self.position_grid and min(self.position_grid) < 1:
            raise ValueError(f"a position grid of {self.position_grid} must have one row and one column at least")
        if self.alignment_depth > self.depth:
            raise ValueError(
                f"alignment after block {self.alignment_depth}, but the model has only {self.depth} blocks"
            )
        names = [modality.name for modality in self.modalities]
        if not names or names[0] != LATENT or len({*names}) < len(names):
            raise ValueError(f"modalities {names}: the first must be {LATENT!r}, and all need different names")
        for kind, name, table in (
            ("backbone", self.backbone, "backbones.BACKBONES"),
            ("prediction", self.prediction, "predictions.PREDICTIONS"),
            ("schedule", self.times, "schedules.SCHEDULES"),
            *(("condition", name, "conditions.CONDITIONS") for name in self.conditions),
        ):
            if name not in (known := registered(table)):
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
    def parts(self) -> Blocks:
        """What the transformer is made of: what its backbone always has, and what it was given."""
        return self.blocks.beside(ALWAYS.get(self.backbone, Blocks()))

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


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are guided, and when."""

    scale: float = 1.0
    """Classifier-free guidance scale w; 1 is none."""
    scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """That of single modalities, by name; 1 leaves a modality conditional."""
    interval: tuple[float, float] = (0.0, 1.0)
    """A modality is guided only while lowest ≤ t ≤ highest, in noise time (t = 1 is noise)."""
    representation_scale: float = 1.0
    """Scale of representation guidance; needs a model that was trained with dropped maps."""
    unconditional: Unconditional = "class"
    """What classifier-free guidance leads away from: the model without its condition, or without everything else too,
    for models that know all combinations of times."""
    auto_scale: float = 1.0
    """Scale of autoguidance by a weaker model."""
    auto_scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """That of single modalities, by name."""
    guided_channels: int | None = None
    """Classifier-free guidance moves so many latent channels, the first ones (SiT's published samples: 3), or all."""
    others: Mapping[str, float] = field(default_factory=dict[str, float])
    """Scales of registered guiders that this package does not know, by name."""

    def scale_of(self, modality: str) -> float:
        """The classifier-free scale of a modality."""
        return self.scales.get(modality, self.scale)

    @property
    def asks_for_weaker(self) -> bool:
        """Whether a weaker model is needed."""
        return any(scale != 1 for scale in (self.auto_scale, *self.auto_scales.values()))
