"""The figures of a comparison, with all that they depend on: what `reglue evaluate` measures, prints and writes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reglue.data.pictures import in_html
from reglue.errors import option
from reglue.metrics.distances import (
    Gaussian,
    frechet_distance,
    frechet_influence,
    inception_scores,
    kernel_distance,
    manifold_scores,
)
from reglue.metrics.features import FeatureNetwork
from reglue.metrics.resampling import interval, resample_counts, resampled_means
from reglue.metrics.sides import Side
from reglue.seeds import generator

NAMES = {
    "spatial_frechet_distance": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kernel_distance": "KID",
    "density": "density",
    "coverage": "coverage",
}
"""What the field calls the figures, but for the Fréchet distance, whose name depends on the network."""


@dataclass(frozen=True, repr=False)
class Figure:
    """A figure and, where resampling gives one, the 95 % interval around it.

    Printing it shows no number, which would say little without its protocol: print the `Evaluation`.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, resampled: Tensor, least: float = -math.inf, most: float = math.inf) -> Figure:
        """With the interval of its resamples (R,), if there are any, within what the figure can be."""
        if not len(resampled):
            return cls(value)
        low, high = interval(value, resampled)
        return cls(value, max(low, least), min(high, most))

    def __repr__(self) -> str:
        return "<Figure: print its Evaluation, which says how it was made>"

    def shown(self) -> str:
        """The number and its interval, for the table of an `Evaluation`."""
        digits = 6 if abs(self.value) < 0.1 else 4
        value = f"{self.value:.{digits}f}"
        return value if self.low is None else f"{value} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True, repr=False)
