"""The networks that have short names, and how a file of weights is recognised as one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from reglue.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

STARTER = "starter"
"""The short name of the encoder and the autoencoder that come with the package."""

AUTOENCODERS_ON_HUB = {
    "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse",
    "sd-vae-ft-ema": "stabilityai/sd-vae-ft-ema",
    "sdxl-vae": "stabilityai/sdxl-vae",
    "sd3-vae": "stabilityai/stable-diffusion-3-medium-diffusers/vae",
    "flux-vae": "black-forest-labs/FLUX.1-schnell/vae",
    "dc-ae-f32c32": "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers",
    "dc-ae-f64c128": "mit-han-lab/dc-ae-f64c128-in-1.0-diffusers",
    "dc-ae-f128c512": "mit-han-lab/dc-ae-f128c512-in-1.0-diffusers",
    "dc-ae-f32c32-sana": "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
    "taesd": "madebyollin/taesd",
    "taesdxl": "madebyollin/taesdxl",
    "taesd3": "madebyollin/taesd3",
    "taef1": "madebyollin/taef1",
}
"""Short names of autoencoders on the Hugging Face hub: OWNER/REPOSITORY[/SUBFOLDER]."""
GATED_AUTOENCODERS = {"sd3-vae", "flux-vae"}
"""Those whose pages ask for terms to be accepted first."""

LATENT_SCALES = {
    "sd-vae-ft-mse": (0.18215, 0.0),
    "sd-vae-ft-ema": (0.18215, 0.0),
    "sdxl-vae": (0.13025, 0.0),
    "sd3-vae": (1.5305, 0.0609),
    "flux-vae": (0.3611, 0.1159),
}
"""Scale and shift of the latents of those that are published in single files too, which do not have them."""
LATENT_CHANNELS = {4: ("sd-vae-ft-mse", "sdxl-vae"), 16: ("sd3-vae", "flux-vae")}
"""Whose latents have so many channels."""
MODELS_AROUND = {
    "conditioner.embedders.": "sdxl-vae",
    "cond_stage_model.": "sd-vae-ft-mse",
    "model.diffusion_model.input_blocks.": "sd-vae-ft-mse",
    "model.diffusion_model.joint_blocks.": "sd3-vae",
    "model.diffusion_model.double_blocks.": "flux-vae",
}
"""By which tensors a checkpoint shows in whose latents its model lives. The first that is there counts."""

Steps = tuple[Literal["normalise", "resize"], Literal["normalise", "resize"]]
"""The order in which an image in [0, 1] is standardised and brought to the network's input size. Bicubic weights sum to
1, so the two orders agree but for rounding; the published features are reproduced to the bit by their own."""

NORMALISE_RESIZE: Steps = ("normalise", "resize")
RESIZE_NORMALISE: Steps = ("resize", "normalise")


@dataclass(frozen=True)
class EncoderFamily:
    """What networks of one kind share: how they are fed, and the tensors by which their weights are recognised."""

    steps: Steps
    tensors: frozenset[str]
    """Those of `DISTINCTIVE_TENSORS` that their weights have."""
    recognisable: bool = True
    """False where networks that compute something else have the same tensors: then a file alone is ambiguous."""


DISTINCTIVE_TENSORS = frozenset({"cls_token", "pos_embed", "norm_pre.weight", "attn_pool.latent", "blocks.0.ls1.gamma"})

# REPA standardises first for DINOv2, and resizes first for CLIP. A patch of 16 leaves an image as it is, as REPA does
# with DINO and MAE, so that their order only shows in a folder with another `reglue_input`.
DINO_V2 = EncoderFamily(NORMALISE_RESIZE, frozenset({"cls_token", "pos_embed", "blocks.0.ls1.gamma"}))
DINO_V3 = EncoderFamily(NORMALISE_RESIZE, frozenset({"cls_token"}))
# DINO and MAE are plain vision transformers, as many others are.
PLAIN = EncoderFamily(NORMALISE_RESIZE, frozenset({"cls_token", "pos_embed"}), recognisable=False)
# OpenAI's networks use an approximate GELU, which other CLIPs of the same shapes do not.
CLIP = EncoderFamily(RESIZE_NORMALISE, frozenset({"cls_token", "pos_embed", "norm_pre.weight"}), recognisable=False)
# Their own image processors resize first.
SIGLIP_2 = EncoderFamily(RESIZE_NORMALISE, frozenset({"pos_embed", "attn_pool.latent"}))
PE = EncoderFamily(RESIZE_NORMALISE, frozenset({"cls_token", "pos_embed", "norm_pre.weight", "attn_pool.latent"}))
PE_GIANT = EncoderFamily(RESIZE_NORMALISE, PE.tensors - {"cls_token"})


@dataclass(frozen=True)
class KnownEncoder:
    """One row of the table of short names: a timm architecture, and the shapes by which its weights are recognised.

    Mean, standard deviation and the repository of the weights are timm's own for that architecture.
    """

    architecture: str
    family: EncoderFamily
    width: int
    depth: int
    patch_size: int
    registers: int = 0


KNOWN_ENCODERS = {
    "dinov2-s": KnownEncoder("vit_small_patch14_dinov2.lvd142m", DINO_V2, 384, 12, 14),
    "dinov2-b": KnownEncoder("vit_base_patch14_dinov2.lvd142m", DINO_V2, 768, 12, 14),
    "dinov2-l": KnownEncoder("vit_large_patch14_dinov2.lvd142m", DINO_V2, 1024, 24, 14),
    "dinov2-g": KnownEncoder("vit_giant_patch14_dinov2.lvd142m", DINO_V2, 1536, 40, 14),
    "dinov2-s-reg": KnownEncoder("vit_small_patch14_reg4_dinov2.lvd142m", DINO_V2, 384, 12, 14, 4),
    "dinov2-b-reg": KnownEncoder("vit_base_patch14_reg4_dinov2.lvd142m", DINO_V2, 768, 12, 14, 4),
    "dinov2-l-reg": KnownEncoder("vit_large_patch14_reg4_dinov2.lvd142m", DINO_V2, 1024, 24, 14, 4),
    "dinov2-g-reg": KnownEncoder("vit_giant_patch14_reg4_dinov2.lvd142m", DINO_V2, 1536, 40, 14, 4),
    "dinov3-s": KnownEncoder("vit_small_patch16_dinov3.lvd1689m", DINO_V3, 384, 12, 16, 4),
    "dinov3-b": KnownEncoder("vit_base_patch16_dinov3.lvd1689m", DINO_V3, 768, 12, 16, 4),
    "dinov3-l": KnownEncoder("vit_large_patch16_dinov3.lvd1689m", DINO_V3, 1024, 24, 16, 4),
    "dino-b": KnownEncoder("vit_base_patch16_224.dino", PLAIN, 768, 12, 16),
    "mae-b": KnownEncoder("vit_base_patch16_224.mae", PLAIN, 768, 12, 16),
    "mae-l": KnownEncoder("vit_large_patch16_224.mae", PLAIN, 1024, 24, 16),
    "clip-b": KnownEncoder("vit_base_patch16_clip_quickgelu_224.openai", CLIP, 768, 12, 16),
    "clip-l": KnownEncoder("vit_large_patch14_clip_quickgelu_224.openai", CLIP, 1024, 24, 14),
    "siglip2-b": KnownEncoder("vit_base_patch16_siglip_256.v2_webli", SIGLIP_2, 768, 12, 16),
    "siglip2-l": KnownEncoder("vit_large_patch16_siglip_256.v2_webli", SIGLIP_2, 1024, 24, 16),
    "siglip2-so400m": KnownEncoder("vit_so400m_patch16_siglip_256.v2_webli", SIGLIP_2, 1152, 27, 16),
    "pe-t": KnownEncoder("vit_pe_core_tiny_patch16_384.fb", PE, 192, 12, 16),
    "pe-s": KnownEncoder("vit_pe_core_small_patch16_384.fb", PE, 384, 12, 16),
    "pe-b": KnownEncoder("vit_pe_core_base_patch16_224.fb", PE, 768, 12, 16),
    "pe-l": KnownEncoder("vit_pe_core_large_patch14_336.fb", PE, 1024, 24, 14),
    "pe-g": KnownEncoder("vit_pe_core_gigantic_patch14_448.fb", PE_GIANT, 1536, 50, 14),
}


class Shape(NamedTuple):
    """What tells vision transformers apart."""

    width: int
    depth: int
    patch_size: int
    registers: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Shape:
        """That of tensors by timm's names; zeros for what is not there."""
        first, registers = (
            next((tensors[name].shape for name in names if name in tensors and tensors[name].ndim == dimensions), None)
            for names, dimensions in ((("patch_embed.proj.weight",), 4), (("reg_token", "register_tokens"), 3))
        )
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        return cls(first[0] if first else 0, depth, first[-1] if first else 0, registers[1] if registers else 0)


