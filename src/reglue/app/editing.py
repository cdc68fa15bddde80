"""The Edit tab: an image, what of it stays, and what was painted on it, as options of `ImageModel.edit`."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image

from reglue.app.drawing import NO_CLASS, Wish
from reglue.app.visitor import Visitor
from reglue.app.work import Work
from reglue.app.workshop import Run, Workshop
from reglue.command_lines import changed, command_line
from reglue.data.placing import Place
from reglue.editing.options import CLASS_TOKEN, LOCAL, Editing
from reglue.editing.painting import IGNORED
from reglue.errors import UserError
from reglue.pipeline import ImageModel

FREE, KEEP, SWAP = "free", "keep", "from the other image"
SWAPPED = {LOCAL: "local_from", CLASS_TOKEN: "cls_from"}
"""The modalities that another image may give, and the options that ask for it."""
DEFAULTS = {part.name: part.default for part in fields(Editing)}
FINEST = 256
"""The longer side of what is painted on, in its own cells, at most."""


@dataclass(frozen=True)
class Painted:
    """What was painted on the canvas. Its cells cover the image evenly."""

    mask: np.ndarray | None = None
    """Where to draw anew: bool (rows, columns)."""
    labels: np.ndarray | None = None
    """Class numbers, 255 where nothing is painted: uint8 (rows, columns)."""
    box: tuple[int, int, int, int] | None = None
    """A piece of the map: left, top, right, bottom in pixels of the image."""
    at: tuple[int, int] | None = None
    """Where its upper left corner goes."""
    mirror: bool = False

    @classmethod
    def read(cls, text: str) -> Painted:
        """What the browser sends as JSON; nothing for an empty text. Raises UserError for anything else."""
        try:
            found = json.loads(text or "{}")
            shape = (int(found.get("rows", 0)), int(found.get("columns", 0)))
            mask, labels = (_cells(found.get(name, ""), shape) for name in ("mask", "labels"))
            piece = found.get("piece") or {}
            box, at = (tuple(int(number) for number in piece.get(name, ())) for name in ("box", "at"))
            if len(box) not in (0, 4) or len(at) not in (0, 2):
                raise ValueError("a piece has four edges and goes to two")
        except (ValueError, TypeError, AttributeError, binascii.Error) as error:
            raise UserError("what was painted cannot be read; clear it and paint again") from error
        return cls(
            mask=None if mask is None or not mask.any() else mask > 0,
            labels=None if labels is None or (labels == IGNORED).all() else labels,
            box=box if len(box) == 4 and len(at) == 2 else None,
            at=at if len(box) == 4 and len(at) == 2 else None,
            mirror=bool(piece.get("mirror")),
        )


@dataclass(frozen=True)
class EditWish(Wish):
    """What is to become of the image at hand."""

    classes: str = NO_CLASS
    count: int = 4
    held: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of each modality by name: free, keep, or from the other image."""
    strength: float = 1.0
    """1 begins with noise alone."""
    until: float = 0.0
    feather: int = 0
    resample: int = 0
    flow_edit: bool = False
    source_class: str = NO_CLASS


def canvas(run: Run, visitor: Visitor, workshop: Workshop) -> dict[str, Any]:
    """What the canvas shows of the image at hand, as plain data but for the images.

    `image` and `map` (None where the run has none) are PIL images; the map covers the part `box` (left, top, right,
    bottom) of the image that the model sees, in `grid` (rows, columns) cells. What is painted has `cells` (rows,
    columns). Raises UserError if there is no image, or it cannot be encoded.
    """
    image, model = visitor.open(), run.model()
    place, grid = Place(image.size, run.record.resolution), run.record.denoiser.grid
    share = min(1.0, FINEST / max(image.size))
    return {
        "image": image,
        "map": model.see(image).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
        if LOCAL in run.modalities
        else None,
        "box": place.box,
        "grid": grid,
        "cells": (max(1, round(image.height * share)), max(1, round(image.width * share))),
        "labels": [label for label, count in enumerate(workshop.prototypes.spec.positions) if count]
        if workshop.prototypes and LOCAL in run.modalities
        else [],
    }