class Metrics:
    """The figures; None for those that could not be measured, for reasons in `Evaluation.absent`.

    Distances: smaller is better. All others: larger is better. As those of a `Figure`, the numbers are not printed.
    """

    frechet_distance: Figure
    """FID, if the network is the Inception."""
    spatial_frechet_distance: Figure | None = None
    """sFID of ADM."""
    inception_score: Figure | None = None
    precision: Figure | None = None
    recall: Figure | None = None
    kernel_distance: Figure | None = None
    """KID, the mean over the subsets; around 0 for equal distributions, hence sometimes below."""
    kernel_distance_std: float | None = None
    """Standard deviation between the subsets."""
    density: Figure | None = None
    coverage: Figure | None = None

    def __repr__(self) -> str:
        measured = ", ".join(part.name for part in fields(self) if getattr(self, part.name) is not None)
        return f"<Metrics {measured}: print their Evaluation, which says how they were made>"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Figures and all that they depend on; `print(evaluation)` shows the table."""

    metrics: Metrics
    absent: dict[str, str]
    """Figures that are missing, and why."""
    distance_name: str
    """What the field calls the Fréchet distance of these features: FID, FD-DINOv2, or the encoder in brackets."""
    images: str
    image_count: int | None
    """None where the figures come from the statistics in a file."""
    image_size: tuple[int, int] | None
    """Height and width at which the network was given them; None if it was given none."""
    image_features: str
    """Where they came from: computed, or the store's cache, or statistics in the file."""
    reference: str
    reference_count: int | None
    reference_size: tuple[int, int] | None
    reference_features: str
    skipped: tuple[str, ...]
    """Images of either side that could not be read."""
    feature_network: str
    feature_network_sha256: str
    features: str
    input_rule: str
    """How the network brings images to its own input."""
    kernel_subsets: int
    kernel_subset_size: int
    neighbours: int
    density_neighbours: int
    resamples: int
    confidence: float
    seed: int
    protocol: dict[str, Any] | None
    """How the images were sampled; None if that is not recorded. What the user states in place of a record is under
    `stated_by_user`."""
    warnings: tuple[str, ...]
    versions: dict[str, str]

    def figures(self) -> dict[str, float]:
        """The numbers alone, by the field's names: for what draws curves of them."""
        return {name: figure.value for name, figure in self._named().items()}

    def _named(self) -> dict[str, Figure]:
        named = {self.distance_name: self.metrics.frechet_distance}
        named |= {name: getattr(self.metrics, field) for field, name in NAMES.items()}
        return {name: figure for name, figure in named.items() if figure is not None}

    def rows(self) -> dict[str, str]:
        """The report for people: what is measured and what that depends on, by title."""
        metrics = self.metrics
        rows = {name: figure.shown() for name, figure in self._named().items()}
        if self.protocol is None:
            rows[self.distance_name] += ", protocol not recorded"
        if metrics.kernel_distance is not None:
            rows["KID"] += f", ± {metrics.kernel_distance_std:.6f} between subsets"
        rows |= {name: f"– ({reason})" for name, reason in self.absent.items()}
        if self.resamples:
            rows["in brackets"] = f"{self.confidence:.0%} intervals of {self.resamples} resamples of one side"
        rows |= {
            "images": _side_row(self.images, self.image_count, self.image_size, self.image_features),
            "reference": _side_row(self.reference, self.reference_count, self.reference_size, self.reference_features),
            "features": f"{self.features} of {self.feature_network} (SHA-256 {self.feature_network_sha256[:12]})",
            "resize": f"another size within a side scaled to cover and cropped; then {self.input_rule}",
            "settings": f"{self.kernel_subsets} subsets of {self.kernel_subset_size}, {self.neighbours} neighbours "
            f"({self.density_neighbours} for density and coverage), seed {self.seed}",
            "protocol": _protocol_row(self.protocol),
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        return rows

    def __str__(self) -> str:
        """The report for people: several lines, no newline at the end."""
        rows = self.rows()
        width = max(map(len, rows))
        return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows.items()), *self.warnings])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        warnings = {"": "\n".join(self.warnings)} if self.warnings else {}
        return in_html(f"Evaluation of {self.images}", self.rows() | warnings)

    def report_name(self) -> str:
        """The file of a report in its run's `reports`: step, network, and a hash of all that the figures depend on.

        The same evaluation again, perhaps by other versions of libraries, has the same name.
        """
        protocol = self.protocol or {}
        about = {name: value for name, value in asdict(self).items() if name not in ("metrics", "absent", "warnings")}
        about |= {"versions": None, "protocol": {**protocol, "versions": None}}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        network = re.sub(r"[^\w.-]+", "-", Path(self.feature_network).name)
        return f"step-{protocol.get('step', 0):08d}-{network}-{digest}.json"


def measure_figures(
    network: FeatureNetwork,
    images: Side,
    reference: Side,
    *,
    resamples: int,
    kernel_subsets: int,
    kernel_subset_size: int,
    seed: int,
    device: torch.device,
) -> tuple[Metrics, dict[str, str]]:
    """The figures, and the reasons for those that are missing. Numbers of resamples and subsets are as in `Evaluation`;
    the device is the one on which rows are compared."""
    own, others = images.features, reference.features
    counts = resample_counts(len(own.features) if own else 0, resamples if own else 0, seed, "images")
    # Statistics that came in a file have no images to resample.
    resampled = own if own and resamples and not images.given else None
    figures: dict[str, Any] = {
        "frechet_distance": _distance(images.pool, reference.pool, resampled and resampled.features, counts)
    }
    absent: dict[str, str] = {}

    if images.spatial and reference.spatial:
        rows = resampled and resampled.spatial_features
        figures["spatial_frechet_distance"] = _distance(images.spatial, reference.spatial, rows, counts)
    else:
        absent["sFID"] = "a file has no mu_s" if network.spatial_width else "defined for the Inception alone"
    if own is None:
        reason = f"{images.path} has statistics and no images"
        return Metrics(**figures), absent | {name: reason for name in NAMES.values() if name != "sFID"}
    if own.logits is None:
        absent["Inception Score"] = network.without_logits
    else:
        whole = float(inception_scores(own.logits, torch.ones(1, len(own.logits))))
        figures["inception_score"] = Figure.of(whole, inception_scores(own.logits, counts))
    if others is None:
        reason = "the reference has statistics and no images"
        return Metrics(**figures), absent | dict.fromkeys(("precision", "recall", "KID", "density", "coverage"), reason)

    generated, real = (side.features.to(device) for side in (own, others))
    subsets = {"subsets": kernel_subsets, "subset_size": kernel_subset_size}
    draws = generator(seed, "kernel distance")
    kernel = kernel_distance(generated, real, **subsets, generator=draws, counts=counts)
    figures |= {"kernel_distance": Figure.of(kernel.mean, kernel.resampled), "kernel_distance_std": kernel.std}
    scores = manifold_scores(generated=generated, real=real)
    for name, most in (("precision", 1.0), ("density", math.inf)):
        values = getattr(scores, name).cpu()
        means = resampled_means(values, counts) if len(counts) else torch.empty(0)
        figures[name] = Figure.of(float(values.mean()), means, least=0, most=most)
    # Recall and coverage have no intervals: they rest on few images that lie far from all others, and resamples do not
    # show by how much they would move had others been drawn.
    figures |= {name: Figure(float(getattr(scores, name).mean())) for name in ("recall", "coverage")}
    return Metrics(**figures), absent


