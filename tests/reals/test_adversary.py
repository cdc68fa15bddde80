"""The discriminator, its sizes and its weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reglue.errors import UserError
from reglue.reals.adversary import MAX_WEIGHT, PatchDiscriminator, adaptive_weight, hinge
from reglue.reals.config import check_size


@settings(max_examples=60)
@given(height=st.integers(1, 40), width=st.integers(1, 40), layers=st.integers(1, 4))
def test_sizes_that_pass_the_check_are_those_that_work(height: int, width: int, layers: int) -> None:
    discriminator = PatchDiscriminator(2, layers)
    images = torch.randn(1, 3, height, width)
    try:
        check_size((height, width), layers)
    except UserError:
        with pytest.raises(RuntimeError):
            discriminator(images)
    else:
        assert discriminator(images).shape[:2] == (1, 1)


def test_scores_do_not_depend_on_the_other_images() -> None:
    discriminator = PatchDiscriminator(8, 2)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(discriminator(images)[1:2], discriminator(images[1:2]))


def test_a_score_sees_a_patch_and_not_the_image() -> None:
    """PatchGAN of three layers: 70×70 pixels."""
    discriminator = PatchDiscriminator(2, 3)
    for module in discriminator.layers:
        if isinstance(module, torch.nn.GroupNorm):  # Its statistics are of the whole image.
            module.forward = lambda x: x  # type: ignore[method-assign]
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    scores = discriminator(images)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    assert images.grad is not None
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_hinge_is_zero_once_both_are_told_apart_by_a_margin() -> None:
    assert hinge(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge(torch.zeros(4), torch.zeros(4)) == 1
    assert hinge(torch.tensor([-1.0]), torch.tensor([0.0])) == 1.5


def test_the_weight_is_a_ratio_of_norms() -> None:
    assert float(adaptive_weight(torch.full((4,), 3.0), torch.full((4,), 1.0))) == pytest.approx(3, rel=1e-3)
    assert float(adaptive_weight(torch.full((4,), 3.0), torch.zeros(4))) == MAX_WEIGHT
