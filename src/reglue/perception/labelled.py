"""Labelled data for probes and heads: what they read of a store, and images with what is to be predicted for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reglue.data.manifest import compressor_of, holds_codes, value_of
from reglue.data.masks import load_depths, load_masks
from reglue.data.store import Store
from reglue.encoders.compressors import Compressor, as_map, load_compressor
from reglue.errors import UserError
from reglue.files import read_jsonl
from reglue.perception.probes import Examples
from reglue.seeds import permutation

LAST_LAYER = "features.last"
"""The name of the features of the last stored layer alone, among the inputs."""


@dataclass(frozen=True)
class StoreInput:
    """A column of a store, or a part of one, as probes read it."""

    name: str
    column: str
    channels: slice
    shape: tuple[int, int, int]
    """(C, h, w); class tokens are maps of one position."""
    mean: Tensor
    std: Tensor
    """(C,): what a probe reads has mean 0 and standard deviation 1 by the store's statistics."""
    data: str
    """SHA-256 of the column's shards."""
    compressor: Compressor | None
    """That made the codes, if these are codes."""
    ratio: float | None
    """Channels of what the input was made from ÷ its own; None for latents."""

    def examples(self, images: LabelledImages) -> Examples:
        """Images as a probe sees them: float32 (n, C, h, w), of a store or of another one of the same kind."""

        def read(rows: Tensor) -> Tensor:
            values = as_map(self._raw(images.store, rows).float())
            return (values - self.mean[:, None, None]) / self.std[:, None, None]

        return Examples(read, images.rows, images.targets, self.shape)

    def raw(self, inputs: Tensor) -> Tensor:
        """What a probe reads (n, C, h, w), back on the scale of the store."""
        return inputs * self.std[:, None, None] + self.mean[:, None, None]

    @torch.inference_mode()
    def _raw(self, store: Store, rows: Tensor) -> Tensor:
        if self.compressor is not None:
            known = store.manifest.compressors.get(compressor_of(self.column))
            if known != self.compressor.spec() or self.column not in store.manifest.columns:
                uncompressed = read_uncompressed(self.compressor, store, rows)
                if uncompressed is None:
                    layers = list(self.compressor.layers or ())
                    raise UserError(
                        f"{store.folder} has neither the codes {self.column} nor the layers {layers} that they are "
                        "made of; prepare it with these"
                    )
                return self.compressor.encode(uncompressed)
        return store.read(self.column, rows, self.channels)[value_of(self.column)]


def read_uncompressed(compressor: Compressor, store: Store, rows: Tensor) -> Tensor | None:
    """What a compressor takes (n, C, h, w) of rows of a store; None if the store does not have it."""
    encoder, column = store.manifest.encoder, compressor.column
    if encoder is None or column not in store.manifest.columns:
        return None
    try:
        channels = slice(None) if column == "cls" else encoder.channels_of(compressor.layers)
    except ValueError:
        return None
    return as_map(store.read(column, rows, channels)[column])


def open_input(store: Store, name: str) -> StoreInput:
    """An input that a store has, by its name: that of a column, or `LAST_LAYER`."""
    manifest = store.manifest
    column = "features" if name == LAST_LAYER else name
    channels = slice(-manifest.encoder.width, None) if name == LAST_LAYER and manifest.encoder else slice(None)
    content, statistics = manifest.columns[column], manifest.statistics[column]
    mean, std = (torch.tensor(value)[channels].float() for value in (statistics.mean, statistics.std))
    width, *grid = content.tensors[value_of(column)].shape
    height, across = grid or (1, 1)
    compressor = load_compressor(compressor_folder(store, column)) if holds_codes(column) else None
    whole = compressor.spec().channels_in if compressor else None if name == "latent" else width
    return StoreInput(
        name=name,
        column=column,
        channels=channels,
        shape=(len(mean), height, across),
        mean=mean,
        std=torch.where(std > 1e-6, std, 1.0),
        data=hashlib.sha256("".join(shard.sha256 for shard in content.shards).encode()).hexdigest(),
        compressor=compressor,
        ratio=whole and whole / len(mean),
    )


def compressor_folder(store: Store, column: str) -> Path:
    """Where the compressor is that made a column of codes."""
    return store.folder / "compressors" / compressor_of(column)


def compressor_figures(store: Store, column: str) -> dict[str, float]:
    """The figures that `reglue compress` wrote about the compressor of a column of codes; none if they are gone."""
    lines = read_jsonl(compressor_folder(store, column) / "metrics.jsonl", dict[str, float], "delete it")
    made = store.manifest.compressors.get(compressor_of(column))
    kept = [line for line in lines if made and line.get("epoch") == made.epoch]
    return (kept or lines or [{}])[-1]


@dataclass(frozen=True)
class LabelledImages:
    """Rows of a store with what is to be predicted for them."""

    store: Store
    rows: Tensor
    """(n,)."""
    targets: Tensor
    """(n, …), as in `Examples`."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | Tensor) -> LabelledImages:
        return replace(self, rows=self.rows[which], targets=self.targets[which])

    def ascending(self) -> LabelledImages:
        """In the order of the store, which is faster to read."""
        return self[self.rows.argsort()]


class Parts(NamedTuple):
    """Which images serve for what."""

    fitting: LabelledImages
    selection: LabelledImages
    """That choose the regularisation."""
    measured: LabelledImages
    """That no probe has seen."""


def draw_parts(
    sets: Sequence[LabelledImages], seed: int, count: int | None, *, held_out: float, selection: float
) -> Parts:
    """Images for fitting, selection and measurement, drawn at random by the seed.

    The share `held_out` of the first set is measured on, or the second set if there is one; the share `selection` of
    the rest selects. At most `count` images of each set take part. Raises UserError for too few.
    """
    rest, *others = (images[permutation(seed, "probe split", 0, len(images))[:count]] for images in sets)
    if others:
        measured = others[0]
    else:
        measuring = max(1, round(held_out * len(rest)))
        measured, rest = rest[:measuring], rest[measuring:]
    selecting = max(1, round(selection * len(rest)))
    if len(rest) - selecting < 2:
        raise UserError(f"{sets[0].store.folder} has too few images for probes: {len(sets[0])}; use another store")
    return Parts(rest[selecting:].ascending(), rest[:selecting].ascending(), measured.ascending())


# Mirror images never take part: a probe fitted to them would know the images that it is measured on.


def with_classes(store: Store) -> LabelledImages:
    """All images of a store with their classes."""
    if not store.manifest.source.class_names:
        raise UserError(f"{store.folder} has no classes to predict; give masks")
    return LabelledImages(store, store.originals, store.labels[store.originals])


def with_masks(store: Store, folder: Path) -> LabelledImages:
    """The images of a store that have a mask in a folder, as `load_masks` finds them."""
    source, rows = store.manifest.source, store.originals
    found, masks = load_masks(folder, Path(source.path), store.names(rows), source.resolution)
    return LabelledImages(store, rows[found], masks)


def with_depths(store: Store, folder: Path) -> LabelledImages:
    """The images of a store that have a depth map in a folder, as `load_depths` finds them."""
    source, rows = store.manifest.source, store.originals
    found, depths = load_depths(folder, Path(source.path), store.names(rows), source.resolution)
    known = depths.flatten(1).isfinite().any(1)
    if not bool(known.any()):
        raise UserError(f"{folder}: no depth map has a pixel of known depth (above 0); give others")
    return LabelledImages(store, rows[found[known]], depths[known])
