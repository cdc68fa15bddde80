"""Copies of training images, and the intervals of shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from measures import PAIRS, closeness, copying, difference_of, pictures, share_of, views
from reglue.metrics.features import load_encoder_features

TRAINING, HELD_OUT, NEW, OTHER = torch.randn(4, 300, 16, generator=torch.Generator().manual_seed(0))
NOISE = 0.01 * torch.randn(40, 16, generator=torch.Generator().manual_seed(1))


def copied(samples: Tensor, mirrored: Tensor = OTHER[:40]) -> float:
    held_out = torch.stack([HELD_OUT, OTHER])
    return copying(torch.stack([samples, mirrored]), TRAINING, held_out)[0]["copied"]["value"]


def test_copies_are_told_from_new_images_and_from_images_without_features() -> None:
    assert copied(TRAINING[:40] + NOISE) > 0.9
    assert abs(copied(NEW[:40])) < 0.1
    assert abs(copied(NOISE, NOISE)) < 0.1  # Grey images are near to many.
    assert copied(HELD_OUT[:40] + NOISE) < -0.9


def test_mirror_images_are_copies_too() -> None:
    assert copied(NEW[:40], TRAINING[:40] + NOISE) > 0.9


def test_the_closest_pairs() -> None:
    samples = NEW[:40].clone()
    samples[[3, 7]] = TRAINING[[5, 9]] + NOISE[:2]
    held_out = torch.stack([HELD_OUT, OTHER])
    _, closest, places = copying(torch.stack([samples, OTHER[:40]]), TRAINING, held_out)
    assert len(closest) == len(places) == PAIRS
    assert dict(zip(closest[:2].tolist(), places[:2].tolist(), strict=True)) == {3: 5, 7: 9}


def test_the_ratio_is_of_the_nearest_to_the_next() -> None:
    real = torch.tensor([[0.0], [3.0], [5.0], [100.0]])
    ratio, nearest = closeness(torch.tensor([[[1.0]]]), real, 2)
    assert ratio.item() == pytest.approx(1 / 3)  # 1, and 2 and 4 next
    assert nearest.item() == 0


def test_views_are_of_images_and_of_their_mirror_images(tiny_images: Path, tiny_encoder: str, tmp_path: Path) -> None:
    network = load_encoder_features(tiny_encoder, (16, 16), "class-token", "cpu")
    for i, file in enumerate(sorted(tiny_images.rglob("*.png"))[:5]):
        Image.open(file).crop((0, 0, 16, 16)).save(tmp_path / f"{i:06d}.png")
    images = torch.cat(list(pictures(tmp_path, 5)))
    assert images.shape == (5, 3, 16, 16)
    found = views(network, images.split(2))
    swapped = views(network, images.flip(-1).split(5)).flip(0)
    assert torch.allclose(found, swapped, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_intervals_of_shares_are_wilsons() -> None:
    # 361 of 400, by the formula.
    p, z, n = 0.9025, 1.959964, 400
    middle, half = (p + z**2 / (2 * n)), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    found = share_of(p, n)
    assert found["low"] == pytest.approx((middle - half) / (1 + z**2 / n), abs=1e-6)
    assert found["high"] == pytest.approx((middle + half) / (1 + z**2 / n), abs=1e-6)


def test_differences_of_shares_have_a_width_where_nothing_was_found() -> None:
    none = difference_of(0.0, 0.0, 400)
    assert none["value"] == 0
    assert none["high"] == -none["low"] == pytest.approx(share_of(0.0, 400)["high"])
    found = difference_of(56 / 70, 42 / 70, 70)  # as Newcombe's first example, there of 48 in 80
    assert found["low"] == pytest.approx(0.0481, abs=5e-5)
    assert found["high"] == pytest.approx(0.3401, abs=5e-5)
