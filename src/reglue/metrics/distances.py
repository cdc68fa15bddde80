"""How far a set of generated images is from a set of real ones: functions of their features, computed in float64.

Features are (N, D) tensors, one row per image. Everything works in blocks, so memory stays bounded by
`BLOCK · max(N, D)` numbers whatever the number of images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024
"""Rows handled at once by functions that compare every row with every other."""


class GaussianStatistics:
    """Mean (D,) and covariance (D, D; divided by N − 1) of features that arrive in batches.

    Batches and partial statistics are merged by the pairwise update of Chan, Golub & LeVeque (1983), which does not
    lose digits when the mean is far from zero, as summing squares would.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)

    def update(self, features: Tensor) -> Self:
        """Adds a batch (B, D) of any floating type and device; returns itself."""
        batch = GaussianStatistics(len(self.mean))
        rows = features.detach().to("cpu", torch.float64)
        if len(rows):
            batch.count = len(rows)
            batch.mean = rows.mean(0)
            batch._scatter = (rows - batch.mean).T @ (rows - batch.mean)
        return self.merge(batch)

    def merge(self, other: "GaussianStatistics") -> Self:
        """Adds what another has seen; returns itself."""
        count = self.count + other.count
        if other.count:
            shift = other.mean - self.mean
            self._scatter += other._scatter + torch.outer(shift, shift) * (self.count * other.count / count)
            self.mean = self.mean + shift * (other.count / count)
            self.count = count
        return self

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D); ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, not {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017, eq. 6); 0 or more.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½). The trace of the root equals the sum of the singular values of Σ₁^½ Σ₂^½
    (the nuclear norm), which exists for singular covariances too and never becomes complex.
    """
    shift = first.mean - second.mean
    covariances = first.covariance, second.covariance
    fidelity = torch.linalg.svdvals(symmetric_root(covariances[0]) @ symmetric_root(covariances[1])).sum()
    distance = shift @ shift + covariances[0].trace() + covariances[1].trace() - 2 * fidelity
    return max(float(distance), 0.0)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root (D, D) of a symmetric positive semi-definite matrix; negative rounding becomes 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclass(frozen=True)
class KernelDistance:
    """The kernel distance over subsets: its mean, and the standard deviation between subsets."""

    mean: float
    std: float


def kernel_distance(
    first: Tensor, second: Tensor, *, subsets: int = 100, subset_size: int = 1000, generator: np.random.Generator
) -> KernelDistance:
    """The kernel inception distance of Bińkowski et al. (2018): unbiased squared MMD, kernel (x·y/D + 1)³.

    Averaged over `subsets` random pairs of subsets of `subset_size` rows (or of all rows of the smaller set, if that
    has fewer) without repetition. Being unbiased it may be slightly negative. Takes features (N, D) and (M, D);
    ValueError below two rows.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError("the kernel distance needs at least two rows on either side")
    values = []
    for _ in range(subsets):
        drawn = [side[torch.from_numpy(generator.permutation(len(side))[:size])].double() for side in (first, second)]
        values.append(_squared_mmd(*drawn))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(within[0] + within[1] - 2 * kernel(x, y).mean())


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision: the share of generated images that look real. Recall: the share of real ones that can be generated."""

    precision: float
    recall: float


def precision_recall(*, generated: Tensor, real: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall of Kynkäänniemi et al. (2019) for features (N, D) and (M, D).

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in the
    same set (itself not counted). Precision is the share of generated points inside the real manifold, recall the share
    of real points inside the generated one. The names are keywords because exchanging the sets exchanges the results.
    ValueError where a set has no k-th neighbour.
    """
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(f"precision and recall need more than {neighbours} rows on either side")
    real_radii = _neighbour_radii(real, neighbours)
    generated_radii = _neighbour_radii(generated, neighbours)
    precise = 0
    reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, distances in _distance_blocks(generated, real):
        precise += int((distances <= real_radii).any(1).sum())
    for start, distances in _distance_blocks(real, generated):
        reached[start : start + len(distances)] = (distances <= generated_radii).any(1)
    return PrecisionRecall(precise / len(generated), float(reached.double().mean()))


def _neighbour_radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance (N,) of each row to its k-th nearest other row."""
    radii = []
    for start, distances in _distance_blocks(features, features):
        rows = torch.arange(len(distances), device=distances.device)
        distances[rows, start + rows] = torch.inf
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def nearest(query: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest reference rows (M, D) of each query row (N, D), nearest first.

    Returns Euclidean distances (N, k) float64 and row numbers (N, k) int64. ValueError where the reference is smaller
    than k. Generated images whose nearest real image is much closer than real ones are to each other are memorised.
    """
    if len(reference) < k:
        raise ValueError(f"{k} neighbours of a reference of {len(reference)} rows")
    rows = [block.topk(k, dim=1, largest=False).indices for _, block in _distance_blocks(query, reference)]
    if not rows:
        return torch.zeros(0, k, dtype=torch.float64), torch.zeros(0, k, dtype=torch.int64)
    indices = torch.cat(rows)
    # Measured again by difference, since a copy should be at distance zero exactly, not to rounding.
    distances = torch.stack([(query.double() - reference[column].double()).norm(dim=1) for column in indices.T], dim=1)
    order = distances.argsort(dim=1, stable=True)
    return distances.gather(1, order), indices.gather(1, order)


def _distance_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Euclidean distances of every row to every column, some rows at a time: (first row, distances (≤ BLOCK, M)).

    By |x|² + |y|² − 2xy, fifteen times as fast as by differences; centring keeps its error near 1e-8 of the spread.
    """
    centre = columns.double().mean(0)
    centred = columns.double() - centre
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].double() - centre
        yield start, torch.cdist(block, centred, compute_mode="use_mm_for_euclid_dist")
