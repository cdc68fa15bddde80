"""Memory of the statistics that standardise features before they are compressed: over N images, and over 2N."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from common import Comparison, peak_memory_mib, report
from reglue.data.manifest import Contents, Source
from reglue.data.store_writer import StoreWriter
from reglue.encoders.autoencoders import load_autoencoder
from reglue.training import distributed

PUBLISHED_BATCHES = 301
"""Batches of 256 images that calc_norm_stats.py looks at by default."""
CHUNK = 16


@dataclass(frozen=True)
class Compressing:
    """Peak memory of the features' statistics.

    Ours streams over a store. Theirs is a loop in a script that asks for a GPU and a hub, so it is re-enacted: every
    batch's features are kept as float32 arrays, joined, and standardised as a whole.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    images: int = 64
    """N: peaks are measured for N and 2N."""
    channels: int = 3072
    """Of the features: four layers of DINOv2-B."""
    side: int = 16
    """Of the features' grid."""


def compressing(options: Compressing) -> str:
    """Measure, each in a process of its own."""
    conditions = options.conditions
    torch.set_num_threads(conditions.threads)
    images, channels, side = (8, 16, 4) if conditions.toy else (options.images, options.channels, options.side)
    per_image = channels * side**2 * 4
    figures: dict[str, Any] = {"bytes_per_image": per_image}
    for name, run in (("ours", ours), ("theirs", theirs)):
        peaks = {count: growth(run, count, channels, side) for count in (images, 2 * images)}
        slope = (peaks[2 * images] - peaks[images]) * 2**20 / images
        figures[name] = {
            "peak_mib": peaks,
            "bytes_held_per_image": slope,
            "features_held_times": slope / per_image,
        }
    figures["published_images"] = PUBLISHED_BATCHES * 256
    figures["published_gigabytes_of_features"] = PUBLISHED_BATCHES * 256 * 3072 * 16**2 * 4 / 1e9
    return report("compressor", options, figures, distributed.resolve_device("cpu"))


def growth(run: Callable[[int, int, int], None], *sizes: int) -> float:
    """MiB by which a process grows at most while it runs a function."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child(pipe: Connection) -> None:
        before = peak_memory_mib()
        run(*sizes)
        pipe.send(peak_memory_mib() - before)

    process = context.Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def features(count: int, channels: int, side: int) -> Iterator[Tensor]:
    """Random maps, a few images at a time."""
    chance = torch.Generator().manual_seed(0)
    for start in range(0, count, CHUNK):
        yield torch.randn(min(CHUNK, count - start), channels, side, side, generator=chance)


def ours(count: int, channels: int, side: int) -> None:
    """Write a store shard by shard, and its statistics, as `reglue prepare` does."""
    autoencoder = load_autoencoder("starter").spec
    source = Source("random", "random", (side, side), (), count)
    contents = Contents(
        source=source,
        autoencoder=autoencoder,
        encoder=None,
        features=True,
        latent_dtype="float32",
        shard_rows=CHUNK,
        statistics_images=count,
        statistics_seed=0,
    )
    with TemporaryDirectory() as folder:
        writer = StoreWriter(Path(folder) / "store", contents)
        for block, part in zip(writer.pending, features(count, channels, side), strict=True):
            names = [str(i) for i in block]
            columns = {"features": {"features": part}, "label": {"label": torch.zeros(len(part), dtype=torch.int64)}}
            writer.write(block, names, [], columns)
        store = writer.finish(torch.arange(count))
        assert abs(store.manifest.statistics["features"].mean[0]) < 0.5


def theirs(count: int, channels: int, side: int) -> None:
    """Keep everything, join it, and standardise it as a whole."""
    kept = [part.flatten(2).transpose(1, 2).flatten(end_dim=1).numpy() for part in features(count, channels, side)]
    joined = np.concatenate(kept)
    mean, std = joined.mean(axis=0), joined.std(axis=0)
    standardised = (joined - mean) / std
    assert abs(standardised[:, 0].mean()) < 0.5
