"""Masks and depth maps: the class, or the depth, of every pixel of an image, cropped exactly as the image was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.arrays import ONLY, ArrayFile
from reglue.data.images import Cover, open_picture, upright_size
from reglue.errors import UserError
from reglue.progress import Bar


def load_masks(folder: Path, images: Path, names: Sequence[str], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The masks of images `names` within the image folder `images`, cropped to `size` (height, width).

    The mask of `CLASS/NAME.jpg` is `folder/CLASS/NAME.png`, a palette or greyscale image of class numbers. Returns
    which of the names have one, ascending (n,) int64, and the masks, uint8 (n, height, width): one byte per pixel is
    held in memory. Raises UserError if there are none, and for one that is damaged, holds colours, or has other
    proportions than its image (which is looked at where it still exists).
    """
    found, masks = _load(folder, "mask", (".png",), read_mask, images, names, size)
    return found, torch.from_numpy(masks)


def load_depths(folder: Path, images: Path, names: Sequence[str], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The depth maps of images, as `load_masks` takes and crops them.

    The map of `CLASS/NAME.jpg` is `folder/CLASS/NAME.png`, a greyscale image of 8 or 16 bits, or `….npy`, an array
    (height, width). Depth keeps the file's unit; what is 0, negative, infinite or no number is unknown. Returns which
    of the names have one, ascending (n,) int64, and the maps, float32 (n, height, width), NaN where unknown. Raises
    UserError as `load_masks` does.
    """
    found, depths = _load(folder, "depth map", (".png", ".npy"), read_depth, images, names, size)
    known = np.isfinite(depths) & (depths > 0)
    return found, torch.from_numpy(np.where(known, depths, np.float32("nan")))


def _load(
    folder: Path,
    what: str,
    endings: Sequence[str],
    read: Callable[[Path], Image.Image],
    images: Path,
    names: Sequence[str],
    size: tuple[int, int],
) -> tuple[Tensor, np.ndarray]:
    """Which of the images `names` have a file, (n,) int64, and what `read` makes of those, cropped: (n, *size)."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of {what}s, {what} files named as the images")
    choices = [[folder / Path(name).with_suffix(ending) for ending in endings] for name in names]
    paths = [next(filter(Path.is_file, of_one), None) for of_one in choices]
    found = {index: path for index, path in enumerate(paths) if path is not None}
    if not found:
        raise UserError(f"{folder} has no {what} for any image; that of {names[0]} would be {choices[0][0]}")
    cropped: np.ndarray | None = None  # Filled one by one: a list would hold them twice.
    index: int
    for position, (index, path) in enumerate(Bar(found.items(), desc=f"{what}s", unit="image", leave=False)):
        whole = read(path)
        _check_proportions(whole, path, images / names[index])
        one = np.asarray(crop_mask(whole, size))
        cropped = np.empty((len(found), *size), dtype=one.dtype) if cropped is None else cropped
        cropped[position] = one
    assert cropped is not None
    return torch.tensor(list(found)), cropped


def read_depth(path: Path) -> Image.Image:
    """The depths of a file, as an image of 32-bit floats. Raises UserError for anything else."""
    depths, mode = _read(path)
    if depths.ndim != 2 or mode not in ("L", "I", "I;16", "F") or depths.dtype.kind not in "uif":
        raise UserError(f"{path} holds no depth map; save it as a greyscale PNG or as an array (height, width)")
    return Image.fromarray(depths.astype(np.float32))


def read_mask(path: Path) -> Image.Image:
    """The class numbers of a file, as an image of 8 bits. Raises UserError for anything else."""
    numbers, mode = _read(path)
    if path.suffix == ".npy" and mode == "F":
        raise UserError(f"{path} holds {numbers.dtype}, not the whole numbers of classes; save it as such")
    if numbers.ndim != 2 or mode not in ("1", "L", "P", "I", "I;16"):
        raise UserError(f"{path} holds colours (mode {mode}), not class numbers; save it as a palette or greyscale PNG")
    if numbers.max(initial=0) > 255 or numbers.min(initial=0) < 0:
        raise UserError(f"{path} holds class {numbers.max()}; class numbers lie between 0 and 254, and 255 is ignored")
    return Image.fromarray(numbers.astype(np.uint8))


def _read(path: Path) -> tuple[np.ndarray, str]:
    """The numbers of a picture or an array, and the mode of the picture. Raises UserError if it is damaged."""
    try:
        if path.suffix == ".npy":
            numbers = ArrayFile(path).read(ONLY)
            mode = "L" if numbers.dtype.kind in "biu" else "F"
        else:
            with open_picture(path) as file:
                numbers, mode = np.asarray(file), file.mode
        if not numbers.size:
            raise ValueError(f"it has no pixels, its shape is {numbers.shape}")
        return numbers, mode
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({error}); fix it or remove it") from error


def crop_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The part of a mask that `data.images.crop_to` keeps of its image, at `size` (height, width).

    Every pixel is the nearest one of the whole mask, scaled in one step: halving on the way, as images are, would move
    it by up to half a pixel.
    """
    height, width = size
    cover = Cover.of(mask.size, size)
    mask = mask.resize(cover.scaled, Image.Resampling.NEAREST)
    return mask.crop((cover.left, cover.top, cover.left + width, cover.top + height))


def _check_proportions(mask: Image.Image, path: Path, image_path: Path) -> None:
    try:
        height, width = upright_size(image_path)
    except Exception:  # Decoders raise nearly anything on malformed bytes.
        return  # The images may have moved since the store was made.
    # A mask may be smaller or larger than its image, with sides that were rounded to whole pixels.
    if abs(mask.width * height - mask.height * width) > max(width, height, *mask.size):
        raise UserError(
            f"{path} has {mask.width}×{mask.height} pixels, and its image {image_path} {width}×{height}; "
            "a mask must show the whole image"
        )
