"""PSNR and SSIM against definitions and another implementation of the Gaussian window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from reglue.metrics.reconstruction import MAX_PSNR, psnr, ssim


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def scipy_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """One channel (h, w), as scikit-image computes it: radius 5, population statistics, the border left out."""
    x, y = first.astype(float), second.astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, 1.5, truncate=3.5)

    ux, uy = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - ux * ux, mean(y * y) - uy * uy, mean(x * y) - ux * uy
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = ((2 * ux * uy + c1) * (2 * vxy + c2)) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
    return value[5:-5, 5:-5].mean()


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), height=st.integers(11, 24), width=st.integers(11, 24), blend=st.floats(0, 1))
def test_ssim_is_that_of_the_gaussian_window(seed: int, height: int, width: int, blend: float) -> None:
    first = noise(seed, 2, 3, height, width)
    second = (first * (1 - blend) + noise(seed + 1, 2, 3, height, width) * blend).to(torch.uint8)
    expected = [np.mean([scipy_ssim(a, b) for a, b in zip(x.numpy(), y.numpy(), strict=True)]) for x, y in zip(first, second, strict=True)]  # fmt: skip # noqa: E501
    np.testing.assert_allclose(ssim(first, second).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 8, 10])
def test_images_below_the_window_have_a_similarity_too(size: int) -> None:
    first, second = noise(0, 1, 3, size, size), noise(1, 1, 3, size, size)
    assert -1 <= float(ssim(first, second)) < float(ssim(first, first)) == pytest.approx(1)


def test_psnr_in_decibels() -> None:
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert float(psnr(black, black + 255)) == pytest.approx(0)
    assert float(psnr(black, black + 1)) == pytest.approx(48.1308, abs=1e-3)
    assert float(psnr(black, black)) == MAX_PSNR
    both = torch.cat([black, black + 255])
    assert psnr(both, torch.cat([black + 1, black])).tolist() == pytest.approx([48.1308, 0], abs=1e-3)
