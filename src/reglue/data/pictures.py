"""Pictures for people: many images as one, with names beside them, and compressed semantics as colours."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reglue.extras import is_installed

HEAT = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
"""Colours from dark blue to yellow, evenly spaced, as lightness has them too: viridis at its quarters."""
GAP = 2
"""Pixels between the images of a grid."""
MARGIN = 6
"""Pixels around text."""
TEXT_SIZES = (12, 24)
"""Height of text in pixels: the least, and the greatest, which pictures of many pixels have."""
LONGEST = 20
"""Width of a name in a legend, in heights of its text, from which it is broken into lines."""
PAGE_WIDTH = 1600
"""Pictures of a page are enlarged to about so many pixels …"""
MAX_ENLARGEMENT = 6
"""… but by no more than this."""


def image_grid(images: np.ndarray, columns: int, background: int = 255) -> np.ndarray:
    """Lays uint8 images (N, H, W, 3) out row by row, `columns` to a row, as one uint8 picture (height, width, 3).

    Cells that no image fills, and the gaps of two pixels between cells, have the grey value `background` (0–255).
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"image_grid takes uint8 (N, H, W, 3), not {images.dtype} {images.shape}")
    if columns < 1 or not len(images):
        raise ValueError("image_grid needs at least one image and one column")
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height + GAP, width + GAP, 3), background, dtype=np.uint8)
    cells[:count, :height, :width] = images
    in_rows = cells.reshape(rows, columns, height + GAP, width + GAP, 3).swapaxes(1, 2)
    return in_rows.reshape(rows * (height + GAP), columns * (width + GAP), 3)[:-GAP, :-GAP]


