"""Pictures for people: many images as one, and compressed semantics as colours."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 2
"""Pixels between the images of a grid."""


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
    from matplotlib import colormaps  # slow to import

    share = ((similarities.detach().float().cpu() + 1) / 2).clamp(0, 1).numpy()
    return colormaps["viridis"](share, bytes=True)[..., :3]


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


def _positions(code: Tensor) -> Tensor:
    """A code (N, K, h, w) as float64 (N·h·w, K) on the CPU."""
    return code.detach().to("cpu", torch.float64).movedim(1, -1).reshape(-1, code.shape[1])
