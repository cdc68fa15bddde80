"""Whose a published checkpoint is: what tells the families apart, and what each one's class can be built with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from reglue.config import ClassToken, Latent, LocalSemantics
from reglue.diffusion.conditions import CLASS
from reglue.diffusion.denoiser import DenoiserConfig
from reglue.diffusion.specs import Blocks
from reglue.errors import UserError, option

Family = Literal["sit", "dit", "repa", "redi", "reg", "reglue", "lightningdit", "sfd", "uvit"]

TIME_FROM_NOISE: frozenset[Family] = frozenset({"sit", "redi", "lightningdit", "sfd"})
"""The families whose published time runs from noise (0) to data (1)."""

PREDICTION, PATH_TYPE, ENCODER_DEPTH, NUM_CLASSES = "prediction", "path_type", "encoder_depth", "num_classes"
"""Options of the published trainings that weights do not tell: what is predicted, the path, after how many blocks the
projector reads, and how many classes there are besides none. In our safetensors files they are metadata."""
NUM_HEADS = "num_heads"
"""Option of the published classes, which some trainings keep."""
LABEL_DROPOUTS = ("class_dropout_prob", "cfg_prob")
"""Options of the published trainings: the share of samples trained without their class."""
FAMILY = "family"
"""Option in our files."""
MAP_DROPOUT = "dino_drop_prob"
"""ReDi's option for the share of the training without the map; None is 0."""
VELOCITY = ("v", "velocity")
"""How the published codes call what our models predict: REPA's and those made of it, and SiT's."""
DIT: Family = "dit"
"""The family with the shapes of SiT's, whose networks predict noise."""
FAMILY_NAMES = re.compile(rf"(?<![a-z])(?:{'|'.join(get_args(Family))})(?![a-z])", re.IGNORECASE)
NAMES = {
    "sit": "SiT",
    DIT: "DiT",
    "repa": "REPA",
    "redi": "ReDi",
    "reg": "REG",
    "reglue": "REGLUE",
    "lightningdit": "LightningDiT",
    "sfd": "SFD",
    "uvit": "U-ViT",
}
"""As they are written."""
CANNOT = "they cannot be imported: choose a checkpoint of SiT, DiT, REPA, ReDi, REG, REGLUE, LightningDiT, SFD or U-ViT"
OTHERS = {
    "r_embedder.": "MeanFlow's",
    "t_pixel_embedder.": "Latent Forcing's",
    "transformer_blocks.": "of a transformer of diffusers",
}
"""What only the names of other models' weights have in them."""
OUTPUTS = "final_layer.linear.weight"


@dataclass(frozen=True)
class Evidence:
    """What speaks for some families, where shapes leave several."""

    families: frozenset[str]
    reason: str
    """Completes a sentence that begins "since"."""
    firm: bool = False
    """Whether the user has said so, and weights of other families are refused."""


def evidence_in(file: Path, arguments: Mapping[str, Any], said: str | None) -> list[Evidence]:
    """What the user said, the options that a file was trained with, and its name, say about its family."""
    found = [Evidence(frozenset({said}), f"{option('family')} says so", firm=True)] if said else []
    if (ours := arguments.get(FAMILY)) in get_args(Family):
        found.append(Evidence(frozenset({str(ours)}), "its record says so"))
    model = str(arguments.get("model", ""))[:40]
    if name := FAMILY_NAMES.search(model):
        # SiT's, REPA's, ReDi's, REG's and REGLUE's code all call their models SiT.
        found.append(_for_dit(name[0].lower() == DIT, f"its options name the model {model}"))
    elif PREDICTION in arguments or PATH_TYPE in arguments:
        found.append(_for_dit(False, "its options are those of SiT's code"))
    if arguments.get(PREDICTION) == VELOCITY[1]:
        found.append(Evidence(TIME_FROM_NOISE, f"its options have {PREDICTION} {VELOCITY[1]}, as in SiT's code"))
    named = {name.lower() for name in FAMILY_NAMES.findall(file.stem)}
    if named and (DIT in named) == (named == {DIT}):
        found.append(_for_dit(DIT in named, "its name says so"))
    return found


def _for_dit(is_dit: bool, reason: str) -> Evidence:
    return Evidence(frozenset({DIT}) if is_dit else frozenset(get_args(Family)) - {DIT}, reason)