def options_of(wish: EditWish, painted: Painted, visitor: Visitor, workshop: Workshop) -> dict[str, Any]:
    """The fields of `Editing` for a wish; whatever is an image becomes a file of the visitor's.

    Raises UserError if another image is asked for and there is none.
    """
    image = visitor.open()
    options: dict[str, Any] = {"keep": tuple(name for name, how in wish.held.items() if how == KEEP)}
    for name, how in wish.held.items():
        if how == SWAP:
            if visitor.other is None:
                raise UserError("there is no other image yet; drop one beside the canvas")
            options[SWAPPED[name]] = visitor.other
    if painted.mask is not None:
        options |= {"mask": visitor.write(_stretched(255 * painted.mask, image), "mask"), "feather": wish.feather}
    if painted.labels is not None:
        options["paint"] = visitor.write(_stretched(painted.labels, image), "labels")
        options["prototypes"] = workshop.prototypes_at
    if painted.box and painted.at:
        left, top, right, bottom = painted.box
        most = (image.width - (right - left), image.height - (bottom - top))
        at = tuple(max(0, min(corner, end)) for corner, end in zip(painted.at, most, strict=True))
        options |= {"paste": visitor.image, "box": painted.box, "at": at, "mirror": painted.mirror}
    holds = options["keep"] or {*SWAPPED.values(), "paste", "paint"} & options.keys()
    if wish.flow_edit:
        source = None if wish.source_class == NO_CLASS else wish.source_class
        options |= {"flow_edit": True, "source_class": source}
    return {
        **options,
        "until": wish.until if holds else 0.0,
        "strength": wish.strength if wish.strength < 1 else None,
        "resample": wish.resample,
    }


def edit(run: Run, wish: EditWish, options: Mapping[str, Any], visitor: Visitor, work: Work) -> list[Image.Image]:
    """Draw edits of the image at hand. Raises UserError for what contradicts itself or is not in the run."""
    model = run.model()
    assert visitor.image is not None
    return model.edit(
        visitor.image,
        count=wish.count,
        seed=wish.seed,
        classes=_classes(run, wish),
        controls=[work.watching(model)],
        **_sampling(wish, model),
        **options,
    )


def command(run: Run, wish: EditWish, options: Mapping[str, Any], visitor: Visitor) -> str:
    """The command line that draws the same edits, while the visitor's files are there."""
    model, named = run.model(), _classes(run, wish)
    sampling = changed(_sampling(wish, model), model.sampling_for(named is not None))
    options = {name: value for name, value in options.items() if value != DEFAULTS[name]}
    own = {"classes": () if named is None else (named,), "count": wish.count, "seed": wish.seed}
    device = None if run.device == "auto" else run.device
    return command_line("edit", run.name, visitor.image, out="edits", **own, **options, **sampling, device=device)


def _classes(run: Run, wish: EditWish) -> str | None:
    return None if wish.classes == NO_CLASS or not run.record.class_names else wish.classes


def _sampling(wish: EditWish, model: ImageModel) -> dict[str, Any]:
    """Guidance follows a class, and there is nothing to follow without one."""
    guided = wish.classes != NO_CLASS and bool(model.record.class_names)
    own = wish.sampling(model)
    return own if guided else {"sampler": wish.sampler, "steps": wish.steps}


def _cells(text: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Base64 of one byte for each cell as uint8 (rows, columns); None for nothing. Raises ValueError if it is not."""
    if not text:
        return None
    if not (0 < shape[0] <= FINEST and 0 < shape[1] <= FINEST):
        raise ValueError(f"{shape} cells")
    return np.frombuffer(base64.b64decode(text, validate=True), np.uint8).reshape(shape)


def _stretched(cells: np.ndarray, image: Image.Image) -> Image.Image:
    """Cells as a grey picture of the image's size, without smoothing."""
    return Image.fromarray(cells.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
