import numpy as np
import pytest
import torch

from reglue.data.pictures import GAP, colours_of, image_grid, label_colours, legend, text_block, titled_grid


def test_grid_places_images_row_by_row_and_fills_the_rest():
    images = np.stack([np.full((3, 5, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    grid = image_grid(images, columns=2, background=7)
    assert grid.shape == (2 * 3 + GAP, 2 * 5 + GAP, 3)
    assert (grid[:3, :5] == 10).all()
    assert (grid[:3, 5 + GAP :] == 20).all()
    assert (grid[3 + GAP :, :5] == 30).all()
    assert (grid[3 + GAP :, 5:] == 7).all()
    assert (grid[3 : 3 + GAP] == 7).all()


def test_grid_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match="uint8"):
        image_grid(np.zeros((2, 3, 4, 4), dtype=np.uint8), columns=2)
    with pytest.raises(ValueError, match="at least one"):
        image_grid(np.zeros((0, 4, 4, 3), dtype=np.uint8), columns=2)


def test_colours_separate_regions_and_do_not_depend_on_axis_signs():
    code = torch.zeros(2, 6, 4, 4)
    code[:, 2, :, :2] = 3.0
    code += 0.01 * torch.randn(code.shape, generator=torch.Generator().manual_seed(0))
    colours = colours_of(code)
    assert colours.shape == (2, 4, 4, 3)
    assert colours.dtype == np.uint8
    assert colours[:, :, :2, 0].min() > colours[:, :, 2:, 0].max() + 50
    # The largest entry of the first axis is positive, so more of channel 2 is more red.
    assert np.abs(colours_of(code * 5).astype(int) - colours).max() <= 1


def test_one_reference_gives_one_meaning_to_a_colour():
    reference = torch.randn(8, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    assert (colours_of(reference[2:3], reference) == colours_of(reference)[2:3]).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_missing_components_are_grey(channels):
    colours = colours_of(torch.randn(4, channels, 3, 3))
    assert (colours[..., channels:] == 128).all()
    assert colours[..., 0].std() > 0


def test_a_constant_code_is_grey():
    assert (colours_of(torch.ones(2, 4, 3, 3)) == 128).all()


def test_labels_have_the_colours_of_pascal_voc() -> None:
    colours = label_colours(256)
    assert colours[[0, 1, 2, 3, 20]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 64, 128]]
    assert len(np.unique(colours, axis=0)) == 256


NAMES = [
    "cat",
    "great white shark, white shark, man-eater, man-eating shark",
    "n" * 90,
    "a\nb\tc",
    "",
    "\udcff",
    "名前",
]


@pytest.mark.parametrize("text", NAMES)
@pytest.mark.parametrize("width", [64, 300])
def test_text_stays_within_its_width(text: str, width: int) -> None:
    block = text_block(text, width, 12)
    assert block.shape[1] == width
    assert (block[:, :2] == 255).all(), "cut on the left"
    assert (block[:, -2:] == 255).all(), "cut on the right"
    assert (block[-2:] == 255).all(), "cut below"
    assert (block < 128).any() == bool(text)


def test_titles_stand_over_columns_and_before_rows() -> None:
    images = np.full((6, 120, 140, 3), 99, dtype=np.uint8)
    grid = image_grid(images, columns=3)
    over = titled_grid(images, 3, titles=["one", "two", "three words that need lines\nand one more"])
    assert (over[-len(grid) :] == grid).all()
    strip = over[: -len(grid)]
    for column in range(3):
        assert (strip[:, column * (140 + GAP) :][:, :140] < 128).any()
    before = titled_grid(images, 3, row_titles=["one", "word " * 200])
    assert before.shape == (grid.shape[0], grid.shape[1] + 140, 3)
    assert (before[:, 140:] == grid).all()
    assert all((before[start : start + 120, :140] < 128).any() for start in (0, 120 + GAP))


@pytest.mark.parametrize("count", [1, 2, 21, 150])
@pytest.mark.parametrize("width", [128, 900])
def test_every_entry_of_a_legend_is_whole(count: int, width: int) -> None:
    entries = [(np.array([200, index, 7], np.uint8), NAMES[index % len(NAMES)]) for index in range(count)]
    picture = legend(entries, width, 12)
    assert picture.shape[1] == width
    assert (picture[:, -1] == 255).all()
    swatches = picture[(picture[..., 0] == 200) & (picture[..., 2] == 7)][:, 1]
    assert (np.bincount(swatches, minlength=count) == 24 * 12).all(), "whole, and once each"
