"""The networks that have short names, and how a file of weights is recognised as one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reglue.errors import UserError
from reglue.files import opened_tensors

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

Steps = tuple[Literal["normalise", "resize"], Literal["normalise", "resize"]]
"""The order in which an image in [0, 1] is standardised and brought to the network's input size. Bicubic weights sum to
1, so the two orders agree but for rounding; the published features are reproduced to the bit by their own."""

NORMALISE_RESIZE: Steps = ("normalise", "resize")
RESIZE_NORMALISE: Steps = ("resize", "normalise")


@dataclass(frozen=True)
class EncoderFamily:
    """What networks of one kind share: how they are fed, and the tensors that give them away."""

    steps: Steps
    tensors: frozenset[str]
    """Those of `TELLING_TENSORS` that their weights have."""
    recognisable: bool = True
    """False where networks that compute something else have the same tensors: then a file alone does not tell."""


TELLING_TENSORS = frozenset({"cls_token", "pos_embed", "norm_pre.weight", "attn_pool.latent", "blocks.0.ls1.gamma"})

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


def recognise(file: Path) -> str:
    """The short name of the architecture whose weights a file holds. Raises UserError if there is not just one."""
    shapes = _tensor_shapes(file)
    width, *_, patch_size = shapes.get("patch_embed.proj.weight", [0, 0])
    depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    registers = next((shapes[key][1] for key in ("reg_token", "register_tokens") if key in shapes), 0)
    telling = TELLING_TENSORS & shapes.keys()
    fitting = {
        name: known.family
        for name, known in KNOWN_ENCODERS.items()
        if (known.width, known.depth, known.patch_size, known.registers) == (width, depth, patch_size, registers)
        and known.family.tensors == telling
    }
    if len(fitting) == 1 and all(family.recognisable for family in fitting.values()):
        return next(iter(fitting))
    if fitting:
        choices = " or ".join(f"{name}@{file}" for name in fitting)
        raise UserError(f"{file} may hold more than one network: say which, as {choices}, or as timm:NAME@{file}")
    raise UserError(
        f"{file} holds no encoder of the table (found width {width}, {depth} blocks, patch "
        f"{patch_size}, {registers} registers): say which network it is, as NAME@{file}"
    )


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    with opened_tensors(file, "fetch it again") as tensors:
        return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 not a dict
