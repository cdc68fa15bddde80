"""One side of a comparison as its feature network sees it, described by as many processes as there are."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reglue.data.store import Store
from reglue.errors import UserError
from reglue.metrics.distances import DENSITY_NEIGHBOURS, NEIGHBOURS, Gaussian, GaussianStatistics
from reglue.metrics.features import EncoderFeatures, FeatureNetwork, FeatureSet, describe_images
from reglue.metrics.image_sets import Images, ImageSet, Share
from reglue.metrics.inception import Inception
from reglue.progress import Bar
from reglue.training import distributed

PRECISION = "float32"
"""In which networks describe images here."""
LEAST_IMAGES = max(NEIGHBOURS, DENSITY_NEIGHBOURS) + 1
"""Fewer do not have as many neighbours."""


@dataclass(frozen=True)
class Side:
    """Features of a set of images, and the Gaussians that are compared."""

    path: Path
    pool: Gaussian
    spatial: Gaussian | None
    features: FeatureSet | None
    """None where a file holds statistics alone."""
    size: tuple[int, int] | None
    """Height and width at which the network was given the images; None if it was given none."""
    origin: str
    """Where the features came from."""
    given: bool
    """Whether the Gaussians come from a file, and not from the features."""
    skipped: tuple[str, ...] = ()
    """Names of images that could not be read."""
    other_sizes: int = 0
    """Images that were brought to the size of the first since no size was asked for."""
    fingerprints: Tensor | None = None
    """(N,) int64, equal for images of the same pixels; None if the network was given none."""

    @property
    def count(self) -> int | None:
        """Of images whose features are known."""
        return len(self.features.features) if self.features else None


def describe_side(
    network: FeatureNetwork,
    side: ImageSet,
    name: str,
    share: Share,
    *,
    resolution: tuple[int, int] | None = None,
    keep_spatial: bool = False,
) -> Side:
    """Features and Gaussians of one side, computed, or as far as its store or file has them.

    `name` is that of the side, for messages. `share` is what this process describes of what all return. `resolution`
    (height, width) is the size that images are brought to first. `keep_spatial` keeps spatial features one by one, as
    resampling needs them. Raises UserError for a file whose statistics are of another network, and for too few images.
    """
    given = side.pool is not None and isinstance(network, Inception)
    found, size, origin, seen = None, None, "statistics in the file", _Seen([], 0, None)
    # Class tokens serve if they were computed in the precision in which those of images will be.
    precision = side.store.manifest.precision if side.store and _fits(side.store, network) else None
    if side.store and precision == PRECISION:
        origin, size = "class tokens cached in the store", network.image_size
        found = FeatureSet(side.store.read("cls", side.store.originals)["cls"].float(), None, None)
    elif side.images is not None:
        since = f", as the store's class tokens are in {precision}" if precision else ""
        origin = f"computed from the images{since}"
        size = resolution or network.image_size or side.images.first_size()
        found, seen = _describe_images(network, side.images, size, name, share, keep_spatial)
    elif not given:
        raise UserError(f"{side.path} holds no images, and its statistics are the Inception's; give the images too")
    if found:
        refuse_too_few(len(found.features), f"{side.path} has {len(found.features)} readable images")
    pool, spatial = side.pool, found.spatial.gaussian if found and found.spatial else None
    if pool is not None and given:
        for gaussian, width in ((pool, network.width), (side.spatial, network.spatial_width)):
            if gaussian is not None and len(gaussian.mean) != width:
                raise UserError(f"{side.path} has statistics of {len(gaussian.mean)} features, not of {width}")
        spatial = side.spatial or spatial
        if found:
            origin = f"{'FID and sFID' if side.spatial else 'FID'} from the statistics in the file, all else {origin}"
    else:
        assert found is not None
        pool = GaussianStatistics(network.width).update(found.features).gaussian
    other_sizes = 0 if resolution else seen.other_sizes
    skipped, fingerprints = tuple(seen.skipped), seen.fingerprints
    return Side(side.path, pool, spatial, found, size, origin, given, skipped, other_sizes, fingerprints)


def refuse_too_few(count: int, found: str) -> None:
    """Raise UserError where there are fewer images than neighbours to look for; `found` says what there is."""
    if count < LEAST_IMAGES:
        raise UserError(f"{found}; at least {LEAST_IMAGES} are needed for a comparison")


def _fits(store: Store, network: FeatureNetwork) -> bool:
    """Whether the store's class tokens are the network's. Choices for the patches do not matter."""
    if not isinstance(network, EncoderFeatures) or network.kind != "class-token" or store.manifest.encoder is None:
        return False
    cached, spec = store.manifest.encoder, network.encoder.spec
    return replace(cached, layers=spec.layers, final_norm=spec.final_norm) == spec


class _Seen(NamedTuple):
    """What is noted of images while they are described. See `Side`."""

    skipped: list[str]
    other_sizes: int
    fingerprints: Tensor | None


def _fingerprint(image: Tensor) -> int:
    """64 bits of an image's pixels, uint8 (3, H, W)."""
    content = image.contiguous().numpy().data
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


