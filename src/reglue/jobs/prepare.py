"""`reglue prepare`: a folder of images to a store of latents, class tokens and features."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.images import ImageFolder, UnreadableImage
from reglue.data.store import Contents, Source, Store, StoreWriter
from reglue.errors import UserError
from reglue.latents.autoencoders import Autoencoder, load_autoencoder
from reglue.runs.ranks import resolve_device
from reglue.seeds import permutation
from reglue.semantics.encoders import VisionEncoder, load_encoder

NO_ENCODER = "none"


@dataclass(frozen=True)
class Prepare:
    """Encode a folder of images once, so that training never has to.

    The same command again continues where an interrupted one stopped.
    """

    images: Positional[Path]
    """Folder of images: one sub-folder per class, or images alone for an unconditional store."""
    out: Positional[Path]
    """Folder of the store: new, empty, or left over from the same command."""
    resolution: int | tuple[int, int] = 256
    """Side of the prepared images in pixels, or height and width. Images are scaled to cover it, then cropped."""
    autoencoder: str = "sd-vae-ft-mse"
    """starter, a short name, a name on the hub (OWNER/REPOSITORY) or a folder in diffusers' layout."""
    encoder: str = "dinov2-b-reg"
    """starter, a short name, timm:NAME, NAME@FILE, a folder or a file of weights; none stores latents alone."""
    layers: tuple[int, ...] | None = None
    """Blocks of the encoder whose features are stored, 0 is the first. Default: the last four."""
    final_norm: bool = True
    """Apply the encoder's final norm to the features of each of these blocks."""
    features: bool = False
    """Store the patch features too, which `reglue compress` learns from."""
    statistics_images: int = 10_000
    """Means and standard deviations are taken over so many images, drawn at random."""
    seed: int = 0
    """Of that draw."""
    batch_size: int = 16
    """Images encoded at once. Changes speed and memory; results change by rounding alone."""
    shard_size: int = 256
    """Images per file of the store. A shard is held in memory until it is complete."""
    dtype: Literal["float32", "float16"] = "float32"
    """Precision in which latents are stored."""
    workers: int = 2
    """Processes that decode images; 0 decodes in this one."""
    strict: bool = False
    """Stop at the first image that cannot be read, instead of reporting and skipping it."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for option in ("batch_size", "shard_size", "statistics_images"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option.replace('_', '-')} {getattr(self, option)}: choose at least 1")
        for option in ("workers", "seed"):
            if getattr(self, option) < 0:
                raise UserError(f"--{option} {getattr(self, option)}: choose 0 or more")
        if min(self.size) < 1:
            raise UserError(f"--resolution {self.resolution}: choose a positive number of pixels")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the prepared images."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


def prepare(options: Prepare) -> Store:
    """Make a store, or continue one. Raises UserError for anything that the user can mend."""
    images = ImageFolder.open(options.images)
    device = resolve_device(options.device)
    # Convolutions at full resolution take most of the time, and channels_last makes them 1.6 times as fast on a CPU.
    autoencoder = load_autoencoder(options.autoencoder, device=device).to(memory_format=torch.channels_last)
    autoencoder.spec.latent_size(options.size)
    encoder = None
    if options.encoder != NO_ENCODER:
        encoder = load_encoder(options.encoder, options.size, options.layers, device, final_norm=options.final_norm)
    elif options.features:
        raise UserError("--features needs an encoder; name one with --encoder, or leave --features out")

    writer = StoreWriter(options.out, _contents(options, images, autoencoder, encoder))
    pending = writer.pending
    if writer.complete:
        store = Store.open(options.out)
        print(f"{options.out} is complete already: {len(store)} images")
        return store
    remaining = sum(map(len, pending))
    started = time.perf_counter()
    with tqdm(total=len(images), initial=len(images) - remaining, unit="image", desc="prepare") as progress:
        batches = iter(_decoded(images, options, pending, device))
        for block in pending:
            block_started = time.perf_counter()
            columns: dict[str, dict[str, Tensor]] = {}
            names: list[str] = []
            skipped: list[UnreadableImage] = []
            for batch in (next(batches) for _ in _split(block, options.batch_size)):
                for image in batch.unreadable:
                    if options.strict:
                        raise UserError(f"{images.path / image.name}: {image.reason}; mend it, or leave --strict out")
                    tqdm.write(f"skipped {images.path / image.name}: {image.reason}", file=sys.stderr)
                    skipped.append(image)
                if batch.indices:
                    described = _describe(batch.pixels.to(device), autoencoder, encoder, options)
                    described["label"] = {"label": torch.tensor([images.labels[index] for index in batch.indices])}
                    _put(columns, described, at=len(names), rows=len(block))
                    names += [images.names[index] for index in batch.indices]
                progress.update(len(batch.indices) + len(batch.unreadable))
            filled = {
                column: {name: tensor[: len(names)] for name, tensor in columns.get(column, {}).items()}
                for column in _column_names(options)
            }
            writer.write(
                block,
                names,
                skipped,
                filled,
                images_per_second=len(block) / (time.perf_counter() - block_started),
                peak_rss_mib=peak_rss_mib(),
            )
    seconds = time.perf_counter() - started
    store = writer.finish(_statistics_rows(options, writer.rows))
    print(
        f"{options.out}: {len(store)} images ({len(store.manifest.skipped)} unreadable), "
        f"{remaining / seconds:.1f} images/s, peak memory {peak_rss_mib():.0f} MiB"
    )
    return store


def peak_rss_mib() -> float:
    """The most memory that this process has had resident so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class _Batch(NamedTuple):
    """Decoded images: uint8 pixels (B, 3, h, w) with their indices in the folder, and those that could not be read."""

    indices: list[int]
    pixels: Tensor
    unreadable: list[UnreadableImage]


