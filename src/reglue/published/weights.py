"""Checkpoints of the published code bases: SiT, DiT, REPA, ReDi, REG, REGLUE, LightningDiT, SFD and U-ViT, read and
written under their key names.

The names and shapes of the weights tell which family a file is from. SiT, ReDi, LightningDiT and SFD count time from
noise to data; their weights are converted exactly, so that the imported model has data at t = 0 like every other and
nothing needs to remember it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reglue.config import ClassToken, Latent, LocalSemantics
from reglue.diffusion.backbones import sit
from reglue.diffusion.conditions import CLASS
from reglue.diffusion.denoiser import Denoiser, DenoiserConfig
from reglue.diffusion.embeddings import FREQUENCIES, MAX_PERIOD, position_embedding, rotation_of
from reglue.diffusion.modalities import Modality
from reglue.diffusion.specs import ALWAYS, Blocks
from reglue.encoders.autoencoders import AutoencoderSpec
from reglue.errors import UserError, option
from reglue.papers import SFD
from reglue.published.families import (
    CANNOT,
    DIT,
    OTHERS,
    OUTPUTS,
    TIME_FROM_NOISE,
    Evidence,
    Family,
    choose_family,
)
from reglue.published.sfd import OFFSET, SEMANTIC, as_sfd, from_sfd

PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
"""Attention heads by width, for S, B, L, XL and LightningDiT's 1p0B and 1p6B: few weights have a shape that tells."""

PUBLISHED_AUTOENCODER = AutoencoderSpec(
    name="sd-vae-ft-mse",
    kind="AutoencoderKL",
    weights_sha256=None,
    latent_channels=4,
    downsampling=8,
    shift=(0.0,) * 4,
    scale=(0.18215,) * 4,
)
"""Whose latents all of them learn, unseen."""
PUBLISHED_DECODER = "sd-vae-ft-ema"
"""Decodes for all of them: a fine-tuned decoder for the same latents."""

KEYS = {
    "x_embedder.proj": "patches",
    "t_embedder.mlp": "time_embedding",
    "y_embedder.embedding_table": f"conditions.{CLASS}",
    **{theirs: f"backbone.{ours}" for theirs, ours in (sit.KEYS | sit.SWIGLU).items()},
    "blocks.{i}.skip_linear": "backbone.blocks.{i}.skip",
    "final_layer.linear": "velocity",
    "final_layer.linear_cls": f"token_velocities.{ClassToken.modality}",
    "cls_projectors2": f"tokens.{ClassToken.modality}.linear",
    "wg_norm": f"tokens.{ClassToken.modality}.norm",
    "projectors.0": "projector",
    "projector": "projector",
    "convolution": "convolution",
    "time_offsets": "time_offsets",
}
"""Published name → ours. {i} stands for the number of a block."""

OF_UVIT = {
    "patch_embed.proj": "x_embedder.proj",
    "time_embed": "t_embedder.mlp",
    "label_emb": "y_embedder.embedding_table",
    "norm": "final_layer.norm_final",
    "decoder_pred": "final_layer.linear",
    "final_layer": "convolution",
}
"""U-ViT's names → those that the others have for the same, but for its blocks."""

LABELS = "y_embedder.embedding_table.weight"
TIME_WEIGHT = "time_embedding.0.weight"
POSITIONS = "backbone.positions.weight"
"""U-ViT's, which are learned."""
ROTARY = {"feat_rope.freqs_cos": 0, "feat_rope.freqs_sin": 1}
"""LightningDiT's tables, which are functions of the sizes, and what `rotation_of` has first and second."""


@dataclass(frozen=True)
class OfficialModel:
    """What a published checkpoint holds, in our terms."""

    family: Family
    config: DenoiserConfig
    weights: dict[str, Tensor]
    """Under our names, in our time convention."""
    has_null: bool = True
    """Whether it was trained without classes too; otherwise the null label's embedding is zero."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out, as sentences."""

    def denoiser(self) -> Denoiser:
        """The model with its weights, in eval mode."""
        denoiser = Denoiser(self.config)
        denoiser.load_state_dict(self.weights)
        return denoiser.eval()


