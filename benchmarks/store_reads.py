"""How fast a store gives random rows, against what the disk and the memory give by themselves, and what GPUs need.

    python benchmarks/store_reads.py --store STORE
    python benchmarks/store_reads.py --made /tmp/store      # makes one in ImageNet's shapes at 256 pixels, and keeps it

For every column, cache (cold: the kernel is asked to forget the files), batch size and number of processes: GB/s of
`Store.read_stored`, of `os.preadv` of as many bytes at random offsets, and of reading the files from front to back.
Then, for every recipe that the store serves, what training reads and draws: `TrainingData.read`, by as many threads as
`reglue train` has for a GPU. With rows from the page cache, time on a core is the figure to trust on a busy machine.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from multiprocessing import get_context
from pathlib import Path
from threading import BrokenBarrierError
from typing import Annotated, Any

import torch
import tyro

from common import Conditions, report
from counting import H200_PRODUCTS, training_flops
from reglue.config import Recipe
from reglue.data.batches import TrainingData, denoiser_config
from reglue.data.manifest import LOCAL_CODES, compressor_of
from reglue.data.prefetch import READERS, prefetch
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.papers import RECIPES
from reglue.seeds import generator, permutation
from workloads import Data, Workload, random_store

BLOCK = 2**22
"""Bytes that a sequential read asks for at once."""
PATIENCE = 300
"""Seconds that a process waits for the others to have begun too: they import PyTorch, and may begin with a GPU."""
REACHED, GPUS = 0.5, 8
"""Share of an H200's matrix rate that training is to reach, and how many of them read."""


@dataclass(frozen=True)
class StoreReads:
    """Random reads of a store."""

    conditions: Annotated[Conditions, tyro.conf.arg(name="")] = field(default_factory=Conditions)
    store: Path | None = None
    """A store to read; one of random numbers is made otherwise."""
    made: Path = Path("store-reads")
    """Where that one is, or is made."""
    data: Data = "imagenet"
    """Sizes of the store that is made: ImageNet at 256 px (SD-VAE, DINOv2-B), those of `reglue demo`, or a toy's."""
    rows: int = 1024
    """Of the store that is made: 1.6 MB each in ImageNet's sizes."""
    columns: tuple[str, ...] = ("latent", "local.conv-16", "cls", "features")
    batch_sizes: tuple[int, ...] = (32, 256)
    processes: tuple[int, ...] = (1, 2)
    """How many read at the same time, each its share of the rows."""
    images: int = 2048
    """Rows read for a figure, at least one pass over the store if it is smaller; at most one pass when cold."""
    last_layer: bool = True
    """Of the features, read the last layer alone, as alignment does."""
    pinned: bool = False
    """Read into pinned memory, as training for a GPU does, which it needs: PyTorch uses it again, while other memory is
    new each time."""
    threads_of_training: int = READERS
    """That read samples, as --workers of `reglue train`."""


@dataclass(frozen=True)
class Work:
    """What one process reads."""

    store: Path
    column: str
    rows: list[int]
    batch_size: int
    last_layer: bool
    pinned: bool


def main(options: StoreReads) -> None:
    """Measure and print. Raises UserError if memory is to be pinned and there is no GPU."""
    if options.pinned and not torch.cuda.is_available():
        raise UserError("--pinned: this machine has no NVIDIA GPU that PyTorch can see; leave it out")
    torch.set_num_threads(options.conditions.threads)
    folder = options.store or made(options)
    started = time.perf_counter()
    store = Store.open(folder)
    opened = time.perf_counter() - started
    columns = [column for column in options.columns if column in store.manifest.columns]
    figures: list[dict[str, Any]] = []
    with Readers(max(options.processes), options.conditions.threads) as readers:
        for column in columns:
            for cache in ("cold", "warm"):
                for batch_size in options.batch_sizes:
                    for processes in options.processes:
                        figure = measured(options, folder, column, cache, batch_size, processes, readers)
                        figures.append({"column": column, "cache": cache, **figure})
                        print(" ".join(f"{key}={value}" for key, value in figures[-1].items()), flush=True)
    figures_of: dict[str, Any] = {
        "open_seconds": opened,
        "shards": len(store.manifest.columns["label"].shards),
        "reads": figures,
        "training": of_training(options, store),
    }
    needed = needs(figures, min(options.batch_sizes))
    for name, need in needed.items():
        print(name, need)
    figures_of |= {"memory_copy_gb_per_second": memory_rate(), "needs": needed}
    report("store_reads", options, figures_of, torch.device("cpu"))


