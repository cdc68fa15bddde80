"""How images and labels are found, and which of them are taken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from reglue.errors import UserError, option
from reglue.files import TakesPaths


@dataclass(frozen=True, kw_only=True)
class Reading(TakesPaths):
    """How images and labels are found in what is no folder with a sub-folder per class."""

    labels: Path | None = None
    """Table of labels for a folder or tar shards: a .csv or .tsv with columns such as file_name and label, or a .json
    {"FILE": LABEL, …}."""
    no_labels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Treat all images, at any depth of the folder, as one class."""
    class_level: int | None = None
    """Folders of this level are the classes, where there are folders in folders: 2 for photos/animals/cat/1.jpg, in a
    tar file too. Default: the first level."""
    class_names: Path | None = None
    """Text file with the names of the classes, one per line, for labels that are numbers or a stream."""
    image_column: str | None = None
    """Column of the images, in a table of labels that of their names; in tar shards their file ending. Default: the
    only one."""
    label_column: str | None = None
    """Column of the labels; in tar shards a file ending, or a key in .json. Default: the only one, .cls or the key
    label, and then the folders in the tar."""
    configuration: str | None = None
    """Configuration of a data set that has several."""
    split: str | None = None
    """Split of a data set that has several. Default: train."""
    streaming: bool = False
    """Read in order through `datasets`, without keeping the data set on disk. One process decodes, and resuming reads
    from the start again."""
    count: int | None = None
    """Images to take from a stream; needed if the stream does not state its length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels and self.no_labels:
            raise UserError(f"{option('labels')} gives labels and {option('no_labels')} takes none; leave one out")
        if self.count is not None and (self.count < 1 or not self.streaming):
            raise UserError(f"{option('count')} {self.count}: choose at least 1, with {option('streaming')}")
        if self.class_level is not None and (self.class_level < 1 or self.labels or self.no_labels):
            raise UserError(
                f"{option('class_level')} {self.class_level}: choose at least 1, without {option('labels')} or "
                f"{option('no_labels')}"
            )

    def found_from_anywhere(self) -> Reading:
        """The same with absolute paths, to be kept."""
        labels, names = (path and path.absolute() for path in (self.labels, self.class_names))
        return replace(self, labels=labels, class_names=names)


@dataclass(frozen=True)
class Subset:
    """Some images of every class, drawn at random. A larger subset of the same seed holds the smaller ones."""

    share: float = 1.0
    """Of each class, rounded, at least one."""
    per_class: int | None = None
    """At most so many of each class."""
    seed: int = 0
