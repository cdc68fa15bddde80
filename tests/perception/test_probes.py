"""Probes: ridge regression against scikit-learn's, what a map probe can and cannot learn, the scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from reglue.metrics.distances import GaussianStatistics
from reglue.perception import probes
from reglue.perception.agreement import IGNORE, confusions, mean_iou
from reglue.perception.probes import (
    PENALTIES,
    Examples,
    LinearProbe,
    ProbeTraining,
    fit_linear,
    fit_map,
    measure_probe,
    ridge,
    score_of_chance,
)


def examples(inputs: Tensor, targets: Tensor) -> Examples:
    channels, height, width = inputs.shape[1:]
    return Examples(lambda rows: inputs[rows], torch.arange(len(inputs)), targets, (channels, height, width))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def training(hidden: int, steps: int = 150) -> ProbeTraining:
    return ProbeTraining(hidden, steps, batch_size=32, learning_rate=1e-2, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_the_streamed_ridge_is_scikit_learns(penalty: float):
    """On inputs far from zero and of different scales, whose squared errors are summed there and averaged here."""
    x = drawn(0, 300, 5).double() * torch.tensor([1e-3, 1.0, 2.0, 50.0, 1.0]).double() + 100
    y = F.one_hot(torch.from_numpy(np.random.default_rng(1).integers(3, size=300)), 3).double()
    statistics = GaussianStatistics(8)
    for rows, ones in zip(x.split(70), y.split(70), strict=True):
        statistics.update(torch.cat([rows, ones], 1))
    probe = ridge(statistics, 5, penalty, flat=False)
    std, mean = torch.std_mean(x, 0)
    theirs = Ridge(alpha=penalty * 299).fit((x - mean) / std, y)
    expected = theirs.predict((x - mean) / std)
    np.testing.assert_allclose(x @ probe.weight + probe.bias, expected, rtol=1e-6, atol=1e-8)


def test_the_result_of_a_ridge_depends_neither_on_scale_nor_on_batches():
    inputs, targets = drawn(0, 200, 6, 2, 2), torch.arange(200) % 3
    one = fit_linear(examples(inputs[:150], targets[:150]), examples(inputs[150:], targets[150:]), 3, flat=True)
    scaled = inputs * 1000 + 7
    other = fit_linear(examples(scaled[:150], targets[:150]), examples(scaled[150:], targets[150:]), 3, flat=True)
    assert one.chosen == other.chosen
    assert torch.equal(one.probe.predict(inputs, None), other.probe.predict(scaled, None))


def test_a_constant_input_gets_no_weight():
    inputs, targets = drawn(0, 60, 3, 1, 1), torch.arange(60) % 2
    inputs[:, 1] = 5
    probe = fit_linear(examples(inputs[:40], targets[:40]), examples(inputs[40:], targets[40:]), 2, flat=False).probe
    assert isinstance(probe, LinearProbe)
    assert probe.weight.isfinite().all()
    assert (probe.weight[1] == 0).all()


@pytest.mark.trains
def test_what_is_said_by_places_needs_a_flat_probe():
    """Classes differ in where a value is, not in its mean."""
    targets = torch.arange(400) % 2
    inputs = 0.3 * drawn(0, 400, 1, 2, 2)
    inputs[targets == 0, 0, 0, 0] += 1
    inputs[targets == 1, 0, 1, 1] += 1
    parts = (slice(200), slice(200, 300), slice(300, 400))
    fitting, selection, measured = (examples(inputs[part], targets[part]) for part in parts)
    fits = {flat: fit_linear(fitting, selection, 2, flat).probe for flat in (True, False)}
    accuracy = {flat: measure_probe(fit, measured, 2, 0).value for flat, fit in fits.items()}
    assert accuracy[True] > 0.95
    assert accuracy[False] < 0.65


@pytest.mark.trains
def test_the_penalty_is_chosen_where_the_fit_did_not_look():
    """More inputs than images, of which one tells the class: the smallest penalty fits noise."""
    targets = torch.arange(120) % 2
    inputs = drawn(0, 120, 300, 1, 1)
    inputs[:, 0, 0, 0] += 4.0 * targets
    fitting, selection = (examples(inputs[part], targets[part]) for part in (slice(40), slice(40, 120)))
    fitted = fit_linear(fitting, selection, 2, flat=False)
    assert fitted.chosen > PENALTIES[0]
    assert 0.5 < fitted.selection_score < 1
    assert not fitted.at_end


@pytest.mark.parametrize(
    ("penalties", "chosen", "at_end"),
    [
        ((0.1, 1.0), 1.0, True),  # Better than a smaller one.
        ((1.0, 3.0), 1.0, True),  # Better than a larger one.
        ((0.1, 1.0, 3.0), 1.0, False),
        ((30.0, 100.0), 100.0, False),  # As good as a smaller one.
    ],
)
def test_a_penalty_at_the_end_of_those_on_offer_is_said(penalties, chosen, at_end, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "PENALTIES", penalties)
    targets = (torch.arange(180) % 3 == 0).long()
    inputs = drawn(0, 180, 300, 1, 1)
    inputs[:, 0, 0, 0] += 2.0 * targets
    fitting, selection = (examples(inputs[part], targets[part]) for part in (slice(60), slice(60, 180)))
    fitted = fit_linear(fitting, selection, 2, flat=False)
    assert (fitted.chosen, fitted.at_end) == (chosen, at_end)


def test_an_accuracy_comes_with_its_binomial_error():
    targets = torch.tensor([0, 0, 0, 1])
    always_0 = LinearProbe(torch.zeros(1, 2).double(), torch.tensor([1.0, 0.0]).double(), flat=False)
    score = measure_probe(always_0, examples(drawn(0, 4, 1, 1, 1), targets), 2, seed=0)
    assert score.value == 0.75 == score_of_chance(targets, targets, 2)
    assert score.standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_chance_is_the_score_of_the_most_common_class():
    masks = torch.tensor([[[0, 0, 1], [IGNORE, 1, 1]]], dtype=torch.uint8)
    assert score_of_chance(masks, masks, 2) == pytest.approx((3 / 5 + 0) / 2)
    assert score_of_chance(torch.full((4,), 255), torch.tensor([255, 0]), 256) == 0.5


def test_class_255_of_images_is_a_class_like_others():
    targets = torch.full((30,), 255)
    inputs = 0.1 * drawn(0, 30, 2, 2, 2)
    fitted = fit_map(examples(inputs, targets), examples(inputs, targets), 256, training(hidden=0, steps=300))
    assert fitted.selection_score == 1


def halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Maps 2×4×4 whose first channel is the class of each cell, and masks of 8×8 pixels with an ignored row."""
    cells = torch.from_numpy(np.random.default_rng(seed).integers(2, size=(count, 1, 2, 1))).repeat(1, 1, 2, 4)
    inputs = torch.cat([2.0 * cells - 1 + 0.2 * drawn(seed, count, 1, 4, 4), drawn(seed + 1, count, 1, 4, 4)], 1)
    masks = cells[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8)
    masks[:, 0] = IGNORE
    return inputs, masks


