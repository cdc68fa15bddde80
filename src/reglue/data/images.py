"""Images: what a source of them is, folders of files, and each image as a cropped RGB tensor."""

from __future__ import annotations

import hashlib
import io
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from reglue.data.colours import in_srgb
from reglue.data.labels import in_class_order
from reglue.data.listing import Listing, classes_of, formats, list_tree, refuse_none
from reglue.errors import UserError, printable

ORIENTATION, TURNED = 0x0112, range(5, 9)
"""EXIF's tag, and those of its values that exchange height and width."""


@dataclass
class Noticed:
    """What decoding finds out about images beside their pixels."""

    peaks: list[int] = field(default_factory=list)
    """The highest grey value (0 to 65535) of each image of 16 bits."""
    converted: int = 0
    """How many had an ICC profile that changed their colours."""


_noticed: ContextVar[Noticed | None] = ContextVar("noticed", default=None)


@contextmanager
def noticing() -> Iterator[Noticed]:
    """What is noticed about the images that are decoded in the block."""
    noticed = Noticed()
    token = _noticed.set(noticed)
    try:
        yield noticed
    finally:
        _noticed.reset(token)


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


class ImageSource(ABC):
    """Images in a fixed order, each readable by its index, in any process and, unless `sequential`, any thread."""

    path: Path
    """Where they are, as it was given."""
    names: Sequence[str]
    """One for each image, no two equal. Some sources compute them when asked."""
    labels: Sequence[int]
    """Index into `class_names` of each image; zeros where there are no classes."""
    class_names: tuple[str, ...] = ()
    """In the order of the labels; empty for unconditional images."""
    sequential: bool = False
    """Whether going to an image reads all of those before it, so that one process has to read them in order."""
    notes: tuple[str, ...] = ()
    """Lines for whoever opened it: what was passed over, and what else could have been meant."""

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """One image, decoded and cropped: uint8 (3, height, width), or why it cannot be read."""
        return load_crop(self.names[index], lambda: self.find(index), resolution)

    @abstractmethod
    def find(self, index: int) -> Path | bytes:
        """The file of an image, or its content. Whatever it raises is why the image cannot be read."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what distinguishes these images and labels from others."""


@dataclass(frozen=True)
class ImageFolder(ImageSource):
    """The images of a folder in a fixed order: by class, then by name.

    Each class is a sub-folder, with all images below it. A folder that holds images itself has no classes.
    """

    path: Path
    names: tuple[str, ...]
    """Paths within the folder, with forward slashes: `n01440764/0001.jpg`, or `0001.jpg` where there are no classes."""
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    """Paths of the class folders, as `in_class_order`; empty for an unconditional folder."""
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str, class_level: int | None = None) -> ImageFolder:
        """List a folder of images whose classes are its folders of a level, counted from 1, which is the default.

        Hidden entries (`.name`), what systems leave (`SYSTEM_FOLDERS`), and files that are not images are passed over.
        Raises UserError for a folder that is missing or empty, for a class without images, and as `classes_of`.
        """
        path = Path(path)
        found = list_tree(path)
        if not found.folders and (class_level or 1) == 1:
            return cls._of_one_class(path, found)
        classes, notes = classes_of(path, found.images, class_level)
        filled = {folder.as_posix() for name in found.images for folder in PurePosixPath(name).parents}
        for folder in sorted(found.folders):
            if folder.count("/") < (class_level or 1) and folder not in filled:
                raise UserError(
                    f"{path / folder} is a class without images{found.reason}; remove the folder or add images to it"
                )
        class_names = in_class_order(set(classes))
        index_of = {name: index for index, name in enumerate(class_names)}
        labelled = sorted(zip((index_of[name] for name in classes), found.images, strict=True))
        labels, names = zip(*labelled, strict=True)
        return cls(path, names, labels, class_names, found.notes + notes)

    @classmethod
    def unlabelled(cls, path: Path | str) -> ImageFolder:
        """List the images in a folder and in all of its sub-folders, sorted by path, without classes.

        Raises UserError for a folder that is missing or holds no images.
        """
        return cls._of_one_class(Path(path), list_tree(Path(path)))

    @classmethod
    def _of_one_class(cls, path: Path, found: Listing) -> ImageFolder:
        refuse_none(path, found)
        return cls(path, tuple(sorted(found.images)), (0,) * len(found.images), (), found.notes)

    def find(self, index: int) -> Path:
        """See `ImageSource.find`."""
        return self.path / self.names[index]

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
        reason = re.sub(r" <_io\.BytesIO[^>]*>", "", printable(" ".join(str(error).split()))) or type(error).__name__
        return UnreadableImage(name, reason.replace(f" {str(file)!r}", "") if isinstance(file, Path) else reason)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode(file: Path | bytes) -> Image.Image:
    """An image file, or its content, in RGB: as `read_picture` reads it, with transparency laid over white."""
    return laid_over(read_picture(file), "white")


