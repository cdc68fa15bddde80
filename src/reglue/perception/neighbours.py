"""Whether two representations of the same images find the same images alike."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 10
"""Of an image, as in the papers."""


def cknna(ours: Tensor, theirs: Tensor, neighbours: int = NEIGHBOURS) -> float | None:
    """Centred kernel alignment over mutual nearest neighbours of n images in (n, D) and (n, E) (CKNNA: the platonic
    representation hypothesis, arXiv 2405.07987, which REPA, arXiv 2410.06940, measures alignment by).

    HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) of the cosines K and L, each HSIC unbiased, and over those pairs alone of
    which the second is among the nearest of the first, in both. 1 where they agree, about 0 where they have nothing to
    do with each other; None where it is not defined: for fewer than four images, and where nothing differs.
    """
    if len(ours) < 4:
        return None
    cosines = [F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T for x in (ours, theirs)]
    near = [_nearest(each, min(neighbours, len(ours) - 1)) for each in cosines]
    both = near[0] & near[1]
    own = [_hsic(each * those, each * those) for each, those in zip(cosines, near, strict=True)]
    scale = own[0] * own[1]
    return float(_hsic(cosines[0] * both, cosines[1] * both) / scale.sqrt()) if scale > 0 else None


def _nearest(cosines: Tensor, count: int) -> Tensor:
    """For every image the others that are nearest: (n, n) bool."""
    nearest = cosines.clone().fill_diagonal_(-torch.inf).topk(count, dim=1).indices
    return torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, nearest, True)


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimator (Song et al., Feature selection via dependence maximization, 2012, eq. 4)."""
    n = len(a)
    a, b = (each.clone().fill_diagonal_(0) for each in (a, b))
    total = (a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b).sum()
    return total / (n * (n - 3))