def _distance(own: Gaussian, reference: Gaussian, features: Tensor | None, counts: Tensor) -> Figure:
    """The Fréchet distance, with an interval if the features (N, D) behind `own` are there to be resampled."""
    distance = frechet_distance(own, reference)
    if features is None:
        return Figure(distance)
    return Figure.of(distance, resampled_means(frechet_influence(features, own, reference), counts), least=0)


def warnings_of(network: FeatureNetwork, images: Side, reference: Side) -> Iterator[str]:
    """Why the figures may not mean what they seem to, a line each."""
    for name, side in (("images", images), ("reference images", reference)):
        if not side.given and side.count is not None and side.count < network.width:
            yield (
                f"warning: {side.count} {name} for {network.width} features: the covariance is singular and the "
                "Fréchet distance biased; compare it only with figures from as many images"
            )
        if side.other_sizes:
            height, width = side.size or (0, 0)
            yield (
                f"warning: {side.other_sizes} of {side.count} {name} are of another size than the first, and were "
                f"scaled and cropped to its {height}×{width} pixels; {option('resolution')} chooses another"
            )
        prints = torch.empty(0) if side.fingerprints is None else side.fingerprints
        if copies := len(prints) - len(prints.unique()):  # of the pixels of an earlier one
            yield (
                f"warning: {copies} of {side.count} {name} are copies of others among them: the figures take each for "
                "an image of its own"
            )
    if images.fingerprints is not None and reference.fingerprints is not None:
        shared = int(torch.isin(images.fingerprints, reference.fingerprints).sum())
        if shared:
            yield f"warning: {shared} of {images.count} images are in the reference too, pixel for pixel"
    if images.size and reference.size and images.size != reference.size:
        sizes = [f"{height}×{width}" for height, width in (images.size, reference.size)]
        yield (
            f"warning: images of {sizes[0]} pixels are compared with a reference of {sizes[1]}: the figures contain "
            "the difference in sharpness; evaluate both at one resolution"
        )


def _side_row(path: str, count: int | None, size: tuple[int, int] | None, origin: str) -> str:
    counted = "" if count is None else f"{count} of "
    sized = "" if size is None else f", {size[0]}×{size[1]} pixels"
    return f"{counted}{path}{sized} ({origin})"


def _protocol_row(protocol: dict[str, Any] | None) -> str:
    """A protocol on one line, but for what is long."""
    if protocol is None:
        return "not recorded: nothing says how the images were made"
    short = {name: value for name, value in protocol.items() if name not in ("labels", "class_names", "versions")}
    return ", ".join(f"{name} {value}" for name, value in _flat(short))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value
