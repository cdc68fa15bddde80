"""ICC profiles: colours come out as viewers show them, in every mode of an image, and damaged ones are no matter."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from profiles import ADOBE_RGB, DISPLAY_P3, gamma, profile
from reglue.data.colours import in_srgb
from reglue.data.images import decode, noticing

GREY = profile(b"GRAY", kTRC=gamma(1.8))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
COLOUR = (200, 150, 90)


def by_pillow(image: Image.Image, icc: bytes) -> np.ndarray:
    """What Pillow's own function makes of an image."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    converted = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
    )
    return np.asarray(converted, int)


@pytest.mark.parametrize("icc", [ADOBE_RGB, DISPLAY_P3])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff", "a.avif"])
def test_colours_come_to_srgb(tmp_path: Path, icc: bytes, name: str):
    image = Image.new("RGB", (8, 8), COLOUR)
    image.save(tmp_path / name, icc_profile=icc)
    with noticing() as noticed:
        shown = np.asarray(decode(tmp_path / name), int)
    assert noticed.converted == 1
    assert abs(shown - by_pillow(image, icc)).max() <= 4  # Some formats lose a little.
    assert abs(shown - np.array(COLOUR)).max() >= 5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA"])
def test_every_mode_keeps_its_transparency(tmp_path: Path, mode: str):
    image = Image.new("RGBA", (4, 4), (*COLOUR, 102 if mode.endswith("A") else 255)).convert(mode)
    image.save(tmp_path / "a.png", icc_profile=ADOBE_RGB)
    opaque = by_pillow(image.convert("RGB"), ADOBE_RGB)
    share = 0.4 if mode.endswith("A") else 1
    assert abs(np.asarray(decode(tmp_path / "a.png"), int) - (share * opaque + (1 - share) * 255)).max() <= 1


def test_a_profile_of_greys(tmp_path: Path):
    Image.new("L", (4, 4), 90).save(tmp_path / "a.png", icc_profile=GREY)
    assert decode(tmp_path / "a.png").getpixel((0, 0)) == (109, 109, 109)  # (90 / 255)^1.8 of the light is 109 in sRGB


@pytest.mark.parametrize(
    ("mode", "icc"),
    [("RGB", SRGB), ("RGB", GREY), ("CMYK", ADOBE_RGB), ("RGB", b"no profile"), ("RGB", ADOBE_RGB[:200]), ("1", GREY)],
)
def test_profiles_that_say_nothing_change_nothing(mode: str, icc: bytes):
    image = Image.new("RGB", (4, 4), COLOUR).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    image.info["icc_profile"] = icc
    shown, converted = in_srgb(image)
    assert not converted
    assert np.array_equal(np.asarray(shown), expected)


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_profiles_do_not_spoil_an_image(data: st.DataObject):
    icc = bytearray(ADOBE_RGB)
    for _ in range(data.draw(st.integers(0, 6))):
        icc[data.draw(st.integers(0, len(icc) - 1))] = data.draw(st.integers(0, 255))
    image = Image.new("RGB", (4, 4), COLOUR)
    image.info["icc_profile"] = bytes(icc[: data.draw(st.integers(0, len(icc)))])
    assert in_srgb(image)[0].size == (4, 4)
