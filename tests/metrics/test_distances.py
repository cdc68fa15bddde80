import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from reglue.metrics import distances
from reglue.metrics.distances import (
    Gaussian,
    GaussianStatistics,
    frechet_distance,
    inception_scores,
    kernel_distance,
    manifold_scores,
    nearest,
    symmetric_root,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(features: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(features.shape[1]).update(features)


def gaussian(features: torch.Tensor) -> Gaussian:
    return statistics(features).gaussian


@settings(max_examples=30)
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
    first, second = (Gaussian(m, torch.diag(d**2)) for m, d in zip(means, deviations, strict=True))
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-10)


def test_frechet_of_full_covariances_agrees_with_scipy():
    roots = normal(2, 6, 6, seed=2)
    covariances = roots @ roots.mT
    root = torch.as_tensor(sqrtm((covariances[0] @ covariances[1]).numpy())).real
    expected = float(covariances[0].trace() + covariances[1].trace() - 2 * root.trace())
    zero = torch.zeros(6, dtype=torch.float64)
    assert frechet_distance(Gaussian(zero, covariances[0]), Gaussian(zero, covariances[1])) == pytest.approx(expected)


def test_frechet_of_singular_covariances():
    # Four rows in twenty dimensions: rank three; SciPy's sqrtm of the product fails or turns complex here.
    first, second = gaussian(normal(4, 20)), gaussian(normal(4, 20) + 2.0)
    assert frechet_distance(first, second) == pytest.approx(4.0 * 20, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


@settings(max_examples=30)
@given(rows=st.integers(2, 12), width=st.integers(1, 8), seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_frechet_is_symmetric_nonnegative_and_scales_with_the_square(rows, width, seed, scale):
    x, y = normal(rows, width, seed=seed), normal(rows + 3, width, seed=seed + 1)
    distance = frechet_distance(gaussian(x), gaussian(y))
    assert distance >= 0
    assert frechet_distance(gaussian(y), gaussian(x)) == pytest.approx(distance, rel=1e-8, abs=1e-9)
    assert frechet_distance(gaussian(scale * x), gaussian(scale * y)) == pytest.approx(
        scale**2 * distance, rel=1e-6, abs=1e-9 * scale**2
    )


def test_frechet_agrees_with_torch_fidelity_on_features_like_a_networks():
    sides = [(normal(500, 64, seed=seed) @ normal(64, 64, seed=9)).abs() + seed for seed in (0, 1)]
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(side) for side in sides), verbose=False)
    expected = theirs["frechet_inception_distance"]
    assert frechet_distance(*map(gaussian, sides)) == pytest.approx(expected, rel=1e-9)


def test_statistics_of_many_rows_are_taken_in_blocks(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 7)
    torch.testing.assert_close(statistics(normal(40, 3)).covariance, torch.cov(normal(40, 3).T))


def test_symmetric_root_squares_to_the_matrix():
    factor = normal(5, 2)
    matrix = factor @ factor.T
    torch.testing.assert_close(symmetric_root(matrix) @ symmetric_root(matrix), matrix)


def test_kernel_distance_agrees_with_torch_fidelity():
    x, y = normal(60, 16), normal(60, 16, seed=1) + 0.2
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, verbose=False)
    measured = kernel_distance(x, y, subsets=4, subset_size=100, generator=np.random.default_rng(0))
    assert measured.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
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


def test_kernel_distance_in_float32_is_that_of_float64():
    x, y = normal(200, 64).abs(), normal(200, 64, seed=1).abs() * 1.01
    exact, fast = (
        kernel_distance(a, b, subsets=3, subset_size=100, generator=np.random.default_rng(0))
        for a, b in ((x.float().double(), y.float().double()), (x.float(), y.float()))
    )
    assert fast.mean == pytest.approx(exact.mean, abs=1e-3 * exact.std)
    assert fast.std == pytest.approx(exact.std, rel=1e-3)


