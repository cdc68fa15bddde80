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

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reglue.data.manifest import (
    METADATA,
    Column,
    Manifest,
    ShardMetadata,
    Statistics,
    TensorSpec,
    holds_codes,
    is_whole,
    read_manifest,
    value_of,
)
from reglue.data.pictures import colours_of, in_html
from reglue.data.read_ahead import expect
from reglue.data.sources import FLIPPED
from reglue.errors import UserError, option
from reglue.files import opened_tensors, parse_json
from reglue.progress import Bar

SHARD_REMEDY = "delete it and run the command that made it again"
SCALE = "scale"
"""The tensor of a column in 8 bits that its values are multiplied with."""
INT8_LARGEST = 127
SHOWN = 12
"""Latents, and names of classes, that a notebook shows."""
MAPPED_AT_ONCE = 16_384
"""Files that a store keeps mapped. Linux allows a process 65,530 maps, and ImageNet-21k has more shards."""


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
                if column != to_be_replaced and not is_whole(folder, shard):
                    commands = "`reglue compress`" if holds_codes(column) else "`reglue prepare` or `reglue reencode`"
                    raise UserError(f"{folder / shard.file} is missing or cut short; run the same {commands} again")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        source = self.manifest.source
        height, width = source.resolution
        what = f"{len(self):,} images of {height}×{width}, {len(source.class_names)} classes"
        return f"Store({what}, columns {', '.join(sorted(self.manifest.columns))}, in {self.folder})"

    def _repr_html_(self) -> str:
        """The same in a notebook, with a few latents as colours."""
        source, columns = self.manifest.source, self.manifest.columns
        facts = {
            "images": "{:,} of {}×{} pixels".format(len(self), *source.resolution),
            "classes": ", ".join(source.class_names[:SHOWN]) + (", …" if len(source.class_names) > SHOWN else ""),
            **{f"column {name}": ", ".join(map(str, columns[name].tensors.values())) for name in sorted(columns)},
            "in": str(self.folder),
        }
        rows = torch.linspace(0, len(self) - 1, min(SHOWN, len(self))).long()
        return in_html("Store", {name: text for name, text in facts.items() if text}, self.as_colours(rows))

    def as_colours(self, rows: Tensor) -> np.ndarray:
        """The latents of some rows (n,) as colours, uint8 (n, h, w, 3): no network is asked."""
        return colours_of(self.read("latent", rows)["mean"].float())

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

    @property
    def shard_rows(self) -> list[int]:
        """How many rows each shard has, the same in every column."""
        return [shard.rows for shard in self.manifest.columns["label"].shards]

    def read(self, column: str, rows: Tensor, channels: slice = slice(None)) -> dict[str, Tensor]:
        """Rows of a column in the order asked for, each tensor (len(rows), …) on the CPU; what is in 8 bits as float16.

        `rows` (n,) are indices in [0, N), repeats allowed; `channels` picks some of the first axis of each row, and no
        others are read. Raises UserError for a column that the store does not have and for a damaged file.
        """
        return dequantised(self.read_stored(column, rows, channels))

    def read_stored(self, column: str, rows: Tensor, channels: slice = slice(None)) -> dict[str, Tensor]:
        """As `read`, but the tensors as they are stored; `dequantised` makes of them what `read` gives, on any device.

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
        for shard, (end, count) in enumerate(zip(self._ends.tolist(), self.shard_rows, strict=True)):
            start = end - count
            within = torch.arange(start, end) if rows is None else rows[(rows >= start) & (rows < end)]
            if not len(within):
                continue
            mapped = {  # Not kept: resident pages go with the map.
                name: tensor[:, channels] if tensor.ndim > 1 else tensor
                for name, tensor in _map(self.folder, content, shard).items()
            }
            for part in within.split(chunk):
                yield part, dequantised({name: tensor[part - start] for name, tensor in mapped.items()})

    def has_whole(self, column: str) -> bool:
        """Whether the store has a column, and all of its files in full size."""
        content = self.manifest.columns.get(column)
        return content is not None and all(is_whole(self.folder, shard) for shard in content.shards)

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
        progress = Bar(total=len(rows), desc=f"statistics of {column}", unit="image", leave=False)
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
                f"that made it, or store it with {option('dtype')} float32 in a new folder"
            )
        return Statistics(len(rows), tuple(mean.tolist()), tuple(std.tolist()))

    def _column(self, column: str) -> Column:
        columns = self.manifest.columns
        if column not in columns:
            how = "`reglue compress`" if holds_codes(column) else "`reglue prepare`"
            raise UserError(
                f"{self.folder} has no column {column} (it has {', '.join(sorted(columns))}); add it with {how}"
            )
        return columns[column]


def quantised(features: Tensor) -> dict[str, Tensor]:
    """Features (B, C, h, w) as int8 and a `scale` (B, C) float16 for every channel of an image: half the size of
    float16.

    A scale of each channel's own fits features better than one for each position: a few channels are far larger than
    the others (arXiv 2309.16588), and would take their precision.
    """
    scale = (features.float().abs().amax((2, 3)) / INT8_LARGEST).half()
    steps = features.float() / torch.where(scale > 0, scale, 1).float()[:, :, None, None]
    whole = steps.nan_to_num().round().clamp(-INT8_LARGEST, INT8_LARGEST).to(torch.int8)
    return {"features": whole, SCALE: scale}


def dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a column as they are stored, those in 8 bits as float16 again. Others stay as they are."""
    if SCALE not in tensors:
        return dict(tensors)
    scale = tensors[SCALE][:, :, None, None]
    return {name: tensor.to(scale.dtype) * scale for name, tensor in tensors.items() if name != SCALE}


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
