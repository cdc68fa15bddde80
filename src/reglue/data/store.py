"""The store: everything that training needs to know of a folder of images, computed once.

A folder with a `manifest.json` and safetensors shards: `latent-00000.safetensors` holds the first rows of the column
`latent`, and so on. Shard k covers images k·shard_rows … of the source, less those that could not be read, so that a
shard depends on nothing but its own images: a store that was left half-written continues with its next shard. Each
shard's metadata names its images, so that nothing but safetensors is needed to read one.

| column | tensors of a row |
|---|---|
| `label` | `label` () int64: index of the class, 0 where there are no classes |
| `latent` | `mean` (C,H,W), and `std` (C,H,W) if the autoencoder has one; raw, before shift and scale |
| `cls` | `cls` (D,) float32: the encoder's class token |
| `features` | `features` (L·D,h,w) float16: patch features of the L chosen layers at the encoder's grid |
| `features` in 8 bits | `features` int8 and, for every channel of an image, `scale` (L·D,) float16 to multiply by |
| `local.NAME` | `local` (K,h,w): the codes of compressor NAME, at the encoder's grid |
| `cls.NAME` | `cls` (K,): the class token's codes of compressor NAME |
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from reglue.config import Precision
from reglue.data.images import ImageSource, UnreadableImage
from reglue.data.read_ahead import expect
from reglue.data.sources import FLIPPED, Reading, Subset, open_images
from reglue.encoders.autoencoders import AutoencoderSpec
from reglue.encoders.compressors import CompressedColumn, CompressorSpec
from reglue.encoders.vision import EncoderSpec
from reglue.errors import UserError
from reglue.files import BESIDE, opened_tensors, parse_json, plain, read_json, read_jsonl, replacing, to_json

FORMAT = 1
"""Version of the layout on disk."""

REMEDY = "prepare the store anew"
SHARD_REMEDY = "delete it and run the command that made it again"
MANIFEST = "manifest.json"
PARTIAL = "manifest.partial.json"
JOURNAL = "prepare.jsonl"
"""Of process 0, and of all processes of earlier runs. Process 3 writes prepare-3.jsonl."""
METADATA = "reglue"
"""Key of a shard's metadata: `ShardMetadata` as JSON."""
READ_AT_ONCE = 2**18
"""Bytes of a file whose hash is taken: so few stay in a core's own cache."""
LOCAL_CODES = "local."
CLASS_TOKEN_CODES = "cls."
"""What the names of columns that hold a compressor's codes begin with, for maps and for class tokens."""
SCALE = "scale"
"""The tensor of a column in 8 bits that its values are multiplied with."""
INT8_LARGEST = 127
MAPPED_AT_ONCE = 16_384
"""Files that a store keeps mapped. Linux allows a process 65,530 maps, and ImageNet-21k has more shards."""


@dataclass(frozen=True)
class Source:
    """The images that a store was made from."""

    path: str = field(compare=False)
    """Where the images were, as it was given; they may have moved since."""
    fingerprint: str
    """`ImageSource.fingerprint`: of a folder, names and sizes of its files."""
    resolution: tuple[int, int]
    """Height and width in pixels after the crop."""
    class_names: tuple[str, ...]
    """In the order of the labels; empty for an unconditional store."""
    count: int
    """Images that rows are made of: unreadable ones included, and mirror images."""
    reading: Reading = field(default=Reading(), compare=False)
    """How images and labels were found at the path. What came of it is in the fingerprint."""
    subset: Subset | None = None
    """Which of the images were taken; None for all."""
    flips: bool = False
    """Whether each image is followed by its mirror image, whose name ends with `#flipped`."""

    def open(self) -> ImageSource:
        """The images once more, in the same order. Raises UserError if they are gone, or others than they were."""
        images = open_images(Path(self.path), self.reading, self.subset, self.flips)
        if images.fingerprint() != self.fingerprint:
            raise UserError(f"{self.path} has changed since the store was made; prepare the store anew")
        return images


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a column."""

    shape: tuple[int, ...]
    """Of one row."""
    dtype: str
    """`float16`, `float32`, `int64` or `int8`."""

    @classmethod
    def of(cls, rows: Tensor) -> TensorSpec:
        """That of a tensor (rows, …)."""
        return cls(tuple(rows.shape[1:]), str(rows.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class Shard:
    """One file of a column."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardMetadata:
    """What a shard says of itself."""

    format: int
    column: str
    names: list[str]
    """The images of its rows."""