def titled_grid(
    images: np.ndarray, columns: int, titles: Sequence[str] = (), row_titles: Sequence[str] = ()
) -> np.ndarray:
    """`image_grid` with a title over each column, or before each row, on white: uint8 (height, width, 3).

    Titles are broken into lines as wide as an image, which should have some hundred pixels (`enlarge`); those of rows
    are cut at its height.
    """
    height, width = images.shape[1:3]
    picture, size = image_grid(images, columns), text_size(width)
    if titles:
        blocks = [text_block(title, width, size) for title in titles]
        tallest = max(map(len, blocks))
        strip = np.stack([_padded(block, above=tallest - len(block)) for block in blocks])
        picture = stacked([image_grid(strip, columns), picture])
    if row_titles:
        blocks = [text_block(title, width, size)[:height] for title in row_titles]
        centred = [_padded(block, (height - len(block)) // 2, -(-(height - len(block)) // 2)) for block in blocks]
        strip = image_grid(np.stack(centred), columns=1)
        picture = np.concatenate([_padded(strip, above=len(picture) - len(strip)), picture], axis=1)
    return picture


def legend(entries: Sequence[tuple[np.ndarray, str]], width: int, size: int) -> np.ndarray:
    """Colours uint8 (3,) with their names, in as many columns as fit the width: uint8 (height, width, 3), on white.

    Long names are broken into lines. `size` is that of the text in pixels.
    """
    font, swatch = _font(size), 2 * size
    room = min(width - swatch - 2 * MARGIN, LONGEST * size)
    widest = min(room, max(_length(name, font) for _, name in entries) + MARGIN)
    columns = max(1, width // (swatch + widest + 2 * MARGIN))
    cells: list[np.ndarray] = []
    for colour, name in entries:
        text = text_block(name, widest, size, centred=False)
        cell = np.full((len(text), swatch + MARGIN, 3), 255, np.uint8)
        cell[MARGIN // 2 : MARGIN // 2 + size, MARGIN:] = colour
        cells.append(np.concatenate([cell, text], axis=1))
    per_column = -(-len(cells) // columns)  # Lists are read downwards.
    rows = [cells[start::per_column] for start in range(per_column)]
    heights = [max(map(len, row)) for row in rows]
    return stacked(
        [
            np.concatenate([_padded(cell, below=height - len(cell)) for cell in row], axis=1)
            for row, height in zip(rows, heights, strict=True)
        ],
        width,
    )


def text_block(text: str, width: int, size: int, centred: bool = True) -> np.ndarray:
    """Black text on white in lines that fit the width, uint8 (height, width, 3); `size` is its height in pixels.

    Lines break between words, and within a word that is too long for one.
    """
    font = _font(size)
    lines = [line for part in _printable(text).split("\n") for line in _broken(part, width - MARGIN, font)]
    step = round(1.25 * size)
    image = Image.new("RGB", (width, step * len(lines) + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        left = (width - font.getlength(line)) / 2 if centred else MARGIN / 2
        draw.text((left, MARGIN / 2 + step * number), line, "black", font)
    return np.asarray(image)


def text_size(width: int) -> int:
    """The height of text in pixels that suits images of a width."""
    least, greatest = TEXT_SIZES
    return min(greatest, max(least, width // 14))


def stacked(pictures: Sequence[np.ndarray], width: int = 0) -> np.ndarray:
    """Pictures uint8 (h, w, 3) above each other, as wide as the widest, or `width` if that is more."""
    width = max(width, *(one.shape[1] for one in pictures))
    return np.concatenate([_padded(one, right=width - one.shape[1]) for one in pictures])


def colours_of(code: Tensor, reference: Tensor | None = None) -> np.ndarray:
    """Shows codes (N, K, h, w) as colours: first three principal components as red, green and blue, uint8 (N, h, w, 3).

    Components and ranges are fitted once, over every position of `reference` (M, K, h', w'), or of `code` itself where
    none is given. So a colour means one thing throughout the set, and sets shown with one reference can be compared. A
    component that K or the data cannot supply is mid-grey.
    """
    fitted = _positions(code if reference is None else reference)
    values = _positions(code)
    mean = fitted.mean(0)
    variances, axes = torch.linalg.eigh((fitted - mean).T @ (fitted - mean) / len(fitted))
    # An eigenvector's sign is arbitrary; the largest entry made positive gives the same colours on every machine.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    shown = torch.full((len(values), 3), 0.5, dtype=torch.float64)
    for channel, index in enumerate(range(len(variances) - 1, max(len(variances) - 4, -1), -1)):
        if variances[index] <= 1e-10 * max(float(variances[-1]), 1e-30):
            break
        # Two standard deviations to either side fill the range of a colour; outliers saturate.
        deviation = (values - mean) @ axes[:, index] / variances[index].sqrt()
        shown[:, channel] = (0.5 + deviation / 4).clamp(0, 1)
    batch, _, height, width = code.shape
    return (shown * 255).round().to(torch.uint8).reshape(batch, height, width, 3).numpy()


def heat_of(similarities: Tensor) -> np.ndarray:
    """Shows values (N, h, w) from −1 to 1 as colours from dark blue to yellow, uint8 (N, h, w, 3)."""
    values = similarities.detach().float().cpu().numpy()
    places = np.linspace(-1, 1, len(HEAT))
    return np.stack([np.interp(values, places, colours) for colours in HEAT.T], axis=-1).round().astype(np.uint8)


def label_colours(count: int) -> np.ndarray:
    """A colour for each of so many classes, uint8 (count, 3): those of PASCAL VOC, in which class 0 is black.

    The bits of a class number, three at a time from the lowest, are those of red, green and blue from the highest.
    """
    numbers = np.arange(count)[:, None]
    colours = np.zeros((count, 3), dtype=np.int64)
    for position in range(8):
        colours |= ((numbers >> (3 * position + np.arange(3))) & 1) << (7 - position)
    return colours.astype(np.uint8)


def enlarge(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Small uint8 pictures (N, h, w, 3) at a size (height, width) in pixels, without smoothing."""
    height, width = size
    return np.stack(
        [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.NEAREST)) for p in pictures]
    )


def png_address(images: np.ndarray, columns: int | None = None) -> str:
    """Images uint8 (N, H, W, 3) as the address of one PNG, `columns` to a row (all, if not given); gaps are clear.

    Small ones are enlarged by whole numbers: a browser would blur them, or make their pixels unequal.
    """
    columns = columns or len(images)
    factor = max(1, min(MAX_ENLARGEMENT, PAGE_WIDTH // (columns * images.shape[2])))
    # Clear gaps, so that the page's own colour is seen between the images in the dark too.
    opaque = image_grid(np.full_like(images, 255), columns, background=0)[..., :1]
    grid = np.concatenate([image_grid(images, columns), opaque], axis=2).repeat(factor, 0).repeat(factor, 1)
    file = io.BytesIO()
    Image.fromarray(grid).save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def in_html(title: str, facts: Mapping[str, str], images: np.ndarray | None = None) -> str:
    """What a notebook shows of an object: a title, a table of facts, and images uint8 (N, H, W, 3) below."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left;white-space:pre-wrap">{html.escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    shown = "" if images is None or not len(images) else f'<div><img src="{png_address(images)}" width="480"></div>'
    return f"<b>{html.escape(title)}</b><table>{rows}</table>{shown}"


def _positions(code: Tensor) -> Tensor:
    """A code (N, K, h, w) as float64 (N·h·w, K) on the CPU."""
    return code.detach().to("cpu", torch.float64).movedim(1, -1).reshape(-1, code.shape[1])


def _padded(picture: np.ndarray, above: int = 0, below: int = 0, right: int = 0) -> np.ndarray:
    """A picture (h, w, 3) with so many rows or columns of white around it."""
    return np.pad(picture, ((above, below), (0, right), (0, 0)), constant_values=255)


def _printable(text: str) -> str:
    """Text as a font takes it: names of folders may hold bytes that are no characters."""
    return text.encode(errors="replace").decode()


def _length(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Pixels of a text on one line, rounded up."""
    return math.ceil(font.getlength(" ".join(_printable(text).split())))


def _broken(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """A text as lines that fit a width in pixels."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own, which has most alphabets; without it Pillow's, which has Latin letters."""
    if not is_installed("matplotlib"):
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
    import matplotlib as mpl  # slow to import

    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
