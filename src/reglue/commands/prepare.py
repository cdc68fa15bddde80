"""`reglue prepare`: images to a store of latents, class tokens and features."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reglue.data.decoding import decoded
from reglue.data.images import ImageSource, Noticed, UnreadableImage
from reglue.data.manifest import (
    MANIFEST,
    PARTIAL,
    Contents,
    Source,
    holds_codes,
    is_whole,
    read_manifest,
    refuse_others,
)
from reglue.data.opening import is_on_hub, open_images
from reglue.data.store import Store, quantised
from reglue.data.store_writer import StoreWriter
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, load_autoencoder
from reglue.encoders.known import STARTER
from reglue.encoders.vision import EncoderSpec, VisionEncoder, load_encoder
from reglue.errors import UserError, option, printable
from reglue.locks import writes
from reglue.machine import memory
from reglue.names import NO_ENCODER
from reglue.options.prepare import Prepare
from reglue.progress import Bar
from reglue.seeds import permutation
from reglue.training import distributed
from reglue.training.precision import autocast, matmul_precision

PUBLISHED_GRID = 16
"""Patches along each side of the maps that the published models learn from: those of 256 pixels."""
CLASSES_SHOWN = 20
"""Of so many classes the images are counted one by one."""
DARK = 4096
"""16-bit images whose values all lie below this, a sixteenth of the range, are probably of 12 bits or fewer."""


@writes()
def prepare(options: Prepare, *, semantics_of: Contents | None = None) -> Store:
    """Make a store, or continue one. Raises UserError for anything that the user can fix.

    `semantics_of`: a store whose class tokens and features this one has been given. They stay as they are.
    """
    rank, processes = distributed.join(options.device)
    if options.features and options.encoder == NO_ENCODER:
        raise UserError("--features needs an encoder; name one with --encoder, or leave --features out")
    images = open_images(options.images, options.reading, options.subset, options.flips)
    if distributed.broadcast_object(semantics_of is None and _is_finished(options, images)):
        return _finished(options, rank)
    device = distributed.resolve_device(options.device)
    # Convolutions at full resolution take most of the time, and channels_last makes them 1.6 times as fast on a CPU.
    autoencoder = load_autoencoder(options.autoencoder, device=device).to(memory_format=torch.channels_last)
    autoencoder.spec.latent_size(options.size)
    encoder = None
    if options.encoder != NO_ENCODER:
        encoder = load_encoder(options.encoder, options.size, options.layers, device, final_norm=options.final_norm)

    contents = contents_of(options, images, autoencoder.spec, encoder.spec if encoder else None)
    if semantics_of:
        given = {name: getattr(semantics_of, name) for name in ("encoder", "features", "features_dtype")}
        contents = replace(contents, **given)
    with distributed.first_process_first():
        writer = StoreWriter(options.out, contents, rank)
    if writer.complete:
        return _finished(options, rank)
    if rank == 0:
        for line in (*_about_images(options, images), *_about_maps(contents.encoder)):
            print(printable(line), flush=True)
    blocks = _dealt(writer.pending, rank, processes)
    remaining = sum(map(len, writer.pending))
    started = time.perf_counter()
    noticed = fill(writer, blocks, images, autoencoder, encoder, options, device, quiet=rank > 0)
    distributed.barrier()
    peaks = distributed.all_gather(torch.tensor(noticed.peaks, dtype=torch.int64))
    converted = int(distributed.all_gather(torch.tensor([noticed.converted])).sum())
    if rank == 0:
        writer.gather()
        seconds = time.perf_counter() - started
        store = writer.finish(_statistics_rows(options, writer.rows))
        print(
            f"{printable(str(options.out))}: {len(store)} images ({len(store.manifest.skipped)} unreadable), "
            f"{remaining / seconds:.1f} images/s, peak memory {memory()[1]:.0f} MiB"
        )
        if converted:
            print(f"the colours of {converted} images were brought from their ICC profile to sRGB")
        if dark := int(((peaks > 0) & (peaks < DARK)).sum()):
            print(
                f"{dark} of the {len(peaks)} 16-bit images use less than a sixteenth of their range and are "
                "stored dark; if their values have fewer bits, rescale them and prepare them again"
            )
    distributed.barrier()
    return Store.open(options.out)


def _is_finished(options: Prepare, images: ImageSource) -> bool:
    """Whether the store is whole and is what the options ask for, as can be told without loading a network.

    That a network is still the same is known by its name, and of files here by their age. False says nothing: the
    networks have to be loaded then. Raises UserError for a store with other contents.
    """
    if not (options.out / MANIFEST).is_file():
        return False
    has = read_manifest(options.out)
    own = [shard for name, column in has.columns.items() if not holds_codes(name) for shard in column.shards]
    if not all(is_whole(options.out, shard) for shard in own):
        return False
    prepared = (options.out / own[0].file).stat().st_mtime
    if not _is_same(has.autoencoder.name, options.autoencoder, prepared):
        return False
    if has.encoder is None or options.encoder == NO_ENCODER:
        if has.encoder or options.encoder != NO_ENCODER:
            return False
    else:
        layers = options.layers or tuple(range(has.encoder.depth))[-4:]
        if not _is_same(has.encoder.name, options.encoder, prepared):
            return False
        if (layers, options.final_norm) != (has.encoder.layers, has.encoder.final_norm):
            return False
    refuse_others(options.out, has, contents_of(options, images, has.autoencoder, has.encoder))
    return True


def _is_same(known: str, asked: str, since: float) -> bool:
    """Whether a network that a store knows by a name is the one asked for, and no file of it has changed since a time
    (in seconds, as the file system has it)."""
    architecture, at, file = asked.rpartition("@")
    if known not in (asked, f"{architecture}{at}{Path(file).resolve()}"):
        return False
    place = Path(__file__).parents[1] / STARTER if asked == STARTER else Path(file)
    changed = (file.stat().st_ctime for file in (place, *place.rglob("*")) if file.exists())
    return all(time < since for time in changed)


def _finished(options: Prepare, rank: int) -> Store:
    store = Store.open(options.out)
    if rank == 0:
        (options.out / PARTIAL).unlink(missing_ok=True)  # Left, if the process died before it could.
        print(f"{printable(str(options.out))} is complete already: {len(store)} images")
    return store


def _about_images(options: Prepare, images: ImageSource) -> Iterator[str]:
    """What was found: how many images of which classes, and what was passed over."""
    known = "" if images.sequential or not images.class_names else _counted(images)
    yield f"{options.images}: {len(images)} images{known}"
    yield from images.notes


def _counted(images: ImageSource) -> str:
    counts = np.bincount(np.asarray(images.labels), minlength=len(images.class_names)).tolist()
    if len(counts) > CLASSES_SHOWN:
        return f" in {len(counts)} classes of {min(counts)} to {max(counts)}"
    shown = ", ".join(f"{name} {count}" for name, count in zip(images.class_names, counts, strict=True))
    return f" in {len(counts)} class{'es' if len(counts) > 1 else ''}: {shown}"


def _about_maps(encoder: EncoderSpec | None) -> Iterator[str]:
    """What the encoder sees, and the size at which it sees as much as in the published methods, if it sees less."""
    if encoder is None:
        return
    grid, seen = ("×".join(map(str, size)) for size in (encoder.grid, encoder.input_size))
    larger = ""
    if (patches := min(encoder.grid)) < PUBLISHED_GRID // 2:
        sides = dict.fromkeys(side * PUBLISHED_GRID // patches for side in encoder.image_size)
        larger = (
            f"; {option('resolution')} {' '.join(map(str, sides))} gives {PUBLISHED_GRID} along a side, as in the "
            "published methods"
        )
    yield f"encoder {encoder.name} sees {seen} pixels of each image, and its maps have {grid} patches{larger}"


def fill(
    writer: StoreWriter,
    blocks: list[range],
    images: ImageSource,
    autoencoder: Autoencoder,
    encoder: VisionEncoder | None,
    options: Prepare,
    device: torch.device,
    quiet: bool = False,
) -> Noticed:
    """Encode the images of blocks, and write each block as soon as it is complete.

    Returns what was noticed about the images: some of 16 bits are darker than they are meant.
    Other processes decode ahead, and threads write and hash behind, so that the networks wait for neither. A GPU has
    the next batch before it is done with one, and copies by itself what it has found.
    """
    batch_indices = [list(batch) for block in blocks for batch in _batches_of(block, options.batch_size)]
    batches = decoded(images, batch_indices, options.size, options.workers, pinned=device.type == "cuda")
    noticed = Noticed()
    with (
        ThreadPoolExecutor(writers := writers_for(device)) as threads,
        Bar(total=sum(map(len, blocks)), unit="image", desc="prepare", disable=quiet) as progress,
    ):
        written: deque[Future[None]] = deque()
        wait = mark(device)
        for block in blocks:
            block_started = time.perf_counter()
            columns: dict[str, dict[str, Tensor]] = {}
            names: list[str] = []
            skipped: list[UnreadableImage] = []
            for batch in (next(batches) for _ in _batches_of(block, options.batch_size)):
                if batch.failure:
                    raise batch.failure
                noticed.peaks += batch.noticed.peaks
                noticed.converted += batch.noticed.converted
                for image in batch.unreadable:
                    if options.strict:
                        raise UserError(f"{images.path / image.name}: {image.reason}; fix it, or leave --strict out")
                    Bar.write(printable(f"skipped {images.path / image.name}: {image.reason}"), file=sys.stderr)
                    skipped.append(image)
                if batch.names:
                    encoded = encode_columns(batch.pixels.to(device, non_blocking=True), autoencoder, encoder, options)
                    encoded["label"] = {"label": batch.labels}
                    put(columns, encoded, at=len(names), rows=len(block))
                    wait_for_last, wait = wait, mark(device)
                    wait_for_last()
                    names += batch.names
                progress.update(len(batch.names) + len(batch.unreadable))
            filled = {
                column: {name: tensor[: len(names)] for name, tensor in columns.get(column, {}).items()}
                for column in _column_names(options)
            }
            measured = {
                "images_per_second": len(block) / (time.perf_counter() - block_started),
                "peak_rss_mib": memory()[1],
            }
            if len(written) == writers:  # No more wait for the disk, since each takes its room in memory.
                written.popleft().result()
            written.append(threads.submit(write_when_copied, writer, wait, block, names, skipped, filled, measured))
        for block_written in written:
            block_written.result()
    return noticed


def writers_for(device: torch.device) -> int:
    """Threads that write blocks. For a GPU one hashes while the other one writes; a CPU's networks need just one."""
    return 2 if device.type == "cuda" else 1


