"""Image folders: what is listed, the crop, and files that are anything but images."""

from __future__ import annotations

import io
import os
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from reglue.data.images import ORIENTATION, ImageFolder, UnreadableImage, crop_to, decode, load_crop, upright_size
from reglue.data.masks import read_mask
from reglue.errors import UserError
from reglue.watching.checks import picture


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def only_image(tmp_path: Path, name: str = "a.png") -> ImageFolder:
    return ImageFolder(tmp_path, (name,), (0,), ())


def test_classes_are_sorted_sub_folders_and_images_are_sorted_within(tmp_path: Path):
    for name in ("zebra/b.png", "zebra/a.JPG", "ape/10.png", "ape/2.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise_image(4, 4).save(tmp_path / name)
    (tmp_path / "zebra" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("nor this")

    images = ImageFolder.open(tmp_path)

    assert images.names == ("ape/10.png", "ape/2.webp", "zebra/a.JPG", "zebra/b.png")
    assert images.labels == (0, 0, 1, 1)
    assert images.class_names == ("ape", "zebra")
    assert len(images) == 4


def test_a_folder_without_sub_folders_is_unconditional(tmp_path: Path):
    noise_image(4, 4).save(tmp_path / "a.png")
    images = ImageFolder.open(str(tmp_path))
    assert (images.names, images.labels, images.class_names) == (("a.png",), (0,), ())


def move_down(folder: Path) -> None:
    """The one class becomes a folder of classes."""
    (folder / "cat").mkdir()
    (folder / "a.png").rename(folder / "cat" / "a.png")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: None, "holds no images"),
        (lambda folder: (folder / "full" / "empty_class").parent.rename(folder / "lonely"), "class without images"),
        (lambda folder: noise_image(2, 2).save(folder / "stray.png"), "stray.png"),
        (lambda folder: (folder / "full").rename(folder / "deeper") and move_down(folder / "deeper"), "deeper/cat"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(tmp_path: Path, make, says: str):
    folder = tmp_path / "images"
    folder.mkdir()
    if says not in ("no such folder", "holds no images"):
        (folder / "full").mkdir()
        if says != "class without images":
            noise_image(2, 2).save(folder / "full" / "a.png")
    make(folder)
    with pytest.raises(UserError, match=says) as caught:
        ImageFolder.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def adm_crop(image: Image.Image, side: int) -> np.ndarray:
    """What ADM does to an image, told once more and for squares alone."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    pixels = np.array(
        image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    )
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@settings(max_examples=60)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 40))
def test_square_crops_are_adms_to_the_bit(width: int, height: int, side: int):
    image = noise_image(width, height)
    np.testing.assert_array_equal(np.array(crop_to(image, (side, side))), adm_crop(image, side))


@settings(max_examples=60)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 50), st.integers(1, 50))
def test_any_image_is_cropped_to_any_size(width: int, height: int, target_height: int, target_width: int):
    cropped = crop_to(noise_image(width, height), (target_height, target_width))
    assert cropped.size == (target_width, target_height)


def test_the_crop_is_the_centre():
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255
    assert np.array(crop_to(Image.fromarray(pixels), (16, 16))).min() == 255
    assert np.array(crop_to(Image.fromarray(pixels.transpose(1, 0, 2)), (16, 16))).min() == 255


def test_an_image_too_long_for_its_scaled_version_to_fit_in_memory_is_refused(tmp_path: Path):
    Image.new("L", (60_000, 1)).save(tmp_path / "a.png")
    unreadable = only_image(tmp_path).load(0, (512, 512))
    assert isinstance(unreadable, UnreadableImage)
    assert "60000×1" in unreadable.reason


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_of_image_becomes_rgb(tmp_path: Path, mode: str):
    formats = {"CMYK": "jpg", "YCbCr": "jpg", "I": "tiff", "F": "tiff"}
    name = f"a.{formats.get(mode, 'png')}"
    values = np.full((6, 5), 0x8000 if mode.startswith("I") else 128)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode in ("I", "F"):
        image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    else:
        image = Image.fromarray(values.astype(np.uint8)).convert("RGB").convert(mode)
    assert image.mode == mode
    image.save(tmp_path / name)

    pixels = only_image(tmp_path, name).load(0, (6, 5))

    assert isinstance(pixels, torch.Tensor)
    assert (pixels.shape, pixels.dtype) == ((3, 6, 5), torch.uint8)
    if mode not in ("1", "P", "CMYK"):  # These cannot hold this grey exactly.
        assert (pixels.float() - 128).abs().max() <= 2


def test_transparency_shows_white(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert np.array(decode(tmp_path / "a.png")).min() == 255


def test_a_photograph_held_sideways_is_turned_upright(tmp_path: Path):
    image = noise_image(8, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn by 90° clockwise to see it upright.
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.array(decode(tmp_path / "a.png")), np.rot90(np.array(image), -1))


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    noise_image(40, 40).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    unreadable = only_image(tmp_path).load(0, (8, 8))
    assert isinstance(unreadable, UnreadableImage)
    assert "bomb" in unreadable.reason


def test_threads_that_decode_at_once_refuse_bombs_and_leave_warnings_as_they_were(monkeypatch: pytest.MonkeyPatch):
    def file(side: int) -> bytes:
        content = io.BytesIO()
        noise_image(side, side).save(content, "PNG")
        return content.getvalue()

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    both_inside, bomb, small, filters = threading.Barrier(2), file(40), file(20), list(warnings.filters)
    transpose = ImageOps.exif_transpose

    def meet(image: Image.Image) -> Image.Image | None:
        both_inside.wait(10)
        with pytest.raises(Image.DecompressionBombError):
            decode(bomb)
        assert warnings.filters == filters
        return transpose(image)

    monkeypatch.setattr(ImageOps, "exif_transpose", meet)
    with ThreadPoolExecutor(2) as threads:
        assert [image.size for image in threads.map(decode, [small, small])] == [(20, 20), (20, 20)]
    assert warnings.filters == filters


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    noise_image(24, 18).save(file, kind)
    return file.getvalue()


@settings(max_examples=80)
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), data=st.data())
def test_no_bytes_whatever_raise(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject):
    whole = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("wild")
    (folder / "a.png").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    result = only_image(folder).load(0, (16, 16))
    if isinstance(result, UnreadableImage):
        assert result.name == "a.png"
        assert result.reason
        assert "\n" not in result.reason
    else:
        assert result.shape == (3, 16, 16)


def test_truncated_text_and_missing_files_are_unreadable_with_a_reason(tmp_path: Path):
    (tmp_path / "cut.jpg").write_bytes(encoded("JPEG")[:400])
    (tmp_path / "text.png").write_text("I am no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    images = ImageFolder.open(tmp_path)
    results = [images.load(index, (8, 8)) for index in range(len(images))]
    assert [result.name for result in results if isinstance(result, UnreadableImage)] == list(images.names)
    assert len(images) == 5
    assert len(images.fingerprint()) == 64


def test_fingerprint_notices_a_replaced_file(tmp_path: Path):
    noise_image(4, 4).save(tmp_path / "a.png")
    before = ImageFolder.open(tmp_path).fingerprint()
    noise_image(5, 5).save(tmp_path / "a.png")
    assert ImageFolder.open(tmp_path).fingerprint() != before


def rgb_of(path: Path) -> list[int]:
    """The colour of an image of one colour, read by path and by content alike."""
    pixels = np.array(decode(path))
    assert np.array_equal(pixels, np.array(decode(path.read_bytes())))
    assert np.ptp(pixels, axis=(0, 1)).max() <= 2, "not one colour"
    return pixels[0, 0].tolist()


def palette(transparent: bool) -> Image.Image:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "name", "colour"),
    [
        (Image.new("L", (4, 4), 77), "a.png", (77, 77, 77)),
        (Image.new("L", (4, 4), 77), "a.jpg", (77, 77, 77)),
        (Image.new("1", (4, 4), 1), "a.png", (255, 255, 255)),
        (palette(transparent=False), "a.png", (200, 100, 50)),
        (palette(transparent=True), "a.png", (255, 255, 255)),
        (palette(transparent=True), "a.gif", (255, 255, 255)),
        (Image.new("LA", (4, 4), (0, 51)), "a.png", (204, 204, 204)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "a.png", (255, 204, 204)),
        (Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "a.webp", (255, 0, 0)),
        # JPEG holds these inverted, as Adobe does; TIFF as they are.
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "a.jpg", (255, 0, 0)),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "a.jpg", (0, 0, 0)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "a.tiff", (255, 0, 0)),
        (Image.fromarray(np.full((4, 4), 257 * 99, np.uint16)), "a.png", (99, 99, 99)),
        (Image.fromarray(np.full((4, 4), 257 * 99, np.uint16)), "a.tiff", (99, 99, 99)),
        (Image.fromarray(np.full((4, 4), 257 * 99, np.int32)), "a.tiff", (99, 99, 99)),
        (Image.fromarray(np.full((4, 4), 99, np.float32)), "a.tiff", (99, 99, 99)),
        (Image.fromarray(np.full((4, 4), 0.4, np.float32)), "a.tiff", (102, 102, 102)),
        (Image.new("RGB", (1, 1), (1, 2, 3)), "a.png", (1, 2, 3)),
        (Image.new("RGB", (4, 4), (1, 2, 3)), "a.bmp", (1, 2, 3)),
    ],
)
def test_colours_are_those_that_a_viewer_shows(tmp_path: Path, image: Image.Image, name: str, colour):
    image.save(tmp_path / name)
    assert np.abs(np.subtract(rgb_of(tmp_path / name), colour)).max() <= 1


def test_transparency_in_16_bits_is_white(tmp_path: Path):
    Image.fromarray(np.full((4, 4), 30_000, np.uint16)).save(tmp_path / "a.png", transparency=30_000)
    if Image.open(tmp_path / "a.png").info.get("transparency") != 30_000:
        pytest.skip("Pillow keeps no transparency of 16 bits")
    assert rgb_of(tmp_path / "a.png") == [255, 255, 255]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.array([[-1.0, 3]], np.float32), "between -1 and 3, not between 0 and 255"),
        (np.array([[0, 4000]], np.float32), "between 0 and 4000"),
        (np.array([[0, np.nan]], np.float32), "nan"),
        (np.array([[0, 70_000]], np.int32), "not between 0 and 65535"),
    ],
)
def test_values_of_an_unknown_range_are_unreadable_not_guessed(tmp_path: Path, values: np.ndarray, says: str):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    unreadable = only_image(tmp_path, "a.tiff").load(0, (2, 2))
    assert isinstance(unreadable, UnreadableImage)
    assert says in unreadable.reason


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_an_animation_gives_its_first_image(tmp_path: Path, name: str):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with Image.open(tmp_path / name) as file:
        assert getattr(file, "n_frames", 1) == 2
    assert np.abs(np.subtract(rgb_of(tmp_path / name), (255, 0, 0))).max() <= 2


def test_the_content_counts_and_not_the_ending(tmp_path: Path):
    noise_image(8, 8).save(tmp_path / "a.bmp")
    (tmp_path / "a.bmp").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(np.array(decode(tmp_path / "a.jpg")), np.array(noise_image(8, 8)))


def test_damaged_exif_does_not_spoil_the_image(tmp_path: Path):
    noise_image(8, 4).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert decode(tmp_path / "a.jpg").size == (8, 4)


def test_reasons_are_the_same_each_time(tmp_path: Path):
    (tmp_path / "text.png").write_text("I am no image")
    unreadable = load_crop("x", (tmp_path / "text.png").read_bytes, (8, 8))
    assert unreadable == UnreadableImage("x", "cannot identify image file")
    assert only_image(tmp_path, "text.png").load(0, (8, 8)) == UnreadableImage("text.png", "cannot identify image file")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("opened", [decode, upright_size, read_mask, lambda file: picture(file).read()])
def test_no_program_is_started_for_postscript_called_an_image(tmp_path: Path, monkeypatch, opened):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    with pytest.raises((OSError, UserError), match="cannot identify image file"):
        opened(tmp_path / "a.png")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", [b"\0\3\0\0\0\1", b"\0\2\0\0\0\2"], ids=["a number", "text"])
@pytest.mark.parametrize("value", [b"\0\1", b"\0\6", b"\0\x09", b"6\0", b"\xff\xff"])
def test_the_upright_size_is_that_of_the_decoded_image(tmp_path: Path, kind: bytes, value: bytes):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1" + ORIENTATION.to_bytes(2) + kind + value + bytes(6)
    noise_image(8, 4).save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == decode(tmp_path / "a.jpg").size[::-1]
