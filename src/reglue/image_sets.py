"""Sets of images that `reglue evaluate` compares: folders, NPZ files, stores and runs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue import run as runs
from reglue.data.images import ImageFolder, ImageSource, UnreadableImage, crop_to, decode
from reglue.data.store import MANIFEST, PARTIAL, Store
from reglue.errors import UserError
from reglue.metrics.distances import Gaussian
from reglue.samples import PROTOCOL, Draw, archived_protocol, protocol_in, write_samples
from reglue.training.checkpoints import find

DRAWN = "evaluated"
"""The folder beneath a run for the images that are drawn to be evaluated."""


@dataclass(frozen=True)
class ImageSet:
    """One side of a comparison."""

    path: Path
    """As it was given, or that of a run's training store."""
    images: ReadableImages | None
    """None where a file holds statistics alone."""
    store: Store | None = None
    """Where the images are a store's."""
    pool: Gaussian | None = None
    """Mean and covariance of the Inception's pool features, where a file has them: ADM's `mu` and `sigma`."""
    spatial: Gaussian | None = None
    """The same of its spatial features: `mu_s` and `sigma_s`."""

    def protocol(self) -> dict[str, Any] | None:
        """How the images were sampled, if anything says so."""
        return self.images.protocol() if self.images else None


def open_images(path: Path, count: int | None, batch_size: int, device: str) -> ImageSet:
    """What is to be measured: a folder, an .npz file, a store, or a run, whose images are drawn when they are read.

    `count`, `batch_size` and `device` are for drawing. Raises UserError for anything else, and a count without a run.
    """
    if is_run(path):
        return ImageSet(path, _DrawnImages(path, 50_000 if count is None else count, batch_size, device))
    if count is not None:
        raise UserError(f"--count {count}: {path} is no run, and only from a run are images drawn; leave it out")
    return _open(path)


def open_reference(path: Path) -> ImageSet:
    """What to compare with: a folder, an .npz file, a store, or a run, which stands for its training store.

    Raises UserError for anything else.
    """
    if not is_run(path):
        return _open(path)
    store = _training_store(path)
    return _of_store(store.folder, store)  # Not the run's: reports name what the numbers rest on.


def is_run(path: Path) -> bool:
    """Whether a folder is a run."""
    return (path / runs.FILE).is_file()


def _open(path: Path) -> ImageSet:
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a folder of images, or an .npz file")
        gaussians = [_read_gaussian(path, *names) for names in (("mu", "sigma"), ("mu_s", "sigma_s"))]
        images = _NpzImages(path) if gaussians[0] is None or _member(path) else None
        return ImageSet(path, images, None, *gaussians)
    if any((path / name).is_file() for name in (MANIFEST, PARTIAL)):
        return _of_store(path, Store.open(path))
    return ImageSet(path, _FolderImages(ImageFolder.open(path)))


def _of_store(path: Path, store: Store) -> ImageSet:
    return ImageSet(path, _StoreImages(store), store)


def _training_store(run: Path) -> Store:
    record = runs.RunRecord.read(run)
    remedy = "give its training store as --reference"
    if record.store is None:
        raise UserError(f"{run} was not trained here, so it has no training store; give a --reference")
    if not (Path(record.store) / MANIFEST).is_file():
        raise UserError(f"{run} was trained on the store {record.store}, which is not there any more; {remedy}")
    store = Store.open(record.store)
    if not record.trained_on(store):
        raise UserError(f"{record.store} is not the store that {run} was trained on; {remedy}")
    return store


@dataclass(frozen=True)
class Share:
    """Every so many batches of a set of images: what one of several processes describes."""

    size: int
    """Images per batch; the last one of the set may have fewer."""
    rank: int = 0
    processes: int = 1

    def batches(self, count: int) -> Iterator[range]:
        """The numbers of the images in each batch of the share, of `count` images in all."""
        for start in range(self.rank * self.size, count, self.processes * self.size):
            yield range(start, min(start + self.size, count))


class ReadableImages(Protocol):
    """Images of one side, readable in batches."""

    def __len__(self) -> int: ...

    def first_size(self) -> tuple[int, int]:
        """Height and width of the first image that can be read, upright."""
        ...

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        """The images of a share, a batch at a time, each uint8 (3, *resolution) or why it cannot be read."""
        ...

    def protocol(self) -> dict[str, Any] | None:
        """How they were sampled, if they say."""
        ...


@dataclass(frozen=True)
class _FolderImages:
    folder: ImageFolder
    limit: int | None = None
    """Only so many, the first ones."""

    def __len__(self) -> int:
        return len(self.folder) if self.limit is None else min(self.limit, len(self.folder))

    def first_size(self) -> tuple[int, int]:
        first_reason = ""
        for name in self.folder.names:  # One that cannot be read is skipped later, too.
            try:
                image = decode(self.folder.path / name)
                return image.height, image.width
            except Exception as error:  # Decoders raise nearly anything on malformed bytes.
                first_reason = first_reason or f"{name}: {' '.join(str(error).split())}"
        raise UserError(f"no image in {self.folder.path} can be read; the first, {first_reason}")

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        return _in_batches(self.folder, range(len(self)), resolution, share)

    def protocol(self) -> dict[str, Any] | None:
        path = self.folder.path / PROTOCOL
        protocol = protocol_in(path.read_text(), path) if path.is_file() else None
        if protocol and "labels" in protocol and self.limit is not None:  # Of as many images as are taken.
            protocol["labels"] = protocol["labels"][: self.limit]
        return protocol