@pytest.mark.trains
def test_masks_are_learned_at_their_own_resolution_and_255_is_ignored():
    fitting, selection, measured = (examples(*halves(60, seed)) for seed in (0, 10, 20))
    fitted = fit_map(fitting, selection, 2, training(hidden=0))
    score = measure_probe(fitted.probe, measured, 2, seed=0)
    assert score.value > 0.9
    assert score.pixel_accuracy is not None
    assert score.pixel_accuracy > 0.95
    assert 0 < score.standard_error < 0.05
    assert fitted.probe.predict(measured.read(torch.arange(2)), (8, 8)).shape == (2, 8, 8)


@pytest.mark.trains
def test_a_convolutional_probe_sees_neighbours_and_a_linear_one_does_not():
    """A pixel's class is the sign of its cell times that of the cell to its right."""

    def maps(seed: int) -> Examples:
        inputs = drawn(seed, 300, 1, 4, 4).sign()
        cells = (inputs * inputs.roll(-1, 3) > 0)[:, 0].to(torch.uint8)
        cells[:, :, -1] = IGNORE
        return examples(inputs, cells)

    parts = [maps(seed) for seed in range(3)]
    linear, conv = (fit_map(parts[0], parts[1], 2, training(hidden, 300)) for hidden in (0, 16))
    assert measure_probe(linear.probe, parts[2], 2, 0).value < 0.5
    assert measure_probe(conv.probe, parts[2], 2, 0).value > 0.8


@pytest.mark.trains
def test_training_is_a_function_of_the_seed_and_stops_where_it_was_best():
    inputs, masks = halves(40, 0)
    fits = [fit_map(examples(inputs, masks), examples(*halves(20, 5)), 2, training(8, 60)) for _ in range(2)]
    assert fits[0].chosen == fits[1].chosen
    assert torch.equal(*(fit.probe.predict(inputs, (8, 8)) for fit in fits))
    again = measure_probe(fits[0].probe, examples(*halves(20, 5)), 2, 0).value
    assert again == pytest.approx(fits[0].selection_score)


def test_mean_intersection_over_union_of_a_known_table():
    target = torch.tensor([[[0, 0, 1], [1, 1, IGNORE]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1], [1, 0, 2]]])
    counts = confusions(predicted, target, 4)
    assert counts.shape == (1, 4, 4)
    assert counts[0, :2, :2].tolist() == [[1, 1], [1, 2]]
    # Class 0: 1 of 3; class 1: 2 of 4; classes 2 and 3 do not occur.
    assert mean_iou(counts[0]) == pytest.approx((1 / 3 + 2 / 4) / 2)