def import_official(
    published: Mapping[str, Tensor],
    *,
    latent_channels: int = 4,
    heads: int | None = None,
    alignment_depth: int | None = None,
    grid: tuple[int, int] | None = None,
    classes: int | None = None,
    evidence: Sequence[Evidence] = (),
) -> OfficialModel:
    """Recognise published weights by their shapes and convert them.

    `latent_channels` is C of the autoencoder (4 for the SD-VAE that all of them use); `heads` is needed for widths
    that no published model has; `alignment_depth` (after which block the projector reads) is the published one if not
    given; `grid` (H, W) of the latents is needed where the positions do not tell it: a fixed sin-cos embedding does,
    and learned ones are taken for a square. `classes` is how many the model knows: where the table of their embeddings
    has as many rows, it was trained without a null label. `evidence` decides, the first first, where several families
    have these shapes. Raises UserError that says what was found and what was expected.
    """
    for part, whose in OTHERS.items():
        if any(part in name for name in published):
            raise UserError(f"these weights are {whose}; {CANNOT}")
    is_uvit = any(re.search(r"\bin_blocks\.\d", name) for name in published)
    published, alignment_depth = _with_uniform_names(published, alignment_depth)
    published, notes = _with_one_projector(published)
    published, has_null, of_labels = _with_null_label(published, classes)
    config = _recognise(published, is_uvit, latent_channels, heads, alignment_depth, grid)
    family, why = choose_family(published, config, evidence)
    if family == DIT:
        config = replace(config, prediction="noise")
    weights = {ours: published[theirs].float() for theirs, ours in _names(published).items()}
    if family == "uvit":
        weights[POSITIONS] = published["pos_embed"][0].float()
    if config.learned_positions:
        weights["positions"] = published["pos_embed"].float()
    _refuse_other_rotations(published, config)
    with torch.device("meta"):  # no memory, no initialisation: only names and shapes are asked for
        expected = Denoiser(config).state_dict()
    wrong = sorted(
        (expected.keys() ^ weights.keys())
        | {name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape}
    )
    if wrong:
        raise UserError(
            f"looks like {family}, but these weights are missing, unknown or of another shape: {', '.join(wrong)}"
        )
    if family in TIME_FROM_NOISE:
        weights = reverse_time(weights)
    return OfficialModel(family, config, weights, has_null, (*why, *notes, *of_labels))