def read_picture(file: Path | bytes) -> Image.Image:
    """An image file, or its content, as `upright` gives it. The first one of several.

    Raises what that does, and whatever the decoder raises for a file that is no image, is cut short, or has more pixels
    than Pillow deems safe (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if isinstance(file, Path) and not file.is_file():
        raise FileNotFoundError("not a file, or a broken link")
    with open_picture(file) as opened:
        # Pillow warns of a bomb before it decodes, and refuses only at twice the size.
        if Image.MAX_IMAGE_PIXELS and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(
                f"{opened.width}×{opened.height} pixels exceed the limit of {Image.MAX_IMAGE_PIXELS}, could be a "
                "decompression bomb"
            )
        opened.load()
        return upright(opened)


def upright(opened: Image.Image) -> Image.Image:
    """An image turned upright, in RGB, or in RGBA if it has transparency.

    Colours come to sRGB if the image has an ICC profile (`in_srgb`). Grey values of 16 bits are scaled to 8.
    Floating-point values count from 0 to 1, or to 255 if one exceeds 1. Raises ValueError for values outside.
    """
    try:
        image = ImageOps.exif_transpose(opened)
    except Exception:  # Damaged EXIF data does not spoil the pixels.
        image = opened.copy()
    if image.mode == "F" or image.mode.startswith("I"):  # convert("RGB") would clip these instead of scaling.
        return _eight_bits(np.asarray(image), image.info.get("transparency")).convert("RGB")
    shown, converted = in_srgb(image)
    if converted and (noticed := _noticed.get()):
        noticed.converted += 1
    if image.has_transparency_data:
        shown.putalpha(image.convert("RGBA").getchannel("A"))
    return shown


def laid_over(image: Image.Image, colour: str) -> Image.Image:
    """An image in RGB or RGBA without transparency, in RGB: one colour lies behind it."""
    if image.mode == "RGB":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def open_picture(file: Path | bytes) -> Image.Image:
    """What Pillow opens, none of it decoded: an image in one of `listing.formats`. Raises whatever Pillow does."""
    return Image.open(file if isinstance(file, Path) else io.BytesIO(file), formats=formats())


def upright_size(file: Path) -> tuple[int, int]:
    """Height and width of an image as `decode` turns it. Raises whatever Pillow does for what is no image."""
    with open_picture(file) as image:
        try:
            turned = image.getexif().get(ORIENTATION) in TURNED
        except Exception:  # Damaged EXIF data does not spoil the pixels.
            turned = False
        return image.size if turned else (image.height, image.width)


def _eight_bits(grey: np.ndarray, transparent: int | None) -> Image.Image:
    """Grey values of more than 8 bits (h, w) as an image of mode L, white where they are the transparent value."""
    lowest, highest = float(grey.min()), float(grey.max())
    floating = grey.dtype.kind == "f"
    most = 255 if floating else 65535
    if not 0 <= lowest <= highest <= most:  # False for NaN too.
        raise ValueError(f"its values lie between {lowest:g} and {highest:g}, not between 0 and {most}")
    if (noticed := _noticed.get()) and not floating:
        noticed.peaks.append(int(highest))
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
