"""Edited crops go back to where they were cut; masks and boxes meet the grid that a model sees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reglue.data.images import crop_to
from reglue.data.placing import Place, feathered

sizes = st.tuples(st.integers(3, 90), st.integers(3, 90))


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Random pixels, (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@settings(max_examples=60)
@given(image_size=sizes, size=sizes)
def test_what_the_model_does_not_see_stays(image_size: tuple[int, int], size: tuple[int, int]) -> None:
    place, image = Place(image_size, size), picture(image_size)
    left, top, right, bottom = place.box
    assert 0 <= left < right <= image_size[0]
    assert 0 <= top < bottom <= image_size[1]
    black = Image.new("RGB", (size[1], size[0]))
    result, before = np.asarray(place.put_back(image, black)), np.asarray(image)
    assert result.shape == before.shape
    assert not result[top:bottom, left:right].any()
    outside = np.ones(before.shape[:2], dtype=bool)
    outside[top:bottom, left:right] = False
    assert np.array_equal(result[outside], before[outside])


def test_a_crop_of_the_images_own_size_goes_back_to_the_bit() -> None:
    image, edited = picture((40, 24)), picture((24, 24), 1)
    result = Place((40, 24), (24, 24)).put_back(image, edited)
    assert np.array_equal(np.asarray(result)[:, 8:32], np.asarray(edited))
    whole = Place((24, 24), (24, 24))
    assert np.array_equal(np.asarray(whole.put_back(edited, picture((24, 24), 2))), np.asarray(picture((24, 24), 2)))


@pytest.mark.parametrize("image_size", [(64, 64), (200, 100), (37, 90), (16, 16), (10, 14)])
def test_a_crop_that_is_put_back_looks_as_it_did(image_size: tuple[int, int]) -> None:
    """Smooth pictures survive scaling there and back."""
    columns, rows = np.meshgrid(np.linspace(0, 200, image_size[0]), np.linspace(0, 200, image_size[1]))
    image = Image.fromarray(np.stack([columns, rows, columns / 2 + rows / 2], -1).astype(np.uint8))
    size = (32, 32)
    back = np.asarray(Place(image_size, size).put_back(image, crop_to(image, size))).astype(int)
    assert np.abs(back - np.asarray(image)).max() <= 14
    assert np.abs(back - np.asarray(image)).mean() < 2


@settings(max_examples=60)
@given(image_size=sizes, scale=st.integers(1, 4), data=st.data())
def test_every_white_pixel_that_is_seen_is_in_a_cell(
    image_size: tuple[int, int], scale: int, data: st.DataObject
) -> None:
    grid = (6, 4)
    place = Place(image_size, (grid[0] * scale, grid[1] * scale))
    left, top, right, bottom = place.box
    x, y = data.draw(st.integers(left, right - 1)), data.draw(st.integers(top, bottom - 1))
    mask = np.zeros((image_size[1], image_size[0]), dtype=bool)
    mask[y, x] = True
    cells = place.cells(mask, grid)
    assert cells.any()
    assert not place.cells(~np.zeros_like(mask), grid).logical_not().any()
    assert not place.cells(np.zeros_like(mask), grid).any()


def test_cells_and_boxes_are_where_pixels_are() -> None:
    place = Place((64, 32), (32, 32))  # The middle 32 columns.
    mask = np.zeros((32, 64), dtype=bool)
    mask[3, 17], mask[3, 5] = True, True
    assert place.cells(mask, (8, 8)).nonzero().tolist() == [[0, 0]]
    assert place.on_grid((16, 0, 48, 32), (8, 8)) == (0, 0, 8, 8)
    assert place.on_grid((24, 8, 33, 17), (8, 8)) == (2, 2, 4, 4)
    assert place.on_grid((24, 8, 25, 9), (8, 8)) == (2, 2, 3, 3)


def test_feathers_end_where_they_should() -> None:
    mask = np.zeros((9, 40), dtype=bool)
    mask[:, :10] = True
    assert np.array_equal(feathered(mask, 0), mask)
    share = feathered(mask, 5)
    assert (share[:, :10] == 1).all()
    assert (share[:, 14:] == 0).all()
    assert (np.diff(share[0, 9:15]) < 0).all()
