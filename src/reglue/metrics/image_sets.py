"""Sets of images to compare: folders, NPZ files, stores, and runs that draw theirs when they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reglue import run as runs
from reglue.arrays import ArrayFile
from reglue.contact_sheet import read_hashes, refuse_changed
from reglue.data.images import ImageFolder, ImageSource, UnreadableImage, crop_to, decode, upright_size
from reglue.data.manifest import MANIFEST, PARTIAL
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.metrics.distances import Gaussian
from reglue.samples import PROTOCOL, archived_protocol, protocol_in, write_samples
from reglue.sampling import Draw

IMAGE_ARRAYS = ("arr_0", "images")
"""Where an .npz file may keep its images. An .npy file has one array alone."""
MOST_FEATURES = 2**14
"""No statistics are of more."""
ROUNDING = 1e-6
"""Of a covariance's largest numbers: how far from symmetric, or below zero along an axis, it may be."""


@dataclass(frozen=True)
class Share:
    """Every so many batches of a set of images: those that one of several processes reads."""

    size: int
    """Images per batch; the last one of the set may have fewer."""
    rank: int = 0
    processes: int = 1

    def batches(self, count: int) -> Iterator[range]:
        """The numbers of the images in each batch of the share, of `count` images in all."""
        for start in range(self.rank * self.size, count, self.processes * self.size):
            yield range(start, min(start + self.size, count))


class Images(ABC):
    """Images that can be read in batches."""

    other_sizes = 0
    """How many of those that were read, at the size of the first, had another one."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def first_size(self) -> tuple[int, int]:
        """Height and width of the first image that can be read, upright."""

    @abstractmethod
    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        """The images of a share, a batch at a time, each uint8 (3, *resolution) or why it cannot be read."""

    def name(self, number: int) -> str:
        """What one of them is called in reports."""
        return str(number)

    def protocol(self) -> dict[str, Any] | None:
        """How they were sampled, if that is recorded."""
        return None


@dataclass(frozen=True)
class ImageSet:
    """One side of a comparison."""

    path: Path
    """As it was given; for a run as the reference, that of its training store."""
    images: Images | None
    """None where a file holds statistics alone."""
    store: Store | None = None
    """The store whose images these are, if they are one's."""
    pool: Gaussian | None = None
    """Mean and covariance of the Inception's pool features, where a file has them: ADM's `mu` and `sigma`."""
    spatial: Gaussian | None = None
    """The same of its spatial features: `mu_s` and `sigma_s`."""


def is_run(path: Path) -> bool:
    """Whether a folder is a run."""
    return (path / runs.FILE).is_file()


def open_image_set(path: Path) -> ImageSet:
    """A folder of images, an .npz or .npy file, or a store. Raises UserError for anything else."""
    if path.suffix.lower() in (".npz", ".npy"):
        arrays = ArrayFile(path)
        arrays.refuse_changed()
        pool, spatial = (_read_gaussian(arrays, *both) for both in (("mu", "sigma"), ("mu_s", "sigma_s")))
        has_images = pool is None or any(name in arrays.names for name in IMAGE_ARRAYS)
        return ImageSet(path, _ArchivedImages(arrays) if has_images else None, None, pool, spatial)
    if path.is_file():
        raise UserError(f"{path} is a file; give a folder of images, an .npz or .npy file, a store or a run")
    if any((path / name).is_file() for name in (MANIFEST, PARTIAL)):
        return _of_store(Store.open(path))
    folder = ImageFolder.open(path)
    return ImageSet(path, _FolderImages(folder, len(folder)))


def drawn_images(drawing: Draw) -> ImageSet:
    """Images of a run, which are drawn when they are read first: those that are not there yet."""
    return ImageSet(drawing.run, _DrawnImages(drawing))


def open_training_images(run: Path) -> ImageSet:
    """The images that a run was trained on. Raises UserError if its store is gone or has changed."""
    record = runs.RunRecord.read(run)
    remedy = "give the training store as the reference"
    if record.store is None:
        raise UserError(f"{run} was not trained here, so it has no training store; give a reference")
    if not (Path(record.store) / MANIFEST).is_file():
        raise UserError(f"{run} was trained on the store {record.store}, which is gone; {remedy}")
    store = Store.open(record.store)
    if not record.trained_on(store):
        raise UserError(f"{record.store} is not the store that {run} was trained on; {remedy}")
    return _of_store(store)


def _of_store(store: Store) -> ImageSet:
    return ImageSet(store.folder, _StoreImages(store), store)


class _SourceImages(Images):
    """Some of the images of a source."""

    source: ImageSource
    rows: range
    """Their indices in the source."""

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        source = self.source  # Made here, in every process: drawing images is common work.
        return (
            [source.load(self.rows[number], resolution) for number in numbers] for numbers in share.batches(len(self))
        )

    def name(self, number: int) -> str:
        return self.source.names[self.rows[number]]


