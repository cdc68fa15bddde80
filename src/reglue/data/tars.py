"""Images in tar shards, read in place by byte range. `tarfile` finds where the members are."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from reglue.data.images import UnreadableImage, is_image, load_crop
from reglue.data.labels import index_labels
from reglue.data.reading import Reading
from reglue.data.sources import Computed, class_names_of, repeated
from reglue.errors import UserError, option


class _Member(NamedTuple):
    """A file within a tar file."""

    offset: int
    size: int


class TarImages:
    """The images of tar shards in WebDataset's layout: files of one sample follow each other and share a name.

    Opening reads the headers, and the labels. An image is named SHARD/FILE.
    """

    sequential = False

    def __init__(self, path: Path, files: Sequence[Path], reading: Reading):
        """Raises UserError for a damaged or compressed shard, two images of one name, and samples without a label."""
        self.path, self._files = path, files
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        labels: list[Any] = []
        for shard, file in enumerate(files):
            with file.open("rb") as content:
                for key, members in _samples(file):
                    image = _image_of(members, f"{file.name}/{key}", reading)
                    if image is None:
                        continue
                    names.append(f"{file.name}/{key}.{image}")
                    places.append((shard, members[image].offset, members[image].size))
                    if not reading.no_labels and not reading.labels:
                        labels.append(_label_of(members, content, names[-1], reading))
        if not names:
            raise UserError(f"{path} holds no images; those in a tar file end in .jpg, .png and the like")
        if len(set(names)) < len(names):
            raise UserError(f"{path} has two images {repeated(names)}; give every shard and image its own name")
        self.names, self._places = names, np.array(places)
        self.labels: Sequence[int] = Computed(len(names), lambda _: 0)
        self.class_names: tuple[str, ...] = ()
        if labels:
            self.labels, self.class_names = index_labels(labels, names.__getitem__, class_names_of(reading), str(path))

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """As `ImageSource.load`."""
        shard, offset, size = self._places[index].tolist()

        def read() -> bytes:
            with self._files[shard].open("rb") as file:
                return _read(file, _Member(offset, size))

        return load_crop(self.names[index], read, resolution)

    def fingerprint(self) -> str:
        """SHA-256 of the names, sizes and labels of the images."""
        digest = hashlib.sha256()
        for name, size, label in zip(self.names, self._places[:, 2].tolist(), self.labels, strict=True):
            digest.update(f"{name}\0{size}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _samples(file: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """The samples of a tar file: the name that their files share, and each file by its ending in lower case."""

    def members() -> Iterator[tuple[str, str, _Member]]:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[reportAttributeAccessIssue], which keeps them all otherwise
                key, ending = _key_and_ending(member.name)
                if member.isfile() and key and not key.endswith("/"):
                    yield key, ending, _Member(member.offset_data, member.size)

    with file.open("rb") as content:
        content.seek(-min(tarfile.BLOCKSIZE, file.stat().st_size), 2)
        if any(content.read()):  # `tarfile` does not notice a cut header, nor missing files at the end.
            raise UserError(f"{file} is not a whole tar file (it has no end mark); fetch it again, or unpack it first")
    try:
        for key, group in itertools.groupby(members(), key=lambda member: member[0]):
            yield key, {ending: member for _, ending, member in group}
    except tarfile.TarError as error:
        raise UserError(f"{file} is not a whole tar file ({error}); fetch it again, or unpack it first") from error


def _key_and_ending(name: str) -> tuple[str, str]:
    """What the files of one sample share, and the ending of one of them in lower case."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower()


def name_in_tar(name: str) -> str:
    """What an image of a tar file is called here, by its name there."""
    return ".".join(_key_and_ending(name))


def _image_of(members: dict[str, _Member], sample: str, reading: Reading) -> str | None:
    """The ending of a sample's image."""
    wanted = (reading.image_column or "").lower().removeprefix(".")
    endings = [ending for ending in members if (ending == wanted if wanted else is_image(f"a.{ending}"))]
    if len(endings) > 1:
        raise UserError(f"{sample} has images {', '.join(endings)}; choose one with {option('image_column')}")
    return endings[0] if endings else None


def _label_of(members: dict[str, _Member], file: Any, name: str, reading: Reading) -> Any:
    column = reading.label_column
    ending = column.lower().removeprefix(".") if column else "cls"
    if ending in members:
        text = _read(file, members[ending]).decode(errors="replace").strip()
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else text
    if "json" in members:
        try:
            about = json.loads(_read(file, members["json"]))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"the .json beside {name} is not JSON ({error}); fix it, or use {option('no_labels')}"
            ) from error
        if isinstance(about, dict) and (column or "label") in about:
            return about[column or "label"]
    raise UserError(
        f"{name} has no label: no file .{ending} and no key {column or 'label'} in a .json beside it; name either with "
        f"{option('label_column')}, or use {option('labels')} or {option('no_labels')}"
    )


def _read(file: Any, member: _Member) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) < member.size:
        raise OSError("the tar file is cut short")
    return content