def write_when_copied(
    writer: StoreWriter,
    wait: Callable[[], object],
    block: range,
    names: list[str],
    skipped: list[UnreadableImage],
    columns: dict[str, dict[str, Tensor]],
    measured: dict[str, float],
) -> None:
    """Write a block once its last batch has been copied."""
    wait()
    writer.write(block, names, skipped, columns, **measured)


def mark(device: torch.device) -> Callable[[], object]:
    """A function that waits until the device has done what it has been given so far. A CPU always has."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)  # Asleep meanwhile: the core is wanted for decoding.
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def _dealt(blocks: list[range], rank: int, processes: int) -> list[range]:
    """The part of the blocks that one of several processes does: neighbours, since files and streams are read on."""
    return blocks[len(blocks) * rank // processes : len(blocks) * (rank + 1) // processes]


def _batches_of(block: range, size: int) -> list[range]:
    return [block[start : start + size] for start in range(0, len(block), size)]


def _column_names(options: Prepare) -> list[str]:
    semantic = [] if options.encoder == NO_ENCODER else ["cls", "features"] if options.features else ["cls"]
    return ["label", "latent", *semantic]


@torch.inference_mode()
def encode_columns(
    pixels: Tensor, autoencoder: Autoencoder, encoder: VisionEncoder | None, options: Prepare
) -> dict[str, dict[str, Tensor]]:
    """The columns of uint8 images (B, 3, h, w) on the models' device."""
    images = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    with matmul_precision(pixels.device, options.precision), autocast(pixels.device, options.precision):
        moments = autoencoder.encode(images)
        described = encoder.describe(pixels) if encoder else None
    latent_dtype = getattr(torch, options.dtype)
    columns = {"latent": {"mean": moments.mean.to(latent_dtype)}}
    if moments.std is not None:
        columns["latent"]["std"] = moments.std.to(latent_dtype)
    if described is not None:
        columns["cls"] = {"cls": described.class_token.float()}
        if options.features:
            eight_bits = options.features_dtype == "int8"
            features = described.features
            columns["features"] = quantised(features) if eight_bits else {"features": features.half()}
    return columns