class _FolderImages(_SourceImages):
    """The first `count` images of a folder."""

    def __init__(self, folder: ImageFolder, count: int):
        self.source, self.rows = folder, range(count)

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        asked = resolution != self.first_size()
        hashes = read_hashes(self.source.path)
        for numbers, batch in zip(share.batches(len(self)), super().batches(resolution, share), strict=True):
            for number in numbers:
                refuse_changed(self.source.path / self.name(number), hashes)
            if not asked:  # Only the beginning of each file is read once more.
                readable = [number for number, image in zip(numbers, batch, strict=True) if isinstance(image, Tensor)]
                files = (self.source.path / self.name(number) for number in readable)
                self.other_sizes += sum(upright_size(file) != resolution for file in files)
            yield batch

    def first_size(self) -> tuple[int, int]:
        first_reason = ""
        for name in self.source.names:  # One that cannot be read is skipped later, too.
            try:
                image = decode(self.source.path / name)
                return image.height, image.width
            except Exception as error:  # Decoders raise nearly anything on malformed bytes.
                first_reason = first_reason or f"{name}: {' '.join(str(error).split())}"
        raise UserError(f"no image in {self.source.path} can be read; the first, {first_reason}")

    def protocol(self) -> dict[str, Any] | None:
        path = self.source.path / PROTOCOL
        protocol = protocol_in(path.read_bytes(), path) if path.is_file() else None
        if protocol and "labels" in protocol:
            protocol["labels"] = protocol["labels"][: len(self)]
        return protocol


class _DrawnImages(_FolderImages):
    """Images that are drawn when they are read first."""

    def __init__(self, drawing: Draw):
        self.drawing, self.rows = drawing, range(drawing.count)

    def first_size(self) -> tuple[int, int]:
        return runs.RunRecord.read(self.drawing.run).resolution

    @cached_property
    def source(self) -> ImageSource:
        return ImageFolder.open(write_samples(self.drawing))


class _StoreImages(_SourceImages):
    """The images that a store was made from, without mirror images. They may be gone unless they are read."""

    def __init__(self, store: Store):
        made_of = store.manifest.source
        self.store, self.rows = store, range(0, made_of.count, 2 if made_of.flips else 1)

    def first_size(self) -> tuple[int, int]:
        return self.store.manifest.source.resolution

    @cached_property
    def source(self) -> ImageSource:
        try:
            return self.store.manifest.source.open()
        except UserError as error:
            raise UserError(
                f"the store {self.store.folder} has no class tokens of this network in float32, so its images are "
                f"needed, but {error}; put them back, or choose a network whose class tokens it has"
            ) from error


class _ArchivedImages(Images):
    """The images of an .npz or .npy file, streamed: the array is never whole in memory."""

    def __init__(self, arrays: ArrayFile):
        name = next((name for name in IMAGE_ARRAYS if name in arrays.names), None)
        if name is None:
            has = ", ".join(arrays.names) or "nothing"
            raise UserError(f"{arrays.path} has no array arr_0 or images, nor statistics mu and sigma; it has {has}")
        shape, fortran, dtype = arrays.header(name)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise UserError(f"{arrays.path}: {name} is {dtype} {shape}, but images are uint8 (N, H, W, 3) in C order")
        if 0 in shape:
            raise UserError(f"{arrays.path}: {name} holds no images, its shape is {shape}")
        self.arrays, self.array, self.shape = arrays, name, shape

    def __len__(self) -> int:
        return self.shape[0]

    def first_size(self) -> tuple[int, int]:
        return self.shape[1], self.shape[2]

    def batches(self, resolution: tuple[int, int], share: Share) -> Iterator[list[Tensor | UnreadableImage]]:
        # Other processes' batches are read and dropped: the file may be compressed.
        for number, images in enumerate(self.arrays.blocks(self.array, share.size)):
            if number % share.processes == share.rank:
                yield [_to_size(image, resolution) for image in images]

    def protocol(self) -> dict[str, Any] | None:
        return archived_protocol(self.arrays.path) if self.arrays.path.suffix.lower() == ".npz" else None


def _to_size(image: np.ndarray, resolution: tuple[int, int]) -> Tensor:
    if image.shape[:2] != resolution:
        image = np.asarray(crop_to(Image.fromarray(image), resolution))
    return torch.tensor(image).permute(2, 0, 1)


def _is_covariance(matrix: np.ndarray) -> bool:
    """Whether a matrix (D, D) of finite numbers is symmetric and has no negative eigenvalues, but for rounding."""
    room = ROUNDING * np.linalg.norm(matrix) + np.finfo(np.float64).tiny
    if np.abs(matrix - matrix.T).max() > room:
        return False
    try:  # Many times faster than its eigenvalues.
        np.linalg.cholesky(matrix + room * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        return False
    return True


def _read_gaussian(arrays: ArrayFile, mean_name: str, covariance_name: str) -> Gaussian | None:
    """Statistics of an .npz file, if it has them. Raises UserError for arrays that are no mean and covariance."""
    if not {mean_name, covariance_name} <= set(arrays.names):
        return None
    means, covariances = (arrays.header(name) for name in (mean_name, covariance_name))
    if covariances.shape != 2 * means.shape or len(means.shape) != 1 or not 1 <= means.shape[0] <= MOST_FEATURES:
        raise UserError(
            f"{arrays.path}: {mean_name} is {means.shape} and {covariance_name} {covariances.shape}, but a mean is "
            f"(D,) and a covariance (D, D), with D from 1 to {MOST_FEATURES}"
        )
    if "U" in (means.dtype.kind, covariances.dtype.kind):
        raise UserError(f"{arrays.path}: {mean_name} or {covariance_name} holds text, not numbers")
    mean, covariance = (arrays.read(name).astype(np.float64) for name in (mean_name, covariance_name))
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{arrays.path}: {mean_name} or {covariance_name} holds numbers that are not finite")
    if not _is_covariance(covariance):
        raise UserError(
            f"{arrays.path}: {covariance_name} is no covariance (symmetric, and no variance below 0); fetch or make it "
            "again"
        )
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))
