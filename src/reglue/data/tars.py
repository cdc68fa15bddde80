"""Images in tar shards, read in place by byte range. `tarfile` finds where the members are."""

from __future__ import annotations

import hashlib
import json
import os
import string
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from reglue.data.images import ImageSource
from reglue.data.labels import index_labels
from reglue.data.listing import classes_of, is_hidden, is_image, passed_over
from reglue.data.reading import Reading
from reglue.data.sources import Computed, class_names_of, distinct_names, repeated
from reglue.errors import UserError, one_line, option

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""What compressed files begin with."""
LINKS = 32
"""Links from one to the next that are followed."""
READ_AT_ONCE = 2**16
"""Bytes of zeros between joined tar files that are looked at together: a multiple of a block."""


class _Member(NamedTuple):
    """A file within a tar file."""

    offset: int
    size: int


class _Label(NamedTuple):
    """What a sample says of its label."""

    value: Any
    ending: str
    """Of the file that says so."""


class TarImages(ImageSource):
    """The images of tar shards, in WebDataset's layout (the files of one sample share a name) or of class folders.

    Opening reads the headers, and the labels. An image is named SHARD/FILE, with the folders of SHARD where two shards
    have one name.
    """

    def __init__(self, path: Path, files: Sequence[Path], reading: Reading):
        """Raises UserError for a damaged or compressed shard, two images of one name, and samples without a label."""
        self.path, self._files = path, files
        names: list[str] = []
        in_tar: list[str] = []
        places: list[tuple[int, ...]] = []
        told: list[_Label | None] = []
        endings: Counter[str] = Counter()
        labelled = not reading.no_labels and not reading.labels
        for index, (file, shard) in enumerate(zip(files, distinct_names(path, files), strict=True)):
            with file.open("rb") as content:
                for key, members in _samples(file, content).items():
                    images = _images_of(members, key, shard, reading)
                    used = set(images)
                    for image in images:
                        in_tar.append(f"{key}.{image}")
                        names.append(f"{shard}/{in_tar[-1]}")
                        places.append((index, *members[image]))
                        says = None
                        if labelled and reading.class_level is None:
                            says = _label_of(members, content, names[-1], reading)
                        if says:
                            used.add(says.ending)
                        told.append(says)
                    endings.update(f".{ending}" if ending else "" for ending in members if ending not in used)
        self.notes = passed_over(endings)
        if not names:
            why = "".join(f" ({note})" for note in self.notes)
            raise UserError(f"{path} holds no images{why}; those in a tar file end in .jpg, .png and the like")
        if twice := repeated(names):
            raise UserError(f"{path} has two images {twice}; give every shard and image its own name")
        self.names, self._places = names, np.array(places)
        self.labels = Computed(len(names), lambda _: 0)
        if labelled:
            if any(told):
                labels = [says.value if says else _refuse_unlabelled(names[i], reading) for i, says in enumerate(told)]
            else:
                labels, notes = _folders(path, in_tar, names, reading)
                self.notes += notes
            self.labels, self.class_names = index_labels(labels, names.__getitem__, class_names_of(reading), str(path))

    def find(self, index: int) -> bytes:
        """See `ImageSource.find`."""
        shard, offset, size = self._places[index].tolist()
        with self._files[shard].open("rb") as file:
            return _read(file, _Member(offset, size))

    def fingerprint(self) -> str:
        """SHA-256 of the names, sizes and labels of the images."""
        digest = hashlib.sha256()
        for name, size, label in zip(self.names, self._places[:, 2].tolist(), self.labels, strict=True):
            digest.update(f"{name}\0{size}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _samples(file: Path, content: BinaryIO) -> dict[str, dict[str, _Member]]:
    """The samples of a tar file: by the name that their files share, each file by its ending in lower case."""
    samples: dict[str, dict[str, _Member]] = {}
    for name, member in _members(file, content):
        key, ending = _key_and_ending(name)
        members = samples.setdefault(key, {})
        if ending in members and is_image(name):
            raise UserError(f"{file} has two images {name}; give every image its own name")
        members[ending] = member
    return samples


def _members(file: Path, content: BinaryIO) -> Iterator[tuple[str, _Member]]:
    """The files in a tar file by their names, links as what they lead to. What nobody sees is passed over."""
    found: list[tuple[str, _Member | str]] = []
    with_holes: set[str] = set()
    for header in _headers(file, content):
        name = _from_root(header.name)
        if header.issym() or header.islnk():
            # Symbolic ones lead on from where they are, unless from the root.
            start = f"{name}/.." if header.issym() and not header.linkname.startswith("/") else ""
            found.append((name, _from_root(f"{start}/{header.linkname}")))
        elif header.isfile():
            found.append((name, _Member(header.offset_data, header.size)))
            if header.issparse():
                with_holes.add(name)
    place_of = dict(found)
    # All may lie in what is hidden elsewhere: home/me/.cache/cat/1.png.
    shared = len(os.path.commonpath([f"/{name.rpartition('/')[0]}" for name in place_of])) if found else 0
    for name, place in found:
        if any(is_hidden(part) for part in f"/{name}"[shared:].split("/")):
            continue
        if name in with_holes and is_image(name):
            raise UserError(f"{file} keeps {name} with holes (as a sparse file); unpack it into a folder first")
        target = name
        for _ in range(LINKS):
            if not isinstance(place, str):
                break
            target, place = place, place_of.get(place)
        if isinstance(place, _Member):
            yield name, place
        elif is_image(name):
            raise UserError(f"{file}: {name} is a link to {target}, which is not in it; unpack it where that is")


def _from_root(path: str) -> str:
    """A path from the root of the tar file, without a slash before it: ./a.png and /a.png are a.png."""
    return os.path.normpath(f"/{path}").lstrip("/")


def _headers(file: Path, content: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file, or of several that were joined to one. Raises UserError for any damage."""

    def damaged(reason: str) -> UserError:
        return UserError(f"{file} is not a whole tar file ({reason}); fetch it again, or unpack it first")

    size = os.fstat(content.fileno()).st_size
    beginning = content.read(8)
    for magic, program in COMPRESSED.items():
        if beginning.startswith(magic):
            raise damaged(f"it is compressed by {program}")
    start: int | None = 0
    while start is not None:
        try:
            content.seek(start)
            archive = tarfile.open(fileobj=content, mode="r:")  # noqa: SIM115, nothing to close but `content`
            while (header := archive.next()) is not None:
                archive.members = []  # type: ignore[reportAttributeAccessIssue], which keeps them all otherwise
                if header.size < 0 or archive.offset <= header.offset:
                    raise damaged(f"{header.name} has a negative size")
                if header.isfile() and not header.issparse() and header.offset_data + header.size > size:
                    raise damaged(f"{header.name} is cut short")
                yield header
        except UserError:
            raise
        except Exception as error:  # `tarfile` raises nearly anything for damaged headers.
            raise damaged(one_line(error)) from error
        # It stops without a word at a damaged header, at one that is cut, and at the end of a file that is cut.
        content.seek(archive.offset)
        block = content.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise damaged("it has no end mark")
        if any(block):
            raise damaged(f"at byte {archive.offset} there is no header")
        start = _behind_zeros(content)


