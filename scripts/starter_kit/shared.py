"""What both trainings of the starter kit share: views of photographs and of shapes, and a loop by the clock.

A quarter of the views are bright shapes on a dark ground, because the kit also has to describe and reconstruct
handwriting, which no photograph resembles. No handwriting is used: the shapes are thresholded photographs, random
strokes and letters of Pillow's own font.
"""

from __future__ import annotations

import math
import string
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

from reglue.data.listing import is_image

SHAPES = 0.25
"""Share of views that are no photographs."""


def minimise(optimiser: torch.optim.Optimizer, minutes: float) -> Iterator[tuple[int, Any]]:
    """Steps until the time is over, each with its number and the progress bar.

    The caller computes gradients, and the weights are updated when it asks for the next step. The learning rate rises
    for a hundred steps and falls to zero over the time.
    """
    rate, parameters = optimiser.defaults["lr"], [p for group in optimiser.param_groups for p in group["params"]]
    start, step, elapsed = time.monotonic(), 0, 0.0
    with tqdm(total=100, desc="training", unit="%") as progress:
        while elapsed < 1:
            optimiser.zero_grad()
            yield step, progress
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - elapsed)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            step += 1
            elapsed = (time.monotonic() - start) / (60 * minutes)
            progress.update(100 * elapsed - progress.n)
    print(f"{step} steps")


def random_views(source: Path, photographs: int, count: int, size: int, rng: np.random.Generator) -> Tensor:
    """So many views, uint8 (N, 3, size, size), of at most so many photographs of a tar file."""
    images = read_images(source, photographs)
    order = tqdm(rng.permutation(count) % len(images), desc="views")
    views = (np.array(random_view(images[row], size, rng)) for row in order)
    return torch.stack([torch.from_numpy(view).permute(2, 0, 1) for view in views])


def read_images(source: Path, limit: int) -> list[Image.Image]:
    """Training images of a tar file laid out as `train/class/image`.

    At most so many, evenly spread over the sorted files, so that every class is among them.
    """
    with tarfile.open(source) as tar:
        inside = [member for member in tar if "train" in Path(member.name).parts and is_image(member.name)]
        files = sorted(inside, key=lambda member: member.name)
        chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(limit, len(files))).astype(int)]
        return [Image.open(tar.extractfile(file)).convert("RGB") for file in tqdm(chosen, desc="photographs")]  # type: ignore[reportArgumentType]


def random_view(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A random crop of a photograph, flipped half the time, at size × size; or a shape."""
    if rng.random() >= SHAPES:
        return _random_crop(image, size, rng)
    if rng.random() < 0.25:
        return _thresholded(_random_crop(image, size, rng), rng)
    return _strokes(size, rng) if rng.random() < 0.65 else _glyph(size, rng)


def _random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    area = image.width * image.height * rng.uniform(0.25, 1.0)
    aspect = math.exp(rng.uniform(-0.25, 0.25))
    width = min(image.width, round(math.sqrt(area * aspect)))
    height = min(image.height, round(math.sqrt(area / aspect)))
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _thresholded(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The bright or the dark parts of a photograph, as soft white on black."""
    grey = image.convert("L").filter(ImageFilter.GaussianBlur(image.width * rng.uniform(0.01, 0.03)))
    values = np.asarray(grey, dtype=np.float32) * rng.choice([-1, 1])
    threshold = np.quantile(values, rng.uniform(0.6, 0.9))
    softness = max(4.0, float(values.std())) * rng.uniform(0.1, 0.5)
    white = 255 / (1 + np.exp(-np.clip((values - threshold) / softness, -30, 30)))
    return Image.fromarray(white.astype(np.uint8)).convert("RGB")


def _strokes(size: int, rng: np.random.Generator) -> Image.Image:
    """One or two round-ended curves through random points."""
    canvas = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    thickness = rng.uniform(0.05, 0.13) * canvas.width
    for _ in range(rng.integers(1, 3)):
        points = rng.uniform(0.15, 0.85, size=(rng.integers(3, 8), 2)) * canvas.width
        for x, y in _curve(points, 4 * size):
            half = thickness / 2
            draw.ellipse((x - half, y - half, x + half, y + half), fill=255)
    return canvas.resize((size, size), Image.Resampling.BOX).convert("RGB")


def _curve(points: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
    """A quadratic B-spline: smooth, and inside the hull of its points."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    segments = len(padded) - 2
    position = np.linspace(0, segments, steps, endpoint=False)
    segment, t = position.astype(int), (position % 1)[:, None]
    before, here, after = padded[segment], padded[segment + 1], padded[segment + 2]
    return 0.5 * ((1 - t) ** 2 * before + (1 + 2 * t * (1 - t)) * here + t**2 * after)


def _glyph(size: int, rng: np.random.Generator) -> Image.Image:
    """A letter or numeral, turned, sheared and moved a little."""
    canvas = Image.new("L", (2 * size, 2 * size))
    font = ImageFont.load_default(size=float(canvas.width * rng.uniform(0.6, 0.95)))
    character = str(rng.choice(list(string.ascii_letters + string.digits)))
    centre = canvas.width / 2
    stroke = int(rng.integers(0, size // 12))
    ImageDraw.Draw(canvas).text((centre, centre), character, 255, font, anchor="mm", stroke_width=stroke)
    angle, shear, scale = rng.uniform(-0.4, 0.4), rng.uniform(-0.3, 0.3), rng.uniform(0.9, 1.2)
    a, b = math.cos(angle) * scale, (math.sin(angle) + shear) * scale
    c, d = -math.sin(angle) * scale, math.cos(angle) * scale
    shift = rng.uniform(-0.06, 0.06, size=2) * canvas.width
    matrix = (a, b, centre - a * centre - b * centre + shift[0], c, d, centre - c * centre - d * centre + shift[1])
    moved = canvas.transform(canvas.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return moved.resize((size, size), Image.Resampling.BOX).convert("RGB")