@dataclass(frozen=True)
class _DrawnImages:
    """Images that a run draws by its recipe's own protocol into a folder beneath it, those that are not there yet."""

    run: Path
    count: int
    batch_size: int
    device: str

    def __len__(self) -> int:
        return self.count

    def first_size(self) -> tuple[int, int]:
        return runs.RunRecord.read(self.run).resolution

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        return self._drawn.batches(resolution, share)

    def protocol(self) -> dict[str, Any] | None:
        return self._drawn.protocol()

    @cached_property
    def _drawn(self) -> _FolderImages:
        step = find(self.run).name
        folder = self.run / DRAWN / f"step-{step}"
        drawing = Draw(self.run, folder, self.count, batch_size=self.batch_size, device=self.device)
        return _FolderImages(ImageFolder.open(write_samples(drawing)), self.count)


@dataclass(frozen=True)
class _StoreImages:
    """The images that a store was made from, no mirror images; they may be gone, as long as nobody reads them."""

    store: Store

    def __len__(self) -> int:
        return len(self._originals)

    def first_size(self) -> tuple[int, int]:
        return self.store.manifest.source.resolution

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        return _in_batches(self._source, self._originals, resolution, share)

    def protocol(self) -> dict[str, Any] | None:
        return None

    @property
    def _originals(self) -> range:
        source = self.store.manifest.source
        return range(0, source.count, 2 if source.flips else 1)

    @cached_property
    def _source(self) -> ImageSource:
        try:
            return self.store.manifest.source.open()
        except UserError as error:
            raise UserError(
                f"the store {self.store.folder} holds no such features, so its images are needed, but {error}; put "
                "them back, or set --feature-network store"
            ) from error


def _in_batches(
    images: ImageSource, indices: range, resolution: tuple[int, int], share: Share
) -> Iterator[list[Tensor | UnreadableImage]]:
    for numbers in share.batches(len(indices)):
        yield [images.load(indices[number], resolution) for number in numbers]


class _NpzImages:
    """The images of an .npz file, streamed: the array is never whole in memory."""

    def __init__(self, path: Path):
        self.path = path
        member = _member(path)
        if member is None:
            has = ", ".join(_names(path)) or "nothing"
            raise UserError(f"{path} has no array arr_0 or images, nor statistics mu and sigma; it has {has}")
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                shape, fortran, dtype = _read_header(file)
        except (zipfile.BadZipFile, ValueError) as error:
            raise UserError(f"{path} is not a whole .npz file: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise UserError(f"{path}: {member} is {dtype} {shape}, but images are uint8 (N, H, W, 3) in C order")
        if 0 in shape:
            raise UserError(f"{path}: {member} holds no images, its shape is {shape}")
        self.member, self.shape = member, shape

    def __len__(self) -> int:
        return self.shape[0]

    def first_size(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        bytes_per_image = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _read_header(file)
            mine = {numbers.start for numbers in share.batches(len(self))}
            for numbers in Share(share.size).batches(len(self)):
                start, count = numbers.start, len(numbers)
                try:
                    content = file.read(count * bytes_per_image)
                except (zipfile.BadZipFile, OSError, EOFError) as error:
                    raise UserError(f"{self.path} is damaged: {error}") from error
                if len(content) < count * bytes_per_image:
                    raise UserError(f"{self.path} is cut short: {self.member} ends within image {start + count - 1}")
                if start not in mine:
                    continue
                pixels = np.frombuffer(content, dtype=np.uint8).reshape(count, *self.shape[1:])
                yield [_to_size(image, resolution) for image in pixels]

    def protocol(self) -> dict[str, Any] | None:
        return archived_protocol(self.path)


def _to_size(image: np.ndarray, resolution: tuple[int, int]) -> Tensor:
    if image.shape[:2] != resolution:
        image = np.asarray(crop_to(Image.fromarray(image), resolution))
    return torch.tensor(image).permute(2, 0, 1)


def _names(path: Path) -> list[str]:
    """The arrays of an .npz file, as files of the archive. Raises UserError if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole .npz file: {error}") from error


def _member(path: Path) -> str | None:
    """The array of an .npz file that holds images."""
    names = _names(path)
    return next((name for name in ("arr_0.npy", "images.npy") if name in names), None)


def _read_gaussian(path: Path, mean_name: str, covariance_name: str) -> Gaussian | None:
    """Statistics of an .npz file, if it has them. Raises UserError if they are none."""
    if any(f"{name}.npy" not in _names(path) for name in (mean_name, covariance_name)):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (arrays[name].astype(np.float64) for name in (mean_name, covariance_name))
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path}: {mean_name} or {covariance_name} cannot be read: {error}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: {mean_name} is {mean.shape} and {covariance_name} {covariance.shape}, but a mean is (D,) and a "
            "covariance (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {mean_name} or {covariance_name} holds numbers that are not finite")
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the array that begins here; leaves the file at its first number."""
    version_read = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version_read == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