@dataclass(frozen=True)
class Column:
    """What a column holds and where."""

    tensors: dict[str, TensorSpec]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Statistics:
    """Per channel, over images and positions, in float64. For latents: of mean + std·ξ, ξ standard normal."""

    images: int
    """How many images were looked at."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a store is asked to hold. Equal contents give equal stores."""

    source: Source
    autoencoder: AutoencoderSpec
    encoder: EncoderSpec | None
    features: bool
    """Whether the encoder's patch features are stored."""
    latent_dtype: str
    """`float32` or `float16`: how moments are stored."""
    shard_rows: int
    """Images per shard, unreadable ones included."""
    statistics_images: int
    """Statistics are taken over so many images, drawn at random (or over all, if there are fewer)."""
    statistics_seed: int
    precision: Precision = "float32"
    """Of the networks' matrix products."""
    features_dtype: str = "float16"
    """`float16` or `int8`: how patch features are stored."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Contents):
    """Everything about a finished store."""

    format: int
    skipped: tuple[UnreadableImage, ...]
    """Images of the source that have no row."""
    columns: dict[str, Column]
    statistics: dict[str, Statistics]
    compressors: dict[str, CompressorSpec]
    """The codes of compressor NAME are in column `local.NAME`; those of `cls.NAME` in the column of the same name."""
    versions: dict[str, str]
    """Of the libraries that made the store."""
    hash: str = ""
    """SHA-256 of all of the above, hence of all shards too."""


class Store:
    """A finished store, read through memory maps."""

    def __init__(self, folder: Path, manifest: Manifest, pinned: bool = False):
        """`pinned`: rows are read into memory that a GPU can copy from by itself, and that PyTorch uses again."""
        self.folder = folder
        self.manifest = manifest
        self.pinned = pinned
        rows = [shard.rows for shard in manifest.columns["label"].shards]
        self._ends = torch.tensor(rows, dtype=torch.int64).cumsum(0)
        self._mapped: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def __reduce__(self):
        return Store, (self.folder, self.manifest, self.pinned)  # A process maps its own files.

    @classmethod
    def open(cls, folder: Path | str, to_be_replaced: str | None = None) -> Store:
        """Open a store. Raises UserError if it is none, is half-written, or if a file is missing or cut short.

        Files of the column `to_be_replaced` may be.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for column, content in manifest.columns.items():
            for shard in content.shards:
                if column != to_be_replaced and not _is_whole(folder, shard):
                    jobs = "`reglue compress`" if holds_codes(column) else "`reglue prepare` or `reglue reencode`"
                    raise UserError(f"{folder / shard.file} is missing or cut short; run the same {jobs} again")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def labels(self) -> Tensor:
        """Class of each row: (N,) int64, zeros where there are no classes."""
        return self.read("label", torch.arange(len(self)))["label"]

    @cached_property
    def originals(self) -> Tensor:
        """The rows (n,) int64 of images as they are, in order: all, unless the store has mirror images too."""
        if not self.manifest.source.flips:
            return torch.arange(len(self))
        return torch.tensor([row for row, name in enumerate(self._names) if not name.endswith(FLIPPED)])

    def read(self, column: str, rows: Tensor, channels: slice = slice(None)) -> dict[str, Tensor]:
        """Rows of a column in the order asked for, each tensor (len(rows), …) on the CPU; what is in 8 bits as float16.

        `rows` (n,) are indices in [0, N), repeats allowed; `channels` picks some of the first axis of each row, and no
        others are read. Raises UserError for a column that the store does not have and for a damaged file.
        """
        return restored(self.read_stored(column, rows, channels))

    def read_stored(self, column: str, rows: Tensor, channels: slice = slice(None)) -> dict[str, Tensor]:
        """As `read`, but the tensors as they are stored; `restored` makes of them what `read` gives, on any device.

        Every byte is copied once, from the page cache to where it stays.
        """
        content = self._column(column)
        rows = rows.to("cpu", torch.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows must lie in [0, {len(self)}), got {int(rows.min())} … {int(rows.max())}")
        tensors: dict[str, Tensor] = {}
        for name, spec in content.tensors.items():
            shape = [len(range(*channels.indices(n))) if axis == 0 else n for axis, n in enumerate(spec.shape)]
            shape, dtype = (len(rows), *shape), getattr(torch, spec.dtype)
            tensors[name] = torch.empty(shape, dtype=dtype, pin_memory=self.pinned)
        # NumPy's slices take a fraction of the time of torch's, and with one row of a shard they are most of the work.
        targets = {name: tensor.numpy() for name, tensor in tensors.items()}
        copies: list[tuple[np.ndarray, np.ndarray]] = []
        for shard, within, positions in self._runs(rows):
            for name, mapped in self._map(column, shard).items():
                picked = mapped[within]
                copies.append((targets[name][positions], picked[:, channels] if picked.ndim > 1 else picked))
        for _, picked in copies:
            expect(picked)
        for target, picked in copies:
            target[...] = picked
        return tensors

    def _runs(self, rows: Tensor) -> Iterator[tuple[int, slice, slice]]:
        """Rows (n,) as runs of neighbours that go to neighbouring places, in the order of the files.

        Yields shards, rows within them and places in the output. Each run is one copy.
        """
        ascending, order = (part.numpy() for part in rows.sort(stable=True))
        shards = np.searchsorted(self._ends.numpy(), ascending, side="right")
        breaks = (np.diff(ascending) != 1) | (np.diff(order) != 1) | (np.diff(shards) != 0)
        first = np.flatnonzero(np.r_[True, breaks]) if len(rows) else np.empty(0, np.int64)
        within = ascending[first] - np.r_[0, self._ends.numpy()][shards[first]]
        lengths = np.diff(np.r_[first, len(rows)])
        for shard, row, place, length in zip(
            *(a.tolist() for a in (shards[first], within, order[first], lengths)), strict=True
        ):
            yield shard, slice(row, row + length), slice(place, place + length)

    def _map(self, column: str, shard: int) -> dict[str, np.ndarray]:
        """The tensors of a shard as views of the file, which stays mapped."""
        mapped = self._mapped.get((column, shard))
        if mapped is None:
            tensors = _map(self.folder, self._column(column), shard)
            mapped = {name: tensor.numpy() for name, tensor in tensors.items()}
            if len(self._mapped) >= MAPPED_AT_ONCE:
                self._mapped.pop(next(iter(tuple(self._mapped))), None)  # Other threads read too.
            self._mapped[column, shard] = mapped
        return mapped

    def scan(
        self, column: str, rows: Tensor | None = None, chunk: int = 64, channels: slice = slice(None)
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """All rows of a column (or the given ascending ones) in order, at most `chunk` at a time and in bounded memory.

        Yields pairs of row indices (n,) and their tensors (n, …), of the first axis of each row only some `channels`.
        No chunk straddles two shards.
        """
        content = self._column(column)
        for shard, end in enumerate(self._ends.tolist()):
            start = self._start(shard)
            within = torch.arange(start, end) if rows is None else rows[(rows >= start) & (rows < end)]
            if not len(within):
                continue
            mapped = {  # Not kept: resident pages go with the map.
                name: tensor[:, channels] if tensor.ndim > 1 else tensor
                for name, tensor in _map(self.folder, content, shard).items()
            }
            for part in within.split(chunk):
                yield part, restored({name: tensor[part - start] for name, tensor in mapped.items()})

    def is_whole(self, column: str) -> bool:
        """Whether the store has a column, and all of its files in full size."""
        content = self.manifest.columns.get(column)
        return content is not None and all(_is_whole(self.folder, shard) for shard in content.shards)

    def names(self, rows: Tensor) -> list[str]:
        """Paths of the rows' images within the image folder."""
        return [self._names[row] for row in rows.tolist()]

    @cached_property
    def _names(self) -> list[str]:
        names: list[str] = []
        for shard in self.manifest.columns["label"].shards:
            with opened_tensors(self.folder / shard.file, SHARD_REMEDY) as file:
                names += parse_json((file.metadata() or {}).get(METADATA, ""), ShardMetadata).names
        return names

    def finish(self) -> Store:
        """Write the manifest into the folder, whose shards are there already. Returns the store, with its hash."""
        return Store(self.folder, _write_manifest(self.folder, self.manifest))

    def statistics(self, column: str, rows: Tensor) -> Statistics:
        """Per-channel mean and standard deviation of a column over ascending rows (n,), streamed in float64.

        Raises UserError if they are not finite.
        """
        value = value_of(column)
        shape = self._column(column).tensors[value].shape
        count = 0
        mean = torch.zeros(shape[0], dtype=torch.float64)
        squares = torch.zeros(shape[0], dtype=torch.float64)  # Sum of squared deviations from the mean so far.
        parts = self.scan(column, rows, chunk=max(1, 2**23 // math.prod(shape)))
        progress = tqdm(total=len(rows), desc=f"statistics of {column}", unit="image", leave=False)
        for part, tensors in parts:
            progress.update(len(part))
            values = tensors[value].double().transpose(0, 1).flatten(1)
            new = values.shape[1]
            new_variance, new_mean = torch.var_mean(values, dim=1, correction=0)
            delta = new_mean - mean
            squares += new_variance * new + delta.square() * (count * new / (count + new))
            mean += delta * (new / (count + new))
            count += new
            if "std" in tensors:  # Var(mean + std·ξ) = Var(mean) + E[std²].
                squares += tensors["std"].double().square().transpose(0, 1).flatten(1).sum(1)
        progress.close()
        std = (squares / count).sqrt()
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise UserError(
                f"column {column} of {self.folder} has values that are not finite; check the weights of the network "
                "that made it, or store it with --dtype float32 in a new folder"
            )
        return Statistics(len(rows), tuple(mean.tolist()), tuple(std.tolist()))

    def add_codes(self, name: str, compressor: CompressorSpec, shards: Iterable[Tensor]) -> Store:
        """Write the codes of a compressor as its column (`codes_column`) and return the store with it.

        `shards` gives the codes, (n, K, h, w) or (n, K), of the store's shards in order, n rows each (none for an empty
        shard). The manifest changes last and at once: until then the store is what it was.
        """
        column = codes_column(name, compressor.column)
        written = []
        labels = self.manifest.columns["label"].shards
        for index, (codes, shard) in enumerate(zip(shards, labels, strict=True)):
            start = self._start(index)
            names = self._names[start : start + shard.rows]
            written.append(write_shard(self.folder, column, index, names, {value_of(column): codes}))
        content = join_columns(written)
        added = Store(self.folder, replace(self.manifest, columns={**self.manifest.columns, column: content}))
        statistics = added.statistics(column, torch.arange(len(self)))
        before = read_manifest(self.folder)  # Another process may have added other codes meanwhile.
        manifest = replace(
            before,
            columns={**before.columns, column: content},
            compressors={**before.compressors, compressor_of(column): compressor},
            statistics={**before.statistics, column: statistics},
        )
        return Store(self.folder, _write_manifest(self.folder, manifest))

    def take_semantics(self, other: Store) -> Store:
        """This store with all that another one of the same rows knows beside labels and latents: class tokens,
        features, codes and their compressors. Files are linked where that is possible, and copied otherwise.

        The manifest changes last and at once: until then the store is what it was.
        """
        assert [shard.rows for shard in other.manifest.columns["label"].shards] == [
            shard.rows for shard in self.manifest.columns["label"].shards
        ]
        taken = {name: column for name, column in other.manifest.columns.items() if name not in ("label", "latent")}
        for shard in tqdm([s for column in taken.values() for s in column.shards], desc="semantics", unit="shard"):
            _link(other.folder / shard.file, self.folder / shard.file)
        for name in other.manifest.compressors:
            source = other.folder / "compressors" / name
            shutil.copytree(source, self.folder / "compressors" / name, dirs_exist_ok=True)
        before = self.manifest
        statistics = {name: value for name, value in other.manifest.statistics.items() if name in taken}
        manifest = replace(
            before,
            encoder=other.manifest.encoder,
            features=other.manifest.features,
            features_dtype=other.manifest.features_dtype,
            columns={**before.columns, **taken},
            statistics={**before.statistics, **statistics},
            compressors=other.manifest.compressors,
        )
        return Store(self.folder, _write_manifest(self.folder, manifest))

    def restore(self, other: Store) -> None:
        """Take files that are missing here or cut short from the store whose semantics this one has.

        What only this one has is left to the commands that make it. Raises UserError if the other one's class tokens or
        features are not the same any more.
        """
        there = {shard for column in other.manifest.columns.values() for shard in column.shards}
        for name, column in self.manifest.columns.items():
            for shard in column.shards:
                if _is_whole(self.folder, shard):
                    continue
                if shard in there:
                    _link(other.folder / shard.file, self.folder / shard.file)
                elif name in ("cls", "features"):
                    raise UserError(
                        f"{self.folder / shard.file} is missing or cut short, and {other.folder} has another one now; "
                        "choose a new folder"
                    )

    def _column(self, column: str) -> Column:
        columns = self.manifest.columns
        if column not in columns:
            how = "`reglue compress`" if holds_codes(column) else "`reglue prepare`"
            raise UserError(
                f"{self.folder} has no column {column} (it has {', '.join(sorted(columns))}); add it with {how}"
            )
        return columns[column]

    def _start(self, shard: int) -> int:
        return int(self._ends[shard - 1]) if shard else 0


class StoreWriter:
    """Fills a store shard by shard, and knows what an earlier, interrupted run has already done.

    A journal (`prepare.jsonl`, one line per block of `shard_rows` images) says which blocks are complete; a line is
    added after its shards are in place. `complete` says that there was nothing left to do from the start.

    Many processes can fill one store, each with a writer and a journal of its own. Process 0 makes its writer before
    the others do, and none writes before all have one; when all have written, process 0 gathers and finishes.
    """

    def __init__(self, folder: Path | str, asked: Contents, rank: int = 0):
        """Begin a store, or continue one. Raises UserError if the folder holds anything else, or other contents."""
        self.folder = Path(folder)
        self.contents = asked
        self._journal = self.folder / (f"prepare-{rank}.jsonl" if rank else JOURNAL)
        self._blocks: dict[int, Block] = {}
        self._one_line_at_a_time = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}; choose another one") from error
        self.complete = False
        if (self.folder / MANIFEST).is_file():
            has: Contents = (manifest := _read_manifest(self.folder / MANIFEST))
            own = [column for name, column in manifest.columns.items() if not holds_codes(name)]
            self.complete = all(_is_whole(self.folder, shard) for column in own for shard in column.shards)
        elif (self.folder / PARTIAL).is_file():
            has = read_json(self.folder / PARTIAL, Contents, REMEDY)
        else:
            strangers = [entry.name for entry in self.folder.iterdir() if entry.suffix not in (BESIDE, ".tmp")]
            if strangers:
                raise UserError(f"{self.folder} is no store but holds {strangers[0]}; choose a new or an empty folder")
            has = asked
            with replacing(self.folder / PARTIAL) as beside:
                beside.write_text(to_json(asked))
        refuse_others(self.folder, has, asked)
        self._read_journals()
        if rank == 0:
            self._join_journals()

    @property
    def pending(self) -> list[range]:
        """The blocks that are still to be done: each a range of indices into the images of the source."""
        count, rows = self.contents.source.count, self.contents.shard_rows
        blocks = [range(start, min(start + rows, count)) for start in range(0, count, rows)]
        return [block for index, block in enumerate(blocks) if index not in self._blocks]

    @property
    def rows(self) -> int:
        """Rows written so far, by this run and by earlier ones."""
        return sum(block.rows for block in self._blocks.values())

    def write(
        self,
        block: range,
        names: list[str],
        skipped: Iterable[UnreadableImage],
        columns: Mapping[str, Mapping[str, Tensor]],
        **measured: float,
    ) -> None:
        """Write one pending block: for each column its tensors (len(names), …), in the order of `names`.

        `measured` goes into the journal: figures such as images per second. Threads may write blocks of their own.
        """
        index = block.start // self.contents.shard_rows
        written = {name: write_shard(self.folder, name, index, names, tensors) for name, tensors in columns.items()}
        done = Block(index, len(names), tuple(skipped), written, measured)
        with self._one_line_at_a_time, self._journal.open("a") as journal:
            journal.write(json.dumps(plain(done)) + "\n")
        self._blocks[index] = done

    def gather(self) -> None:
        """Take in what other processes have written. Raises UserError if blocks are still missing then."""
        self._read_journals()
        self._join_journals()
        if self.pending:
            raise UserError(
                f"{self.folder} lacks {len(self.pending)} shard(s) that other processes wrote; give all machines the "
                "same folder on a shared disk, and run the same command again"
            )

    def finish(self, rows: Tensor) -> Store:
        """Write the manifest, with statistics over the ascending `rows`, when no block is pending."""
        if not self.rows:
            first = self._blocks[0].skipped[0]
            raise UserError(
                f"no image in {self.contents.source.path} can be read; the first, {first.name}: {first.reason}"
            )
        blocks = [self._blocks[index] for index in sorted(self._blocks)]
        columns = {name: join_columns([block.columns[name] for block in blocks]) for name in blocks[0].columns}
        statistics = {}
        compressors = {}
        if (self.folder / MANIFEST).is_file():  # A finished store had lost a shard; what was added to it stays.
            before = _read_manifest(self.folder / MANIFEST)
            compressors = before.compressors
            columns = {**before.columns, **columns}
            statistics = before.statistics
        manifest = Manifest(
            **{part.name: getattr(self.contents, part.name) for part in fields(Contents)},
            format=FORMAT,
            skipped=tuple(image for block in blocks for image in block.skipped),
            columns=columns,
            statistics=statistics,
            compressors=compressors,
            versions={
                name: version(name) for name in ("reglue", "torch", "timm", "diffusers", "safetensors", "pillow")
            },
        )
        unfinished = Store(self.folder, manifest)
        fresh = {name: unfinished.statistics(name, rows) for name in blocks[0].columns if name != "label"}
        manifest = _write_manifest(self.folder, replace(manifest, statistics={**statistics, **fresh}))
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return Store(self.folder, manifest)

    def _read_journals(self) -> None:
        # A line that is damaged is of a block that counts as not done.
        for block in (block for path in self._journals() for block in read_jsonl(path, Block, remedy=None)):
            if all(_is_whole(self.folder, shard) for column in block.columns.values() for shard in column.shards):
                self._blocks[block.index] = block

    def _join_journals(self) -> None:
        """Write all that was read into one journal. Appending to a torn line would spoil the next one too."""
        blocks = [self._blocks[index] for index in sorted(self._blocks)]
        with replacing(self.folder / JOURNAL) as beside:
            beside.write_text("".join(json.dumps(plain(block)) + "\n" for block in blocks))
        for path in self._journals():
            if path.name != JOURNAL:
                path.unlink()

    def _journals(self) -> list[Path]:
        return sorted(self.folder.glob("prepare*.jsonl"))


@dataclass(frozen=True)
class Block:
    """A line of the journal: one shard of every column is in place."""

    index: int
    rows: int
    skipped: tuple[UnreadableImage, ...]
    columns: dict[str, Column]
    """Each with this block's shard alone."""
    measured: dict[str, float]


def in_8_bits(features: Tensor) -> dict[str, Tensor]:
    """Features (B, C, h, w) as int8 and a `scale` (B, C) float16 for every channel of an image: half the size of
    float16.

    A scale of each channel's own fits features better than one for each position: a few channels are far larger than
    the others (arXiv 2309.16588), and would take their precision.
    """
    scale = (features.float().abs().amax((2, 3)) / INT8_LARGEST).half()
    steps = features.float() / torch.where(scale > 0, scale, 1).float()[:, :, None, None]
    whole = steps.nan_to_num().round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8)
    return {"features": whole, SCALE: scale}


def restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a column as they are stored, those in 8 bits as float16 again. Others stay as they are."""
    if SCALE not in tensors:
        return dict(tensors)
    scale = tensors[SCALE][:, :, None, None]
    return {name: tensor.to(scale.dtype) * scale for name, tensor in tensors.items() if name != SCALE}


def value_of(column: str) -> str:
    """The tensor of a column that its statistics describe: `mean` for `latent`, otherwise the column's namesake."""
    return "mean" if column == "latent" else column.partition(".")[0]


def codes_column(name: str, column: CompressedColumn) -> str:
    """The column with the codes of compressor `name`, which was fitted to `column`."""
    return (LOCAL_CODES if column == "features" else CLASS_TOKEN_CODES) + name


def holds_codes(column: str) -> bool:
    """Whether a column holds codes: what `reglue compress` adds."""
    return column.startswith((LOCAL_CODES, CLASS_TOKEN_CODES))


def compressor_of(column: str) -> str:
    """Under which name `Manifest.compressors` and the store's folder `compressors` hold the compressor of a column."""
    return column.removeprefix(LOCAL_CODES)


def write_shard(folder: Path, column: str, index: int, names: list[str], tensors: Mapping[str, Tensor]) -> Column:
    """Write shard `index` of a column: tensors (len(names), …) and the names of the images, whole or not at all."""
    path = folder / f"{column}-{index:05d}.safetensors"
    # One key alone, since safetensors writes several in random order, and the same shard must have the same bytes.
    metadata = {METADATA: json.dumps(plain(ShardMetadata(FORMAT, column, names)))}
    with replacing(path) as beside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()} if names else {}, beside, metadata)
        shard = Shard(path.name, len(names), beside.stat().st_size, _sha256(beside))
    return Column({name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, (shard,))


def join_columns(columns: list[Column]) -> Column:
    """One column from its shards, of which those without rows know no shapes."""
    return Column(
        next(column.tensors for column in columns if column.shards[0].rows),
        tuple(shard for column in columns for shard in column.shards),
    )


def refuse_others(folder: Path, has: Contents, asked: Contents) -> None:
    """Raise UserError naming the first thing in which a store differs from what was asked for."""
    for path, old, new in _differences("", has, asked):
        raise UserError(
            f"{folder} was prepared with {path} {_brief(old)}{_model_of(path, has)}, not {_brief(new)}"
            f"{_model_of(path, asked)}; choose another folder, or the same options and images as before"
        )


def _differences(path: str, has: Any, asked: Any) -> Iterator[tuple[str, Any, Any]]:
    """Paths of fields that compare as different, with both values."""
    if is_dataclass(has) and is_dataclass(asked):
        for part in fields(Contents if isinstance(has, Contents) else has):
            if part.compare:
                inner = f"{path}.{part.name}".lstrip(".")
                yield from _differences(inner, getattr(has, part.name), getattr(asked, part.name))
    elif has != asked:
        yield path, has, asked


def _model_of(path: str, contents: Contents) -> str:
    """The user's name for the model that a field such as `encoder.weights_sha256` belongs to."""
    if path.startswith("encoder.") and contents.encoder:
        return f" ({contents.encoder.name})"
    return f" ({contents.autoencoder.name})" if path.startswith("autoencoder.") else ""


def _brief(value: Any) -> str:
    text = value.name if isinstance(value, EncoderSpec) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def read_manifest(folder: Path) -> Manifest:
    """What a store says of itself, its files unseen. Raises UserError if it is none, or is half-written."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PARTIAL).is_file():
            raise UserError(f"{folder} is a half-written store; run the same `reglue prepare` again to finish it")
        raise UserError(f"{folder} is not a store: it has no {MANIFEST}; make one with `reglue prepare`")
    return _read_manifest(path)


def is_intact(folder: Path, shard: Shard, on_read: Callable[[int], object]) -> bool:
    """Whether a file of a store has the bytes that its manifest says. Reads all of it, telling `on_read` how much."""
    return _is_whole(folder, shard) and _sha256(folder / shard.file, on_read) == shard.sha256


def _read_manifest(path: Path) -> Manifest:
    manifest = read_json(path, Manifest, REMEDY)
    if manifest.format != FORMAT:
        raise UserError(f"{path} has format {manifest.format}, and this program reads {FORMAT}; {REMEDY}")
    if _hash(read_json(path, dict[str, Any], REMEDY)) != manifest.hash:  # In the file, 1 and 1.0 are two things.
        raise UserError(f"{path} was changed by hand or damaged: its hash does not fit; {REMEDY}")
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    manifest = replace(manifest, hash=_hash(plain(manifest)))
    with replacing(folder / MANIFEST) as beside:
        beside.write_text(to_json(manifest))
    return manifest


def _hash(content: dict[str, Any]) -> str:
    """SHA-256 of what a manifest's file says, but for the hash itself."""
    return hashlib.sha256(json.dumps({**content, "hash": ""}, indent=1).encode()).hexdigest()


def _link(source: Path, target: Path) -> None:
    """A second name for a file of a store, or a copy on another disk. Files of stores are replaced, never changed."""
    beside = target.with_name(target.name + BESIDE)
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
        beside.replace(target)
    except OSError:
        with replacing(target) as beside:
            shutil.copyfile(source, beside)


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        return (folder / shard.file).stat().st_size == shard.bytes
    except OSError:
        return False


def _sha256(path: Path, on_read: Callable[[int], object] = lambda _: None) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_AT_ONCE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_read(count)
    return digest.hexdigest()


def _map(folder: Path, content: Column, index: int) -> dict[str, Tensor]:
    """The tensors of a shard as views of the file."""
    shard = content.shards[index]
    with opened_tensors(folder / shard.file, SHARD_REMEDY) as file:
        tensors = {name: file.get_tensor(name) for name in content.tensors}
        for name, spec in content.tensors.items():
            found = TensorSpec.of(tensors[name])
            if found != spec or len(tensors[name]) != shard.rows:
                raise ValueError(f"{name} is {len(tensors[name])} × {found}, not {shard.rows} × {spec}")
        return tensors
