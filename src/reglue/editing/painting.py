"""Prototypes: what the classes of masks look like in the local map of a store, to paint with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from reglue.diffusion.modalities import Modality, State
from reglue.encoders.compressors import Compressor, CompressorSpec
from reglue.encoders.vision import EncoderSpec
from reglue.errors import UserError
from reglue.files import read_json, read_tensors, replacing, to_json, write_tensors
from reglue.perception.heads import Head, features_of_codes

SPEC_FILE, WEIGHTS_FILE = "prototypes.json", "prototypes.safetensors"
REMEDY = "make them again with `reglue prototypes`"
IGNORED = 255
"""The number in a mask of what belongs to no class."""


@dataclass(frozen=True)
class PrototypesSpec:
    """What prototypes were made from, as plain data."""

    column: str
    """Of the store: the codes that they are means of."""
    compressor: CompressorSpec
    """That made the codes."""
    images_sha256: str
    """Of the store's images."""
    looks: int
    """Prototypes of a class."""
    positions: tuple[int, ...]
    """How many positions of the store each class has; 0 for one that no mask has."""
    seed: int
    """Of the clusters."""
    masks_sha256: str
    """Of the masks, as they were cropped."""
    versions: dict[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class HeadLoss:
    """−Σ m_k log p_k over the cells of the encoder's grid: what a head sees in a local map, against a painting."""

    head: Head
    modality: Modality
    """The local map as the model learns it."""
    compressor: Compressor
    encoder: EncoderSpec
    """With the compressor's layers."""
    shares: Tensor
    """m (B, classes, *grid): how much of each cell the classes have; nothing of one that is free."""

    def of(self, images: slice) -> HeadLoss:
        """See `Loss.of`."""
        return replace(self, shares=self.shares[images])

    def __call__(self, data: State) -> State:
        """See `Loss.__call__`."""
        code = self.modality.denormalise(data[self.modality.name].float())
        scores = self.head(*features_of_codes(code, self.compressor, self.encoder), self.encoder.grid)
        return {self.modality.name: -(self.shares * scores.log_softmax(1)).flatten(1).sum(1)}


@dataclass(frozen=True)
class Prototypes:
    """Mean codes of classes."""

    spec: PrototypesSpec
    codes: Tensor
    """(classes, looks, K), raw: as the compressor gives them. Looks are in descending order of their share."""

    def save(self, folder: Path) -> None:
        """Write `prototypes.safetensors` and `prototypes.json` into a folder that is there."""
        write_tensors(folder / WEIGHTS_FILE, {"codes": self.codes})
        with replacing(folder / SPEC_FILE) as beside:
            beside.write_text(to_json(self.spec))

    def refuse_others(self, compressor: CompressorSpec | None, place: Path) -> None:
        """Raise UserError if these are not codes of a compressor."""
        if compressor != self.spec.compressor:
            raise UserError(f"{place} holds codes of another compressor than the run's; {REMEDY} from the run's store")

    @property
    def classes(self) -> list[int]:
        """Those that have one."""
        return [label for label, count in enumerate(self.spec.positions) if count]

    def map_of(self, labels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Labels (H, W) int64 as codes (looks, K, *grid), Σ m_k·p_k with the classes' shares of each cell, and where.

        A cell is painted, bool (*grid), if half of it is; its classes' shares then are those of what is painted.
        """
        shares = shares_of(labels[None], len(self.codes), grid)[0]
        painted = shares.sum(0)
        code = torch.einsum("khw,klc->lchw", shares, self.codes)
        return code / painted.clamp(min=1e-6), painted >= 0.5


def shares_of(labels: Tensor, classes: int, grid: tuple[int, int]) -> Tensor:
    """How much of each cell of a grid the classes have: labels (N, H, W) integer → float32 (N, classes, *grid)."""
    return torch.stack(
        [F.adaptive_avg_pool2d((labels == label).float()[:, None], grid)[:, 0] for label in range(classes)], dim=1
    )


def load_prototypes(folder: Path) -> Prototypes:
    """What `Prototypes.save` wrote. Raises UserError for a missing or damaged file."""
    if not (folder / SPEC_FILE).is_file():
        raise UserError(f"{folder} has no {SPEC_FILE}: give a folder that `reglue prototypes` made")
    spec = read_json(folder / SPEC_FILE, PrototypesSpec, REMEDY)
    tensors = read_tensors(folder / WEIGHTS_FILE, REMEDY, sealed=True)
    codes = tensors.get("codes", torch.empty(0))
    if codes.shape != (len(spec.positions), spec.looks, spec.compressor.channels):
        raise UserError(f"{folder / WEIGHTS_FILE} does not belong to {SPEC_FILE} beside it; {REMEDY}")
    return Prototypes(spec, codes)