class _Crops(Dataset):
    """The images of a folder as (index, decoded crop)."""

    def __init__(self, images: ImageFolder, size: tuple[int, int]):
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> tuple[int, Tensor | UnreadableImage]:
        return index, self.images.load(index, self.size)


def _decoded(images: ImageFolder, options: Prepare, blocks: list[range], device: torch.device) -> Iterator[_Batch]:
    """The batches of all blocks in order, decoded by other processes ahead of their use. None straddles two blocks."""
    batches = [list(part) for block in blocks for part in _split(block, options.batch_size)]
    return iter(
        DataLoader(
            _Crops(images, options.size),
            batch_sampler=batches,
            collate_fn=_collate,
            num_workers=min(options.workers, len(batches)),
            pin_memory=device.type == "cuda",
        )
    )


def _collate(items: list[tuple[int, Tensor | UnreadableImage]]) -> _Batch:
    readable = [(index, crop) for index, crop in items if isinstance(crop, Tensor)]
    return _Batch(
        [index for index, _ in readable],
        torch.stack([crop for _, crop in readable]) if readable else torch.empty(0, dtype=torch.uint8),
        [crop for _, crop in items if isinstance(crop, UnreadableImage)],
    )


def _split(block: range, size: int) -> list[range]:
    return [block[start : start + size] for start in range(0, len(block), size)]


def _column_names(options: Prepare) -> list[str]:
    semantic = [] if options.encoder == NO_ENCODER else ["cls", "features"] if options.features else ["cls"]
    return ["label", "latent", *semantic]


@torch.inference_mode()
def _describe(
    pixels: Tensor, autoencoder: Autoencoder, encoder: VisionEncoder | None, options: Prepare
) -> dict[str, dict[str, Tensor]]:
    """The columns of uint8 images (B, 3, h, w) on the models' device."""
    moments = autoencoder.encode((pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last))
    latent_dtype = getattr(torch, options.dtype)
    columns = {"latent": {"mean": moments.mean.to(latent_dtype)}}
    if moments.std is not None:
        columns["latent"]["std"] = moments.std.to(latent_dtype)
    if encoder is not None:
        described = encoder.describe(pixels)
        columns["cls"] = {"cls": described.class_token.float()}
        if options.features:
            columns["features"] = {"features": described.features.half()}
    return columns


def _put(columns: dict[str, dict[str, Tensor]], batch: dict[str, dict[str, Tensor]], at: int, rows: int) -> None:
    """Copy a batch into the columns of its block from row `at` on. The first batch shows how much to allocate."""
    for column, tensors in batch.items():
        for name, tensor in tensors.items():
            held = columns.setdefault(column, {})
            if name not in held:
                held[name] = torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype)
            held[name][at : at + len(tensor)] = tensor.cpu()


def _contents(
    options: Prepare, images: ImageFolder, autoencoder: Autoencoder, encoder: VisionEncoder | None
) -> Contents:
    source = Source(
        path=str(options.images),
        fingerprint=images.fingerprint(),
        resolution=options.size,
        class_names=images.class_names,
        count=len(images),
    )
    return Contents(
        source=source,
        autoencoder=autoencoder.spec,
        encoder=encoder.spec if encoder else None,
        features=options.features,
        latent_dtype=options.dtype,
        shard_rows=options.shard_size,
        statistics_images=options.statistics_images,
        statistics_seed=options.seed,
    )


def _statistics_rows(options: Prepare, rows: int) -> Tensor:
    """Ascending rows over which statistics are taken: a random sample, since the rows are sorted by class."""
    return permutation(options.seed, "statistics", 0, rows)[: options.statistics_images].sort().values