def _describe_images(
    network: FeatureNetwork, images: Images, size: tuple[int, int], name: str, share: Share, keep_spatial: bool
) -> tuple[FeatureSet, _Seen]:
    """The features of all images, in their order, of which each process describes a share, and what was noted."""
    numbers: list[int] = []
    prints: list[int] = []
    found = describe_images(network, _readable(images, size, name, share, numbers, prints), keep_spatial=keep_spatial)
    noted = (distributed.all_gather(torch.tensor(part, dtype=torch.int64)) for part in (numbers, prints))
    described, fingerprints = noted
    others = distributed.all_gather(torch.tensor([images.other_sizes]))
    unread = sorted({*range(len(images))} - {*described.tolist()})
    seen = _Seen([images.name(number) for number in unread], int(others.sum()), fingerprints)
    if share.processes == 1:
        return found, seen
    order = described.argsort()
    nothing = torch.zeros(0, 0)
    logits = distributed.all_gather(nothing if found.logits is None else found.logits)
    spatial = distributed.all_gather(nothing if found.spatial_features is None else found.spatial_features)
    return FeatureSet(
        features=distributed.all_gather(found.features)[order],
        logits=logits[order] if len(logits) else None,
        spatial=_of_all_processes(found.spatial) if found.spatial else None,
        spatial_features=spatial[order] if len(spatial) else None,
    ), seen


def _of_all_processes(statistics: GaussianStatistics) -> GaussianStatistics:
    """Statistics of what all processes have seen."""
    own = (torch.tensor(statistics.count), statistics.mean, statistics.scatter)
    counts, means, scatters = (distributed.all_gather(part[None]) for part in own)
    merged = GaussianStatistics(len(statistics.mean))
    for count, mean, scatter in zip(counts.tolist(), means, scatters, strict=True):
        merged.merge(GaussianStatistics(len(mean), count, mean, scatter))
    return merged


def _readable(
    images: Images, size: tuple[int, int], name: str, share: Share, numbers: list[int], fingerprints: list[int]
) -> Iterator[Tensor]:
    """The readable images of a share, uint8 (B, 3, *size), a batch at a time; what they are is added to the lists."""
    count = len(images)
    with Bar(total=count, unit="image", desc=name, disable=share.rank > 0) as progress:
        for within, batch in zip(share.batches(count), images.batches(size, share), strict=True):
            readable = []
            for number, image in zip(within, batch, strict=True):
                if isinstance(image, Tensor):
                    readable.append(image)
                    numbers.append(number)
                    fingerprints.append(_fingerprint(image))
                else:
                    Bar.write(f"skipped {image.name} of the {name}: {image.reason}", file=sys.stderr)
            if readable:
                yield torch.stack(readable)
            progress.update(min(len(batch) * share.processes, count - progress.n))
