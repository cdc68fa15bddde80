"""How far a set of generated images is from a set of real ones: functions of their features.

Features are (N, D) tensors, one row per image. Everything works in blocks, so beside the features themselves memory
stays bounded by a few times `BLOCK · max(N, D)` and D² numbers, and one more copy of a side, whatever the number of
images. Sums are taken in float64.

Figures that are means over images come as one value per image, so that they can be resampled (`metrics.resampling`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024
"""Rows handled at once by functions that compare every row with every other."""
MOST_PAIRS = BLOCK * BLOCK
"""Of a block, that are worth being compared by differences of their features."""
NEIGHBOURS = 3
"""Of precision and recall, as published."""
DENSITY_NEIGHBOURS = 5
"""Of density and coverage, as published."""


class Gaussian(NamedTuple):
    """A normal distribution: mean (D,) and covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


class GaussianStatistics:
    """Mean (D,) and covariance (D, D; divided by N − 1) of features that arrive in batches.

    Batches and partial statistics are merged by the pairwise update of Chan, Golub & LeVeque (1983), which does not
    lose digits when the mean is far from zero, as summing squares would.
    """

    def __init__(self, width: int, count: int = 0, mean: Tensor | None = None, scatter: Tensor | None = None):
        """Of nothing, or of what others have seen; `scatter` (D, D) sums products of deviations from the mean."""
        self.count = count
        self.mean = torch.zeros(width, dtype=torch.float64) if mean is None else mean
        self.scatter = torch.zeros(width, width, dtype=torch.float64) if scatter is None else scatter

    def update(self, features: Tensor) -> Self:
        """Adds a batch (B, D) of any size, floating type and device; returns itself."""
        for block in features.detach().split(BLOCK):
            rows = block.to("cpu", torch.float64)
            mean = rows.mean(0)
            rows = rows - mean
            self.merge(GaussianStatistics(len(mean), len(rows), mean, rows.T @ rows))
        return self

    def merge(self, other: "GaussianStatistics") -> Self:
        """Adds what another has seen; returns itself."""
        count = self.count + other.count
        if other.count:
            shift = other.mean - self.mean
            self.scatter += other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
            self.mean = self.mean + shift * (other.count / count)
            self.count = count
        return self

    @property
    def gaussian(self) -> Gaussian:
        """Of what has been seen, a normal distribution; ValueError below two rows."""
        return Gaussian(self.mean, self.covariance)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (D, D); ValueError below two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two rows, not {self.count}")
        return self.scatter / (self.count - 1)


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
    """(R,) float64: the mean with the images of the first set counted as often as each resample has them."""


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
    ValueError below two rows. `counts` (R, N) are how often each resample has each row of the first set.

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
            resampled += kernels.resampled_mmd(counts[:, rows[0]]).cpu()
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
        counts = counts.to(self.first.device)
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
    """The overlap of two sets, image by image; each figure is the mean of a tensor."""

    precision: Tensor
    """(N,) per generated image: 1 if it lies in the manifold of the real ones (it looks real), otherwise 0."""
    recall: Tensor
    """(M,) per real image: 1 if it lies in the manifold of the generated ones (it can be generated), otherwise 0."""
    density: Tensor
    """(N,) per generated image: how many real neighbourhoods it lies in, over k. The mean may exceed 1."""
    coverage: Tensor
    """(M,) per real image: 1 if a generated one lies in its neighbourhood, otherwise 0."""


def manifold_scores(
    *, generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS, density_neighbours: int = DENSITY_NEIGHBOURS
) -> ManifoldScores:
    """Precision and recall of Kynkäänniemi et al. (2019), density and coverage of Naeem et al. (2020).

    For features (N, D) and (M, D). A row's neighbourhood is the ball that reaches to its k-th nearest neighbour in the
    same set, itself not counted; a set's manifold is the union of them. As published, balls are closed and of 3
    neighbours for precision and recall, open and of 5 for density and coverage. The names are keywords because
    exchanging the sets exchanges the results. Comparisons are those of float64, on the features' device. ValueError
    where a set has no k-th neighbour.
    """
    most = max(neighbours, density_neighbours)
    if min(len(generated), len(real)) <= most:
        raise ValueError(f"precision, recall, density and coverage need more than {most} rows on either side")
    real_radii = _Squares(real, real).nearest(most, others_only=True)[0]
    generated_radii = _Squares(generated, generated).nearest(neighbours, others_only=True)[0][:, -1]
    precise, dense = [], []
    reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = torch.zeros_like(reached)
    for block in _Squares(generated, real).blocks():
        precise.append(block.within(real_radii[:, neighbours - 1], closed=True).any(1))
        own_radii = generated_radii[block.start : block.start + len(block.squares), None]
        reached |= block.within(own_radii, closed=True).any(0)
        inside = block.within(real_radii[:, density_neighbours - 1], closed=False)
        dense.append(inside.sum(1) / density_neighbours)
        covered |= inside.any(0)
    return ManifoldScores(torch.cat(precise).double(), reached.double(), torch.cat(dense).double(), covered.double())


