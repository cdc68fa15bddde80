"""Folders of images: what is in them, and each as a cropped RGB tensor."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class UnreadableImage:
    """What stands in for an image that could not be decoded."""

    name: str
    """Its path within the image folder."""
    reason: str
    """One line: what the decoder said."""


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

    @classmethod
    def open(cls, path: Path | str) -> ImageFolder:
        """List a folder of images. Hidden entries (`.name`) and files that are not images are passed over.

        Raises UserError for a folder that is missing or empty, that mixes images and class folders, or that has a class
        without images.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give a folder of images, or one with a sub-folder per class")
        images, folders = _list(path)
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
            images, nested = _list(path / folder)
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

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """One image, decoded and cropped: uint8 (3, height, width), or why it cannot be read."""
        name = self.names[index]
        try:
            image = crop_to(decode(self.path / name), resolution)
        except Exception as error:  # Decoders raise nearly anything on malformed bytes, not OSError alone.
            reason = " ".join(str(error).split()) or type(error).__name__
            return UnreadableImage(name, reason.replace(f" {str(self.path / name)!r}", ""))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

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


def decode(path: Path) -> Image.Image:
    """The image of a file in RGB, turned upright, transparency laid over white. An animation gives its first frame.

    Raises whatever the decoder raises for a file that is no image, is cut short, or has more pixels than Pillow deems
    safe (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if not path.is_file():
        raise FileNotFoundError("not a file, or a broken link")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow warns of a bomb before it decodes, and refuses only at twice the size.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            file.load()
            try:
                image = ImageOps.exif_transpose(file)
            except Exception:  # Damaged EXIF data does not spoil the pixels.
                image = file.copy()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I"):  # 16 bits per pixel, which convert("RGB") would clip instead of scaling.
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


def crop_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale an image to cover `size` (height, width) and cut out its centre, as ADM (arXiv 2105.05233) prepares images.

    Halve by box averaging while both sides stay at least the target's, then one bicubic step, then the crop. For a
    square target this is ADM's own procedure to the bit. Raises ValueError for an image so long that its scaled version
    would have more pixels than Pillow deems safe.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = (round(image.width * scale), round(image.height * scale))
    if Image.MAX_IMAGE_PIXELS and scaled[0] * scaled[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{image.width}×{image.height} pixels are too long and narrow to be cropped to {width}×{height}"
        )
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the images and of the sub-folders in a folder."""
    images: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif Path(entry.name).suffix.lower() in EXTENSIONS:
                images.append(entry.name)
    return sorted(images), sorted(folders)