def measured(
    options: StoreReads, folder: Path, column: str, cache: str, batch_size: int, processes: int, readers: Readers
) -> dict[str, Any]:
    """GB/s of the three ways to read, and bytes per image."""
    store = Store.open(folder)
    passes = 1 if cache == "cold" else -(-options.images // len(store))
    order = torch.cat([permutation(0, "benchmark", epoch, len(store)) for epoch in range(passes)])[: options.images]
    share = -(-len(order) // processes)
    last_layer = options.last_layer and column == "features"
    work = [Work(folder, column, part.tolist(), batch_size, last_layer, options.pinned) for part in order.split(share)]
    size = bytes_per_row(store, column, work[0].last_layer)
    rates = {}
    for name, way in (("store", through_store), ("preadv", at_random), ("sequential", in_order)):
        for shard in store.manifest.columns[column].shards:
            set_cache(folder / shard.file, cache)
        wall, core = readers.together(way, work[:1] if way is in_order else work)
        total = sum(s.bytes for s in store.manifest.columns[column].shards) if way is in_order else len(order) * size
        rates[name] = round(total / wall / 1e9, 2)
        rates[f"{name}_per_core_second"] = round(total / core / 1e9, 2)
    return {"batch_size": batch_size, "processes": processes, "bytes_per_image": size, **rates}


def through_store(work: Work, ready: Callable[[], object]) -> None:
    """Rows by `Store.read_stored`."""
    opened = Store.open(work.store)
    store = Store(opened.folder, opened.manifest, work.pinned)
    width = store.manifest.encoder.width if work.last_layer and store.manifest.encoder else 0
    channels = slice(-width, None) if width else slice(None)
    rows = torch.tensor(work.rows).split(work.batch_size)
    for part in (rows[0], rows[-1]):
        store.read_stored(work.column, part * 0, channels)
    ready()
    for part in rows:
        store.read_stored(work.column, part, channels)


def of_training(options: StoreReads, store: Store) -> list[dict[str, Any]]:
    """What `TrainingData.read` gives for every recipe that the store has the columns for, from disk and from the page
    cache."""
    figures: list[dict[str, Any]] = []
    for name, published in RECIPES.items():
        recipe = replace(published, local=replace(published.local, compressor=compressor_in(store)))
        for cache in ("cold", "warm"):
            for batch_size in options.batch_sizes:
                try:
                    rates = rates_of_training(options, store.folder, recipe, cache, batch_size)
                except UserError:
                    continue  # The store lacks a column.
                figures.append({"recipe": name, "cache": cache, "batch_size": batch_size, **rates})
                print(" ".join(f"{key}={value}" for key, value in figures[-1].items()), flush=True)
    return figures


def rates_of_training(
    options: StoreReads, folder: Path, recipe: Recipe, cache: str, batch_size: int
) -> dict[str, float]:
    """Images per second, by the clock and on a core. Raises UserError for a store that lacks what the recipe needs."""
    opened = Store.open(folder)  # Anew each time: the kernel forgets nothing that is mapped.
    store = Store(folder, opened.manifest, options.pinned)
    data = TrainingData(store, recipe, denoiser_config(store, recipe), 0)
    for column in store.manifest.columns.values():
        for shard in column.shards:
            set_cache(folder / shard.file, cache)
    once = -(-len(store) // batch_size)
    positions = [range(first * batch_size, (first + 1) * batch_size) for first in range(once)]
    if cache == "warm":
        for _ in prefetch(data.read, positions, options.threads_of_training, data.device):
            pass  # Files are mapped by now.
        later = range(once, once + max(once, options.images // batch_size))
        positions = [range(first * batch_size, (first + 1) * batch_size) for first in later]
    wall, core = time.perf_counter(), time.process_time()
    for _ in prefetch(data.read, positions, options.threads_of_training, data.device):
        pass
    wall, core = time.perf_counter() - wall, time.process_time() - core
    images = len(positions) * batch_size
    return {"images_per_second": images / wall, "images_per_core_second": images / core}


def compressor_in(store: Store) -> str:
    """The name of a compressor whose codes of features a store has, or none."""
    columns = (column for column in store.manifest.columns if column.startswith(LOCAL_CODES))
    return compressor_of(next(columns, ""))


def at_random(work: Work, ready: Callable[[], object]) -> None:
    """As many bytes of the same files at random offsets, into one buffer."""
    store = Store.open(work.store)
    size = bytes_per_row(store, work.column, work.last_layer)
    files = [os.open(work.store / shard.file, os.O_RDONLY) for shard in store.manifest.columns[work.column].shards]
    room = [os.fstat(file).st_size - size for file in files]
    draw = generator(0, "offsets", os.getpid())
    chosen = draw.integers(len(files), size=len(work.rows)).tolist()
    offsets = [int(draw.integers(max(room[file], 1))) for file in chosen]
    buffer = memoryview(bytearray(size * work.batch_size))
    places = [buffer[i * size : (i + 1) * size] for i in range(work.batch_size)]
    ready()
    for i, (file, offset) in enumerate(zip(chosen, offsets, strict=True)):
        os.preadv(files[file], [places[i % work.batch_size]], offset)


def in_order(work: Work, ready: Callable[[], object]) -> None:
    """All files from front to back, which one process is asked to."""
    buffer = bytearray(BLOCK)
    ready()
    for shard in Store.open(work.store).manifest.columns[work.column].shards:
        with (work.store / shard.file).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


Way = Callable[[Work, Callable[[], object]], None]
"""A way to read: it does its work after it has called a function that returns when all others are ready too."""


class Readers:
    """Processes that read at the same time, the same ones for every figure: they begin with PyTorch and a GPU once.

    They are new ones and no copies of this process (`spawn`, not `fork`), as one that has looked for a GPU cannot give
    its copies pinned memory.
    """

    def __init__(self, most: int, threads: int) -> None:
        """`most`: how many may be asked to read together."""
        context = get_context("spawn")
        barriers = {count: context.Barrier(count) for count in range(1, most + 1)}
        self.pool = ProcessPoolExecutor(most, context, begin, (barriers, threads))

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def watchdog(self, way: Way, work: list[Work]) -> tuple[float, float]:
        """Seconds until all of the work is done at the same time, and seconds of cores. Starting is not counted.

        Raises what one of the processes has raised, and BrokenProcessPool if one has died.
        """
        # Each waits for the others before it reads, so that none can take the work of two.
        asked = [self.pool.submit(timed, way, part, len(work)) for part in work]
        errors = [error for future in asked if (error := future.exception())]
        if errors:  # Of one that failed and those that waited for it, the one that failed.
            raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))
        began, ended, cores = zip(*(future.result() for future in asked), strict=True)
        return max(ended) - min(began), sum(cores)


_barriers: dict[int, Any] = {}
"""Of a process that reads: where it waits for the others, by how many they are."""


def begin(barriers: dict[int, Any], threads: int) -> None:
    """What a process that reads does first."""
    torch.set_num_threads(threads)
    _barriers.update(barriers)


def timed(way: Way, work: Work, count: int) -> tuple[float, float, float]:
    """When one of so many processes began and ended its work, and its seconds of a core."""
    began: list[float] = []

    def ready() -> None:
        _barriers[count].wait(PATIENCE)
        began.extend((time.perf_counter(), time.process_time()))

    try:
        way(work, ready)
    except BaseException:
        _barriers[count].abort()  # The others do not wait for it.
        raise
    return began[0], time.perf_counter(), time.process_time() - began[1]


def set_cache(file: Path, cache: str) -> None:
    """Bring a file into the page cache, or have it forgotten."""
    descriptor = os.open(file, os.O_RDONLY)
    if cache == "cold":
        os.fsync(descriptor)  # What was not written yet cannot be forgotten.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        while os.read(descriptor, BLOCK):
            pass
    os.close(descriptor)


def bytes_per_row(store: Store, column: str, last_layer: bool) -> int:
    """Bytes that a row of a column takes, or its last layer."""
    tensors = store.manifest.columns[column].tensors.values()
    size = sum(prod(spec.shape) * getattr(torch, spec.dtype).itemsize for spec in tensors)
    encoder = store.manifest.encoder
    return size // len(encoder.layers) if last_layer and encoder else size


def memory_rate() -> float:
    """GB/s at which one core copies memory."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        started = time.process_time()
        target.copy_(source)
        seconds.append(time.process_time() - started)
    return source.nbytes / min(seconds) / 1e9


def needs(figures: list[dict[str, Any]], batch_size: int) -> dict[str, dict[str, float]]:
    """For each recipe at B/2 and 256 pixels: what an H200 takes in, and what one process gave here."""
    rate = {
        f["column"]: f["store_per_core_second"]
        for f in figures
        if (f["cache"], f["batch_size"], f["processes"]) == ("warm", batch_size, 1)
    }
    result = {}
    for name, recipe in RECIPES.items():
        config = Workload.of("imagenet", recipe=name).config
        flops = training_flops(config)
        images = H200_PRODUCTS * REACHED / flops
        sizes = {"latent": 2 * 4 * prod(config.shape.shapes()["latent"])}
        if recipe.local.present:
            sizes["local.conv-16"] = 4 * config.shape.local_channels * 16 * 16
        if recipe.class_token.present or recipe.alignment.present:
            sizes["cls"] = 4 * 768
        if recipe.alignment.present:
            sizes["features"] = 2 * 768 * 16 * 16
        total = sum(sizes.values())
        result[name] = {
            "training_gflop_per_image": flops / 1e9,
            "images_per_second_per_gpu": images,
            "bytes_per_image": total,
            "gb_per_second_per_gpu": images * total / 1e9,
            "gb_per_second_of_all": GPUS * images * total / 1e9,
        }
        if sizes.keys() <= rate.keys():
            seconds = sum(size / rate[column] / 1e9 for column, size in sizes.items())
            result[name]["images_per_second_of_one_process_here"] = 1 / seconds
    return result


def made(options: StoreReads) -> Path:
    """A store of random rows, kept for the next time."""
    if not (options.made / "manifest.json").is_file():
        random_store(options.made, Workload.of(options.data), options.rows, shard_rows=256)
    return options.made


if __name__ == "__main__":
    try:
        main(tyro.cli(StoreReads, description=__doc__))
    except UserError as error:
        print(f"store_reads: {error}", file=sys.stderr)
        sys.exit(2)