def nearest(query: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest reference rows (M, D) of each query row (N, D), nearest first.

    Returns Euclidean distances (N, k) float64 and row numbers (N, k) int64. ValueError where the reference is smaller
    than k. Generated images whose nearest real image is much closer than real ones are to each other are memorised.
    """
    if len(reference) < k:
        raise ValueError(f"{k} neighbours of a reference of {len(reference)} rows")
    squares, indices = _Squares(query, reference).nearest(k)
    return squares.sqrt(), indices


class _Squares:
    """Squared Euclidean distances of every row (N, D) to every column (M, D), a block of rows at a time.

    By |x|² + |y|² − 2xy in float32, which is many times as fast as by differences in float64, and good enough to decide
    nearly every comparison. Those closer than its error bound are decided by `exact`, so that results are those of
    float64 differences.
    """

    def __init__(self, rows: Tensor, columns: Tensor):
        self.rows, self.columns = rows, columns
        self.centre = columns.mean(0, dtype=torch.float64)  # Small numbers have small rounding errors.
        self.centred = torch.cat([self.shift(part).float() for part in columns.split(BLOCK)])
        self.norms = self.centred.square().sum(1)

    def shift(self, features: Tensor) -> Tensor:
        """Features (B, D) less the centre of the columns, in float64."""
        return features.double() - self.centre

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Squared distances (P,) float64 of pairs, by difference: 0 for copies. `rows` and `columns` are (P,) int64."""
        parts = zip(rows.split(BLOCK), columns.split(BLOCK), strict=True)
        squares = [(self.rows[i].double() - self.columns[j].double()).square().sum(1) for i, j in parts]
        return torch.cat(squares) if squares else torch.zeros(0, dtype=torch.float64, device=self.centre.device)

    def blocks(self) -> Iterator["_Block"]:
        """All distances, `BLOCK` rows at a time."""
        for start in range(0, len(self.rows), BLOCK):
            yield _Block(self, start)

    def nearest(self, k: int, others_only: bool = False) -> tuple[Tensor, Tensor]:
        """Squared distances (N, k) float64 and columns (N, k) int64 of the k nearest to each row, of equals the first.

        With `others_only`, rows and columns are the same set, and none is its own neighbour.
        """
        found = [block.nearest(k, others_only) for block in self.blocks()]
        if not found:
            return torch.zeros(0, k, dtype=torch.float64), torch.zeros(0, k, dtype=torch.int64)
        squares, columns = zip(*found, strict=True)
        return torch.cat(squares), torch.cat(columns)


class _Block:
    """Squared distances of some rows to all columns, float32, and how far they may be from the exact ones."""

    def __init__(self, of: _Squares, start: int):
        self.of, self.start = of, start
        centred = of.shift(of.rows[start : start + BLOCK]).float()
        norms = centred.square().sum(1)
        self.squares = torch.addmm(norms[:, None], centred, of.centred.T, alpha=-2).add_(of.norms)
        # A sum of D products is off by at most D roundings of its terms' size (Higham 2002, ch. 3); the other roundings
        # are a few.
        roundings = centred.shape[1] + 32
        largest = float(norms.max() + of.norms.max())
        self.error = roundings * torch.finfo(torch.float32).eps / 2 * largest

    def within(self, radii: Tensor, closed: bool) -> Tensor:
        """Where squared distances are below `radii` (or equal, if `closed`), (M,) or (B, 1) float64: bool (B, M)."""
        nearby = radii.float()
        inside = self.squares <= nearby
        rows, columns = ((self.squares - nearby).abs_() <= self.error).nonzero(as_tuple=True)
        if len(rows) > MOST_PAIRS:
            return self.precise() <= radii if closed else self.precise() < radii
        exact, radius = self.of.exact(rows + self.start, columns), radii.expand(self.squares.shape)[rows, columns]
        inside[rows, columns] = exact <= radius if closed else exact < radius
        return inside

    def nearest(self, k: int, others_only: bool) -> tuple[Tensor, Tensor]:
        """As `_Squares.nearest`, of these rows."""
        squares = self.squares
        own = torch.arange(len(squares), device=squares.device)
        if others_only:
            squares[own, self.start + own] = torch.inf
        # Whatever may be as near as the k-th.
        farthest = squares.topk(k, dim=1, largest=False).values[:, -1:] + 2 * self.error
        rows, columns = (squares <= farthest).nonzero(as_tuple=True)
        if len(rows) > MOST_PAIRS:
            precise = self.precise()
            if others_only:
                precise[own, self.start + own] = torch.inf
            return precise.topk(k, dim=1, largest=False)
        found = rows.bincount(minlength=len(squares))
        place = torch.arange(len(rows), device=rows.device) - (found.cumsum(0) - found)[rows]
        candidates = torch.full((len(squares), int(found.max())), torch.inf, dtype=torch.float64, device=rows.device)
        candidates[rows, place] = self.of.exact(rows + self.start, columns)
        numbers = torch.zeros_like(candidates, dtype=torch.int64)
        numbers[rows, place] = columns
        order = candidates.argsort(dim=1, stable=True)[:, :k]
        return candidates.gather(1, order), numbers.gather(1, order)

    def precise(self) -> Tensor:
        """All squares (B, M) in float64, by |x|² + |y|² − 2xy, for sets of copies: too many are equally far."""
        x = self.of.shift(self.of.rows[self.start : self.start + BLOCK])
        parts = [self.of.shift(part) for part in self.of.columns.split(BLOCK)]
        squares = torch.cat([torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist").square_() for y in parts], dim=1)
        largest = float(squares.max())
        # Copies are at distance 0, but for rounding.
        return squares.masked_fill_(squares <= (x.shape[1] + 32) * torch.finfo(torch.float64).eps * largest, 0)


def inception_scores(logits: Tensor, counts: Tensor, split_size: int = 5000) -> Tensor:
    """The Inception Score of Salimans et al. (2016) of each resample: exp of the mean KL(p(y|x) ‖ p(y)); (R,) float64.

    `logits` (N, C) are the network's, for ADM's score without the bias of its last layer; `counts` (R, N) are how
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
