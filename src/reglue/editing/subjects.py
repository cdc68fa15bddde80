"""Images that are edited, and what is asked of each: checked first, without any network, and then encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reglue.data.images import laid_over
from reglue.data.masks import crop_mask, read_depth, read_mask
from reglue.data.placing import WHITE, Box, Place, feathered
from reglue.diffusion.modalities import State
from reglue.editing.encoding import ImageEncoder, Picture, as_pixels, open_picture
from reglue.editing.options import FEATURES, LOCAL, OTHERS, Editing
from reglue.editing.painting import IGNORED, load_prototypes
from reglue.errors import UserError, option
from reglue.perception.heads import Head, load_head
from reglue.run import RunRecord

SOURCES = {**OTHERS, "paste": LOCAL}
"""The options that name another image, and what they take of it."""
DEPTH = "depth"
"""What some heads predict in place of classes."""


@dataclass(frozen=True)
class Piece:
    """A box of one map that goes to a place in another, in cells of their grid."""

    left: int
    top: int
    right: int
    bottom: int
    to_left: int
    to_top: int
    to_size: tuple[int, int]
    """(rows, columns) that it gets."""
    mirror: bool

    def put(self, into: Tensor, source: Tensor) -> Tensor:
        """The map `into` (1, K, h, w) with the piece of `source`."""
        piece = source[..., self.top : self.bottom, self.left : self.right]
        piece = piece.flip(-1) if self.mirror else piece
        if piece.shape[2:] != self.to_size:
            piece = F.interpolate(piece, self.to_size, mode="bilinear", align_corners=False)
        result = into.clone()
        rows, columns = self.to_size
        result[..., self.to_top : self.to_top + rows, self.to_left : self.to_left + columns] = piece
        return result


@dataclass(frozen=True)
class Subject:
    """An image that is edited, and what its edits are to have. Tensors have a batch of one."""

    image: Image.Image
    """As it is, in RGB or RGBA."""
    place: Place
    own: State
    """What the model would learn of it."""
    known: State
    """What is held until it is let go, of other images perhaps; a batch of several where edits take them in turn."""
    where: State
    """Where, of maps that are not held everywhere: bool (1, 1, h, w)."""
    outside: Tensor | None
    """Where a mask leaves the image as it is: bool (1, 1, h, w)."""
    share: np.ndarray | None
    """How much of each pixel (height, width) is drawn; None for all of it."""
    labels: np.ndarray | None
    """What is painted on what the model sees of it (H, W): classes uint8, or depths float32, NaN where it is free."""
    head: Head | None
    """What is to see that."""
    target: tuple[Tensor, Tensor] | None
    """What its hidden tokens are led to (1, N, D), and which ones are, bool (1, N)."""

    def edit(self, i: int) -> Subject:
        """The same for edit i: looks vary from one to the next."""
        return replace(self, known={name: value[i % len(value)][None] for name, value in self.known.items()})

    def shown(self) -> State:
        """What an edit resembles: what is held, and the image's own elsewhere."""
        held = {n: torch.where(self.where[n], v, self.own[n]) if n in self.where else v for n, v in self.known.items()}
        return {**self.own, **held}


