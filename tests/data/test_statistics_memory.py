"""The statistics of a store's features are streamed: their memory does not grow with the images."""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from reglue.data.manifest import Contents, Source
from reglue.data.store_writer import StoreWriter
from reglue.encoders.autoencoders import load_autoencoder

ROWS, CHANNELS, SIDE = 16, 192, 16


def write(count: int) -> None:
    """A store of so many images' features, shard by shard, with statistics over all of them."""
    contents = Contents(
        source=Source("random", "random", (SIDE, SIDE), (), count),
        autoencoder=load_autoencoder("starter").spec,
        encoder=None,
        features=True,
        latent_dtype="float32",
        shard_rows=ROWS,
        statistics_images=count,
        statistics_seed=0,
    )
    chance = torch.Generator().manual_seed(0)
    with TemporaryDirectory() as folder:
        writer = StoreWriter(Path(folder) / "store", contents)
        for block in writer.pending:
            part = torch.randn(len(block), CHANNELS, SIDE, SIDE, generator=chance)
            columns = {"features": {"features": part}, "label": {"label": torch.zeros(len(block), dtype=torch.int64)}}
            writer.write(block, [str(i) for i in block], [], columns)
        store = writer.finish(torch.arange(count))
        assert abs(store.manifest.statistics["features"].mean[0]) < 0.5


def growth(count: int) -> int:
    """Bytes by which a process grows at most while it writes such a store."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child(pipe: Connection) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        write(count)
        pipe.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    process = context.Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def test_streamed_statistics_do_not_grow_with_the_images() -> None:
    """The features of the images that are added take 48 MiB; everything else is warm after the first run."""
    growth(ROWS)
    few, many = growth(64), growth(320)
    assert many - few < 0.5 * 256 * 4 * CHANNELS * SIDE**2
