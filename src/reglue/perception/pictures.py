"""Maps of heads as files that keep their numbers, and as a picture for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reglue.data.pictures import GAP, enlarge, heat_of, image_grid, label_colours
from reglue.files import replacing
from reglue.perception.heads import Head
from reglue.perception.perceiving import View

CELL, DOTS = 120, 100
"""Least side of an image in the picture in pixels, and pixels to an inch."""
OPACITY = 0.6
"""Of the classes' colours over the image."""
TITLES: dict[View, str] = {
    "alignment": "from latents",
    "local": "from local map",
    "original": "encoder, original",
    "encoder": "encoder, decoded",
}
Maps = Mapping[tuple[str, View], np.ndarray]
"""The map (H, W) of each head, by its name, from each of its views."""


def as_image(values: np.ndarray, head: Head) -> Image.Image:
    """A map (H, W) as a picture that keeps its numbers: classes with a palette, or depth in 16 bits over its range."""
    if head.spec.task == "depth":
        return Image.fromarray((_depth_share(values, head) * 65535).round().astype(np.uint16))
    if head.spec.outputs > 256:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(label_colours(head.spec.outputs).tobytes())
    return image


def draw_maps(path: Path, shown: Sequence[tuple[np.ndarray, Maps]], heads: Mapping[str, Head]) -> None:
    """Write a picture with a row for each image uint8 (H, W, 3): the image, then its maps."""
    from matplotlib.figure import Figure  # Slow to import.
    from matplotlib.patches import Patch

    columns = sorted(shown[0][1], key=lambda key: (list(heads).index(key[0]), list(TITLES).index(key[1])))
    height, width = (side * -(-CELL // min(shown[0][0].shape[:2])) for side in shown[0][0].shape[:2])
    rows = [[image, *(_as_colours(maps[key], heads[key[0]], image) for key in columns)] for image, maps in shown]
    grid = image_grid(enlarge(np.concatenate(rows), (height, width)), columns=1 + len(columns))
    figure = Figure(figsize=(grid.shape[1] / DOTS, grid.shape[0] / DOTS + 1.5), dpi=DOTS, layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid)
    axes.xaxis.tick_top()
    centres = [width / 2 + (width + GAP) * column for column in range(1 + len(columns))]
    axes.set_xticks(centres, ["decoded image", *(f"{name}\n{TITLES[view]}" for name, view in columns)], size=8)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    patches = []
    for name, head in heads.items():
        if head.spec.task == "segmentation":
            classes = np.unique([one for _, maps in shown for key, one in maps.items() if key[0] == name])
            colours = label_colours(head.spec.outputs) / 255
            names = head.spec.class_names
            patches += [Patch(color=tuple(colours[one]), label=f"{name}: {names[one]}") for one in classes]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=7)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def _as_colours(values: np.ndarray, head: Head, image: np.ndarray) -> np.ndarray:
    """A map (H, W) as uint8 (H, W, 3): classes as colours over the image (H, W, 3), depth from dark to light."""
    if head.spec.task == "depth":
        return heat_of(torch.from_numpy(2 * _depth_share(values, head) - 1)[None])[0]
    colours = label_colours(head.spec.outputs)[values]
    return (OPACITY * colours + (1 - OPACITY) * image).round().astype(np.uint8)


def _depth_share(values: np.ndarray, head: Head) -> np.ndarray:
    """Depths as shares of the head's range, from 0 to 1; those outside are cut."""
    assert head.spec.depth_range is not None
    nearest, farthest = head.spec.depth_range
    return np.clip((values - nearest) / max(farthest - nearest, 1e-12), 0, 1)
