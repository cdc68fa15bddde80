"""Checkpoints of the published code bases: SiT, REPA, ReDi, REG and REGLUE, read and written under their key names.

The shapes of the weights tell which family a file is from. SiT and ReDi count time from noise to data; their weights
are converted exactly, so that the imported model has data at t = 0 like every other and nothing needs to remember it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.modalities import StateShape
from reglue.diffusion.transformer import FREQUENCIES, MAX_PERIOD, position_embedding
from reglue.errors import UserError

Family = Literal["sit", "repa", "redi", "reg", "reglue"]

TIME_FROM_NOISE: frozenset[Family] = frozenset({"sit", "redi"})
"""The families whose published time runs from noise (0) to data (1)."""

PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width, for S, B, L and XL: no weight has a shape that would tell."""

# Published name → our name. {i} stands for the number of a block.
KEYS = {
    "x_embedder.proj": "patches",
    "t_embedder.mlp": "transformer.time_embedding",
    "y_embedder.embedding_table": "transformer.label_embedding",
    "blocks.{i}.attn.qkv": "transformer.blocks.{i}.attention.qkv",
    "blocks.{i}.attn.proj": "transformer.blocks.{i}.attention.out",
    "blocks.{i}.mlp.fc1": "transformer.blocks.{i}.mlp.0",
    "blocks.{i}.mlp.fc2": "transformer.blocks.{i}.mlp.2",
    "blocks.{i}.adaLN_modulation.1": "transformer.blocks.{i}.modulation",
    "final_layer.adaLN_modulation.1": "transformer.modulation",
    "final_layer.linear": "velocity",
    "final_layer.linear_cls": "class_token_velocity",
    "cls_projectors2": "class_token.linear",
    "wg_norm": "class_token.norm",
    "projectors.0": "projector",
    "projector": "projector",
}


@dataclass(frozen=True)
class OfficialModel:
    """What a published checkpoint holds, in our terms."""

    family: Family
    config: DenoiserConfig
    weights: dict[str, Tensor]
    """Under our names, in our time convention."""

    def denoiser(self) -> Denoiser:
        """The model with its weights, in eval mode."""
        denoiser = Denoiser(self.config)
        denoiser.load_state_dict(self.weights)
        return denoiser.eval()


def read_official(file: Path) -> dict[str, Tensor]:
    """The (EMA) weights of a published file under their published names.

    Containers: safetensors, a bare state dict, or {model, ema, opt, args, steps}, of which `ema` is taken. Nothing is
    unpickled but tensors and argparse's Namespace. Raises UserError if the file is missing or is something else.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            container = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: not a readable checkpoint ({str(error).splitlines()[0]})") from None
    except Exception as error:
        # torch raises pickle.UnpicklingError for anything that weights_only does not allow.
        raise UserError(f"{file}: holds more than weights and was not opened ({type(error).__name__})") from None
    for name in ("ema", "model"):
        if isinstance(container, dict) and isinstance(container.get(name), dict):
            container = container[name]
            break
    if not isinstance(container, dict) or not all(isinstance(v, Tensor) for v in container.values()):
        raise UserError(f"{file}: expected a state dict or {{model, ema, …}}, found {type(container).__name__}")
    return container


def import_official(
    published: Mapping[str, Tensor],
    *,
    latent_channels: int = 4,
    heads: int | None = None,
    alignment_depth: int | None = None,
) -> OfficialModel:
    """Recognise published weights by their shapes and convert them.

    `latent_channels` is C of the autoencoder (4 for the SD-VAE that all of them use); `heads` is needed for widths
    that no published model has; `alignment_depth` (after which block the projector reads) is the published one if not
    given. Raises UserError that says what was found and what was expected.
    """
    published = _with_uniform_names(published, alignment_depth)
    family, config = _recognise(published, latent_channels, heads, alignment_depth)
    _check_positions(published, config)
    weights = {ours: published[theirs].float() for theirs, ours in _names(published).items()}
    if family in TIME_FROM_NOISE:
        weights = reverse_time(weights)
    expected = Denoiser(config).state_dict()
    wrong = sorted(
        (expected.keys() ^ weights.keys())
        | {name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape}
    )
    if wrong:
        raise UserError(
            f"looks like {family}, but these weights are missing, unknown or of another shape: {', '.join(wrong)}"
        )
    return OfficialModel(family, config, weights)


def export_official(family: Family, config: DenoiserConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published names and time convention for a model of ours: the inverse of `import_official`."""
    if family in TIME_FROM_NOISE:
        weights = reverse_time(weights)
    theirs_by_ours = {ours: theirs for theirs, ours in KEYS.items() if theirs != "projector" or family == "redi"}
    published: dict[str, Tensor] = {}
    for name, value in weights.items():
        stem, ours = _match(name, theirs_by_ours)
        published[ours + name[len(stem) :]] = value
    leading = 1 if config.shape.class_token_width else 0
    published["pos_embed"] = position_embedding(config.token_grid, config.width, leading)
    return published


