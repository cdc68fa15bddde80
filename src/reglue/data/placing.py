"""An edited part back in its image: where the crop that a model sees lies, and how masks meet its grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue.data.images import Cover
from reglue.data.masks import crop_mask
from reglue.errors import option
from reglue.extras import need

WHITE = 128
"""The least grey value of a mask that counts as white."""
Box = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels; the right and the bottom one are outside."""


@dataclass(frozen=True)
class Place:
    """The crop of an image (`crop_to`) that a model sees, within the whole image."""

    image_size: tuple[int, int]
    """(width, height) of the image in pixels."""
    size: tuple[int, int]
    """(height, width) of the crop."""

    @property
    def cover(self) -> Cover:
        """How the crop is made."""
        return Cover.of(self.image_size, self.size)

    @property
    def box(self) -> Box:
        """The pixels of the image that lie wholly within the crop."""
        (left, right), (top, bottom) = (self._span(axis) for axis in (0, 1))
        return left, top, right, bottom

    def _scale(self, axis: int) -> float:
        """Pixels of the crop for one of the image's; axis 0 is across, 1 down."""
        return self.cover.scaled[axis] / self.image_size[axis]

    def _cut(self, axis: int) -> int:
        return self.cover.top if axis else self.cover.left

    def _span(self, axis: int) -> tuple[int, int]:
        first, scale = self._cut(axis), self._scale(axis)
        last = first + self.size[1 - axis]
        start, end = math.ceil(first / scale - 1e-9), math.floor(last / scale + 1e-9)
        if start >= end:  # Not one pixel lies wholly within: the one in the middle.
            start = math.floor((first + last) / 2 / scale)
            end = start + 1
        return max(0, start), min(self.image_size[axis], end)

    def _seen(self, pixel: int, axis: int) -> float:
        """Where an edge of the image's pixels is in the crop."""
        return min(max(pixel * self._scale(axis) - self._cut(axis), 0.0), float(self.size[1 - axis]))

    def put_back(self, image: Image.Image, edited: Image.Image, share: np.ndarray | None = None) -> Image.Image:
        """The image with an edited crop in its place.

        `share` (height, width) float from 0 to 1 is how much of each pixel of the image is the edited one's; pixels
        of share 0, and those outside the crop, are the image's own to the bit, transparent ones (RGBA) too. None stands
        for 1 everywhere.
        """
        left, top, right, bottom = self.box
        corners = (self._seen(left, 0), self._seen(top, 1), self._seen(right, 0), self._seen(bottom, 1))
        inside = edited.resize((right - left, bottom - top), Image.Resampling.BICUBIC, corners)
        result = np.array(image)
        part, drawn = result[top:bottom, left:right], np.asarray(inside.convert(image.mode))
        if share is None:
            part[:] = drawn
        else:
            weight = share[top:bottom, left:right, None]
            blended = weight * drawn + (1 - weight) * part
            part[:] = np.where(weight > 0, blended.round(), part).astype(np.uint8)
        return Image.fromarray(result)

    def cells(self, mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
        """Which cells of a grid over the crop have a true pixel of a mask (height, width) bool of the image: bool."""
        rows, columns = grid
        result = np.zeros(grid, dtype=bool)
        down, across = np.nonzero(mask)
        row = np.floor(((down + 0.5) * self._scale(1) - self._cut(1)) * rows / self.size[0]).astype(int)
        column = np.floor(((across + 0.5) * self._scale(0) - self._cut(0)) * columns / self.size[1]).astype(int)
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        result[row[inside], column[inside]] = True
        # Where the image is smaller than the crop, a pixel covers several cells.
        enlarged = np.asarray(crop_mask(Image.fromarray(mask.astype(np.uint8)), self.size))
        shape = (rows, self.size[0] // rows, columns, self.size[1] // columns)
        return torch.from_numpy(result | (enlarged.reshape(shape).max((1, 3)) > 0))

    def on_grid(self, box: Box, grid: tuple[int, int]) -> Box:
        """A box in pixels of the image as whole cells of a grid over the crop, one at least in each direction."""
        edges: list[int] = []
        for axis in (0, 1):
            cells = grid[1 - axis]
            first, last = (
                round((box[at] * self._scale(axis) - self._cut(axis)) * cells / self.size[1 - axis])
                for at in (axis, axis + 2)
            )
            edges += [first, max(last, first + 1)]
        return edges[0], edges[2], edges[1], edges[3]


def feathered(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask (height, width) bool as shares from 0 to 1, float: 1 within, falling to 0 over so many pixels around."""
    if not pixels:
        return mask.astype(np.float64)
    need(option("feather"), "scipy")
    from scipy.ndimage import distance_transform_edt  # slow to import

    return np.clip(1 - np.asarray(distance_transform_edt(~mask)) / pixels, 0, 1)