def put(columns: dict[str, dict[str, Tensor]], batch: dict[str, dict[str, Tensor]], at: int, rows: int) -> None:
    """Copy a batch into the columns of its block from row `at` on. The first batch shows how much to allocate.

    What is on a GPU is there only when the GPU has done all that it has been given so far (`mark`).
    """
    for column, tensors in batch.items():
        for name, tensor in tensors.items():
            held = columns.setdefault(column, {})
            if name not in held:
                shape = (rows, *tensor.shape[1:])
                held[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            held[name][at : at + len(tensor)].copy_(tensor, non_blocking=True)


def contents_of(
    options: Prepare, images: ImageSource, autoencoder: AutoencoderSpec, encoder: EncoderSpec | None
) -> Contents:
    """What the store is to hold, as the options and what they name have it."""
    source = Source(
        path=str(options.images if is_on_hub(options.images) else options.images.absolute()),
        fingerprint=images.fingerprint(),
        resolution=options.size,
        class_names=images.class_names,
        count=len(images),
        reading=options.reading.found_from_anywhere(),
        subset=options.subset,
        flips=options.flips,
        colours="sRGB",
    )
    return Contents(
        source=source,
        autoencoder=autoencoder,
        encoder=encoder,
        features=options.features,
        features_dtype=options.features_dtype,
        latent_dtype=options.dtype,
        precision=options.precision,
        shard_rows=options.shard_size,
        statistics_images=options.statistics_images,
        statistics_seed=options.seed,
    )


def _statistics_rows(options: Prepare, rows: int) -> Tensor:
    """Ascending rows over which statistics are taken: a random sample, since the rows are sorted by class."""
    return permutation(options.seed, "statistics", 0, rows)[: options.statistics_images].sort().values
