"""CKNNA on representations whose agreement is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reglue.perception.neighbours import cknna


def representation(images: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(images, 12, generator=torch.Generator().manual_seed(seed))


def by_hand(ours: Tensor, theirs: Tensor, neighbours: int) -> float:
    """The definition, pair by pair."""
    n = len(ours)
    kernels = [torch.nn.functional.normalize(x.double(), dim=1) for x in (ours, theirs)]
    kernels = [x @ x.T for x in kernels]

    def near(kernel: Tensor, i: int, j: int) -> bool:
        others = sorted((k for k in range(n) if k != i), key=lambda k: -kernel[i, k])
        return j in others[:neighbours]

    def hsic(a: Tensor, b: Tensor, kept: Tensor) -> float:
        a, b = a * kept, b * kept
        trace = sum(float(a[i, j] * b[j, i]) for i in range(n) for j in range(n))
        means = float(a.sum() * b.sum()) / ((n - 1) * (n - 2))
        rows = float(torch.ones(n).double() @ a @ b @ torch.ones(n).double())
        return (trace + means - 2 / (n - 2) * rows) / (n * (n - 3))

    kept = [torch.tensor([[i != j and near(k, i, j) for j in range(n)] for i in range(n)]).double() for k in kernels]
    own = [hsic(k, k, mask) for k, mask in zip(kernels, kept, strict=True)]
    return hsic(kernels[0], kernels[1], kept[0] * kept[1]) / (own[0] * own[1]) ** 0.5


def test_it_is_what_the_definition_says() -> None:
    ours, theirs = representation(12), representation(12) + 0.7 * representation(12, 1)
    assert cknna(ours, theirs, 3) == pytest.approx(by_hand(ours, theirs, 3), rel=1e-9)


def test_turning_and_scaling_change_nothing_and_noise_does() -> None:
    ours = representation()
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3)))
    assert cknna(ours, 5 * ours @ turn) == pytest.approx(1, abs=1e-6)
    noisy = [cknna(ours, ours + share * representation(seed=1)) or 0 for share in (0.3, 1.0)]
    assert 0.95 > noisy[0] > noisy[1] > abs(cknna(ours, representation(seed=2)) or 0)


def test_where_it_is_not_defined() -> None:
    assert cknna(representation(3), representation(3)) is None
    assert cknna(torch.ones(9, 2), representation(9)) is None