def export_official(
    family: Family, config: DenoiserConfig, weights: Mapping[str, Tensor], *, has_null: bool = True
) -> dict[str, Tensor]:
    """The published names and time convention for a model of ours: the inverse of `import_official`.

    Without `has_null` the last row of the labels' embeddings is left out, as in models trained without label dropout.
    """
    if family in TIME_FROM_NOISE:
        weights = reverse_time(weights)
    others = {*(() if family in ("redi", "sfd") else ("projector",)), *(() if config.parts.swiglu else sit.SWIGLU)}
    theirs_by_ours = {ours: theirs for theirs, ours in KEYS.items() if theirs not in others}
    positions = position_embedding(config.token_grid, config.width, len(config.tokens), config.position_grid)
    published = {"pos_embed": positions, **_rotary_tables(config)}
    for name, value in weights.items():
        if name in ("positions", POSITIONS):
            published["pos_embed"] = value.reshape(1, -1, config.width)
        else:
            stem, theirs = _match(name, theirs_by_ours)
            published[theirs + name[len(stem) :]] = value
    if not has_null:
        published[LABELS] = published[LABELS][:-1]
    if family == "sfd":
        return as_sfd(published)
    return _as_uvit(published, config.depth // 2) if family == "uvit" else published


def reverse_time(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the same model with t replaced by 1 − t and v by −v. Its own inverse, up to rounding.

    By angle addition, cos(ω(1−t)) = cos ω cos ωt + sin ω sin ωt and sin(ω(1−t)) = sin ω cos ωt − cos ω sin ωt, so the
    first layer of the time embedding absorbs the change; the output layers change sign.
    """
    changed = dict(weights)
    half = FREQUENCIES // 2
    # The frequencies as the model has them: rounded to float32.
    exponent = -torch.log(torch.tensor(MAX_PERIOD, dtype=torch.float64)) * torch.arange(half) / half
    omega = torch.exp(exponent.float()).double()
    of_cos, of_sin = weights[TIME_WEIGHT].double().split(half, dim=1)
    changed[TIME_WEIGHT] = torch.cat(
        [of_cos * omega.cos() + of_sin * omega.sin(), of_cos * omega.sin() - of_sin * omega.cos()], dim=1
    ).to(weights[TIME_WEIGHT].dtype)
    for name, value in weights.items():
        if name.startswith(("velocity.", "token_velocities.")):
            changed[name] = -value
    return changed


def _with_uniform_names(
    published: Mapping[str, Tensor], alignment_depth: int | None
) -> tuple[dict[str, Tensor], int | None]:
    """Drop the prefixes of wrappers, and rename the late blocks of old REPA files (`decoder_blocks.i`).

    Those begin after the block that is aligned. Returns the weights and that block, where it is known.
    """
    plain = {name.removeprefix("module."): value for name, value in published.items()}
    if early := [int(m[1]) for name in plain if (m := re.match(r"in_blocks\.(\d{1,4})\.", name))]:
        return _from_uvit(plain, 1 + max(early)), alignment_depth
    if any(name.startswith(f"{SEMANTIC}.") for name in plain):
        return from_sfd(plain), alignment_depth or SFD.alignment.after_block
    late = {name: int(m[1]) for name in plain if (m := re.match(r"decoder_blocks\.(\d{1,4})\.", name))}
    if late:
        first = _blocks(plain)
        if alignment_depth not in (None, first):
            raise UserError(
                f"alignment depth {alignment_depth} given, but the file's decoder starts after block {first}"
            )
        for name, number in late.items():
            plain[f"blocks.{number + first}.{name.split('.', 2)[2]}"] = plain.pop(name)
        alignment_depth = first
    return plain, alignment_depth


def _from_uvit(published: Mapping[str, Tensor], early: int) -> dict[str, Tensor]:
    """U-ViT's weights, with so many early blocks, under the names of the others, and all blocks counted in a row."""
    first = {"in_blocks": 0, "mid_block": early, "out_blocks": early + 1}

    def renamed(name: str) -> str:
        if block := re.match(r"(in_blocks|out_blocks|mid_block)\.(?:(\d{1,4})\.)?", name):
            return f"blocks.{first[block[1]] + int(block[2] or 0)}.{name[block.end() :]}"
        stem = next((stem for stem in OF_UVIT if name.startswith(f"{stem}.")), "")
        return OF_UVIT[stem] + name[len(stem) :] if stem else name

    return {renamed(name): value for name, value in published.items()}


def _as_uvit(published: Mapping[str, Tensor], early: int) -> dict[str, Tensor]:
    """The inverse of `_from_uvit`."""
    stems = {others: theirs for theirs, others in OF_UVIT.items()}

    def renamed(name: str) -> str:
        if block := re.match(r"blocks\.(\d+)\.", name):
            number, rest = int(block[1]), name[block.end() :]
            if number == early:
                return f"mid_block.{rest}"
            return f"in_blocks.{number}.{rest}" if number < early else f"out_blocks.{number - early - 1}.{rest}"
        stem = next((stem for stem in stems if name.startswith(f"{stem}.")), "")
        return stems[stem] + name[len(stem) :] if stem else name

    return {renamed(name): value for name, value in published.items()}


def _rotary_tables(config: DenoiserConfig) -> dict[str, Tensor]:
    """LightningDiT's, (patches, width of a head) each, whose pairs of channels have one angle."""
    if not config.parts.rope:
        return {}
    rotation = rotation_of(config.token_grid, config.width // config.heads, 0, config.position_grid)
    return {name: rotation[part].repeat_interleave(2, dim=1) for name, part in ROTARY.items()}


def _refuse_other_rotations(published: Mapping[str, Tensor], config: DenoiserConfig) -> None:
    """Raise UserError if the rotary tables in a file are not those of its sizes."""
    for name, expected in _rotary_tables(config).items():
        table = published.get(name)
        if table is None or table.shape != expected.shape or not torch.allclose(table.float(), expected, atol=1e-2):
            raise UserError(f"{name} has other rotary positions than LightningDiT's code, which cannot be imported")


def _with_one_projector(published: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Leave out all projectors but the first, of models that were aligned with several encoders; and say so."""
    surplus = {name: m[1] for name in published if (m := re.match(r"projectors\.([1-9]\d*)\.", name))}
    if not surplus:
        return published, ()
    which = ", ".join(dict.fromkeys(surplus.values()))
    kept = {name: value for name, value in published.items() if name not in surplus}
    return kept, (f"It was aligned with several encoders: projectors {which}, which only training uses, are left out.",)


def _with_null_label(
    published: dict[str, Tensor], classes: int | None
) -> tuple[dict[str, Tensor], bool, tuple[str, ...]]:
    """Add a null label's embedding, of zeros, where a row per class is all there is; whether there was one; and what is
    to be said of another number of rows."""
    table = published.get(LABELS)
    if table is None or table.ndim != 2 or not classes or len(table) == classes + 1:
        return published, True, ()
    if len(table) == classes:
        return {**published, LABELS: torch.cat([table, torch.zeros_like(table[:1])])}, False, ()
    rows = len(table)
    return published, True, (f"Of {classes} classes its labels have {rows} rows: taken for {rows - 1} and none.",)


def _blocks(published: Mapping[str, Tensor]) -> int:
    """How many blocks the weights are of. Raises UserError if some are missing."""
    numbers = {int(m[1]) for name in published if (m := re.match(r"blocks\.(\d{1,4})\.", name))}
    if numbers != {*range(len(numbers))}:
        missing = min({*range(len(numbers))} - numbers)
        raise UserError(f"not a SiT-like checkpoint: it has blocks up to {max(numbers)}, but no blocks.{missing}")
    return len(numbers)


def _recognise(
    published: Mapping[str, Tensor],
    is_uvit: bool,
    latent_channels: int,
    heads: int | None,
    alignment_depth: int | None,
    grid: tuple[int, int] | None,
) -> DenoiserConfig:
    inputs, likeness = "x_embedder.proj.weight", "U-ViT's" if is_uvit else "a SiT-like"
    dimensions = {"pos_embed": 3, inputs: 4, OUTPUTS: 2}
    if not is_uvit or LABELS in published:  # An unconditional U-ViT has none.
        dimensions[LABELS] = 2
    said = {name: next(iter(_as_uvit({name: torch.empty(0)}, 0))) if is_uvit else name for name in dimensions}
    for name, count in dimensions.items():
        if name not in published:
            found = ", ".join(sorted(_as_uvit(published, 0) if is_uvit else published)[:4])
            raise UserError(
                f"not {likeness} checkpoint: no {said[name]} (expected {', '.join(said.values())}; found {found}, …)"
            )
        if published[name].ndim != count or not published[name].numel():
            raise UserError(f"not {likeness} checkpoint: {said[name]} has shape {tuple(published[name].shape)}")
    width, channels, patch, _ = published[inputs].shape
    outputs = published[OUTPUTS].shape[0]
    has_class_token = "cls_projectors2.weight" in published
    local_channels = channels - latent_channels
    blocks, heads = _blocks_of(published, width, is_uvit), heads or _heads(published, width)
    other = f"choose the autoencoder whose latents it learned, with {option('autoencoder')}"
    if local_channels < 0:
        raise UserError(
            f"the checkpoint has {channels} input channels, fewer than the {latent_channels} latent channels: {other}"
        )
    learn_sigma = outputs == 2 * patch**2 * channels
    if not learn_sigma and outputs != patch**2 * channels:
        raise UserError(f"final_layer.linear has {outputs} rows; expected {patch**2 * channels}, or twice that (SiT)")
    is_sfd = OFFSET in published
    if local_channels and (learn_sigma or is_uvit or (blocks != Blocks() and not is_sfd)):
        kind = "U-ViT's" if is_uvit else "SiT's" if blocks == Blocks() else "LightningDiT's"
        raise UserError(
            f"the checkpoint has {channels} input channels and no local map (it is {kind} kind), but the latents have "
            f"{latent_channels}: {other}"
        )
    depth = _blocks(published)
    if not depth:
        raise UserError("not a SiT-like checkpoint: it has no blocks.0")
    if is_uvit:
        leading, fixed_positions = 1 + (LABELS in published), False
    else:
        leading, fixed_positions = int(has_class_token), True
    token_grid, learned = _positions(published, leading, patch, grid, fixed_positions)
    last = next((published[k] for k in ("projectors.0.4.weight", "projector.4.weight") if k in published), None)
    # Training alone uses the projector, so that a depth that is not known may be wrong without harm.
    aligned_after = min(alignment_depth or (8 if depth >= 24 else 4), depth)
    always = ALWAYS["lightning"]
    is_lightning = not is_uvit and blocks.beside(always) == blocks
    try:
        return DenoiserConfig(
            modalities=tuple(
                Modality(part.modality, part.kind, channels, is_class_token=part.is_class_token)
                for part, channels in (
                    (Latent, latent_channels),
                    (LocalSemantics, local_channels),
                    (ClassToken, published["cls_projectors2.weight"].shape[-1] if has_class_token else 0),
                )
                if channels
            ),
            grid=(token_grid[0] * patch, token_grid[1] * patch),
            conditions={CLASS: published[LABELS].shape[0] - 1} if LABELS in published else {},
            depth=depth - is_uvit,  # It does not count the block in the middle.
            width=width,
            heads=heads,
            patch=patch,
            backbone="uvit" if is_uvit else "lightning" if is_lightning else "sit",
            blocks=replace(blocks, rms_norm=False, rope=False, swiglu=False) if is_lightning else blocks,
            prediction="noise-sd" if is_uvit else "velocity",
            times=SFD.times if is_sfd else "shared",
            learn_sigma=learn_sigma,
            alignment_depth=aligned_after if last is not None else 0,
            alignment_width=last.shape[0] if last is not None else 0,
            alignment_hidden=last.shape[-1] if last is not None else DenoiserConfig.alignment_hidden,
            learned_positions=learned,
        )
    except ValueError as error:
        raise UserError(f"these weights are of no model that can be built: {error}") from None


def _blocks_of(published: Mapping[str, Tensor], width: int, is_uvit: bool) -> Blocks:
    """What the transformer is made of, by the names and shapes of the first block."""
    modulation = published.get("blocks.0.adaLN_modulation.1.weight")
    return Blocks(
        rms_norm="blocks.0.norm1.weight" in published and not is_uvit,
        qk_norm="blocks.0.attn.q_norm.weight" in published,
        rope=any(name in published for name in ROTARY),
        swiglu="blocks.0.mlp.w12.weight" in published,
        shift=modulation is None or modulation.shape[0] != 4 * width,
        time_mlp=is_uvit and "t_embedder.mlp.0.weight" in published,
        convolution="convolution.weight" in published,
    )


def _heads(published: Mapping[str, Tensor], width: int) -> int:
    """The number of attention heads. Raises UserError where nothing tells."""
    for name in ("blocks.0.attn.q_norm.weight", *ROTARY):
        if name in published and (of_head := published[name].shape[-1]) and width % of_head == 0:
            return width // of_head
    if width not in PUBLISHED_HEADS:
        raise UserError(
            f"width {width} is none of {', '.join(map(str, PUBLISHED_HEADS))}: give the number of attention heads with "
            f"{option('heads')}"
        )
    return PUBLISHED_HEADS[width]


def _positions(
    published: Mapping[str, Tensor], leading: int, patch: int, grid: tuple[int, int] | None, may_be_fixed: bool
) -> tuple[tuple[int, int], bool]:
    """The grid of patches that the position embedding is of, behind so many leading tokens, and whether it is learned
    where it `may_be_fixed`."""
    positions = published["pos_embed"]
    width, tokens = positions.shape[-1], positions.shape[1] - leading
    asked = None if grid is None else (grid[0] // patch, grid[1] // patch)
    if asked and asked[0] * asked[1] != tokens:
        raise UserError(f"pos_embed is of {tokens} patches, but {option('resolution')} asks for {asked[0]}×{asked[1]}")
    grids = [(tokens // columns, columns) for columns in range(1, tokens + 1) if tokens % columns == 0]
    fixable = may_be_fixed and width % 4 == 0
    tolerance = 1e-5 if positions.dtype == torch.float32 else 1e-2  # half precision rounds numbers up to 1 so much
    for candidate in sorted(grids, key=lambda sides: abs(sides[0] - sides[1])) if fixable else []:
        fixed = position_embedding(candidate, width, leading)
        if torch.allclose(positions.float(), fixed, atol=tolerance):
            if asked and asked != candidate:
                raise UserError(
                    f"pos_embed is of {candidate[0]}×{candidate[1]} patches, but {option('resolution')} asks for "
                    f"{asked[0]}×{asked[1]}"
                )
            return candidate, False
    side = round(tokens**0.5)
    if not asked and side**2 != tokens:
        raise UserError(
            f"pos_embed has {tokens} learned patch positions, which is not a square grid: give "
            f"{option('resolution')} HEIGHT WIDTH"
        )
    return asked or (side, side), may_be_fixed


def _names(published: Mapping[str, Tensor]) -> dict[str, str]:
    """Published name → ours, for every weight but the position embedding."""
    names: dict[str, str] = {}
    for name in published:
        if name not in ("pos_embed", *ROTARY):
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
