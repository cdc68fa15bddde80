"""What heads and drawn data sets say of how they were made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reglue.files import read_json, read_jsonl
from reglue.perception.agreement import Estimate
from reglue.perception.heads import HeadSpec

RECORD, JOURNAL = "dataset.json", "drawn.jsonl"
REMEDY = "choose another folder, or delete this one and draw its images again"
COPY = 0.5
"""Of that: an image that is nearer to a training image is flagged as its copy."""


@dataclass(frozen=True)
class HeadRecord:
    """`training.json`: how a head was trained, and how well it does on images that it was not trained on."""

    options: dict[str, str]
    images_sha256: str
    """Of the store's images."""
    fitted: int
    selected: int
    measured: int
    """Images."""
    chosen: float
    """The ridge's penalty, or the step at which training stopped."""
    scores: dict[str, Estimate]
    """On the measured images. Of class maps there is `accuracy` alone, of images by their mean over patches."""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A line of `drawn.jsonl`: an image that was drawn, kept or not."""

    index: int
    label: str
    """The class it was drawn as; nothing where there are none."""
    agreement: float
    """Mean intersection over union of what the head sees in the local map and in the decoded image."""
    kept: bool
    nearest: str | None = None
    """The training image that is nearest by the encoder's class token; None if there are none to compare with."""
    closeness: float | None = None
    """How far that one is, as a share of what is usual there; below `COPY` it is taken for a copy."""

    @property
    def copied(self) -> bool:
        """Whether it is taken for a copy of a training image."""
        return self.closeness is not None and self.closeness < COPY


@dataclass(frozen=True)
class DatasetRecord:
    """`dataset.json`: everything that decides the data set, and what it is."""

    protocol: dict[str, Any]
    """Of sampling, as samples have it, with the head and how images are chosen."""
    head: HeadSpec
    boxes: dict[str, int] = field(default_factory=dict[str, int])
    """How many each class has, by name."""
    files: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of each file but this one; of pictures alone until all are drawn."""


def read_record(folder: Path) -> DatasetRecord:
    """The record of a data set. Raises UserError if it is damaged."""
    return read_json(folder / RECORD, DatasetRecord, REMEDY)


def read_rows(folder: Path) -> list[Drawn]:
    """What was drawn. Raises UserError for damage."""
    return read_jsonl(folder / JOURNAL, Drawn, "delete it, and its images are drawn again")