def reverse_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same model with t replaced by 1 − t and v by −v. Its own inverse, up to rounding.

    By angle addition, cos(ω(1−t)) = cos ω cos ωt + sin ω sin ωt and sin(ω(1−t)) = sin ω cos ωt − cos ω sin ωt, so the
    first layer of the time embedding absorbs the change; the output layers change sign.
    """
    changed = dict(weights)
    key = "transformer.time_embedding.0.weight"
    half = FREQUENCIES // 2
    # The frequencies as the model has them: rounded to float32.
    exponent = -torch.log(torch.tensor(MAX_PERIOD, dtype=torch.float64)) * torch.arange(half) / half
    omega = torch.exp(exponent.float()).double()
    of_cos, of_sin = weights[key].double().split(half, dim=1)
    changed[key] = torch.cat(
        [of_cos * omega.cos() + of_sin * omega.sin(), of_cos * omega.sin() - of_sin * omega.cos()], dim=1
    ).to(weights[key].dtype)
    for head in ("velocity", "class_token_velocity"):
        for part in ("weight", "bias"):
            if f"{head}.{part}" in changed:
                changed[f"{head}.{part}"] = -changed[f"{head}.{part}"]
    return changed


def _with_uniform_names(published: Mapping[str, Tensor], alignment_depth: int | None) -> dict[str, Tensor]:
    """Drop the prefixes of wrappers, and rename the late blocks of old REPA files (`decoder_blocks.i`)."""
    plain = {name.removeprefix("module."): value for name, value in published.items()}
    late = [name for name in plain if name.startswith("decoder_blocks.")]
    if late:
        first = 1 + max(int(name.split(".")[1]) for name in plain if name.startswith("blocks."))
        if alignment_depth not in (None, first):
            raise UserError(
                f"alignment depth {alignment_depth} given, but the file's decoder starts after block {first}"
            )
        for name in late:
            _, number, rest = name.split(".", 2)
            plain[f"blocks.{int(number) + first}.{rest}"] = plain.pop(name)
    return plain


def _recognise(
    published: Mapping[str, Tensor], latent_channels: int, heads: int | None, alignment_depth: int | None
) -> tuple[Family, DenoiserConfig]:
    needed = ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    missing = [name for name in needed if name not in published]
    if missing:
        found = ", ".join(sorted(published)[:4])
        raise UserError(f"not a SiT-like checkpoint: no {missing[0]} (expected {', '.join(needed)}; found {found}, …)")
    width, channels, patch, _ = published["x_embedder.proj.weight"].shape
    outputs = published["final_layer.linear.weight"].shape[0]
    has_class_token = "cls_projectors2.weight" in published
    local_channels = channels - latent_channels
    if local_channels < 0:
        raise UserError(
            f"the checkpoint has {channels} input channels, fewer than the {latent_channels} latent channels"
        )
    learn_sigma = outputs == 2 * patch**2 * channels
    if not learn_sigma and outputs != patch**2 * channels:
        raise UserError(f"final_layer.linear has {outputs} rows; expected {patch**2 * channels}, or twice that (SiT)")
    family: Family
    if has_class_token:
        family = "reglue" if local_channels else "reg"
    elif local_channels:
        family = "redi"
    else:
        family = "sit" if learn_sigma else "repa"

    tokens = published["pos_embed"].shape[1] - has_class_token
    side = round(tokens**0.5)
    if side**2 != tokens:
        raise UserError(f"pos_embed has {tokens} patch positions, which is not a square grid")
    if heads is None and width not in PUBLISHED_HEADS:
        raise UserError(
            f"width {width} is none of {sorted(PUBLISHED_HEADS)}: say how many attention heads with --heads"
        )
    depth = 1 + max(int(m[1]) for name in published if (m := re.match(r"blocks\.(\d+)\.", name)))
    last = next((published[k] for k in ("projectors.0.4.weight", "projector.4.weight") if k in published), None)
    config = DenoiserConfig(
        shape=StateShape(
            latent_channels=latent_channels,
            grid=(side * patch, side * patch),
            local_channels=local_channels,
            class_token_width=published["cls_projectors2.weight"].shape[1] if has_class_token else 0,
        ),
        classes=published["y_embedder.embedding_table.weight"].shape[0] - 1,
        depth=depth,
        width=width,
        heads=heads or PUBLISHED_HEADS[width],
        patch=patch,
        learn_sigma=learn_sigma,
        alignment_depth=(alignment_depth or (8 if depth >= 24 else 4)) if last is not None else 0,
        alignment_width=last.shape[0] if last is not None else 0,
        alignment_hidden=last.shape[1] if last is not None else DenoiserConfig.alignment_hidden,
    )
    return family, config


def _check_positions(published: Mapping[str, Tensor], config: DenoiserConfig) -> None:
    """Refuse a checkpoint with other positions than the fixed ones: our models have no learned ones."""
    leading = 1 if config.shape.class_token_width else 0
    ours = position_embedding(config.token_grid, config.width, leading)
    if not torch.allclose(published["pos_embed"].float(), ours, atol=1e-5):
        raise UserError("pos_embed is not the fixed sin-cos embedding of the published models")


def _names(published: Mapping[str, Tensor]) -> dict[str, str]:
    """Published name → ours, for every weight but the position embedding."""
    names: dict[str, str] = {}
    for name in published:
        if name != "pos_embed":
            stem, ours = _match(name, KEYS)
            names[name] = ours + name[len(stem) :]
    return names


def _match(name: str, table: Mapping[str, str]) -> tuple[str, str]:
    """The longest row of the table that starts `name`: its two sides, with the block's number filled in."""
    number = re.search(r"blocks\.(\d+)\.", name)
    for left in sorted(table, key=len, reverse=True):
        filled = left.replace("{i}", number[1] if number else "")
        if name.startswith(filled + "."):
            return filled, table[left].replace("{i}", number[1] if number else "")
    raise UserError(f"unknown weight {name}; known are {', '.join(sorted(table))}")
