"""Images: what a source of them is, folders of files, and each image as a cropped RGB tensor."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from reglue.errors import UserError

EXTENSIONS = frozenset(
    (
        *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
    )
)
"""Files with these endings (in either case) are images; every other file is passed over."""

_peaks: ContextVar[list[int] | None] = ContextVar("peaks", default=None)


@contextmanager
def grey_peaks() -> Iterator[list[int]]:
    """A list to which the highest grey value (0 to 65535) of every 16-bit image that is decoded in the block comes."""
    peaks: list[int] = []
    token = _peaks.set(peaks)
    try:
        yield peaks
    finally:
        _peaks.reset(token)


@dataclass(frozen=True)
class UnreadableImage:
    """What stands in for an image that could not be decoded."""

    name: str
    """Its name in the source: within an image folder, its path."""
    reason: str
    """One line, from the decoder."""


class OneAtATime:
    """A lock for the threads of one process. A copy in another process has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[OneAtATime], tuple[()]]:
        return OneAtATime, ()


class ImageSource(Protocol):
    """Images in a fixed order, each readable by its index, in any process and, unless `sequential`, any thread."""

    @property
    def path(self) -> Path:
        """Where they are, as it was given."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """One for each image, no two equal. Some sources compute them when asked."""
        ...

    @property
    def labels(self) -> Sequence[int]:
        """Index into `class_names` of each image; zeros where there are no classes."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels; empty for unconditional images."""
        ...

    @property
    def sequential(self) -> bool:
        """Whether going to an image reads all of those before it, so that one process has to read them in order."""
        ...

    def __len__(self) -> int: ...

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """One image, decoded and cropped: uint8 (3, height, width), or why it cannot be read."""
        ...

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what distinguishes these images and labels from others."""
        ...


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder in a fixed order: by class, then by name.

    Each class is a sub-folder that holds its images directly. A folder that holds images itself has no classes.
    """

    path: Path
    names: tuple[str, ...]
    """Paths within the folder, with forward slashes: `n01440764/0001.jpg`, or `0001.jpg` where there are no classes."""
    labels: tuple[int, ...]
    """Index into `class_names` of each image; zeros where there are no classes."""
    class_names: tuple[str, ...]
    """Sorted names of the sub-folders; empty for an unconditional folder."""
    sequential = False

    @classmethod
    def open(cls, path: Path | str) -> ImageFolder:
        """List a folder of images. Hidden entries (`.name`) and files that are not images are passed over.

        Raises UserError for a folder that is missing or empty, that mixes images and class folders, or that has a class
        without images.
        """
        path = Path(path)
        _refuse_missing(path)
        images, folders = list_folder(path)
        if images and folders:
            raise UserError(
                f"{path} holds images (such as {images[0]}) beside sub-folders (such as {folders[0]}); put every image "
                "into a class folder, or leave only images"
            )
        if images:
            return cls(path, tuple(images), (0,) * len(images), ())
        if not folders:
            raise UserError(f"{path} holds no images; images end in {', '.join(sorted(EXTENSIONS))}")
        names: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            images, nested = list_folder(path / folder)
            if nested:
                raise UserError(
                    f"{path / folder} holds sub-folders (such as {nested[0]}), but a class folder holds only images; "
                    f"did you mean {path / folder} itself as the image folder?"
                )
            if not images:
                raise UserError(f"{path / folder} is a class without images; remove the folder or add images to it")
            names += [f"{folder}/{name}" for name in images]
            labels += [label] * len(images)
        return cls(path, tuple(names), tuple(labels), tuple(folders))

    @classmethod
    def unlabelled(cls, path: Path | str) -> ImageFolder:
        """List the images in a folder and in all of its sub-folders, sorted by path, without classes.

        Raises UserError for a folder that is missing or holds no images.
        """
        path = Path(path)
        _refuse_missing(path)
        names = tuple(sorted(_walk(path, "", frozenset())))
        if not names:
            raise UserError(f"{path} holds no images; images end in {', '.join(sorted(EXTENSIONS))}")
        return cls(path, names, (0,) * len(names), ())

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """One image, decoded and cropped: uint8 (3, height, width), or why it cannot be read."""
        name = self.names[index]
        return load_crop(name, lambda: self.path / name, resolution)

    def fingerprint(self) -> str:
        """SHA-256 of the names and file sizes: changes when images are added, removed, renamed or replaced."""
        digest = hashlib.sha256()
        for name in self.names:
            try:
                size = (self.path / name).stat().st_size
            except OSError:
                size = -1  # A broken link; `load` will say so.
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


