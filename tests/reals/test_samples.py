"""Images for an autoencoder: every sample a function of the seed and its position."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reglue.data.images import ImageFolder
from reglue.data.prefetch import prefetch
from reglue.errors import UserError
from reglue.reals.samples import ImageSamples, all_of, to_images, to_pixels

CPU = torch.device("cpu")


def samples(folder: Path, purpose: str = "training", flips: bool = True, rows: int = 24) -> ImageSamples:
    images = ImageFolder.open(folder)
    return ImageSamples(images, torch.arange(len(images))[:rows], (16, 16), (3, 4, 4), 0, purpose, flips)


def test_a_sample_is_the_same_however_it_is_read(tiny_images: Path) -> None:
    alone = [samples(tiny_images)[position] for position in range(40)]
    ours, parts = samples(tiny_images), [range(start, start + 4) for start in range(0, 40, 4)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for workers in (0, 3):  # Three threads at the end of an epoch, some of them in the next one.
        for part, (pixels, noise) in zip(parts, prefetch(ours.batch, parts, workers), strict=True):
            for position, *sample in zip(part, pixels, noise, strict=True):
                assert torch.equal(sample[0], alone[position][0])
                assert torch.equal(sample[1], alone[position][1])
    assert torch.equal(before, torch.get_rng_state())


def test_every_epoch_shows_every_image_once_in_another_order(tiny_images: Path) -> None:
    ours = samples(tiny_images, flips=False)
    epochs = [[ours[p][0].numpy().tobytes() for p in range(24 * e, 24 * (e + 1))] for e in range(2)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert epochs[0] != epochs[1]
    in_order = samples(tiny_images, "validation", flips=False)
    assert [in_order[p][0].numpy().tobytes() for p in range(24)] == [
        in_order.images.load(row, (16, 16)).numpy().tobytes()  # type: ignore[union-attr]
        for row in range(24)
    ]


def test_about_half_are_mirrored(tiny_images: Path) -> None:
    plain, flipped = samples(tiny_images, flips=False), samples(tiny_images)
    mirrored = 0
    for position in range(72):
        (a, _), (b, _) = plain[position], flipped[position]
        assert torch.equal(a, b) or torch.equal(a.flip(2), b)
        mirrored += not torch.equal(a, b)
    assert 15 < mirrored < 60


def test_an_unreadable_image_is_reported_and_replaced_by_the_next(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = sorted(tiny_images.glob("circle/*.png"))[:3]
    for index, name in enumerate(names):
        (folder / f"{index}.png").write_bytes(name.read_bytes())
    (folder / "1.png").write_bytes(b"no image")
    ours = samples(folder, "validation", flips=False)
    assert torch.equal(ours[1][0], ours[2][0])
    assert "1.png" in capsys.readouterr().err
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        samples(folder)[0]


def test_all_of_them_come_once(tiny_images: Path) -> None:
    batches = list(all_of(samples(tiny_images, "validation"), 10, 0, CPU))
    assert [len(pixels) for pixels, _ in batches] == [10, 10, 4]


@given(st.integers(0, 255))
def test_pixels_survive_the_round_trip(value: int) -> None:
    pixels = torch.full((1, 3, 2, 2), value, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_images(pixels)), pixels)
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