def choose_family(
    published: Mapping[str, Tensor], config: DenoiserConfig, evidence: Sequence[Evidence]
) -> tuple[Family, tuple[str, ...]]:
    """The family of weights, and what is to be said about the choice. Raises UserError for another than the user's."""
    usual = family_of(config)
    by_name = usual in ("lightningdit", "sfd", "uvit")
    alone = not (by_name or config.alignment_width or config.tokens or len(config.maps) > 1)
    either: tuple[Family, ...] = ("sit", DIT) if alone else ()
    possible: list[Family] = [usual, *(name for name in either if name != usual)]
    doubt = ""
    if config.learn_sigma:
        # SiT's second half of the outputs gets no gradient and stays as it began; DiT's predicts the variance.
        if published[OUTPUTS].unflatten(0, (config.patch**2, -1))[:, config.channels :].any():
            doubt = " (though the second half of its outputs is not zero, as DiT's is not)"
        else:
            evidence = [*evidence, Evidence(frozenset({"sit"}), "the second half of its outputs is zero")]
    shapes = f"By its shapes it is {' or '.join(NAMES[name] for name in possible)}"
    reasons: list[str] = []
    for each in evidence:
        left = [name for name in possible if name in each.families]
        if each.firm and not left:
            raise UserError(
                f"{option('family')} {' '.join(each.families)}: by their shapes these weights are {NAMES[usual]}'s"
            )
        if 0 < len(left) < len(possible):
            possible = left
            reasons.append(each.reason)
    family = possible[0]
    if not alone:
        return family, ()
    if reasons:
        return family, (f"{shapes}: {NAMES[family]}, since {' and '.join(reasons)}.",)
    return family, (
        f"{shapes}, and nothing says which: assuming {NAMES[family]}{doubt}. If its samples are noise, it is another "
        f"one: name it with {option('family')}.",
    )


def channels_of(config: DenoiserConfig, name: str) -> int:
    """The channels of a modality; 0 if the model does not have it."""
    modality = config.modality(name)
    return modality.channels if modality else 0


def family_of(config: DenoiserConfig) -> Family:
    """The published family whose models are built like this one. Raises UserError, by name, if there is none."""
    published = {Latent.modality, LocalSemantics.modality, ClassToken.modality}
    is_uvit, parts = config.backbone == "uvit", config.parts
    predictions = ("noise-sd",) if is_uvit else ("velocity", "noise")
    strangers = [
        *(f"modality {modality.name}" for modality in config.modalities if modality.name not in published),
        *(f"condition {name}" for name in config.conditions if name != CLASS),
        *([f"backbone {config.backbone}"] if config.backbone not in ("sit", "lightning", "uvit") else []),
        *([f"prediction {config.prediction}"] if config.prediction not in predictions else []),
        *([f"times {config.times}"] if config.times not in ("shared", "lead") else []),
        *(["a convolutional projector"] if config.alignment_width and config.alignment_projector != "mlp" else []),
    ]
    if strangers:
        raise UserError(f"no published code has a model with {', '.join(strangers)}")
    with_class_token, with_local = (channels_of(config, part.modality) > 0 for part in (ClassToken, LocalSemantics))
    more = {"a class token": with_class_token, "a local map": with_local, "alignment": config.alignment_width > 0}
    of_noise = config.prediction == "noise"
    family: Family | None = "uvit" if is_uvit else "lightningdit" if parts != Blocks() else None
    if config.times == "lead":
        other_kind = family != "lightningdit" or of_noise or config.learn_sigma or parts.convolution
        if other_kind or with_class_token or not with_local:
            raise UserError(
                "of models with times lead, the published one (SFD) has LightningDiT's blocks and a local map"
            )
        return "sfd"
    if family:
        own = Blocks(time_mlp=parts.time_mlp, convolution=parts.convolution) if is_uvit else parts
        more |= {
            "predicted noise": of_noise,
            "learn-sigma": is_uvit and config.learn_sigma,
            "a last convolution": not is_uvit and parts.convolution,
            "parts of LightningDiT": own != parts,
        }
        if other := [what for what, has in more.items() if has]:
            raise UserError(f"no published code has a model of {NAMES[family]}'s kind with {', '.join(other)}")
        return family
    if (of_noise or config.learn_sigma) and (other := [what for what, has in more.items() if has]):
        alone = "prediction noise (DiT)" if of_noise else "learn-sigma (SiT)"
        raise UserError(f"no published code has a model with {alone} and {other[0]}")
    if of_noise:
        return DIT
    if with_class_token:
        return "reglue" if with_local else "reg"
    if with_local:
        return "redi"
    return "sit" if config.learn_sigma else "repa"


def refuse_unpublished(config: DenoiserConfig) -> None:
    """Raise UserError, by name, for what the class of a model's family cannot be built with.

    All of them make square grids. REG's and REGLUE's make the class token as wide as what the projector is aligned
    with, and have a projector always.
    """
    rows, columns = config.token_grid
    if rows != columns:
        raise UserError(
            f"the published codes build square models alone: a file of {rows}×{columns} patches would fit none of them"
        )
    token, aligned = channels_of(config, ClassToken.modality), config.alignment_width
    if token and not aligned:
        raise UserError(
            f"no published code has a model with a class token and without alignment ({option('alignment.weight')} 0)"
        )
    if token and token != aligned:
        raise UserError(
            f"no published code has a model with a class token of {token} numbers and alignment with {aligned}: "
            "there both are of one encoder"
        )