def load_crop(name: str, find: Callable[[], Path | bytes], size: tuple[int, int]) -> Tensor | UnreadableImage:
    """Decode and crop the image whose file, or whose file's content, `find` gives: uint8 (3, height, width).

    Whatever `find` or the decoder raises becomes the reason why the image called `name` cannot be read.
    """
    file: Path | bytes = b""
    try:
        file = find()
        image = crop_to(decode(file), size)
    except Exception as error:  # Decoders raise nearly anything on malformed bytes, not OSError alone.
        # Where the bytes lay is not the same the next time.
        reason = re.sub(r" <_io\.BytesIO[^>]*>", "", " ".join(str(error).split())) or type(error).__name__
        return UnreadableImage(name, reason.replace(f" {str(file)!r}", "") if isinstance(file, Path) else reason)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode(file: Path | bytes) -> Image.Image:
    """An image file, or its content, in RGB, turned upright, transparency laid over white. The first one of several.

    Grey values of 16 bits are scaled to 8. Floating-point values count from 0 to 1, or to 255 if one exceeds 1. Raises
    ValueError for values outside, and whatever the decoder raises for a file that is no image, is cut short, or has
    more pixels than Pillow deems safe (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError("not a file, or a broken link")
    content = file if isinstance(file, Path) else io.BytesIO(file)
    with Image.open(content) as opened:
        # Pillow warns of a bomb before it decodes, and refuses only at twice the size.
        if Image.MAX_IMAGE_PIXELS and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(
                f"{opened.width}×{opened.height} pixels exceed the limit of {Image.MAX_IMAGE_PIXELS}, could be a "
                "decompression bomb"
            )
        opened.load()
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:  # Damaged EXIF data does not spoil the pixels.
            image = opened.copy()
    if image.mode == "F" or image.mode.startswith("I"):  # convert("RGB") would clip these instead of scaling.
        return _eight_bits(np.asarray(image), image.info.get("transparency")).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray, transparent: int | None) -> Image.Image:
    """Grey values of more than 8 bits (h, w) as an image of mode L, white where they are the transparent value."""
    lowest, highest = float(grey.min()), float(grey.max())
    floating = grey.dtype.kind == "f"
    most = 255 if floating else 65535
    if not 0 <= lowest <= highest <= most:  # False for NaN too.
        raise ValueError(f"its values lie between {lowest:g} and {highest:g}, not between 0 and {most}")
    peaks = _peaks.get()
    if peaks is not None and not floating:
        peaks.append(int(highest))
    from_unit = floating and highest <= 1
    scaled = np.round(grey * 255) if from_unit else grey if floating else grey.astype(np.int64) // 257
    return Image.fromarray(np.where(grey == transparent, 255, scaled).astype(np.uint8))


@dataclass(frozen=True)
class Cover:
    """Where the pixels of an image go when it is scaled to cover a size and cut: what `crop_to` does, as numbers."""

    scaled: tuple[int, int]
    """(width, height) of the image once it covers the size."""
    left: int
    top: int
    """What is cut off there, in pixels of the scaled image."""

    @classmethod
    def of(cls, image_size: tuple[int, int], size: tuple[int, int]) -> Cover:
        """That of an image of (width, height) pixels and a size (height, width)."""
        height, width = size
        columns, rows = image_size
        while columns >= 2 * width and rows >= 2 * height:
            columns, rows = columns // 2, rows // 2
        scale = max(width / columns, height / rows)
        scaled = (round(columns * scale), round(rows * scale))
        return cls(scaled, (scaled[0] - width) // 2, (scaled[1] - height) // 2)


def crop_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image to cover `size` (height, width) and cut out its centre, as ADM (arXiv 2105.05233) prepares images.

    Halve by box averaging while both sides stay at least the target's, then one bicubic step, then the crop. For a
    square target this is ADM's own procedure to the bit. Raises ValueError for an image so long that its scaled version
    would have more pixels than Pillow deems safe.
    """
    height, width = size
    cover = Cover.of(image.size, size)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    if Image.MAX_IMAGE_PIXELS and cover.scaled[0] * cover.scaled[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}×{image.height} pixels are too long and narrow to be cropped to {width}×{height}"
        )
    image = image.resize(cover.scaled, Image.Resampling.BICUBIC)
    return image.crop((cover.left, cover.top, cover.left + width, cover.top + height))


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the images and of the sub-folders in a folder. Hidden entries are passed over."""
    images: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif is_image(entry.name):
                images.append(entry.name)
    return sorted(images), sorted(folders)


def is_image(name: str) -> bool:
    """Whether a file is an image by its name."""
    return Path(name).suffix.lower() in EXTENSIONS


def _walk(folder: Path, prefix: str, above: frozenset[Path]) -> list[str]:
    """Images in a folder and below, with `prefix` before their names. Links that lead back up are not followed."""
    here = folder.resolve()
    if here in above:
        return []
    images, folders = list_folder(folder)
    names = [prefix + name for name in images]
    for name in folders:
        names += _walk(folder / name, f"{prefix}{name}/", above | {here})
    return names


def _refuse_missing(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of images, or one with a sub-folder per class")
