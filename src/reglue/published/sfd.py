"""SFD's two embeddings of time (arXiv 2512.04926) as one, and its other names for what LightningDiT has too."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from reglue.config import LocalSemantics
from reglue.errors import UserError

SEMANTIC, TEXTURE = "t_embedder_sem.mlp", "t_embedder_tex.mlp"
"""Their results stand one behind the other."""
JOINT = "t_embedder.mlp"
"""What the others call their one embedding of time."""
THEIRS, OTHERS = "repa_projector.", "projector."
"""What SFD's code and the others' call the projector."""
OFFSET = f"time_offsets.{LocalSemantics.modality}.weight"


def from_sfd(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SFD's weights under the names of the others, with one embedding E of time, of twice the width.

    With E(t) = [E_s(t); E_z(t)], and A that keeps the first half of E(t_s) − E(t_z), `TimeOffsets` gives
    [E_s(t_s); E_z(t_z)]. Raises UserError if the two do not have the same shapes.
    """
    weights = _renamed(published, THEIRS, OTHERS)
    for layer, part in product((0, 2), ("weight", "bias")):
        names = [f"{embedding}.{layer}.{part}" for embedding in (SEMANTIC, TEXTURE)]
        found = [weights.pop(name, torch.empty(0)) for name in names]
        expected = (2 if part == "weight" else 1, found[0].shape)
        if any((one.ndim, one.shape) != expected or not one.numel() for one in found):
            shapes = " and ".join(str(tuple(one.shape)) for one in found)
            raise UserError(f"not an SFD checkpoint: {' and '.join(names)} have shapes {shapes}")
        stacked = torch.block_diag(*found) if (layer, part) == (2, "weight") else torch.cat(found)
        weights[f"{JOINT}.{layer}.{part}"] = stacked
    width = len(weights[f"{JOINT}.2.bias"])
    return {**weights, OFFSET: torch.diag((torch.arange(width) < width // 2).float())}


def as_sfd(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_sfd`. Raises UserError for an embedding of time that is not two."""
    published = _renamed(weights, OTHERS, THEIRS)
    joint = {key: published.pop(f"{JOINT}.{key}") for key in ("0.weight", "0.bias", "2.weight", "2.bias")}
    offset, half = published.pop(OFFSET), len(joint["2.bias"]) // 2
    for first, embedding in ((0, SEMANTIC), (half, TEXTURE)):
        own = slice(first, first + half)
        published |= {f"{embedding}.{key}": value[own] for key, value in joint.items()}
        published[f"{embedding}.2.weight"] = joint["2.weight"][own, own]
    again = from_sfd(published)
    if not (torch.equal(again[f"{JOINT}.2.weight"], joint["2.weight"]) and torch.equal(again[OFFSET], offset.float())):
        raise UserError(
            "SFD's code has an embedding of its own for each of two times, and this model has learned one for both: "
            "only what was imported can be exported"
        )
    return published


def _renamed(weights: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The weights with another beginning of some names."""
    return {new + name.removeprefix(old) if name.startswith(old) else name: x for name, x in weights.items()}
