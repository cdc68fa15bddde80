"""The names that networks' tensors have elsewhere, brought to those of timm and of diffusers.

Vision encoders: DINOv2 (arXiv 2304.07193) and DINOv3 (arXiv 2508.10104) as Meta publishes them, and as transformers
has them. Autoencoders: the KL autoencoder of latent diffusion (arXiv 2112.10752), alone or inside a checkpoint of
Stable Diffusion. Tensors may be on the device `meta`, so that shapes alone can be renamed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reglue.encoders.weights import unfitting

DINO_V3 = {
    r"^storage_tokens$": "reg_token",
    r"\.ls([12])\.gamma$": r".gamma_\1",
}
DINO_V3_UNUSED = re.compile(r"mask_token|rope_embed\.|.*\.bias_mask$|local_cls_norm\.")
"""Of pre-training, or made afresh by timm."""

OF_TRANSFORMERS = {
    r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.(?:projection\.)?": "patch_embed.proj.",
    r"^(?:encoder\.|model\.)?layer\.": "blocks.",
    r"\.attention\.attention\.(query|key|value)\.": lambda found: f".attn.{found[1][0]}.",
    r"\.attention\.([qkv])_proj\.": r".attn.\1.",
    r"\.attention\.(?:output\.dense|o_proj)\.": ".attn.proj.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"\.mlp\.(?:weights_in|up_proj)\.": ".mlp.fc1.",
    r"\.mlp\.(?:weights_out|down_proj)\.": ".mlp.fc2.",
    r"^layernorm\.": "norm.",
}
OF_LATENT_DIFFUSION = {
    r"\.down\.(\d+)\.block\.": r".down_blocks.\1.resnets.",
    r"\.down\.(\d+)\.attn\.": r".down_blocks.\1.attentions.",
    r"\.down\.(\d+)\.downsample\.": r".down_blocks.\1.downsamplers.0.",
    r"\.up\.(\d+)\.block\.": r".up_blocks.\1.resnets.",
    r"\.up\.(\d+)\.attn\.": r".up_blocks.\1.attentions.",
    r"\.up\.(\d+)\.upsample\.": r".up_blocks.\1.upsamplers.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"(\.attentions\.\d+)\.norm\.": r"\1.group_norm.",
    r"(\.attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
    r"(\.attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
}
OF_OLD_DIFFUSERS = {
    r"(\.attentions\.\d+)\.query\.": r"\1.to_q.",
    r"(\.attentions\.\d+)\.key\.": r"\1.to_k.",
    r"(\.attentions\.\d+)\.value\.": r"\1.to_v.",
    r"(\.attentions\.\d+)\.proj_attn\.": r"\1.to_out.0.",
}
"""The names that the attention of the SD-VAE had when it was published."""
ATTENTION = re.compile(r".*\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")
AUTOENCODER_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "bn.")
AUTOENCODER_PREFIXES = ("first_stage_model.", "vae.")
"""What stands before an autoencoder's names in a checkpoint of all of Stable Diffusion."""


