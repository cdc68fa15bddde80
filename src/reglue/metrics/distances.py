"""How far a set of generated images is from a set of real ones: functions of their features.

Features are (N, D) tensors, one row per image. Everything works in blocks, so beside the features themselves memory
stays bounded by `BLOCK · max(N, D)` and D² numbers, whatever the number of images. Sums are taken in float64.

Figures that are means over images come as one value per image, so that they can be resampled (`metrics.resampling`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024
"""Rows handled at once by functions that compare every row with every other."""


class Gaussian(NamedTuple):
    """A normal distribution: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


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
        """Adds a batch (B, D) of any size, floating type and device; returns itself."""
        for block in features.detach().split(BLOCK):
            rows = block.to("cpu", torch.float64)
            batch = GaussianStatistics(len(self.mean))
            batch.count, batch.mean = len(rows), rows.mean(0)
            rows = rows - batch.mean
            batch._scatter = rows.T @ rows
            self.merge(batch)
        return self

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
    def gaussian(self) -> Gaussian:
        """What has been seen, as a normal distribution; ValueError below two rows."""
        return Gaussian(self.mean, self.covariance)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D); ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, not {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians (Heusel et al. 2017, eq. 6); 0 or more.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½). With Σ = F Fᵀ the trace of the root equals the sum of the singular values of
    F₁ᵀ F₂ (the nuclear norm), which exists for singular covariances too and never becomes complex.
    """
    shift = first.mean - second.mean
    fidelity = torch.linalg.svdvals(_factor(first.covariance).T @ _factor(second.covariance)).sum()
    distance = shift @ shift + first.covariance.trace() + second.covariance.trace() - 2 * fidelity
    return max(float(distance), 0.0)


def frechet_influence(features: Tensor, own: Gaussian, reference: Gaussian) -> Tensor:
    """How each image moves the Fréchet distance of its set from a fixed reference: (N,) float64, of mean 0.

    `own` is the mean and covariance of the features (N, D). If image i had weight wᵢ instead of 1, the distance would
    change by mean(wᵢ · influenceᵢ), to first order. The derivative of the distance by μ is 2(μ − μᵣ), and by Σ it is
    I − T, where T = Σᵣ^½ (Σᵣ^½ Σ Σᵣ^½)^−½ Σᵣ^½ carries one Gaussian onto the other. For singular covariances the
    pseudo-inverse is exact, because no weight of the same images leaves the space that they span.
    """
    root = symmetric_root(reference.covariance)
    values, vectors = torch.linalg.eigh(root @ own.covariance @ root)
    inverse = torch.where(values > _rounding(values), values.clamp(min=0).rsqrt(), 0.0)
    carried = root @ vectors
    curvature = torch.eye(len(root), dtype=torch.float64) - (carried * inverse) @ carried.T
    curvature *= len(features) / (len(features) - 1)  # The covariance is divided by N − 1.
    influence = []
    for block in features.split(BLOCK):
        centred = block.to("cpu", torch.float64) - own.mean
        influence.append(2 * centred @ (own.mean - reference.mean) + ((centred @ curvature) * centred).sum(1))
    joined = torch.cat(influence)
    return joined - joined.mean()


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root (D, D) of a symmetric positive semi-definite matrix; mere rounding becomes 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * torch.where(values > _rounding(values), values, 0.0).sqrt()) @ vectors.T


def _factor(matrix: Tensor) -> Tensor:
    """F (D, rank) of a symmetric positive semi-definite matrix F Fᵀ: few columns where there are few images."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > _rounding(values)
    return vectors[:, kept] * values[kept].sqrt()


def _rounding(values: Tensor) -> Tensor:
    """Below this, eigenvalues of a positive matrix are rounding errors; their roots would be 10⁸ times as large."""
    return values.abs().max() * len(values) * torch.finfo(values.dtype).eps


@dataclass(frozen=True)
class KernelDistance:
    """The kernel distance over subsets: its mean, and the standard deviation between subsets."""

    mean: float
    std: float
    resampled: Tensor = field(compare=False)
    """(R,) float64: the mean with the images of the first set counted as each resample says."""


