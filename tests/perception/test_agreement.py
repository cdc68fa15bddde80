"""Agreement of maps: exact on what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reglue.perception.agreement import Agreement, ClassAgreement, DepthAgreement


def agreed(agreement: Agreement, maps: torch.Tensor, reference: torch.Tensor, batch: int = 100):
    for one, other in zip(maps.split(batch), reference.split(batch), strict=True):
        agreement.update(one, other)
    return agreement.estimates(seed=0)


def test_classes_by_hand():
    reference = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [2, 2]]])
    maps = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])
    figures = agreed(ClassAgreement(4), maps, reference)
    assert figures["pixel_accuracy"].value == 7 / 8
    assert figures["mean_iou"].value == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    # The second image's map against the first image's reference: nothing in common.
    assert (figures["mean_iou"].unrelated, figures["pixel_accuracy"].unrelated) == (0, 0)
    single = agreed(ClassAgreement(4), maps[:1], reference[:1])["mean_iou"]
    assert (single.standard_error, single.unrelated) == (None, None)


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(1, 10), st.integers(0, 1000))
def test_depth_is_pearsons_correlation_whatever_the_batch(count: int, batch: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    reference = 1 + torch.rand(count, 3, 4, generator=generator)
    maps = reference + 0.3 * torch.rand(count, 3, 4, generator=generator)
    reference[0, 0, 0] = torch.nan
    figures = agreed(DepthAgreement(), maps, reference, batch)
    known = reference.isfinite()
    x, y = maps[known].double().numpy(), reference[known].double().numpy()
    assert figures["correlation"].value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert figures["relative_error"].value == pytest.approx((abs(x - y) / y).mean())
    other = known[:-1]
    x, y = maps[1:][other].double().numpy(), reference[:-1][other].double().numpy()
    assert figures["correlation"].unrelated == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_constants_have_no_correlation():
    figures = agreed(DepthAgreement(), torch.full((3, 4, 4), 0.1), torch.rand(3, 4, 4))
    assert figures["correlation"].value is None
    assert figures["relative_error"].value is not None