def renamed(tensors: Mapping[str, Tensor], renames: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same tensors by other names: each pattern is replaced in all of them, in the order of `renames`."""
    names = {name: name for name in tensors}
    for pattern, replacement in renames.items():
        names = {name: re.sub(pattern, replacement, new) for name, new in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}


def _of_file(
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> Callable[[Mapping[str, Tensor], Path], dict[str, Tensor]]:
    """With the file that has the tensors: where one is missing or of another shape, a UserError names it."""

    @wraps(rename)
    def checked(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
        try:
            return rename(tensors)
        except KeyError as error:
            raise unfitting(file, f"it has no tensor for {error}") from error
        except (IndexError, RuntimeError, ValueError) as error:
            raise unfitting(file, error) from error

    return checked


@_of_file
def as_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision encoder's tensors by the names that timm reads; those of other networks as they are.

    The biases of DINOv3's attention come as `q_bias` and `v_bias`; its keys have none.
    """
    tensors, marker = dict(tensors), "embeddings.cls_token"
    prefix = next((name.removesuffix(marker) for name in tensors if name.endswith(marker)), None)
    if prefix is not None:
        tensors = _as_meta({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    if "storage_tokens" in tensors or "rope_embed.periods" in tensors:
        tensors = renamed({k: v for k, v in tensors.items() if not DINO_V3_UNUSED.match(k)}, DINO_V3)
        for name in [name for name in tensors if name.endswith(".qkv.bias")]:
            q, _, v = tensors.pop(name).chunk(3)
            tensors |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    return tensors


def _as_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of transformers' DINOv2 or DINOv3 by the names that Meta has for them."""
    tensors = renamed(tensors, OF_TRANSFORMERS)
    for query in [name for name in tensors if ".attn.q." in name]:
        q, v = tensors.pop(query), tensors.pop(query.replace(".q.", ".v."))
        k = tensors.pop(query.replace(".q.", ".k."), torch.zeros_like(q))  # DINOv3's keys have no bias.
        tensors[query.replace(".q.", ".qkv.")] = torch.cat([q, k, v])
    if "pos_embed" not in tensors:
        return renamed(tensors, {"^register_tokens$": "storage_tokens"})
    # By this one timm knows Meta's networks.
    return {"mask_token": torch.zeros_like(tensors["cls_token"]), **tensors}


@_of_file
def as_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A KL autoencoder's tensors by the names that diffusers reads, and none of whatever else is in the checkpoint.

    Latent diffusion counts the stages of its decoder from the finest, diffusers from the coarsest; and where diffusers
    has matrices in its attention, latent diffusion has convolutions of one pixel.
    """
    for prefix in AUTOENCODER_PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    ups = [int(found[1]) for name in tensors if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    if ups:
        reverse = {r"^decoder\.up\.(\d+)\.": lambda found: f"decoder.up.{max(ups) - int(found[1])}."}
        parts = {name: one for name, one in tensors.items() if name.startswith(AUTOENCODER_PARTS)}
        tensors = renamed(parts, reverse | OF_LATENT_DIFFUSION)
    tensors = renamed(tensors, OF_OLD_DIFFUSERS)
    return {k: v[:, :, 0, 0] if v.ndim == 4 and ATTENTION.match(k) else v for k, v in tensors.items()}


def kl_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What diffusers' AutoencoderKL is configured with to have these tensors (`as_diffusers`).

    Latent diffusion's networks normalise in 32 groups, which no tensor shows. Raises ValueError, with a reason, for
    tensors of another network.
    """
    if "quantize.embedding.weight" in tensors:
        raise ValueError("it is a VQ autoencoder")
    if "bn.running_mean" in tensors:
        raise ValueError("it is the autoencoder of FLUX.2")
    stages = len({name.split(".")[2] for name in tensors if name.startswith("encoder.down_blocks.")})
    try:
        widths = [tensors[f"encoder.down_blocks.{stage}.resnets.0.conv1.weight"].shape[0] for stage in range(stages)]
        latent_channels = tensors["decoder.conv_in.weight"].shape[1]
        channels_in = tensors["encoder.conv_in.weight"].shape[1]
        channels_out = tensors["decoder.conv_out.weight"].shape[0]
        moments = tensors["encoder.conv_out.weight"].shape[0]
    except (KeyError, IndexError):
        raise ValueError("it has no tensors of a KL autoencoder of images") from None
    if not widths or moments != 2 * latent_channels:
        raise ValueError(f"its encoder gives {moments} channels for {latent_channels} of the latents")
    attentive = [any(f".down_blocks.{stage}.attentions." in name for name in tensors) for stage in range(stages)]
    return {
        "in_channels": channels_in,
        "out_channels": channels_out,
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attentive],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attentive)],
        "block_out_channels": widths,
        "layers_per_block": len({k.split(".")[4] for k in tensors if k.startswith("encoder.down_blocks.0.resnets.")}),
        "latent_channels": latent_channels,
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in tensors),
    }
