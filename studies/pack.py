"""A store with less in it and in smaller files, to carry to another machine: itself a whole, valid store.

    python studies/pack.py STORE --out packed --columns latent cls features local.conv-16 --last-layer

Labels always come along, and so do the compressors of the chosen codes. Images do not, nor does any network: name those
of the other machine with --encoder and --autoencoder. The figures of the copy are the original's to the bit. With
--share it holds a random share of each class, for studies of smaller data.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from reglue.data.store import Statistics, Store, compressor_of, holds_codes, join_columns, write_shard
from reglue.errors import UserError
from reglue.files import TakesPaths, new_folder
from reglue.seeds import permutation
from reglue.semantics.compressors import load_compressor


@dataclass(frozen=True)
class Pack(TakesPaths):
    """Copy a part of a store."""

    store: Positional[Path]
    out: Path
    """A new folder."""
    columns: tuple[str, ...] = ()
    """What to take besides labels; everything if not given."""
    last_layer: bool = False
    """Of features, only the encoder's last layer: all that alignment needs."""
    share: float = 1.0
    """Share of the images of each class, drawn by --seed."""
    seed: int = 0
    megabytes: int = 60
    """Size of the largest file, in units of a million bytes."""


def pack(options: Pack) -> Store:
    """Write the new store, whole or not at all. Raises UserError for columns that the old one does not have."""
    store = Store.open(options.store)
    manifest = store.manifest
    names = dict.fromkeys(["label", *(options.columns or manifest.columns)])
    missing = [name for name in names if name not in manifest.columns]
    if missing:
        has = ", ".join(manifest.columns)
        raise UserError(f"--columns {missing[0]}: {options.store} has no such column; choose of {has}")
    encoder = manifest.encoder
    layer = slice(None)
    if options.last_layer and "features" in names:
        assert encoder is not None
        if encoder.layers[-1] != encoder.depth - 1:
            raise UserError(f"--last-layer: {options.store} holds layers {list(encoder.layers)}, not the last one")
        encoder, layer = replace(encoder, layers=(encoder.depth - 1,)), slice(-encoder.width, None)
    slices = {name: layer if name == "features" else slice(None) for name in names}
    rows = rows_of(store, options)
    one = torch.arange(1)
    bytes_per_row = max(sum(t.nbytes for t in store.read(name, one, slices[name]).values()) for name in names)
    shard_rows = max(1, options.megabytes * 1_000_000 // bytes_per_row - 1)  # Names of images take room too.
    parts = rows.split(shard_rows)

    with new_folder(options.out) as beside:
        columns = {}
        for name in tqdm(names, desc="pack", unit="column"):
            shards = []
            for index, part in enumerate(parts):
                shards.append(write_shard(beside, name, index, store.names(part), store.read(name, part, slices[name])))
            columns[name] = join_columns(shards)
        codes = {compressor_of(name) for name in names if holds_codes(name)}
        for name in codes:
            load_compressor(options.store / "compressors" / name).save(beside / "compressors" / name)
        packed = replace(
            manifest,
            encoder=encoder,
            features="features" in names,
            shard_rows=shard_rows,
            columns=columns,
            compressors={name: spec for name, spec in manifest.compressors.items() if name in codes},
            statistics={},
        )
        unfinished = Store(beside, packed)
        statistics = {
            # Of all images the old figures hold, to the bit: models are normalised by them.
            name: _part(manifest.statistics[name], slices[name])
            if len(rows) == len(store)
            else unfinished.statistics(name, torch.arange(len(rows)))
            for name in names
            if name != "label"
        }
        Store(beside, replace(packed, statistics=statistics)).finish()
    return Store.open(options.out)


def _part(statistics: Statistics, channels: slice) -> Statistics:
    return replace(statistics, mean=statistics.mean[channels], std=statistics.std[channels])


def rows_of(store: Store, options: Pack) -> Tensor:
    """The rows to take, ascending: a share of each class, rounded up. Mirror images go with their images."""
    if not 0 < options.share <= 1:
        raise UserError(f"--share {options.share}: choose above 0, and at most 1")
    if options.share == 1:
        return torch.arange(len(store))
    if store.manifest.source.flips:
        raise UserError(f"--share: {options.store} holds mirror images, which a share would part from their images")
    taken = []
    for label in store.labels.unique().tolist():
        of_class = torch.nonzero(store.labels == label)[:, 0]
        count = -int(-len(of_class) * options.share // 1)
        taken.append(of_class[permutation(options.seed, "share of images", label, len(of_class))[:count]])
    return torch.cat(taken).sort().values


if __name__ == "__main__":
    try:
        pack(tyro.cli(Pack, description=__doc__))
    except UserError as error:
        sys.exit(f"pack: {error}")
