"""Masks: matched by name, cropped as their images, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reglue.data.images import crop_to
from reglue.data.masks import crop_mask, load_depths, load_masks, read_depth, read_mask
from reglue.errors import UserError

SIDES = st.integers(8, 400)


@given(width=SIDES, height=SIDES, target=st.tuples(st.integers(4, 48), st.integers(4, 48)))
def test_a_mask_is_cropped_where_its_image_is(width: int, height: int, target: tuple[int, int]):
    """Ramps say where a pixel came from: after either crop the same place, to within a pixel of the result."""
    rows, columns = np.mgrid[:height, :width]
    for axis, (ramp, side) in enumerate(((rows, height), (columns, width))):
        image = Image.fromarray(ramp.astype(np.float32))
        mask = Image.fromarray((255.0 * ramp / side).astype(np.uint8))
        expected = np.asarray(crop_to(image, target))
        cropped = np.asarray(crop_mask(mask, target)).astype(np.float64) * side / 255
        assert cropped.shape == expected.shape == target
        step = 1 + abs(np.diff(expected, axis=axis)).max(initial=0) + side / 255
        inside = (slice(1, -1), slice(1, -1))  # At the border a bicubic filter sees one side alone.
        assert abs(cropped - expected)[inside].max(initial=0) <= 1.5 * step


def test_halving_does_not_move_a_mask():
    """An eighth of the size: every class keeps its cells exactly, as the image does."""
    cells = np.arange(64, dtype=np.uint8).reshape(8, 8)
    large = cells.repeat(8, 0).repeat(8, 1)
    assert np.array_equal(np.asarray(crop_mask(Image.fromarray(large), (8, 8))), cells)
    assert np.array_equal(np.asarray(crop_to(Image.fromarray(large), (8, 8))), cells)


def test_classes_are_neither_blended_nor_invented():
    mask = Image.fromarray(np.random.default_rng(0).choice([0, 7, 255], (90, 61)).astype(np.uint8))
    assert set(np.unique(np.asarray(crop_mask(mask, (32, 32))))) == {0, 7, 255}


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_numbers_are_read_from_any_mode_that_holds_them(mode: str, tmp_path: Path):
    numbers = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    image = {
        "L": lambda: Image.fromarray(numbers),
        "1": lambda: Image.fromarray(numbers.astype(bool)),
        "I;16": lambda: Image.fromarray(numbers.astype(np.uint16)),
        "P": lambda: Image.fromarray(numbers, mode="L").convert("P"),
    }[mode]()
    if mode == "P":
        image = Image.new("P", (2, 2))
        image.putpalette([200, 10, 30, 0, 90, 0])  # Colours that are not the numbers.
        image.putdata(numbers.flatten().tolist())
    image.save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "mask.png")), numbers)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "dogs"
    folder.mkdir(parents=True)
    for name, size in (("one.jpg", (40, 20)), ("two.jpg", (40, 20)), ("three.jpg", (20, 40))):
        Image.new("RGB", size).save(folder / name)
    return folder.parent


NAMES = ["dogs/one.jpg", "dogs/two.jpg", "dogs/three.jpg"]


def save_mask(folder: Path, name: str, mask: np.ndarray) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save((folder / name).with_suffix(".png"))


def test_masks_are_matched_by_name_and_may_be_of_another_size(images: Path, tmp_path: Path):
    save_mask(tmp_path / "masks", "dogs/one.jpg", np.full((10, 20), 3, np.uint8))
    save_mask(tmp_path / "masks", "dogs/three.jpg", np.full((40, 20), 4, np.uint8))
    found, masks = load_masks(tmp_path / "masks", images, NAMES, (8, 8))
    assert found.tolist() == [0, 2]
    assert (masks.shape, masks.dtype) == ((2, 8, 8), torch.uint8)
    assert masks.unique(dim=0)[:, 0, 0].tolist() == [3, 4]


def test_a_mask_of_other_proportions_than_its_image_is_refused(images: Path, tmp_path: Path):
    save_mask(tmp_path / "masks", "dogs/one.jpg", np.zeros((20, 20), np.uint8))
    with pytest.raises(UserError, match=r"one.png has 20×20 pixels.*one.jpg 40×20"):
        load_masks(tmp_path / "masks", images, NAMES, (8, 8))
    found, _ = load_masks(tmp_path / "masks", tmp_path / "moved away", NAMES, (8, 8))
    assert found.tolist() == [0]


def test_a_photograph_on_its_side_has_an_upright_mask(images: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(images / "dogs" / "one.jpg", exif=exif)
    save_mask(tmp_path / "masks", "dogs/one.jpg", np.zeros((40, 20), np.uint8))
    assert load_masks(tmp_path / "masks", images, NAMES, (8, 8))[0].tolist() == [0]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.write_bytes(b"no image"), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot be read"),
        (lambda path: Image.new("RGB", (40, 20)).save(path), "holds colours"),
        (lambda path: Image.fromarray(np.full((20, 40), 300, np.uint16)).save(path), "class 300"),
        (lambda path: path.unlink(), "no mask for any image"),
        (lambda path: path.unlink() or path.parent.rmdir() or path.parent.parent.rmdir(), "no such folder"),
    ],
)
def test_what_is_no_mask_is_named_in_one_line(harm, says: str, images: Path, tmp_path: Path):
    save_mask(tmp_path / "masks", "dogs/one.jpg", np.zeros((20, 40), np.uint8))
    harm(tmp_path / "masks" / "dogs" / "one.png")
    with pytest.raises(UserError, match=says) as caught:
        load_masks(tmp_path / "masks", images, NAMES, (8, 8))
    assert "\n" not in str(caught.value)
    assert "masks" in str(caught.value)


@pytest.mark.parametrize("ending", ["png", "npy"])
def test_depth_maps_keep_their_unit_and_what_is_unknown(ending: str, tmp_path: Path):
    depths = np.full((8, 8), 1500, dtype=np.uint16)
    depths[:4] = 0
    if ending == "png":
        Image.fromarray(depths).save(tmp_path / "a.png")
    else:
        np.save(tmp_path / "a.npy", np.where(depths > 0, depths / 1000, np.nan))
    found, loaded = load_depths(tmp_path, tmp_path, ["b.jpg", "a.jpg"], (4, 4))
    assert (found.tolist(), loaded.shape, loaded.dtype) == ([1], (1, 4, 4), torch.float32)
    assert bool(loaded[0, :2].isnan().all())
    assert loaded[0, 2:].unique().item() == (1500 if ending == "png" else 1.5)


def test_what_is_no_depth_map_is_refused(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    np.save(tmp_path / "line.npy", np.ones(4))
    np.save(tmp_path / "empty.npy", np.ones((0, 5)))
    np.save(tmp_path / "objects.npy", np.array([[None]], dtype=object), allow_pickle=True)
    for name, reason in {
        "colours.png": "no depth map",
        "line.npy": "no depth map",
        "objects.npy": "not numbers",
        "empty.npy": r"no pixels, its shape is \(0, 5\)",
    }.items():
        with pytest.raises(UserError, match=reason):
            read_depth(tmp_path / name)