@dataclass(frozen=True)
class Request:
    """What is asked of an image, found to be possible. Nothing is encoded yet."""

    editing: Editing
    image: Image.Image
    place: Place
    pixels: Tensor
    """What the model sees of it: uint8 (1, 3, H, W)."""
    white: np.ndarray | None
    """Where its mask is white: bool (height, width)."""
    inside: Tensor | None
    """The cells of the grid with something white: bool (1, 1, h, w)."""
    sources: Mapping[str, Tensor]
    """What the model sees of the images that options of `SOURCES` name."""
    piece: Piece | None
    part: Box | None
    """The tokens of `features_from` whose mean counts, as a box in their grid; None for each by itself."""
    labels: np.ndarray | None
    """See `Subject.labels`."""
    painted: tuple[Tensor, Tensor] | None
    """The looks of that with prototypes (looks, K, h, w), as the model learns them, and where, bool (1, 1, h, w)."""
    head: Head | None
    """What is to see it, without prototypes."""

    @classmethod
    def of(cls, picture: Picture, editing: Editing, record: RunRecord) -> Request:
        """Raises UserError for images that cannot be read, and for what does not fit the image."""
        image, name = open_picture(picture), named(picture)
        place, grid = Place(image.size, record.resolution), record.denoiser.grid
        white = read_white(editing, image.size, name)
        inside = None if white is None else place.cells(white, grid)[None, None]
        if inside is not None and not inside.any():
            raise UserError(f"{option('mask')}: its white lies outside of the part of {name} that the model sees")
        head = read_head(editing, record)
        labels = read_painting(editing, record, image.size, name, head)
        if labels is not None and white is not None:
            free = IGNORED if labels.dtype == np.uint8 else np.nan
            labels[np.asarray(crop_mask(Image.fromarray(white), record.resolution)) == 0] = free
        if labels is not None and head:
            refuse_unseen(labels, head, editing)
        others = {field: open_picture(value) for field in SOURCES if (value := getattr(editing, field)) is not None}
        return cls(
            editing=editing,
            image=image,
            place=place,
            pixels=as_pixels(image, record.resolution),
            white=white,
            inside=inside,
            sources={field: as_pixels(other, record.resolution) for field, other in others.items()},
            piece=find_piece(editing, others["paste"].size, place, name, grid) if "paste" in others else None,
            part=find_part(editing, others, record),
            labels=labels,
            painted=None if labels is None else paint(editing, record, labels),
            head=head,
        )

    def subject(self, encoder: ImageEncoder) -> Subject:
        """The image and what is asked, encoded."""
        own, device = encoder.encode(self.pixels), encoder.device
        seen = {
            field: encoder.encode(pixels)[SOURCES[field]]
            for field, pixels in self.sources.items()
            if SOURCES[field] != FEATURES
        }
        known = {name: own[name] for name in self.editing.keep if name != FEATURES}
        known |= {OTHERS[field]: value for field, value in seen.items() if field in OTHERS}
        inside = None if self.inside is None else self.inside.to(device)
        maps = [modality.name for modality in encoder.record.denoiser.maps]
        where = {} if inside is None else dict.fromkeys(maps, inside)
        if self.piece:
            known[LOCAL] = self.piece.put(known.get(LOCAL, own[LOCAL]), seen["paste"])
        if self.painted:
            code, there = (part.to(device) for part in self.painted)
            if LOCAL in known:
                known[LOCAL] = torch.where(there, code, known[LOCAL])
            else:
                known[LOCAL], where[LOCAL] = code, there & where.get(LOCAL, there)
        return Subject(
            image=self.image,
            place=self.place,
            own=own,
            known=known,
            where={name: part for name, part in where.items() if name in known},
            outside=None if inside is None else ~inside,
            share=None if self.white is None else feathered(self.white, self.editing.feather),
            labels=self.labels,
            head=self.head and self.head.to(device),
            target=self._target(encoder, inside) if FEATURES in self.editing.held else None,
        )

    def _target(self, encoder: ImageEncoder, inside: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Subject.target`. What stands for the whole image is led where all of it is drawn."""
        grid = encoder.record.denoiser.token_grid
        tokens = encoder.target(self.sources.get("features_from", self.pixels))
        leading = tokens.shape[1] - grid[0] * grid[1]
        chosen = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if inside is not None:
            chosen[:, leading:] = F.adaptive_max_pool2d(inside.float(), grid).flatten(1) > 0
        if self.part:
            left, top, right, bottom = self.part
            part = tokens[:, leading:].unflatten(1, grid)[:, top:bottom, left:right]
            tokens = part.flatten(1, 2).mean(1, keepdim=True).expand_as(tokens)
        chosen[:, :leading] = inside is None and self.part is None
        return tokens, chosen


def refuse_lacking(editing: Editing, record: RunRecord) -> None:
    """Raise UserError if a run does not learn what an edit asks for."""
    learned = {modality.name: modality.kind for modality in record.denoiser.modalities}
    for name, asked in editing.needs():
        if name == FEATURES:
            refuse_unaligned(record, asked)
        elif name not in learned:
            raise UserError(f"{asked}: this model does not learn {name}, only {', '.join(learned)}")
        if asked in (option("paste"), option("paint")) and learned[name] != "map":
            raise UserError(f"{asked}: what this model learns as {name} is no map")


def refuse_unaligned(record: RunRecord, asked: str) -> None:
    """Raise UserError if a run's hidden tokens say nothing of a vision encoder's last layer."""
    if not record.denoiser.alignment_width:
        raise UserError(f"{asked}: this model was not aligned with a vision encoder; choose a run that was")
    if record.encoder and record.encoder.layers[-1] != record.encoder.depth - 1:
        raise UserError(
            f"{asked}: this run reads layers {list(record.encoder.layers)} of its encoder, not the last one, with "
            "which it was aligned; choose a run that does"
        )


def read_white(editing: Editing, size: tuple[int, int], name: str) -> np.ndarray | None:
    """Where a mask is white: bool (height, width). Raises UserError for one that does not fit the image."""
    if editing.mask is None:
        return None
    mask = laid_over(open_picture(editing.mask), "black").convert("L")  # What is transparent is not painted.
    if mask.size != size:
        raise UserError(
            f"{option('mask')} {named(editing.mask)} has {mask.width}×{mask.height} pixels, and {name} "
            f"{size[0]}×{size[1]}; give a mask of the image's size"
        )
    white = np.asarray(mask) >= WHITE
    if white.all() or not white.any():
        what, remedy = ("all white", "leave it out") if white.any() else ("all black", "paint white what is to change")
        raise UserError(f"{option('mask')} {named(editing.mask)} is {what}; {remedy}")
    return white


def find_piece(editing: Editing, source_size: tuple[int, int], place: Place, name: str, grid: tuple[int, int]) -> Piece:
    """Where a piece is and goes. Raises UserError if it lies outside of what the model sees of either image."""
    box, at = editing.box, editing.at
    assert box is not None
    assert at is not None
    source = Place(source_size, place.size)
    width, height = (max(1, round(side * editing.scale)) for side in (box[2] - box[0], box[3] - box[1]))
    goes = (*at, at[0] + width, at[1] + height)
    first = cells_of(editing, "box", box, source, grid, named(editing.paste))
    last = cells_of(editing, "at", goes, place, grid, name)
    return Piece(*first, *last[:2], (last[3] - last[1], last[2] - last[0]), editing.mirror)


def find_part(editing: Editing, others: Mapping[str, Image.Image], record: RunRecord) -> Box | None:
    """See `Request.part`. Raises UserError if it lies outside of what the model sees of that image."""
    if editing.box is None or "features_from" not in others or "paste" in others:
        return None
    source = Place(others["features_from"].size, record.resolution)
    return cells_of(editing, "box", editing.box, source, record.denoiser.token_grid, named(editing.features_from))


def cells_of(editing: Editing, field: str, box: Box, place: Place, grid: tuple[int, int], whose: str) -> Box:
    """A box of pixels in cells of a grid. Raises UserError if it lies outside of what the model sees of an image."""
    cells = place.on_grid(box, grid)
    seen = min(cells[:2]) >= 0 and cells[2] <= grid[1] and cells[3] <= grid[0]
    if not seen or box[2] > place.image_size[0] or box[3] > place.image_size[1]:
        raise UserError(
            f"{option(field)} {' '.join(map(str, getattr(editing, field)))}: the piece lies outside of what the "
            f"model sees of {whose}, {' '.join(map(str, place.box))} (left, top, right, bottom)"
        )
    return cells


def read_painting(
    editing: Editing, record: RunRecord, size: tuple[int, int], name: str, head: Head | None
) -> np.ndarray | None:
    """A painting, cropped as the image: see `Subject.labels`. Raises UserError for one that does not fit the image."""
    if editing.paint is None:
        return None
    depth, what = head is not None and head.spec.task == DEPTH, named(editing.paint)
    labels = read_label_map(editing.paint, depth)
    if abs(labels.width * size[1] - labels.height * size[0]) > max(*size, *labels.size):
        raise UserError(
            f"{option('paint')} {what} has {labels.width}×{labels.height} pixels, and {name} {size[0]}×{size[1]}; "
            "paint the whole image, in its proportions"
        )
    cropped = np.array(crop_mask(labels, record.resolution))
    return np.where(np.isfinite(cropped) & (cropped > 0), cropped, np.float32("nan")) if depth else cropped


def paint(editing: Editing, record: RunRecord, labels: np.ndarray) -> tuple[Tensor, Tensor] | None:
    """The looks of a painting (looks, K, h, w), as the model learns them, and where it is painted, bool (1, 1, h, w).

    Raises UserError for labels without prototypes, and for prototypes that are not of the run's codes.
    """
    if editing.prototypes is None:
        return None
    modality = record.denoiser.modality(LOCAL)
    assert modality is not None
    looks = load_prototypes(editing.prototypes)
    looks.refuse_others(record.compressors.get(LOCAL), editing.prototypes)
    refuse_unknown(labels, looks.classes, editing, "prototype")
    code, there = looks.map_of(torch.from_numpy(labels.astype(np.int64)), record.denoiser.grid)
    return modality.normalise(code), there[None, None]


def read_head(editing: Editing, record: RunRecord) -> Head | None:
    """What is to see a painting. Raises UserError for a head that does not read the run's map."""
    return None if editing.head is None else fitting_head(editing.head, record)


def refuse_unseen(labels: np.ndarray, head: Head, editing: Editing) -> None:
    """Raise UserError for a painting of what a head does not predict."""
    if head.spec.task != DEPTH:
        refuse_unknown(labels, range(head.spec.outputs), editing, "class in the head")
        return
    asked, known, ends = f"{option('paint')} {named(editing.paint)}", labels[~np.isnan(labels)], head.spec.depth_range
    if not known.size:
        raise UserError(f"{asked} has no depth, only 0, which is free; paint something")
    spread = ends[1] - ends[0] if ends else 0.0
    if ends and (known.max() < ends[0] - spread or known.min() > ends[1] + spread):
        raise UserError(
            f"{asked} has depths from {known.min():g} to {known.max():g}, and the head predicts {ends[0]:g} to "
            f"{ends[1]:g}; paint in its unit"
        )


def fitting_head(path: Path, record: RunRecord) -> Head:
    """A head that reads a run's local map. Raises UserError for any other, and for a run without one."""
    compressor, asked = record.compressors.get(LOCAL), f"{option('head')} {path}"
    if compressor is None or record.encoder is None:
        learned = ", ".join(modality.name for modality in record.denoiser.modalities)
        raise UserError(f"{asked} reads a local map, and this model learns {learned}; choose a run that has one")
    head = load_head(path)
    try:
        read = replace(record.encoder, layers=compressor.layers or record.encoder.layers)
        head.spec.check_fits(read, "the run's local map", class_token=False)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from None
    return head


def refuse_unknown(labels: np.ndarray, known: Sequence[int], editing: Editing, what: str) -> None:
    """Raise UserError for labels that are not known, and for a painting of none."""
    asked, painted = f"{option('paint')} {named(editing.paint)}", np.unique(labels[labels != IGNORED]).tolist()
    if unknown := [label for label in painted if label not in known]:
        raise UserError(
            f"{asked} has label {unknown[0]}, of which there is no {what}; paint with "
            f"{', '.join(map(str, known))} ({IGNORED} is free)"
        )
    if not painted:
        raise UserError(f"{asked} has no label but {IGNORED}, which is free; paint something")


def read_label_map(picture: Picture, depth: bool) -> Image.Image:
    """A painted map as an image of class numbers, or of depths. Raises UserError for anything else."""
    if not isinstance(picture, Image.Image):
        return (read_depth if depth else read_mask)(Path(picture))
    if depth and picture.mode in ("L", "I", "I;16", "F"):
        return Image.fromarray(np.asarray(picture).astype(np.float32))
    if picture.mode not in ("1", "L", "P"):
        raise UserError(f"a painting holds colours (mode {picture.mode}), not class numbers; give a palette image")
    return Image.fromarray(np.asarray(picture).astype(np.uint8))


def named(picture: Picture | None) -> str:
    """What messages call a picture."""
    return "the image" if picture is None or isinstance(picture, Image.Image) else str(picture)
