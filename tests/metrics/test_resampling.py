import pytest
import torch

from reglue.metrics.distances import Gaussian, GaussianStatistics, frechet_distance, frechet_influence
from reglue.metrics.resampling import interval, resample_counts, resampled_means


def test_a_resample_draws_as_many_images_as_there_are_and_depends_on_the_seed_alone():
    counts = resample_counts(50, 20, 0, "images")
    assert counts.shape == (20, 50)
    assert (counts.sum(1) == 50).all()
    assert (counts == 0).any(1).all()
    assert torch.equal(counts[:5], resample_counts(50, 5, 0, "images"))
    assert not torch.equal(counts, resample_counts(50, 20, 1, "images"))
    assert not torch.equal(counts, resample_counts(50, 20, 0, "reference"))


def test_the_interval_of_a_mean_is_that_of_the_central_limit_theorem():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    resampled = resampled_means(values, resample_counts(400, 2000, 0, "images"))
    low, high = interval(float(values.mean()), resampled)
    half = 1.96 * float(values.std()) / 20
    assert low == pytest.approx(float(values.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(values.mean()) + half, abs=0.1 * half)


def test_an_interval_is_around_its_figure_whatever_the_bias_of_the_resamples():
    assert interval(5.0, torch.linspace(9.0, 11.0, 101)) == pytest.approx((4.05, 5.95))


def draw(count: int, width: int, shift: float, seed: int) -> torch.Tensor:
    """Skewed features whose scales fall off, as a network's do."""
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scales = torch.arange(1, width + 1, dtype=torch.float64).rsqrt()
    return (noise * scales * (1 + shift)).abs() ** 1.5 + shift * scales


def gaussian(features: torch.Tensor) -> Gaussian:
    return GaussianStatistics(features.shape[1]).update(features).gaussian


def test_influences_are_the_derivative_of_the_distance_by_the_weights():
    for count, width in ((40, 6), (9, 20)):  # the second with singular covariances
        features, reference = draw(count, width, 0.3, 0), gaussian(draw(count + 5, width, 0.0, 1))
        influence = frechet_influence(features, gaussian(features), reference)
        assert float(influence.sum()) == pytest.approx(0, abs=1e-9)

        def distance(weights, features=features, reference=reference):
            mean = weights @ features / weights.sum()
            centred = features - mean
            covariance = (centred * weights[:, None]).T @ centred / (weights.sum() * (1 - 1 / len(features)))
            return frechet_distance(Gaussian(mean, covariance), reference)

        step = 1e-5
        for i in range(3):
            more, less = torch.ones(2, count, dtype=torch.float64)
            more[i], less[i] = 1 + step, 1 - step
            slope = (distance(more) - distance(less)) / (2 * step)
            assert float(influence[i]) / count == pytest.approx(slope, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("count", "width", "shift"), [(400, 24, 0.3), (60, 96, 0.0)])
def test_resampled_influences_scatter_as_redrawn_sets_do_where_resampled_sets_are_biased(count, width, shift):
    reference = gaussian(draw(3000, width, 0.0, 0))
    redrawn = torch.tensor([
        frechet_distance(gaussian(draw(count, width, shift, seed)), reference) for seed in range(1, 61)
    ])  # fmt: skip
    ratios, biases = [], []
    for seed in range(1, 7):
        features = draw(count, width, shift, seed)
        influence = frechet_influence(features, gaussian(features), reference)
        counts = resample_counts(count, 200, seed, "images")
        ratios.append(float(resampled_means(influence, counts).std() / redrawn.std()))
        resampled = [frechet_distance(gaussian(features.repeat_interleave(c.long(), 0)), reference) for c in counts[:5]]
        biases.append(sum(resampled) / 5 - float(redrawn[seed - 1]))
    assert 0.5 < sum(ratios) / len(ratios) < 2
    if shift == 0:
        assert min(biases) > float(redrawn.std())
