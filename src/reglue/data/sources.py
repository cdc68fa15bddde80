"""What all sources of images share: how they are read, and sources over other sources."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from reglue.data.images import ImageSource, UnreadableImage
from reglue.data.label_tables import Asked, ImageNames, look_up, read_table
from reglue.data.labels import index_labels, read_class_names
from reglue.data.reading import Reading, Subset
from reglue.errors import UserError
from reglue.seeds import permutation

HUB = "hf:"
"""What the names of data sets on the hub begin with."""
FLIPPED = "#flipped"
"""What the name of an image's mirror image ends with."""


class Computed(Sequence):
    """A sequence whose items are made when they are asked for, so that it takes no memory."""

    def __init__(self, length: int, item: Callable[[int], Any]):
        self._length, self._item = length, item

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return self._item(index)


class Derived(ImageSource):
    """Images of another source."""

    def __init__(self, images: ImageSource):
        self._images = images
        self.path, self.names, self.notes = images.path, images.names, images.notes
        self.class_names, self.sequential = images.class_names, images.sequential

    def find(self, index: int) -> Path | bytes:
        """See `ImageSource.find`."""
        return self._images.find(index)

    def fingerprint(self) -> str:
        """Of all of the images that it takes from."""
        return self._images.fingerprint()


class Relabelled(Derived):
    """Images with labels from a table (`labels.read_table`)."""

    def __init__(self, images: ImageSource, reading: Reading, named: Callable[[str], str]):
        """`named` turns a name in the table into the name here: a.JPG of a tar file is a.jpg."""
        assert reading.labels is not None
        super().__init__(images)
        known = ImageNames(images.names, images.path, reading.labels, named)
        # In tar files, the other option names the ending of the images.
        asked = Asked(reading.image_column if named is str else None, reading.label_column)
        labels = look_up(read_table(reading.labels, known, asked), images.names, reading.labels, images.path)
        self.labels, self.class_names = index_labels(
            labels, images.names.__getitem__, class_names_of(reading), str(reading.labels)
        )

    def fingerprint(self) -> str:
        """SHA-256 of the fingerprint of the images and of their labels."""
        return hashlib.sha256(f"{super().fingerprint()} {self.labels}".encode()).hexdigest()


class Chosen(Derived):
    """Some of the images of each class. The fingerprint is that of all; the store records the subset beside it."""

    def __init__(self, images: ImageSource, subset: Subset):
        super().__init__(images)
        labels = np.asarray(images.labels)
        drawn = []
        for label in range(max(1, len(images.class_names))):
            of_class = np.flatnonzero(labels == label)
            wanted = max(1, round(subset.share * len(of_class)))
            wanted = min(wanted, subset.per_class or wanted)
            order = permutation(subset.seed, "subset of a class", label, len(of_class)).numpy()
            drawn.append(of_class[order[:wanted]])
        self._indices = np.sort(np.concatenate(drawn))
        self.names = Computed(len(self._indices), lambda i: images.names[self._indices[i]])
        self.labels = labels[self._indices].tolist()

    def find(self, index: int) -> Path | bytes:
        """See `ImageSource.find`."""
        return self._images.find(int(self._indices[index]))


class Mirrored(Derived):
    """Each image followed by its mirror image, decoded once if they are read one after the other."""

    def __init__(self, images: ImageSource):
        super().__init__(images)
        self._last: tuple[Any, Tensor | UnreadableImage] | None = None
        self.names = Computed(2 * len(images), lambda i: images.names[i // 2] + FLIPPED * (i % 2))
        self.labels = Computed(2 * len(images), lambda i: images.labels[i // 2])

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """See `ImageSource.load`."""
        original, flipped = divmod(index, 2)
        last = self._last  # Looked at once: another thread may put another image there.
        if last is None or last[0] != (original, resolution):
            last = self._last = (original, resolution), self._images.load(original, resolution)
        image = last[1]
        if not flipped:
            return image
        return image.flip(-1) if isinstance(image, Tensor) else replace(image, name=image.name + FLIPPED)


def class_names_of(reading: Reading) -> tuple[str, ...] | None:
    """The names in the file that the user gave, if any."""
    return read_class_names(reading.class_names) if reading.class_names else None


def repeated(names: Sequence[str]) -> str | None:
    """The first name that occurs twice, if one does."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def distinct_names(path: Path, files: Sequence[Path]) -> list[str]:
    """The names of files; where two are equal, all of their paths within the folder that they share.

    Raises UserError if `path`, which means these files, means one of them twice.
    """
    names = [file.name for file in files]
    if repeated(names):
        shared = os.path.commonpath([file.absolute().parent for file in files])
        names = [file.absolute().relative_to(shared).as_posix() for file in files]
    if twice := repeated(names):
        raise UserError(f"{path} means {twice} twice; name every file once")
    return names