def test_resampled_kernel_distance_counts_images_as_often_as_they_were_drawn():
    x, y = normal(12, 4), normal(12, 4, seed=1) + 0.2
    counts = torch.tensor([[1] * 12, [2, 0, 3] * 4, [12] + [0] * 11])
    found = kernel_distance(x, y, subsets=2, subset_size=12, generator=np.random.default_rng(0), counts=counts)
    assert float(found.resampled[0]) == pytest.approx(found.mean, rel=1e-9)
    rows = [i for i, count in enumerate(counts[1].tolist()) for _ in range(count)]
    pairs = [(i, j) for i in rows for j in rows if i != j]

    def kernel(a, b):
        return float((a @ b / 4 + 1) ** 3)

    within = sum(kernel(x[i], x[j]) for i, j in pairs) / len(pairs)
    other = sum(kernel(y[i], y[j]) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    across = sum(kernel(x[i], y[j]) for i in rows for j in range(12)) / (len(rows) * 12)
    assert float(found.resampled[1]) == pytest.approx(within + other - 2 * across, rel=1e-8)
    assert found.resampled.isfinite().all()


@settings(max_examples=40)
@given(
    generated=st.integers(6, 20),
    real=st.integers(6, 20),
    width=st.integers(1, 4),
    offset=st.floats(0, 3),
    seed=st.integers(0, 999),
    block=st.sampled_from([3, 7, 1024]),
    neighbours=st.integers(1, 5),
    copies=st.integers(0, 6),
    by_difference=st.booleans(),
)
def test_manifold_scores_by_brute_force(generated, real, width, offset, seed, block, neighbours, copies, by_difference):
    fakes, reals = (normal(generated, width, seed=seed) + offset).tolist(), normal(real, width, seed=seed + 1).tolist()
    if by_difference:  # Ties of distances and radii, and neighbours at distance 0.
        fakes[:copies] = reals[:copies]
        fakes[-1], reals[-1] = fakes[0], reals[0]

    def radius(which, points, k):
        return sorted(math.dist(points[which], other) for i, other in enumerate(points) if i != which)[k - 1]

    def inside(point, manifold, k):
        return [math.dist(point, centre) <= radius(i, manifold, k) for i, centre in enumerate(manifold)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distances, "BLOCK", block)
        patch.setattr(distances, "MOST_PAIRS", distances.MOST_PAIRS if by_difference else 0)
        scores = manifold_scores(
            generated=torch.tensor(fakes, dtype=torch.float64),
            real=torch.tensor(reals, dtype=torch.float64),
            neighbours=neighbours,
            density_neighbours=4,
        )
    assert scores.precision.tolist() == [any(inside(p, reals, neighbours)) for p in fakes]
    assert scores.recall.tolist() == [any(inside(p, fakes, neighbours)) for p in reals]
    balls = [radius(i, reals, 4) for i in range(real)]
    lies_in = [[math.dist(p, q) < ball for q, ball in zip(reals, balls, strict=True)] for p in fakes]
    assert scores.density.tolist() == pytest.approx([sum(row) / 4 for row in lies_in])
    assert scores.coverage.tolist() == [any(row) for row in zip(*lies_in, strict=True)]


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_comparisons_too_close_for_float32_are_decided_by_float64(offset):
    """Neighbours that differ in the seventh digit, far from zero and within a wide set."""
    real = normal(60, 16) + offset
    real[30:] = real[:30] + 1e-6 * normal(30, 16, seed=1)
    generated = real + 1e-6 * normal(60, 16, seed=2)
    exact = (generated[:, None] - real).square().sum(2)
    own = (real[:, None] - real).square().sum(2).fill_diagonal_(math.inf).sort(1).values
    theirs = (generated[:, None] - generated).square().sum(2).fill_diagonal_(math.inf).sort(1).values
    scores = manifold_scores(generated=generated, real=real, neighbours=1, density_neighbours=2)
    assert torch.equal(scores.precision, (exact <= own[:, 0]).any(1).double())
    assert torch.equal(scores.recall, (exact <= theirs[:, :1]).any(0).double())
    assert torch.equal(scores.density, (exact < own[:, 1]).sum(1).double() / 2)
    assert torch.equal(scores.coverage, (exact < own[:, 1]).any(0).double())
    assert 0 < scores.precision.mean() < 1
    found, rows = nearest(generated, real)
    assert torch.equal(rows[:, 0], exact.argmin(1))
    torch.testing.assert_close(found[:, 0], exact.amin(1).sqrt(), rtol=1e-12, atol=0)


def test_sets_of_one_image_are_decided_without_comparing_all_pairs(monkeypatch):
    monkeypatch.setattr(distances, "MOST_PAIRS", 10)
    same = normal(1, 16).expand(40, 16).float() * 100
    scores = manifold_scores(generated=same, real=same.clone())
    assert (scores.precision.mean(), scores.recall.mean(), scores.coverage.mean()) == (1, 1, 0)


def test_precision_and_recall_agree_with_torch_fidelity():
    generated, real = normal(80, 4), normal(90, 4, seed=1) + 0.7
    theirs = prc_features_to_metric(generated, real, prc_neighborhood=3, verbose=False)
    scores = manifold_scores(generated=generated, real=real)
    for name in ("precision", "recall"):
        assert 0.1 < theirs[name] < 0.9
        assert float(getattr(scores, name).mean()) == pytest.approx(theirs[name])


def test_precision_and_recall_are_not_exchanged():
    # Generated: one of the two real modes. All of it looks real; half of the real images are never generated.
    real = torch.cat([normal(100, 4), normal(100, 4, seed=1) + 50])
    generated = normal(100, 4, seed=2) * 0.5
    scores = manifold_scores(generated=generated, real=real)
    assert scores.precision.mean() > 0.9
    assert scores.recall.mean() <= 0.5
    assert scores.coverage.mean() <= 0.5
    exchanged = manifold_scores(generated=real, real=generated)
    assert torch.equal(exchanged.precision, scores.recall)
    assert torch.equal(exchanged.recall, scores.precision)


def test_identical_and_disjoint_sets():
    x = normal(50, 6)
    same = manifold_scores(generated=x, real=x)
    assert (same.precision.mean(), same.recall.mean(), same.coverage.mean()) == (1, 1, 1)
    assert float(same.density.mean()) == pytest.approx(1, abs=0.25)
    apart = manifold_scores(generated=x, real=x + 1000)
    assert not any(getattr(apart, name).any() for name in ("precision", "recall", "density", "coverage"))


def test_manifold_scores_need_a_neighbour():
    with pytest.raises(ValueError, match="more than 5"):
        manifold_scores(generated=normal(5, 2), real=normal(9, 2))


def test_inception_score_agrees_with_torch_fidelity_and_is_the_mean_over_splits():
    logits = normal(60, 10) * 3
    whole = torch.ones(1, 60)
    for split_size, splits in ((60, 1), (20, 3)):
        theirs = isc_features_to_metric(logits, splits=splits, shuffle=False)["inception_score_mean"]
        assert float(inception_scores(logits, whole, split_size)) == pytest.approx(theirs, rel=1e-9)
    parts = [float(inception_scores(part, torch.ones(1, len(part)))) for part in logits.split(25)]
    assert float(inception_scores(logits, whole, 25)) == pytest.approx(sum(parts) / 3, rel=1e-12)


def test_inception_score_of_a_resample_is_that_of_its_images():
    logits, counts = normal(30, 5) * 2, torch.tensor([[2, 0, 1] * 10])
    drawn = logits.repeat_interleave(counts[0], 0)
    expected = inception_scores(drawn, torch.ones(1, len(drawn)))
    torch.testing.assert_close(inception_scores(logits, counts), expected)


@settings(max_examples=25)
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
