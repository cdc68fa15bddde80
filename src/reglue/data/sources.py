"""Where images come from: folders, tar shards, parquet files, and whatever `datasets` loads.

Preparing resumes, and many processes share it, so images are read by their index. Three ways lead there without a
second copy on the disk: files of a folder, byte ranges of a tar file (found by `tarfile`), and rows of a parquet file
(found by pyarrow). `datasets` itself would first copy tar and parquet files into its own Arrow files, which doubles
the disk that they take; it is left to what only it can load: data sets it has saved, and the hub, which it downloads.
With `--streaming` it reads tar files, parquet files and the hub in order, and keeps nothing.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from braceexpand import braceexpand
from torch import Tensor

from reglue.data.images import ImageFolder, ImageSource, UnreadableImage, is_image, list_folder, load_crop
from reglue.data.labels import index_labels, look_up, read_class_names, read_table
from reglue.errors import UserError
from reglue.files import TakesPaths
from reglue.seeds import permutation

HUB = "hf:"
"""What the names of data sets on the hub begin with."""
FLIPPED = "#flipped"
"""What the name of an image's mirror image ends with."""
DATA_FILES = (".tar", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Reading(TakesPaths):
    """How images and labels are found in what is no folder with a sub-folder per class."""

    labels: Path | None = None
    """Table of labels for a folder or tar shards: a .csv with columns file and label, or a .json {"FILE": LABEL, …}."""
    no_labels: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take all images, at any depth of a folder, as one class."""
    class_names: Path | None = None
    """Text file with the names of the classes, one per line, for labels that are numbers or a stream."""
    image_column: str | None = None
    """Column of images, or ending of images in tar shards. Default: the only one."""
    label_column: str | None = None
    """Column of labels; in tar shards an ending or a key in .json. Default: the only one; .cls or key label."""
    configuration: str | None = None
    """Of a data set that has several."""
    split: str | None = None
    """Of a data set that has several. Default: train."""
    streaming: bool = False
    """Read in order through `datasets` and keep nothing on the disk. One process decodes; resuming reads again."""
    count: int | None = None
    """How many images of a stream to take. Needed where the stream does not tell how many it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels and self.no_labels:
            raise UserError("--labels gives labels and --no-labels takes none; leave one out")
        if self.count is not None and (self.count < 1 or not self.streaming):
            raise UserError(f"--count {self.count}: choose at least 1, with --streaming")

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


def is_on_hub(path: Path) -> bool:
    """Whether images are `hf:OWNER/NAME`, and no files here."""
    return str(path).startswith(HUB)


def open_images(
    path: Path, reading: Reading = Reading(), subset: Subset | None = None, flips: bool = False
) -> ImageSource:
    """Images at a path, of whatever kind is there.

    `path` is a folder of images, a .tar or .parquet file, a folder of such, a pattern (`shard-{00..99}.tar`,
    `*.parquet`), a data set that `datasets` has saved, or `hf:OWNER/NAME`. With `flips`, images 2i and 2i + 1 are an
    image and its mirror image. Raises UserError for what is missing or cannot be told.
    """
    images = _open_whole(path, reading)
    if subset:
        if images.sequential:
            raise UserError("--share and --per-class need all labels at once; leave them out, or --streaming")
        images = Chosen(images, subset)
    return Mirrored(images) if flips else images


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


# ---- sources over other sources


class Relabelled:
    """Images with labels from a table (`labels.read_table`).

    It may name images of tar shards as they are called there: a.JPG is a.jpg here.
    """

    sequential = False

    def __init__(self, images: ImageFolder | TarImages, reading: Reading):
        assert reading.labels is not None
        self._images = images
        self.path, self.names = images.path, images.names
        named = _name_in_tar if isinstance(images, TarImages) else str
        labels = look_up(read_table(reading.labels, named), images.names, reading.labels, images.path)
        self.labels, self.class_names = index_labels(
            labels, images.names.__getitem__, class_names_of(reading), str(reading.labels)
        )

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """As `ImageSource.load`."""
        return self._images.load(index, resolution)

    def fingerprint(self) -> str:
        """SHA-256 of the fingerprint of the images and of their labels."""
        return hashlib.sha256(f"{self._images.fingerprint()} {self.labels}".encode()).hexdigest()


class Chosen:
    """Some of the images of each class. The fingerprint is that of all; the store records the subset beside it."""

    sequential = False

    def __init__(self, images: ImageSource, subset: Subset):
        labels = np.asarray(images.labels)
        drawn = []
        for label in range(max(1, len(images.class_names))):
            of_class = np.flatnonzero(labels == label)
            wanted = max(1, round(subset.share * len(of_class)))
            wanted = min(wanted, subset.per_class or wanted)
            order = permutation(subset.seed, "subset of a class", label, len(of_class)).numpy()
            drawn.append(of_class[order[:wanted]])
        self._images, self._indices = images, np.sort(np.concatenate(drawn))
        self.path, self.class_names = images.path, images.class_names
        self.names: Sequence[str] = Computed(len(self), lambda i: images.names[self._indices[i]])
        self.labels: Sequence[int] = labels[self._indices].tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """As `ImageSource.load`."""
        return self._images.load(int(self._indices[index]), resolution)

    def fingerprint(self) -> str:
        """Of all of the images that it takes from."""
        return self._images.fingerprint()


class Mirrored:
    """Each image followed by its mirror image, decoded once if they are read one after the other."""

    def __init__(self, images: ImageSource):
        self._images = images
        self._last: tuple[Any, Tensor | UnreadableImage] | None = None
        self.path, self.class_names, self.sequential = images.path, images.class_names, images.sequential
        self.names: Sequence[str] = Computed(len(self), lambda i: images.names[i // 2] + FLIPPED * (i % 2))
        self.labels: Sequence[int] = Computed(len(self), lambda i: images.labels[i // 2])

    def __len__(self) -> int:
        return 2 * len(self._images)

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """As `ImageSource.load`."""
        original, flipped = divmod(index, 2)
        last = self._last  # Looked at once: another thread may put another image there.
        if last is None or last[0] != (original, resolution):
            last = self._last = (original, resolution), self._images.load(original, resolution)
        image = last[1]
        if not flipped:
            return image
        return image.flip(-1) if isinstance(image, Tensor) else replace(image, name=image.name + FLIPPED)

    def fingerprint(self) -> str:
        """Of all of the images that it takes from."""
        return self._images.fingerprint()


# ---- tar shards


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
        if any(content.read()):  # `tarfile` says nothing if a header is cut, nor if files are missing at the end.
            raise UserError(f"{file} is no whole tar file (it has no end mark); fetch it again, or unpack it first")
    try:
        for key, group in itertools.groupby(members(), key=lambda member: member[0]):
            yield key, {ending: member for _, ending, member in group}
    except tarfile.TarError as error:
        raise UserError(f"{file} is no whole tar file ({error}); fetch it again, or unpack it first") from error


def _key_and_ending(name: str) -> tuple[str, str]:
    """What the files of one sample share, and the ending of one of them in lower case."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower()


def _name_in_tar(name: str) -> str:
    """What an image of a tar file is called here, by its name there."""
    return ".".join(_key_and_ending(name))


def _image_of(members: dict[str, _Member], sample: str, reading: Reading) -> str | None:
    """The ending of a sample's image."""
    wanted = (reading.image_column or "").lower().removeprefix(".")
    endings = [ending for ending in members if (ending == wanted if wanted else is_image(f"a.{ending}"))]
    if len(endings) > 1:
        raise UserError(f"{sample} has images {', '.join(endings)}; choose one with --image-column")
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
            raise UserError(f"the .json beside {name} is not JSON ({error}); mend it, or use --no-labels") from error
        if isinstance(about, dict) and (column or "label") in about:
            return about[column or "label"]
    raise UserError(
        f"{name} has no label: no file .{ending} and no key {column or 'label'} in a .json beside it; name either with "
        "--label-column, or use --labels or --no-labels"
    )


def _read(file: Any, member: _Member) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) < member.size:
        raise OSError("the tar file is cut short")
    return content


# ---- which kind is at a path


def _open_whole(path: Path, reading: Reading) -> ImageSource:
    if is_on_hub(path) or reading.streaming:
        local_files = not is_on_hub(path) and not path.is_dir()
        return _tables().load(path, _files(path, reading) if local_files else (), reading)
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _tables().load_saved(path, reading)
    files = _files_in(path, reading) if path.is_dir() else _files(path, reading)
    if files and files[0].suffix == ".parquet":
        return _tables().ParquetImages(path, files, reading)
    images = TarImages(path, files, reading) if files else _open_folder(path, reading)
    return Relabelled(images, reading) if reading.labels else images


def _tables() -> ModuleType:
    from reglue.data import tables  # Only now: `datasets` takes seconds to import.

    return tables


def _open_folder(path: Path, reading: Reading) -> ImageFolder:
    for option in ("class_names", "image_column", "label_column", "configuration", "split"):
        if getattr(reading, option) and not (option == "class_names" and reading.labels):
            raise UserError(f"--{option.replace('_', '-')} is not for {path}, a folder of images; leave it out")
    return ImageFolder.unlabelled(path) if reading.no_labels or reading.labels else ImageFolder.open(path)


def _files(path: Path, reading: Reading) -> list[Path]:
    """The tar or parquet files that a path or a pattern means, in order."""
    if reading.split or reading.configuration:
        raise UserError(f"--split and --configuration are for data sets, not for {path}; name the files of one split")
    files = [path]
    if not path.exists():
        try:
            # Path.glob takes no pattern that begins at the root.
            matches = {name: sorted(glob.glob(name)) for name in braceexpand(str(path))}  # noqa: PTH207
        except ValueError as error:
            raise UserError(f"{path} is no pattern ({error}); write for example shard-{{00..99}}.tar") from error
        for name, found in matches.items():
            if not found:
                raise UserError(f"{name}: no such folder or file; give images, .tar, .parquet, or {HUB}OWNER/NAME")
        files = [Path(name) for found in matches.values() for name in found]
    for file in files:
        if file.suffix not in DATA_FILES:
            raise UserError(f"{file} is neither a folder nor a .tar or .parquet file; unpack it into a folder first")
    if len({file.suffix for file in files}) > 1:
        raise UserError(f"{path} means tar and parquet files; name the ones or the others")
    return files


def _files_in(folder: Path, reading: Reading) -> list[Path]:
    """The tar or parquet files of a folder and of its folders; none if it holds images."""
    images, folders = list_folder(folder)
    beside = [file for file in sorted(folder.iterdir()) if file.suffix in DATA_FILES]
    # One class folder tells; to look into all of them would take as long as to list the images.
    below = (folder / folders[0]).iterdir() if folders and not beside else ()
    if not beside and not any(file.suffix in DATA_FILES for file in below):
        return []
    if images:
        raise UserError(f"{folder} holds images (such as {images[0]}) beside {beside[0].name}; keep either")
    return _tables().files_of_split(folder, beside, reading)


def class_names_of(reading: Reading) -> tuple[str, ...] | None:
    """The names in the file that the user gave, if any."""
    return read_class_names(reading.class_names) if reading.class_names else None


def repeated(names: Sequence[str]) -> str:
    """The first name that occurs twice, of names of which one does."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))