def fitting(tensors: Mapping[str, Tensor]) -> list[str]:
    """The short names of the architectures that have tensors as these, which are by timm's names."""
    shape, present = Shape.of(tensors), DISTINCTIVE_TENSORS & tensors.keys()
    return [
        name
        for name, known in KNOWN_ENCODERS.items()
        if (known.width, known.depth, known.patch_size, known.registers) == shape and known.family.tensors == present
    ]


def recognise(file: Path) -> str:
    """The short name of the architecture whose weights a file holds, by whichever names it has its tensors.

    Raises UserError if there is not just one.
    """
    from reglue.encoders.renaming import as_timm  # slow to import, as torch is
    from reglue.encoders.weights import read_shapes

    tensors = as_timm(read_shapes([file]), file)
    names = fitting(tensors)
    if len(names) == 1 and KNOWN_ENCODERS[names[0]].family.recognisable:
        return names[0]
    if names:
        choices = " or ".join(f"{name}@{file}" for name in names)
        raise UserError(f"{file} may hold more than one network: say which, as {choices}, or as timm:NAME@{file}")
    width, depth, patch_size, registers = Shape.of(tensors)
    raise UserError(
        f"{file} holds no encoder of the table (found width {width}, {depth} blocks, patch "
        f"{patch_size}, {registers} registers): say which network it is, as NAME@{file}"
    )
