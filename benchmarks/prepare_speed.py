"""How much of its time `reglue prepare` spends in the networks, and where the rest goes.

    python benchmarks/prepare_speed.py --images PHOTOS --resolution 128 --autoencoder TAEF2 --encoder DINOV2-S

The job and the networks' bare forward passes on ready tensors take turns. Ratios are given of the time on the clock
and of the time on a core of the process that encodes, which on a busy machine is the one to trust. The other stages are
timed by themselves, per image: what runs in other processes or threads (decoding, writing) costs the networks nothing
where there are cores to spare.

The job begins with starting processes that decode and ends with writing the last shards, while the networks wait: take
so many images that this does not matter, thousands on a GPU.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from common import Timed, alternate, report
from reglue.commands import prepare as job
from reglue.commands.prepare import Prepare, peak_rss_mib
from reglue.config import Precision
from reglue.data.images import UnreadableImage
from reglue.data.opening import open_images
from reglue.data.store_writer import StoreWriter, write_shard
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.vision import load_encoder
from reglue.training.precision import autocast
from workloads import random_images

BARE = 1024
"""Images for what is timed by itself, at most: they lie in memory, and the job's are more where they should be."""


@dataclass(frozen=True)
class PrepareSpeed:
    """The speed of `reglue prepare`."""

    images: Path | None = None
    """Photographs; smooth random ones if not given."""
    resolution: int = 256
    autoencoder: str = "starter"
    encoder: str = "starter"
    batch_sizes: tuple[int, ...] = (16,)
    precision: Precision = "float32"
    workers: int | None = None
    """Processes that decode. Default: as `prepare` chooses."""
    count: int = 64
    """Images: the first of those in --images."""
    conditions: Annotated[Timed, tyro.conf.arg(name="")] = field(default_factory=Timed)


def main(options: PrepareSpeed) -> None:
    """Measure and print."""
    device = options.conditions.begin()
    with tempfile.TemporaryDirectory() as folder:
        images = options.images or random_images(Path(folder), options.count, options.resolution)
        figures = {str(size): measured(options, images, size, device) for size in options.batch_sizes}
    report("prepare_speed", options, {"per_batch_size": figures, "peak_memory_mib": peak_rss_mib()}, device)


def measured(options: PrepareSpeed, images: Path, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Images per second of the job and of the bare networks, their ratio, and milliseconds per image of each stage."""
    every = open_images(images, Prepare.reading, None)
    size = (options.resolution, options.resolution)
    count = min(options.count, len(every))
    asked = Prepare(
        images, Path("unused"), options.resolution, options.autoencoder, options.encoder, features=True,
        batch_size=batch_size, shard_size=64, precision=options.precision, workers=options.workers,
        device=options.conditions.device,
    )  # fmt: skip
    autoencoder = load_autoencoder(asked.autoencoder, device=device).to(memory_format=torch.channels_last)
    encoder = load_encoder(asked.encoder, size, device=device)

    loading = time.process_time()
    crops = [every.load(index, size) for index in range(0, count, -(-count // BARE))]
    decode = (time.process_time() - loading) / len(crops)
    pixels = torch.stack([crop for crop in crops if not isinstance(crop, UnreadableImage)]).to(device)
    batches = pixels.split(batch_size)
    ready = [
        ((part.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last), encoder.preprocess(part))
        for part in batches
    ]

    def autoencode() -> None:
        with torch.inference_mode(), autocast(device, options.precision):
            for part, _ in ready:
                autoencoder.encode(part)

    def see() -> None:
        with torch.inference_mode(), autocast(device, options.precision):
            for _, part in ready:
                encoder.network.forward_intermediates(part, indices=list(encoder.spec.layers), norm=True)

    def describe() -> None:
        for part in batches:
            job.describe(part, autoencoder, encoder, asked)

    contents = job.contents_of(replace(asked, share=1.0), every, autoencoder, encoder)
    contents = replace(contents, source=replace(contents.source, count=count))

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            writer = StoreWriter(Path(folder) / "store", contents)
            job.fill(writer, writer.pending, every, autoencoder, encoder, asked, device, quiet=True)

    contestants = {"autoencoder": autoencode, "encoder": see, "describe": describe, "job": whole}
    timed = alternate(contestants, options.conditions.repeats, device)
    images_of = {name: count if name == "job" else len(pixels) for name in timed}
    clock = {name: timing.median / images_of[name] for name, timing in timed.items()}
    core = {name: timing.cpu_median / images_of[name] for name, timing in timed.items()}
    described = job.describe(batches[0], autoencoder, encoder, asked)
    stages = {
        "decode_and_crop": decode,
        "copy_to_block": core_seconds(lambda: job.put({}, described, at=0, rows=len(batches[0]))) / len(batches[0]),
        "write_and_hash": writing(described) / len(batches[0]),
        **{f"{name}_in_all" if name == "job" else name: seconds for name, seconds in core.items()},
    }
    figures = {
        "images_per_second": 1 / clock["job"],
        "bare_images_per_second": 1 / (clock["autoencoder"] + clock["encoder"]),
        "share_of_bare_by_clock": (clock["autoencoder"] + clock["encoder"]) / clock["job"],
        "share_of_bare_by_core": (core["autoencoder"] + core["encoder"]) / core["job"],
        "milliseconds_per_image_on_a_core": {name: 1e3 * seconds for name, seconds in stages.items()},
    }
    print(batch_size, figures, flush=True)
    return figures


def core_seconds(stage: Callable[[], object]) -> float:
    """Seconds of a core that a stage takes."""
    started = time.process_time()
    stage()
    return time.process_time() - started


def writing(described: dict[str, dict[str, torch.Tensor]]) -> float:
    """Seconds of a core to write and hash a batch."""
    columns = {column: {name: t.cpu() for name, t in tensors.items()} for column, tensors in described.items()}
    rows = len(columns["cls"]["cls"])
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{row}.png" for row in range(rows)]
        return core_seconds(
            lambda: [write_shard(Path(folder), column, 0, names, tensors) for column, tensors in columns.items()]
        )


if __name__ == "__main__":
    main(tyro.cli(PrepareSpeed, description=__doc__))
