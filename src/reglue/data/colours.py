"""Colours of images that carry an ICC profile (Adobe RGB, Display P3, a scanner's own), brought to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
"""With the intent, what viewers do."""
SAME = 1
"""A profile that moves no colour by more than this, of 255, is sRGB itself under whatever name."""
_MODES = {
    "RGB": ("RGB", ("RGB", "RGBA", "P", "PA", "L", "LA", "YCbCr")),
    "GRAY": ("L", ("L", "LA")),
    "CMYK": ("CMYK", ("CMYK",)),
}
"""A profile's kind of colours → the mode of Pillow that it speaks of, and the modes that can be brought to that one."""


def in_srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """An image of 8 bits in sRGB (mode RGB, without its transparency), and whether its profile changed its colours.

    One without a profile, or with a damaged one or one for other kinds of images, is taken to be in sRGB.
    """
    profile = image.info.get("icc_profile")
    mode, transform = _to_srgb(profile) if isinstance(profile, bytes) and profile else ("", None)
    if transform is None or image.mode not in _MODES[mode][1]:
        return image.convert("RGB"), False
    return transform.apply(image.convert(_MODES[mode][0])), True


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The kind of colours of a profile, and how they come to sRGB; None where nothing is to be done."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        kind: str = cast(Any, opened.profile).xcolor_space.strip()
        if kind not in _MODES:
            return kind, None
        mode, _ = _MODES[kind]
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(opened, srgb, mode, "RGB", INTENT, flags=FLAGS)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):  # Damaged, which does not spoil the pixels.
        return "", None
    if mode != "CMYK":
        levels = np.linspace(0, 255, 9 if mode == "RGB" else 256).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 9, 3) if mode == "RGB" else levels[None]
        patches = Image.fromarray(colours)
        moved = np.asarray(transform.apply(patches), int) - np.asarray(patches.convert("RGB"), int)
        if abs(moved).max() <= SAME:
            return kind, None
    return kind, transform
