"""What training reads of a store, and what GPUs need.

    python benchmarks/read_speed.py --store STORE
    python benchmarks/read_speed.py --made /tmp/store      # made once, of random rows in ImageNet's sizes

For each recipe that the store serves: images per second that `TrainingData.read` gives, all draws included, from the
disk (cold: the kernel is asked to forget the files) and from the page cache (warm); and what an H200 takes in at B/2.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from common import Benchmark, core_seconds, report, run
from counting import H200_FLOPS, REACHED, show, training_flops
from reglue.config import Recipe
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.manifest import LOCAL_CODES, compressor_of
from reglue.data.prefetch import READERS, prefetch
from reglue.data.store import Store
from reglue.papers import RECIPES
from reglue.run import needed_columns
from workloads import Workload

GPUS = 8
"""That read at the same time."""


@dataclass(frozen=True)
class ReadSpeed(Benchmark):
    """Random reads of a store by one process."""

    store: Path | None = None
    """A store to read. Default: one of random rows."""
    made: Path = Path("store-reads")
    """Where that one is, or is made."""
    rows: int = 1024
    """Of the store that is made: 1.6 MB each in ImageNet's sizes."""
    batch_size: int = 32
    images: int = 2048
    """Rows that are read from the page cache. From the disk each is read once."""


def main(options: ReadSpeed) -> str:
    """Measure, and print the table and then the line of JSON. Returns the line."""
    torch.set_num_threads(1)
    if options.store is None and not (options.made / "manifest.json").is_file():
        Workload.of("imagenet").random_store(options.made, options.rows)
    store = Store.open(options.store or options.made)
    codes = next((column for column in store.manifest.columns if column.startswith(LOCAL_CODES)), "")
    rows: list[dict[str, Any]] = []
    for published in RECIPES.values():
        recipe = replace(published, local=replace(published.local, compressor=compressor_of(codes)))
        if {*needed_columns(recipe)} <= store.manifest.columns.keys():
            rows.append(of_recipe(options, store, recipe))
    show(rows)
    return report(options, {"recipes": rows})


def of_recipe(options: ReadSpeed, store: Store, recipe: Recipe) -> dict[str, Any]:
    """What a recipe reads, what an H200 at half its matrix rate takes in, and what comes here."""
    size = sum(bytes_of_row(store, column) for column in needed_columns(recipe) if column != "label")
    needed = H200_FLOPS * REACHED / training_flops(Workload.of("imagenet", recipe=recipe.name).config)
    figures: dict[str, Any] = {
        "recipe": recipe.name,
        "bytes of an image": size,
        "images/s of a GPU": round(needed),
        f"GB/s of {GPUS}": GPUS * needed * size / 1e9,
    }
    for cache in ("cold", "warm"):
        opened = Store.open(store.folder)  # Anew, since the kernel forgets nothing that is mapped.
        data = TrainingData(opened, recipe, denoiser_config(opened, recipe), 0)
        for column in opened.manifest.columns.values():
            for shard in column.shards:
                set_cache(store.folder / shard.file, cache)
        count = len(store) if cache == "cold" else max(options.images, len(store))
        batches = [range(first, first + options.batch_size) for first in range(0, count, options.batch_size)]
        images, wall, core = len(batches) * options.batch_size, time.perf_counter(), core_seconds()
        deque(prefetch(data.read, batches, READERS), maxlen=0)
        wall, core = time.perf_counter() - wall, core_seconds() - core
        figures |= {f"{cache}: images/s": round(images / wall), f"{cache}: per second of a core": round(images / core)}
    return figures


def bytes_of_row(store: Store, column: str) -> int:
    """Bytes of a column's row; of the features those of the last layer, which is all that alignment reads."""
    tensors = store.manifest.columns[column].tensors.values()
    size = sum(prod(tensor.shape) * getattr(torch, tensor.dtype).itemsize for tensor in tensors)
    encoder = store.manifest.encoder
    return size // len(encoder.layers) if encoder and column == "features" else size


def set_cache(file: Path, cache: str) -> None:
    """Bring a file into the page cache, or have it forgotten."""
    with file.open("rb", buffering=0) as opened:
        if cache == "cold":
            os.fsync(opened.fileno())  # What was not written yet cannot be forgotten.
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while opened.read(2**22):
                pass


if __name__ == "__main__":
    run(ReadSpeed, main, __doc__)
