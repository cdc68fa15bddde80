"""Probes: how well a small model predicts from features, and so how much of their meaning compression keeps.

A linear probe of classes is ridge regression in closed form. Probes of maps, linear or convolutional, are trained by
gradient descent on the cross-entropy. Either way a part of the training images, which the fit does not see, chooses the
regularisation: the penalty of the ridge, or the step at which to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reglue.metrics.distances import GaussianStatistics
from reglue.perception.agreement import IGNORE, RESAMPLES, confusions, mean_iou, resampled_totals, standard_error
from reglue.perception.heads import head_layers
from reglue.progress import Bar
from reglue.seeds import generator, permutation

NO_TARGET = -100
"""Stands for them where 255 may be a class like others."""
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
"""Ridge penalties to choose from, on inputs of unit variance and squared errors averaged over examples."""
EVALUATIONS = 10
"""How often a training is looked at, to choose where to stop."""
VALUES_AT_ONCE = 2**24
"""Input values read at once by whatever passes over all examples."""


@dataclass(frozen=True)
class Examples:
    """What probes are fitted to and measured on: inputs, read a few at a time, and what to predict from them."""

    read: Callable[[Tensor], Tensor]
    """Rows (n,) to inputs (n, C, h, w), float32 and of about unit variance."""
    rows: Tensor
    """(N,) int64: which rows these are."""
    targets: Tensor
    """(N,) int64: the class of each image; or (N, H, W) uint8: that of each of its pixels; or (N, H, W) float32: the
    depth of each of its pixels, NaN where it is unknown."""
    shape: tuple[int, int, int]
    """(C, h, w) of an input."""

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Tensor) -> Examples:
        """Some of the examples."""
        return replace(self, rows=self.rows[indices], targets=self.targets[indices])

    def batches(self, what: str, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (n, C, h, w) and targets (n, …) in order, under a progress bar."""
        size = size or max(16, VALUES_AT_ONCE // int(np.prod(self.shape)))
        with Bar(total=len(self), desc=what, unit="image", leave=False) as progress:
            for rows, targets in zip(self.rows.split(size), self.targets.split(size), strict=True):
                yield self.read(rows), targets
                progress.update(len(rows))


@dataclass(frozen=True)
class LinearProbe:
    """Scores of classes x·weight + bias, of inputs averaged over positions or of all their values."""

    weight: Tensor
    """(D, classes) float64."""
    bias: Tensor
    """(classes,) float64."""
    flat: bool
    """Whether every value at every position is an input of its own; otherwise positions are averaged."""

    def predict(self, inputs: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Inputs (n, C, h, w) to classes (n,)."""
        return (_vectors(inputs, self.flat) @ self.weight + self.bias).argmax(1)


@dataclass(frozen=True)
class Fitted:
    """A probe and how its regularisation was chosen."""

    probe: LinearProbe | MapProbe
    chosen: float
    """The penalty, or the step at which training stopped."""
    selection_score: float
    """Accuracy or mean intersection over union on the examples that chose it."""
    at_end: bool = False
    """Whether the penalty is the smallest or the largest on offer, so that a better one may lie beyond."""


def fit_linear(fitting: Examples, selection: Examples, classes: int, flat: bool) -> Fitted:
    """Ridge regression to one-hot classes; the penalty has the best accuracy on `selection`.

    `flat`: every value at every position is an input of its own; otherwise positions are averaged.
    """
    channels, height, width = fitting.shape

    def rows(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([_vectors(inputs, flat), F.one_hot(targets, classes).double()], dim=1)

    def wrong(scores: Tensor, one_hot: Tensor) -> Tensor:
        return (scores.argmax(1) != one_hot.argmax(1)).sum()

    values = channels * height * width if flat else channels
    fitted = _fit_ridge(fitting, selection, values, classes, rows, wrong, flat)
    return replace(fitted, selection_score=1 + fitted.selection_score)


def fit_depth(fitting: Examples, selection: Examples) -> Fitted:
    """Ridge regression of the depth at every position; the penalty has the least squared error on `selection`.

    The depth of a position is the mean of its pixels', those of unknown depth left out. The probe has one output.
    """

    def squared_error(depth: Tensor, known: Tensor) -> Tensor:
        return (depth - known).square().sum()

    return _fit_ridge(fitting, selection, fitting.shape[0], 1, _depth_rows, squared_error)


def _fit_ridge(
    fitting: Examples,
    selection: Examples,
    width: int,
    outputs: int,
    rows: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    flat: bool = False,
) -> Fitted:
    """Ridge regression in float64, streamed: memory is a few matrices (width + outputs, width + outputs).

    `rows` makes rows [x (width,), y (outputs,)] of a batch, and `loss` sums over rows how far predictions are from y.
    The penalty is the one of `PENALTIES` whose fit to `fitting` has the least loss on `selection`, the largest among
    equals; the probe returned is then fitted to both, and its score is minus the mean loss.
    """
    statistics, seen = GaussianStatistics(width + outputs), 0
    for batch in fitting.batches("ridge"):
        statistics.update(rows(*batch))
    candidates = [ridge(statistics, width, penalty, flat) for penalty in PENALTIES]
    losses = torch.zeros(len(candidates), dtype=torch.float64)
    for batch in selection.batches("choose the penalty"):
        joint = rows(*batch)
        x, y = joint.split((width, outputs), dim=1)
        losses += torch.stack([loss(x @ probe.weight + probe.bias, y) for probe in candidates])
        seen += len(joint)
        statistics.update(joint)
    best = min(range(len(PENALTIES)), key=lambda index: (float(losses[index]), -index))
    return Fitted(
        probe=ridge(statistics, width, PENALTIES[best], flat),
        chosen=PENALTIES[best],
        selection_score=-float(losses[best]) / max(seen, 1),
        # The largest of equals may end a plateau, beyond which nothing better is to be expected.
        at_end=best == 0 or bool(best == len(PENALTIES) - 1 and losses[best] < losses[best - 1]),
    )


def ridge(statistics: GaussianStatistics, width: int, penalty: float, flat: bool) -> LinearProbe:
    """The least-squares weights of targets y on inputs x, from statistics of rows [x (width,), y (classes,)].

    They minimise mean|x̃·w − y|² + penalty·|w|², where x̃ are the inputs at mean 0 and variance 1: neither the scale of
    an input nor the number of rows changes what a penalty means. Penalties are positive.
    """
    covariance = statistics.covariance
    std = covariance.diagonal()[:width].clamp(min=0).sqrt()
    std = torch.where(std > 1e-9, std, 1.0)  # An input that never changes gets no weight.
    regularised = covariance[:width, :width] / std / std[:, None]
    regularised.diagonal().add_(penalty)
    across = covariance[:width, width:] / std[:, None]
    weight = torch.cholesky_solve(across, torch.linalg.cholesky(regularised)) / std[:, None]
    return LinearProbe(weight, statistics.mean[width:] - statistics.mean[:width] @ weight, flat)


class MapProbe(nn.Module):
    """Scores of classes from a map: linear at every position, or Conv1×1 → ReLU → Conv3×3 → ReLU → linear.

    The class of an image has the highest mean score over positions; scores of pixels are enlarged bilinearly.
    """

    def __init__(self, channels: int, classes: int, hidden: int):
        """`hidden`: channels of the convolutions; 0 makes the probe linear."""
        super().__init__()
        self.layers = head_layers(channels, classes, hidden)

    def forward(self, inputs: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Inputs (n, C, h, w) to scores (n, classes), or (n, classes, *size) where a size is given."""
        scores = self.layers(inputs)
        if size is None:
            return scores.mean((2, 3))
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)

    @torch.inference_mode()
    def predict(self, inputs: Tensor, size: tuple[int, int] | None) -> Tensor:
        """Inputs (n, C, h, w) to classes (n,), or to those of pixels (n, *size), on the CPU."""
        return self(inputs.to(next(self.parameters()).device), size).argmax(1).cpu()


@dataclass(frozen=True)
class ProbeTraining:
    """How a `MapProbe` is trained: Adam with a cosine to 0."""

    hidden: int
    """Channels of its convolutions, 0 for a linear one."""
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: torch.device


def fit_map(fitting: Examples, selection: Examples, classes: int, training: ProbeTraining) -> Fitted:
    """Train a `MapProbe` on the cross-entropy, and keep it as it was when it did best on `selection`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(training.seed, "probe weights").integers(2**63)))
        probe = MapProbe(fitting.shape[0], classes, training.hidden)
    probe.to(training.device)
    optimizer = torch.optim.Adam(probe.parameters(), lr=training.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    best, state = Fitted(probe, 0, -1.0), {}
    order = _endless_order(len(fitting), training.seed)
    for step in Bar(range(1, training.steps + 1), desc="train the probe", unit="step", leave=False):
        batch = fitting.subset(torch.tensor([next(order) for _ in range(min(training.batch_size, len(fitting)))]))
        scores = probe(batch.read(batch.rows).to(training.device), _size(batch))
        counted = _counted(batch.targets).to(training.device)
        targets = batch.targets.to(training.device, torch.int64).masked_fill(~counted, NO_TARGET)
        loss = F.cross_entropy(scores, targets, ignore_index=NO_TARGET, reduction="sum") / counted.sum().clamp(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, training.steps // EVALUATIONS) == 0 or step == training.steps:
            score = measure_probe(probe, selection, classes, training.seed, resamples=0).value
            if score > best.selection_score:
                best = Fitted(probe, step, score)
                state = {name: value.clone() for name, value in probe.state_dict().items()}
    probe.load_state_dict(state)
    return best


@dataclass(frozen=True)
class Score:
    """How well a probe predicts the classes of examples that it was not fitted to."""

    value: float
    """Accuracy of images, or mean intersection over union of pixels; 0 to 1."""
    standard_error: float
    """Binomial for an accuracy; by bootstrap over images for a mean intersection over union (NaN without)."""
    pixel_accuracy: float | None
    """Of masks."""


def score_of_chance(fitting: Tensor, measured: Tensor, classes: int) -> float:
    """What predicting the most common class of targets `fitting` for all targets `measured` scores."""
    common = int(fitting[_counted(fitting)].long().bincount().argmax())
    predicted = torch.full_like(measured, common)
    if measured.ndim == 1:
        return float((predicted == measured).double().mean())
    return mean_iou(confusions(predicted, measured, classes).sum(0))


def measure_probe(
    probe: LinearProbe | MapProbe, examples: Examples, classes: int, seed: int, resamples: int = RESAMPLES
) -> Score:
    """The score of a probe on examples. `seed` is that of the bootstrap."""
    size = _size(examples)
    if size is None:
        batches = examples.batches("measure")
        share = sum(int((probe.predict(inputs, None) == targets).sum()) for inputs, targets in batches) / len(examples)
        return Score(share, (share * (1 - share) / len(examples)) ** 0.5, None)
    at_once = max(1, min(64, VALUES_AT_ONCE // (classes * size[0] * size[1])))
    batches = examples.batches("measure", at_once)
    counts = torch.cat([confusions(probe.predict(inputs, size), targets, classes) for inputs, targets in batches])
    total, resampled = counts.sum(0), resampled_totals(counts, generator(seed, "probe bootstrap"), resamples)
    error = standard_error([mean_iou(one) for one in resampled])
    return Score(mean_iou(total), error, float(total.diagonal().sum() / total.sum()))


def _vectors(inputs: Tensor, flat: bool) -> Tensor:
    """Inputs (n, C, h, w) as float64 (n, C·h·w), or averaged over positions (n, C)."""
    return inputs.flatten(1).double() if flat else inputs.double().mean((2, 3))


def _depth_rows(inputs: Tensor, targets: Tensor) -> Tensor:
    """Rows [x (C,), depth] of the positions of inputs (n, C, h, w) whose depth is known by targets (n, H, W)."""
    known = targets.isfinite()
    grid = (inputs.shape[2], inputs.shape[3])
    share = F.adaptive_avg_pool2d(known.double()[:, None], grid)
    depth = F.adaptive_avg_pool2d(targets.double().masked_fill(~known, 0.0)[:, None], grid) / share
    rows = torch.cat([inputs.double(), depth], dim=1).movedim(1, -1).flatten(0, 2)
    return rows[share.flatten() > 0]


def _counted(targets: Tensor) -> Tensor:
    """Which targets count: all classes of images, and those of pixels that are not to be ignored."""
    return targets != (NO_TARGET if targets.ndim == 1 else IGNORE)


def _size(examples: Examples) -> tuple[int, int] | None:
    """(H, W) of masks; None where the targets are classes of images."""
    return None if examples.targets.ndim == 1 else (examples.targets.shape[1], examples.targets.shape[2])


def _endless_order(count: int, seed: int) -> Iterator[int]:
    """Indices of examples: every epoch has a random order of its own."""
    epoch = 0
    while True:
        yield from permutation(seed, "probe order", epoch, count).tolist()
        epoch += 1
