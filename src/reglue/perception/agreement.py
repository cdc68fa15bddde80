"""How well two maps of one image agree: of the class of every pixel, or of its depth.

Estimates come with a standard error, by bootstrap over images, and with what the same maps give when each is compared
with the map of another image: agreement that has nothing to do with the image, such as things being in the middle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from reglue.seeds import generator

IGNORE = 255
"""Pixels of masks with this class are neither learned nor measured."""
RESAMPLES = 200
"""Bootstrap samples of images, for standard errors."""


@dataclass(frozen=True)
class Estimate:
    """One measure of agreement. A value is None where it is not defined, as the correlation of constants."""

    value: float | None
    standard_error: float | None
    """By bootstrap over images; None for a single one."""
    unrelated: float | None
    """The same of maps of different images: each is compared with the reference of the image before it."""


class Agreement(ABC):
    """Of maps (B, H, W) with reference maps, which arrive in batches and in the same order."""

    names: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._related: list[Tensor] = []
        self._unrelated: list[Tensor] = []
        self._last: Tensor | None = None

    def update(self, maps: Tensor, reference: Tensor) -> None:
        """Count a batch, each (B, H, W)."""
        self._related.append(self.counts(maps, reference))
        before = reference[:-1] if self._last is None else torch.cat([self._last, reference[:-1]])
        if len(before):
            self._unrelated.append(self.counts(maps[-len(before) :], before))
        self._last = reference[-1:]

    def estimates(self, seed: int) -> dict[str, Estimate]:
        """The estimates by name. `seed` is that of the bootstrap."""
        counts = torch.cat(self._related)
        values = self.measure(counts.sum(0))
        unrelated = self.measure(torch.cat(self._unrelated).sum(0)) if self._unrelated else {}
        resampled = [self.measure(total) for total in resampled_totals(counts, generator(seed, "agreement bootstrap"))]
        estimates = {}
        for name in self.names:
            error = standard_error([one[name] for one in resampled]) if len(counts) > 1 else float("nan")
            numbers = (values[name], error, unrelated.get(name, float("nan")))
            estimates[name] = Estimate(*(None if np.isnan(number) else number for number in numbers))
        return estimates

    @abstractmethod
    def counts(self, maps: Tensor, reference: Tensor) -> Tensor:
        """What is summed over images: (B, …)."""

    @abstractmethod
    def measure(self, total: Tensor) -> dict[str, float]:
        """The figures of such a sum; NaN where one is not defined."""


class ClassAgreement(Agreement):
    """Of class numbers."""

    names = ("mean_iou", "pixel_accuracy")

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def counts(self, maps: Tensor, reference: Tensor) -> Tensor:
        """Pixels of each class of the reference (row) by the map's (column)."""
        return confusions(maps, reference, self.classes)

    def measure(self, total: Tensor) -> dict[str, float]:
        """Intersection over union, averaged over the classes that occur; and the share of equal pixels."""
        return {"mean_iou": mean_iou(total), "pixel_accuracy": float(total.diagonal().sum() / total.sum())}


class DepthAgreement(Agreement):
    """Of depths. Pixels whose reference is no number are left out."""

    names = ("correlation", "relative_error")

    def counts(self, maps: Tensor, reference: Tensor) -> Tensor:
        """Sums over pixels, (B, 7) float64: 1, x, y, x², y², x·y, |x − y|/|y| of depths x and their reference y."""
        known = reference.isfinite()
        x, y = (values.double().masked_fill(~known, 0.0) for values in (maps, reference))
        relative = ((x - y).abs() / y.abs().clamp(min=1e-12)).masked_fill(~known, 0.0)
        return torch.stack([sums.sum((1, 2)) for sums in (known.double(), x, y, x * x, y * y, x * y, relative)], dim=1)

    def measure(self, total: Tensor) -> dict[str, float]:
        """Pearson's correlation over all pixels; and the mean error relative to the reference."""
        count, x, y, xx, yy, xy, relative = total.tolist()
        if not count:
            return dict.fromkeys(self.names, float("nan"))
        variances = (xx - x * x / count) * (yy - y * y / count)
        # What rounding leaves of a variance of 0 is no variance.
        defined = variances > 1e-20 * max(xx * yy, 1e-300)
        correlation = (xy - x * y / count) / variances**0.5 if defined else float("nan")
        return {"correlation": correlation, "relative_error": relative / count}


def confusions(predicted: Tensor, targets: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (row) were taken for each (column): (n, classes, classes) int64, per image.

    `predicted` and `targets` are (n, H, W); pixels with target 255 are left out.
    """
    counts = [
        (classes * target[target != IGNORE].long() + guess[target != IGNORE]).bincount(minlength=classes**2)
        for guess, target in zip(predicted, targets, strict=True)
    ]
    return torch.stack(counts).unflatten(1, (classes, classes))


def mean_iou(confusion: Tensor) -> float:
    """Intersection over union, averaged over the classes that occur in targets or predictions; NaN if none does.

    `confusion` (classes, classes) counts pixels, rows by target and columns by prediction.
    """
    intersection = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return float((intersection[union > 0] / union[union > 0]).double().mean())


def resampled_totals(counts: Tensor, draws: np.random.Generator, resamples: int = RESAMPLES) -> Tensor:
    """The sums of counts (N, …) over images that are drawn with repetition: (resamples, …) float64."""
    drawn = torch.from_numpy(draws.integers(len(counts), size=(resamples, len(counts))))
    weights = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double())
    return (weights @ counts.flatten(1).double()).unflatten(1, counts.shape[1:])


def standard_error(resampled: Sequence[float]) -> float:
    """The bootstrap's, of a figure by its values on resamples; NaN if none is defined."""
    defined = [value for value in resampled if not np.isnan(value)]
    return float(np.std(defined)) if defined else float("nan")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """Rows of cells as a table in Markdown; the first `texts` columns hold text, the others numbers."""
    lines = [heads, ["---"] * texts + ["---:"] * (len(heads) - texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