def _behind_zeros(content: BinaryIO) -> int | None:
    """Where the next block begins that is not all zeros; None if the file ends before."""
    while chunk := content.read(READ_AT_ONCE):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            return content.tell() - len(chunk) + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    return None


def _key_and_ending(name: str) -> tuple[str, str]:
    """What the files of one sample share, and the ending of one of them in lower case."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower()


def name_in_tar(name: str) -> str:
    """What an image of a tar file is called here, by its name there."""
    return ".".join(_key_and_ending(name))


def _images_of(members: dict[str, _Member], key: str, shard: str, reading: Reading) -> list[str]:
    """The ending of a sample's image, if it has one.

    Several images in a folder with nothing else are no sample, but images of their own: cat/a.1.png and cat/a.2.png.
    """
    wanted = (reading.image_column or "").lower().removeprefix(".")
    endings = [ending for ending in members if (ending == wanted if wanted else is_image(f"a.{ending}"))]
    if len(endings) > 1 and not ("/" in key and len(endings) == len(members)):
        raise UserError(
            f"{shard}/{key} has images {', '.join(endings)} (a sample is what has one name up to the first dot); "
            f"choose one with {option('image_column')}, or rename them"
        )
    return endings


def _label_of(members: dict[str, _Member], file: BinaryIO, name: str, reading: Reading) -> _Label | None:
    """The label that a sample has in a file of its own or in its .json, if any."""
    column = reading.label_column
    ending = column.lower().removeprefix(".") if column else "cls"
    if ending in members:
        try:
            text = _read(file, members[ending]).decode("utf-8-sig").strip(f"\0{string.whitespace}")
        except UnicodeDecodeError as error:
            raise UserError(f"the .{ending} beside {name} is not text in UTF-8 ({error}); save it as such") from error
        return _Label(int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else text, ending)
    if "json" in members:
        try:
            about = json.loads(_read(file, members["json"]))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"the .json beside {name} is not JSON ({one_line(error)}); fix it, or use {option('no_labels')}"
            ) from error
        if isinstance(about, dict) and (column or "label") in about:
            return _Label(about[column or "label"], "json")
    return None


def _refuse_unlabelled(name: str, reading: Reading) -> NoReturn:
    ending, key = (reading.label_column or "cls").lower().removeprefix("."), reading.label_column or "label"
    raise UserError(
        f"{name} has no label: no file .{ending} and no key {key} in a .json beside it, nor is there a folder for each "
        f"class; name either with {option('label_column')}, or use {option('labels')} or {option('no_labels')}"
    )


def _folders(path: Path, in_tar: list[str], names: list[str], reading: Reading) -> tuple[list[str], tuple[str, ...]]:
    """The classes of images by the folders in the tar files, and notes. A folder that all share is none."""
    if reading.class_level is not None:
        return classes_of(path, in_tar, reading.class_level)
    shared = os.path.commonpath([PurePosixPath("/", name).parent for name in in_tar])
    below = [PurePosixPath("/", name).relative_to(shared).as_posix() for name in in_tar]
    lonely = next((i for i, name in enumerate(below) if "/" not in name), None)
    if reading.label_column or lonely is not None:
        _refuse_unlabelled(names[lonely or 0], reading)
    return classes_of(path, below)


def _read(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) < member.size:
        raise OSError("the tar file is cut short")
    return content