def kernel_distance(
    first: Tensor,
    second: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: np.random.Generator,
    counts: Tensor | None = None,
) -> KernelDistance:
    """The kernel inception distance of Bińkowski et al. (2018): unbiased squared MMD, kernel (x·y/D + 1)³.

    Averaged over `subsets` random pairs of subsets of `subset_size` rows (or of all rows of the smaller set, if that
    has fewer) without repetition. Being unbiased it may be slightly negative. Takes features (N, D) and (M, D);
    ValueError below two rows. `counts` (R, N) says how often each resample has each row of the first set.

    Products are taken in the features' own type and sums in float64: for float32 this is twice as fast as float64
    throughout, and moves the distance by a hundred-thousandth of its scatter between subsets.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError("the kernel distance needs at least two rows on either side")
    if size == len(first) == len(second):
        subsets = 1  # All of them would be the same.
    counts = torch.ones(0, len(first)) if counts is None else counts
    resampled = torch.zeros(len(counts), dtype=torch.float64)
    values = []
    for _ in range(subsets):
        rows = [torch.from_numpy(generator.permutation(len(side))[:size]) for side in (first, second)]
        kernels = _SubsetKernels(first[rows[0]], second[rows[1]])
        values.append(kernels.squared_mmd())
        if len(counts):
            resampled += kernels.resampled_mmd(counts[:, rows[0]])
    return KernelDistance(float(np.mean(values)), float(np.std(values)), resampled / subsets)


class _SubsetKernels:
    """The kernel between all rows of two sets of equally many, less a constant that cancels in the distance."""

    def __init__(self, x: Tensor, y: Tensor):
        self.across = _cubic_kernel(x, y)
        self.shift = float(self.across.mean(dtype=torch.float64))
        self.first, self.second = _cubic_kernel(x, x), _cubic_kernel(y, y)
        for kernel in (self.across, self.first, self.second):
            # The distance is a small difference of large sums: without this it would lose digits in float32.
            kernel -= self.shift
        for kernel in (self.first, self.second):
            kernel.fill_diagonal_(0)  # An image is no pair with itself, nor with its copies in a resample.

    def squared_mmd(self) -> float:
        size = len(self.across)
        within = sum(float(kernel.sum(dtype=torch.float64)) for kernel in (self.first, self.second))
        return within / (size * (size - 1)) - 2 * float(self.across.mean(dtype=torch.float64))

    def resampled_mmd(self, counts: Tensor) -> Tensor:
        """(R,) float64, for counts (R, n) of the first set's rows. A resample of one image alone counts as 0."""
        weights = counts.to(self.first)
        totals = counts.double().sum(1).clamp(min=1)
        pairs = (totals.square() - counts.double().square().sum(1)).clamp(min=1)
        within = ((weights @ self.first) * weights).sum(1, dtype=torch.float64) / pairs
        size = len(self.second)
        other = float(self.second.sum(dtype=torch.float64)) / (size * (size - 1))
        across = counts.double() @ self.across.mean(1, dtype=torch.float64) / totals
        return within + other - 2 * across


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    kernel = (x @ y.T).div_(x.shape[1]).add_(1)
    return kernel * kernel * kernel


@dataclass(frozen=True)
class ManifoldScores:
    """What each image says about the overlap of two sets; each figure is the mean of a tensor."""

    precision: Tensor
    """(N,) per generated image: 1 if it lies in the manifold of the real ones (it looks real), otherwise 0."""
    recall: Tensor
    """(M,) per real image: 1 if it lies in the manifold of the generated ones (it can be generated), otherwise 0."""
    density: Tensor
    """(N,) per generated image: how many real neighbourhoods it lies in, over k. The mean may exceed 1."""
    coverage: Tensor
    """(M,) per real image: 1 if a generated one lies in its neighbourhood, otherwise 0."""


def manifold_scores(
    *, generated: Tensor, real: Tensor, neighbours: int = 3, density_neighbours: int = 5
) -> ManifoldScores:
    """Precision and recall of Kynkäänniemi et al. (2019), density and coverage of Naeem et al. (2020).

    For features (N, D) and (M, D). A row's neighbourhood is the ball that reaches to its k-th nearest neighbour in the
    same set, itself not counted; a set's manifold is the union of them. As published, balls are closed and of 3
    neighbours for precision and recall, open and of 5 for density and coverage. The names are keywords because
    exchanging the sets exchanges the results. float64, on the features' device. ValueError where a set has no k-th
    neighbour.
    """
    most = max(neighbours, density_neighbours)
    if min(len(generated), len(real)) <= most:
        raise ValueError(f"precision, recall, density and coverage need more than {most} rows on either side")
    real_radii, real_density_radii = _neighbour_radii(real, (neighbours, density_neighbours))
    (generated_radii,) = _neighbour_radii(generated, (neighbours,))
    precise, dense = [], []
    reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(reached)
    for start, distances in _distance_blocks(generated, real):
        precise.append((distances <= real_radii).any(1))
        reached |= (distances <= generated_radii[start : start + len(distances), None]).any(0)
        inside = distances < real_density_radii
        dense.append(inside.sum(1) / density_neighbours)
        covered |= inside.any(0)
    return ManifoldScores(torch.cat(precise).double(), reached.double(), torch.cat(dense).double(), covered.double())


def _neighbour_radii(features: Tensor, neighbours: Sequence[int]) -> list[Tensor]:
    """For each k, the distance (N,) of each row to its k-th nearest other row."""
    radii = []
    for start, distances in _distance_blocks(features, features):
        rows = torch.arange(len(distances), device=distances.device)
        distances[rows, start + rows] = torch.inf
        radii.append(distances.topk(max(neighbours), dim=1, largest=False).values)
    return [torch.cat(radii)[:, k - 1] for k in neighbours]


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
    float64, of which no more than a block of either side is held.
    """
    centre = columns.mean(0, dtype=torch.float64)
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].double() - centre
        distances = [
            torch.cdist(block, part.double() - centre, compute_mode="use_mm_for_euclid_dist")
            for part in columns.split(BLOCK)
        ]
        yield start, torch.cat(distances, dim=1)


def inception_scores(logits: Tensor, counts: Tensor, split_size: int = 5000) -> Tensor:
    """The Inception Score of Salimans et al. (2016) of each resample: exp of the mean KL(p(y|x) ‖ p(y)); (R,) float64.

    `logits` (N, C) are the network's, for ADM's score without the bias of its last layer; `counts` (R, N) says how
    often each resample has each image, all ones being the set itself. As in ADM's evaluator the score is the mean over
    splits of `split_size` images in the order given, the last of which may be shorter.
    """
    scores = []
    for part, weights in zip(logits.split(split_size), counts.split(split_size, dim=1), strict=True):
        log_shares = part.double().log_softmax(1)
        shares = log_shares.exp()
        weights = weights.double()
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        marginal = weights @ shares
        divergence = weights @ (shares * log_shares).sum(1) - torch.xlogy(marginal, marginal).sum(1)
        scores.append(divergence.exp())
    return torch.stack(scores).mean(0)
