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
SPREAD = 0.1
"""Standard deviation of painted depths, as a share of a head's range."""


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
    """What a head sees in a local map, against a painting, summed over the cells of the encoder's grid.

    Of classes it is −Σ m_k log p_k, of depths ½ m ((d − d*)/s)², with a tenth of the head's range as s.
    """

    head: Head
    modality: Modality
    """The local map as the model learns it."""
    compressor: Compressor
    encoder: EncoderSpec
    """With the compressor's layers."""
    shares: Tensor
    """m (B, classes or 1, *grid): how much of each cell the classes have, or is painted; nothing of one that is
    free."""
    depths: Tensor | None = None
    """d* (B, 1, *grid)."""

    def of(self, images: slice) -> HeadLoss:
        """See `Loss.of`."""
        depths = None if self.depths is None else self.depths[images]
        return replace(self, shares=self.shares[images], depths=depths)

    def __call__(self, data: State) -> State:
        """See `Loss.__call__`."""
        code = self.modality.denormalise(data[self.modality.name].float())
        scores = self.head(*features_of_codes(code, self.compressor, self.encoder), self.encoder.grid)
        if self.depths is None:
            losses = -self.shares * scores.log_softmax(1)
        else:
            nearest, farthest = self.head.spec.depth_range or (0.0, 1.0)
            losses = self.shares * ((scores - self.depths) / (SPREAD * (farthest - nearest))).square() / 2
        return {self.modality.name: losses.flatten(1).sum(1)}


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


def depths_of(depths: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean depths (N, 1, *grid) of depths (N, H, W), NaN where free, and how much of each cell is painted."""
    known = (~depths.isnan()).float()[:, None]
    shares, sums = (F.adaptive_avg_pool2d(x, grid) for x in (known, depths[:, None].nan_to_num()))
    return sums / shares.clamp(min=1e-6), shares


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
