import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from reglue.metrics import distances
from reglue.metrics.distances import (
    GaussianStatistics,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_recall,
    symmetric_root,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(features: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(features.shape[1]).update(features)


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> GaussianStatistics:
    exact = GaussianStatistics(len(mean))
    exact.count, exact.mean, exact._scatter = 2, mean, covariance.clone()
    return exact


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), offset=st.floats(-1e6, 1e6), merged=st.booleans())
def test_statistics_are_those_of_the_whole_however_it_arrives(cuts, offset, merged):
    features = normal(40, 3) + offset
    edges = [0, *sorted(cuts), 40]
    total = GaussianStatistics(3)
    for start, stop in pairwise(edges):
        part = features[start:stop]
        total = total.merge(statistics(part)) if merged else total.update(part)
    assert total.count == 40
    torch.testing.assert_close(total.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.covariance, torch.cov(features.T), rtol=1e-7, atol=1e-8)


def test_covariance_of_one_row_is_refused():
    with pytest.raises(ValueError, match="two rows"):
        _ = statistics(normal(1, 4)).covariance


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    means, deviations = normal(2, 5), normal(2, 5, seed=1).abs()
    expected = ((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2).sum()
    first, second = (gaussian(m, torch.diag(d**2)) for m, d in zip(means, deviations, strict=True))
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_of_full_covariances_agrees_with_scipy():
    roots = normal(2, 6, 6, seed=2)
    covariances = roots @ roots.mT
    root = torch.as_tensor(sqrtm((covariances[0] @ covariances[1]).numpy())).real
    expected = float(covariances[0].trace() + covariances[1].trace() - 2 * root.trace())
    zero = torch.zeros(6, dtype=torch.float64)
    assert frechet_distance(gaussian(zero, covariances[0]), gaussian(zero, covariances[1])) == pytest.approx(expected)


def test_frechet_of_singular_covariances():
    # Four rows in twenty dimensions: rank three; SciPy's sqrtm of the product fails or turns complex here.
    first, second = statistics(normal(4, 20)), statistics(normal(4, 20) + 2.0)
    assert frechet_distance(first, second) == pytest.approx(4.0 * 20, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(2, 12), width=st.integers(1, 8), seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_frechet_is_symmetric_nonnegative_and_scales_with_the_square(rows, width, seed, scale):
    x, y = normal(rows, width, seed=seed), normal(rows + 3, width, seed=seed + 1)
    distance = frechet_distance(statistics(x), statistics(y))
    assert distance >= 0
    assert frechet_distance(statistics(y), statistics(x)) == pytest.approx(distance, rel=1e-8, abs=1e-9)
    assert frechet_distance(statistics(scale * x), statistics(scale * y)) == pytest.approx(
        scale**2 * distance, rel=1e-6, abs=1e-9 * scale**2
    )


def test_symmetric_root_squares_to_the_matrix():
    factor = normal(5, 2)
    matrix = factor @ factor.T
    torch.testing.assert_close(symmetric_root(matrix) @ symmetric_root(matrix), matrix)


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = normal(6, 3), normal(6, 3, seed=1) + 0.5
    total = 0.0
    for i in range(6):
        for j in range(6):
            if i != j:
                total += ((x[i] @ x[j] / 3 + 1) ** 3 + (y[i] @ y[j] / 3 + 1) ** 3).item() / 30
            total -= 2 * ((x[i] @ y[j] / 3 + 1) ** 3).item() / 36
    measured = kernel_distance(x, y, subsets=4, subset_size=100, generator=np.random.default_rng(0))
    assert measured.mean == pytest.approx(total, rel=1e-10)
    assert measured.std == pytest.approx(0.0, abs=1e-10)


def test_kernel_distance_depends_on_the_seed_alone_and_vanishes_between_equals():
    def measure(x, y, seed):
        generator = np.random.default_rng(seed)
        return kernel_distance(x, y, subsets=20, subset_size=50, generator=generator)

    x, y = normal(300, 8), normal(300, 8, seed=1)
    assert measure(x, y, 3) == measure(x, y, 3) != measure(x, y, 4)
    same, apart = measure(x, y, 0), measure(x, y + 1.0, 0)
    assert abs(same.mean) < 3 * same.std
    assert apart.mean > 5 * apart.std


def test_precision_and_recall_are_not_exchanged():
    # Generated: one of the two real modes. All of it looks real; half of the real images are never generated.
    real = torch.cat([normal(100, 4), normal(100, 4, seed=1) + 50])
    generated = normal(100, 4, seed=2) * 0.5
    scores = precision_recall(generated=generated, real=real)
    assert scores.precision > 0.9
    assert scores.recall <= 0.5
    exchanged = precision_recall(generated=real, real=generated)
    assert (exchanged.precision, exchanged.recall) == (scores.recall, scores.precision)


@pytest.mark.parametrize("block", [3, 1024])
def test_precision_and_recall_by_brute_force(monkeypatch, block):
    monkeypatch.setattr(distances, "BLOCK", block)
    generated, real = normal(17, 3), normal(23, 3, seed=1) * 1.2

    def inside(points, manifold):
        radii = [sorted(math.dist(a, b) for j, b in enumerate(manifold) if j != i)[2] for i, a in enumerate(manifold)]
        return sum(any(math.dist(p, c) <= r for c, r in zip(manifold, radii, strict=True)) for p in points)

    scores = precision_recall(generated=generated, real=real)
    assert scores.precision == inside(generated.tolist(), real.tolist()) / 17
    assert scores.recall == inside(real.tolist(), generated.tolist()) / 23


def test_identical_and_disjoint_sets():
    x = normal(50, 6)
    same = precision_recall(generated=x, real=x)
    assert (same.precision, same.recall) == (1.0, 1.0)
    apart = precision_recall(generated=x, real=x + 1000)
    assert (apart.precision, apart.recall) == (0.0, 0.0)


def test_precision_and_recall_need_a_neighbour():
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(generated=normal(3, 2), real=normal(9, 2))


@settings(deadline=None, max_examples=25)
@given(queries=st.integers(0, 9), references=st.integers(2, 9), k=st.integers(1, 2), seed=st.integers(0, 99))
def test_nearest_by_brute_force(queries, references, k, seed):
    query, reference = normal(queries, 3, seed=seed), normal(references, 3, seed=seed + 1)
    found, rows = nearest(query, reference, k)
    assert found.shape == rows.shape == (queries, k)
    for i in range(queries):
        expected = sorted((math.dist(query[i], other), j) for j, other in enumerate(reference.tolist()))[:k]
        assert rows[i].tolist() == [j for _, j in expected]
        assert found[i].tolist() == pytest.approx([d for d, _ in expected])


def test_a_copy_has_distance_zero():
    reference = normal(30, 100).float() * 100
    found, rows = nearest(reference[[7]], reference)
    assert rows.item() == 7
    assert found.item() == 0.0
    with pytest.raises(ValueError, match="31 neighbours"):
        nearest(reference, reference, 31)
