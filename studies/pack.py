"""A store with less in it and in smaller files, to carry to another machine: itself a whole, valid store.

    python studies/pack.py STORE --out packed --columns latent cls features local.conv-16 --last-layer
    python studies/unpack.py packed

Labels always come along, and so do the compressors of the chosen codes. The figures of the copy are the original's to
the bit (but of features with --eight-bits, which halves what they take). Files that are larger than the limit (a
compressor's, and those of --networks) travel in parts, which the second command, on the other machine, puts together to
the same bytes. Images do not come along. What a study knows of them does: find it out where they are, and bring it, and
the networks, with a store (REFERENCES is `study/references`).

    python studies/convergence.py STORE --reference HELD_OUT --out study --inception FILE --judge FILE --references-only
    python studies/pack.py HELD_OUT --out packed-held-out --columns latent cls --references REFERENCES --networks FILE …

A study must begin with the packed stores where it is to be continued with them: other files are other stores to it.
With --share a store holds a random share of each class, for studies of smaller data.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
import tyro
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional

from measures import REFERENCES
from reglue.data.manifest import METADATA, Statistics, compressor_of, holds_codes, write_manifest
from reglue.data.store import Store, quantised
from reglue.data.store_writer import join_columns, write_shard
from reglue.encoders.compressors import load_compressor
from reglue.errors import UserError
from reglue.files import TakesPaths, new_folder, replacing
from reglue.seeds import permutation

MEGABYTE = 1_000_000
NETWORKS = "networks"
"""Folder of a packed store."""
PARTS = ".parts.json"
"""What the name of the file ends with that says of which parts another one is made."""
COPIED_AT_ONCE = 2**24
"""Bytes."""


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
    eight_bits: bool = False
    """Features as integers of 8 bits with a scale for every channel of an image, as `reglue prepare --features-dtype
    int8` stores them."""
    share: float = 1.0
    """Share of the images of each class, drawn by --seed. Not of a store with mirror images (--flips)."""
    seed: int = 0
    megabytes: int = 60
    """Size of the largest file, in units of a million bytes."""
    networks: tuple[Path, ...] = ()
    """Files and folders of networks to bring along, in `networks`: the Inception's, a judge, encoders,
    autoencoders."""
    references: Path | None = None
    """The `references` folder of a study of these images, which studies with the packed store then read."""


def pack(options: Pack, rows: Tensor | None = None) -> Store:
    """Write the new store, whole or not at all, of the given ascending `rows` (n,) instead of a share.

    Raises UserError for columns that the old store does not have, for networks or references that are not there, and
    where one image alone is larger than the limit.
    """
    store = Store.open(options.store)
    refuse_missing(options)
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
    rows = rows_of(store, options) if rows is None else rows
    takes = {name: take_of(store, name, slices[name], options.eight_bits) for name in names}
    shard_rows = rows_per_shard(store, rows, takes, options.megabytes * MEGABYTE)
    parts = rows.split(shard_rows)

    with new_folder(options.out) as beside:
        columns = {}
        for name in tqdm(names, desc="pack", unit="column"):
            shards = []
            for index, part in enumerate(parts):
                shards.append(write_shard(beside, name, index, store.names(part), takes[name](part)))
            columns[name] = join_columns(shards)
        codes = [compressor_of(name) for name in names if holds_codes(name)]
        compressors = {}
        for name in codes:
            compressor = load_compressor(options.store / "compressors" / name)
            if compressor.column == "features" and manifest.encoder:
                # "All layers of the store" would mean others with --last-layer.
                compressor.layers = compressor.layers or manifest.encoder.layers
            compressors[name] = compressor.save(beside / "compressors" / name)
        packed = replace(
            manifest,
            encoder=encoder,
            features="features" in names,
            shard_rows=shard_rows,
            columns=columns,
            compressors=compressors,
            statistics={},
        )
        unfinished = Store(beside, packed)
        statistics = {
            # Of all images the old figures hold, to the bit: models are normalised by them.
            name: _part(manifest.statistics[name], slices[name])
            if len(rows) == len(store) and not (name == "features" and options.eight_bits)
            else unfinished.statistics(name, torch.arange(len(rows)))
            for name in names
            if name != "label"
        }
        write_manifest(beside, replace(packed, statistics=statistics))
        for network in options.networks:
            copy(network, beside / NETWORKS / network.name)
        if options.references:
            copy(options.references, beside / REFERENCES)
        split = split_large(beside, options.megabytes * MEGABYTE)
    if split:
        print(f"{', '.join(split)} in parts: run `python studies/unpack.py {options.out.name}` where they are used")
    return Store.open(options.out)


def refuse_missing(options: Pack) -> None:
    """Raise UserError for what cannot be brought along."""
    for path in (*options.networks, *([options.references] if options.references else [])):
        if not path.exists():
            raise UserError(f"{path} is to be packed, but is not there; name files or folders")
    names = [path.name for path in options.networks]
    if len(set(names)) < len(names):
        raise UserError("--networks: two of them have the same name; rename one")
    if options.references and options.share < 1:
        raise UserError("--references are of all images, and with --share not all of them are taken; leave one out")


def take_of(store: Store, column: str, channels: slice, eight_bits: bool) -> Callable[[Tensor], dict[str, Tensor]]:
    """What gives the tensors of a column that are to be written, for some rows."""
    if column == "features" and eight_bits:
        return lambda rows: quantised(store.read(column, rows, channels)["features"])
    return lambda rows: store.read_stored(column, rows, channels)


def rows_per_shard(
    store: Store, rows: Tensor, takes: Mapping[str, Callable[[Tensor], dict[str, Tensor]]], limit: int
) -> int:
    """How many rows fit into `limit` bytes, whatever their column. Every file has the names of its images too."""
    # A shard's metadata is JSON within JSON, and a comma and a space follow each name.
    bytes_of_name = max(len(json.dumps(json.dumps(name))) for name in store.names(rows)) + 2
    most = []
    for column, take in takes.items():
        tensors = take(rows[:1])
        bytes_of_row = sum(tensor.nbytes for tensor in tensors.values())
        # Sizes and places of each tensor are in the header, and have more digits where there are more rows.
        header = (
            len(save(tensors, {METADATA: json.dumps({"column": column})})) - bytes_of_row + 100 * (1 + len(tensors))
        )
        most.append((limit - header) // (bytes_of_row + bytes_of_name))
        if most[-1] < 1:
            raise UserError(f"--megabytes: one image of column {column} takes {bytes_of_row} bytes; choose more")
    return min(most)


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder to a new place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def split_large(folder: Path, limit: int) -> list[str]:
    """Cut files above `limit` bytes into parts. Returns the files that are no more, relative to the folder.

    Beside NAME.part-000 … there is NAME.parts.json, with the parts and the SHA-256 of the whole.
    """
    large = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size > limit]
    for path in large:
        digest, parts = hashlib.sha256(), []
        with path.open("rb") as file:
            for index in range(ceil(path.stat().st_size / limit)):
                part = path.with_name(f"{path.name}.part-{index:03d}")
                left = limit
                with part.open("wb") as written:
                    while content := file.read(min(left, COPIED_AT_ONCE)):
                        written.write(content)
                        digest.update(content)
                        left -= len(content)
                parts.append(part.name)
        described = {"sha256": digest.hexdigest(), "parts": parts}
        path.with_name(path.name + PARTS).write_text(json.dumps(described, indent=1))
        path.unlink()
    return [str(path.relative_to(folder)) for path in large]


def join_parts(folder: Path) -> list[Path]:
    """Put together what `split_large` has cut, and remove the parts. Returns the files.

    Raises UserError if a part is missing, or the whole is not what it was.
    """
    joined = []
    for description in sorted(folder.rglob(f"*{PARTS}")):
        whole = description.with_name(description.name.removesuffix(PARTS))
        described = json.loads(description.read_text())
        parts = [description.with_name(name) for name in described["parts"]]
        missing = [part for part in parts if not part.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing; copy it too, and run this again")
        _join(parts, whole, described["sha256"])
        for part in (description, *parts):  # Killed here, parts are left over, but nothing that asks for them.
            part.unlink()
        joined.append(whole)
    return joined


def _join(parts: Sequence[Path], whole: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with replacing(whole) as beside, beside.open("wb") as written:
        for part in parts:
            with part.open("rb") as file:
                while content := file.read(COPIED_AT_ONCE):
                    written.write(content)
                    digest.update(content)
        if digest.hexdigest() != sha256:
            raise UserError(f"the parts of {whole} were damaged on their way; copy them again")


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
