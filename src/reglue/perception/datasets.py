"""Images with masks, as data sets that others read: COCO, YOLO, Pascal VOC, and masks alone."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

import numpy as np

from reglue.names import DatasetFormat

CORNERS = np.ones((3, 3))
"""Pixels that touch at a corner are of one component."""


class Box(NamedTuple):
    """A connected component of a mask."""

    label: int
    left: int
    top: int
    right: int
    """The first column outside, as `bottom` is the first row."""
    bottom: int
    inside: np.ndarray
    """Which pixels of the box it has: bool (height, width)."""


@dataclass(frozen=True)
class Labelled:
    """An image of a data set."""

    number: int
    size: tuple[int, int]
    """(height, width) in pixels."""
    boxes: Sequence[Box]


def boxes_of(mask: np.ndarray, classes: Sequence[int], least: float) -> list[Box]:
    """The connected components of some classes in a mask (H, W) that have `least` pixels: class by class, from the top.

    Pixels that touch at a side or a corner belong together.
    """
    from scipy.ndimage import find_objects, label  # slow to import

    found: list[Box] = []
    for number in classes:
        components, _ = label(mask == number, CORNERS)
        for index, (rows, columns) in enumerate(find_objects(components), 1):
            inside = components[rows, columns] == index
            if inside.sum() >= least:
                found.append(Box(number, columns.start, rows.start, columns.stop, rows.stop, inside))
    return found


class Layout(ABC):
    """Where the files of a data set lie, and what beside images and masks says what is in them."""

    images: ClassVar[str] = "images/{:06d}.png"
    masks: ClassVar[str] = "masks/{:06d}.png"

    def pictures(self, number: int) -> tuple[str, str]:
        """The image of a number and its mask."""
        return self.images.format(number), self.masks.format(number)

    @abstractmethod
    def describe(self, images: Sequence[Labelled], names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """Files and their texts. `names` are those of the classes that have boxes, by number."""


class Masks(Layout):
    """Images and masks."""

    def describe(self, images: Sequence[Labelled], names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """Nothing else."""
        yield from ()


class Coco(Layout):
    """One JSON file, with components as uncompressed run lengths: https://cocodataset.org/#format-data."""

    def describe(self, images: Sequence[Labelled], names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """See `Layout.describe`. Numbers of categories are those in the masks."""
        annotations = [
            {
                "image_id": image.number,
                "category_id": box.label,
                "bbox": [box.left, box.top, box.right - box.left, box.bottom - box.top],
                "area": int(box.inside.sum()),
                "segmentation": {"size": list(image.size), "counts": run_lengths(box, image.size)},
                "iscrowd": 0,
            }
            for image in images
            for box in image.boxes
        ]
        content = {
            "images": [
                {"id": one.number, "file_name": self.images.format(one.number), "height": one.size[0],
                 "width": one.size[1]}
                for one in images
            ],
            "categories": [{"id": number, "name": name} for number, name in names.items()],
            "annotations": [{"id": number, **one} for number, one in enumerate(annotations, 1)],
        }  # fmt: skip
        yield "annotations.json", json.dumps(content)


class Yolo(Layout):
    """A text file for each image, and one for the data set: https://docs.ultralytics.com/datasets/detect."""

    images = "images/train/{:06d}.png"

    def describe(self, images: Sequence[Labelled], names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """See `Layout.describe`. Classes are numbered anew, from 0."""
        order = list(names)
        for one in images:
            height, width = one.size
            lines = [
                f"{order.index(box.label)} {(box.left + box.right) / 2 / width:.6f} "
                f"{(box.top + box.bottom) / 2 / height:.6f} {(box.right - box.left) / width:.6f} "
                f"{(box.bottom - box.top) / height:.6f}\n"
                for box in one.boxes
            ]
            yield f"labels/train/{one.number:06d}.txt", "".join(lines)
        listed = "".join(f"  {number}: {json.dumps(name)}\n" for number, name in enumerate(names.values()))
        # A validation set is asked for; real images make a better one.
        yield "data.yaml", f"path: .\ntrain: images/train\nval: images/train\nnames:\n{listed}"


class Voc(Layout):
    """The folders of Pascal VOC 2012, as torchvision reads them; images are JPEG files of quality 95."""

    images = "VOCdevkit/VOC2012/JPEGImages/{:06d}.jpg"
    masks = "VOCdevkit/VOC2012/SegmentationClass/{:06d}.png"

    def describe(self, images: Sequence[Labelled], names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """See `Layout.describe`."""
        folder = "VOCdevkit/VOC2012"
        for one in images:
            yield f"{folder}/Annotations/{one.number:06d}.xml", self._annotation(one, names)
        listed = "".join(f"{one.number:06d}\n" for one in images)
        for task in ("Main", "Segmentation"):
            yield f"{folder}/ImageSets/{task}/train.txt", listed

    def _annotation(self, image: Labelled, names: Mapping[int, str]) -> str:
        root = ElementTree.Element("annotation")

        def put(parent: ElementTree.Element, **values: object) -> None:
            for name, value in values.items():
                ElementTree.SubElement(parent, name).text = str(value)

        height, width = image.size
        put(root, folder="VOC2012", filename=f"{image.number:06d}.jpg")
        put(ElementTree.SubElement(root, "source"), database="synthetic")
        put(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
        put(root, segmented=1)
        for box in image.boxes:
            cut = box.left == 0 or box.top == 0 or box.right == width or box.bottom == height
            entry = ElementTree.SubElement(root, "object")
            put(entry, name=names[box.label], pose="Unspecified", truncated=int(cut), difficult=0)
            # Counted from 1, and the last ones belong to it.
            corners = {"xmin": box.left + 1, "ymin": box.top + 1, "xmax": box.right, "ymax": box.bottom}
            put(ElementTree.SubElement(entry, "bndbox"), **corners)
        ElementTree.indent(root)
        return ElementTree.tostring(root, "unicode") + "\n"


def run_lengths(box: Box, size: tuple[int, int]) -> list[int]:
    """COCO's uncompressed run lengths: pixels outside, inside, outside … column by column."""
    whole = np.zeros(size, bool)
    whole[box.top : box.bottom, box.left : box.right] = box.inside
    pixels = whole.T.ravel()
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    lengths = np.diff([0, *edges, len(pixels)]).tolist()
    return [0, *lengths] if pixels[0] else lengths


LAYOUTS: dict[DatasetFormat, Layout] = {"coco": Coco(), "yolo": Yolo(), "voc": Voc(), "masks": Masks()}
