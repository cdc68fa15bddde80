"""Maps of heads as files that keep their numbers, and as a picture for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reglue.data.picture_writer import write_picture
from reglue.data.pictures import enlarge, heat_of, label_colours, legend, stacked, text_size, titled_grid
from reglue.perception.heads import Head
from reglue.perception.perceiving import View

CELL = 120
"""Least side of an image in the picture in pixels."""
OPACITY = 0.6
"""Of the classes' colours over the image."""
TITLES: dict[View, str] = {
    "alignment": "from latents",
    "local": "from local map",
    "drawn": "from drawn map",
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
    """Write a picture with a row for each image uint8 (H, W, 3), the image and then its maps, over a legend."""
    columns = sorted(shown[0][1], key=lambda key: (list(heads).index(key[0]), list(TITLES).index(key[1])))
    height, width = (side * -(-CELL // min(shown[0][0].shape[:2])) for side in shown[0][0].shape[:2])
    rows = [[image, *(as_colours(maps[key], heads[key[0]], image) for key in columns)] for image, maps in shown]
    titles = ["decoded image", *(f"{name}\n{TITLES[view]}" for name, view in columns)]
    cells = enlarge(np.concatenate(rows), (height, width))
    grid = titled_grid(cells, len(titles), titles)
    entries: list[tuple[np.ndarray, str]] = []
    for name, head in heads.items():
        of_head = [one for _, maps in shown for (owner, _), one in maps.items() if owner == name]
        prefix = f"{name}: " if len(heads) > 1 else ""
        entries += [(colour, prefix + meaning) for colour, meaning in meanings(head, of_head)]
    write_picture(path, Image.fromarray(stacked([grid, legend(entries, grid.shape[1], text_size(width))])))


def meanings(head: Head, maps: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, str]]:
    """The colours in a head's maps (H, W) and what they stand for: its classes, or the ends of its range of depth."""
    if head.spec.depth_range is not None:
        for end in head.spec.depth_range:
            yield as_colours(np.full((1, 1), end), head, np.empty(0))[0, 0], f"{end:g}"
    else:
        for number in np.unique(np.stack(maps)):
            yield label_colours(head.spec.outputs)[number], head.spec.class_names[number]


def as_colours(values: np.ndarray, head: Head, image: np.ndarray) -> np.ndarray:
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
