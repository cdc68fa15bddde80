"""Writing stores: shard by shard, resumable, by many processes; codes and semantics that are added later."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reglue.data.images import UnreadableImage
from reglue.data.manifest import (
    FORMAT,
    MANIFEST,
    METADATA,
    PARTIAL,
    REMEDY,
    Column,
    Contents,
    Manifest,
    Shard,
    ShardMetadata,
    TensorSpec,
    compressor_of,
    holds_codes,
    is_whole,
    read_manifest,
    refuse_others,
    value_of,
    write_manifest,
)
from reglue.data.prefetch import in_batches
from reglue.data.store import Store
from reglue.encoders.compressors import CompressorSpec
from reglue.errors import UserError
from reglue.files import (
    BESIDE,
    file_sha256,
    plain,
    read_json,
    read_jsonl,
    refuse_filled,
    replacing,
    to_json,
    write_text,
)
from reglue.names import codes_column
from reglue.progress import Bar

JOURNAL = "prepare.jsonl"
"""Of process 0, and of all processes of earlier runs. Process 3 writes prepare-3.jsonl."""


class StoreWriter:
    """Fills a store shard by shard, and knows what an earlier, interrupted run has already done.

    A journal (`prepare.jsonl`, one line per block of `shard_rows` images) says which blocks are complete; a line is
    added after its shards are in place. `complete` means that there was nothing left to do from the start.

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
            has: Contents = (manifest := read_manifest(self.folder))
            own = [column for name, column in manifest.columns.items() if not holds_codes(name)]
            self.complete = all(is_whole(self.folder, shard) for column in own for shard in column.shards)
        elif (self.folder / PARTIAL).is_file():
            has = read_json(self.folder / PARTIAL, Contents, REMEDY)
        else:
            refuse_filled(self.folder)
            has = asked
            write_text(self.folder / PARTIAL, to_json(asked))
        refuse_others(self.folder, has, asked)
        self._read_journals()
        if rank == 0:
            self._join_journals()

    @property
    def pending(self) -> list[range]:
        """The blocks that are still to be done: each a range of indices into the images of the source."""
        count, rows = self.contents.source.count, self.contents.shard_rows
        return [block for index, block in enumerate(in_batches(count, rows)) if index not in self._blocks]

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
            before = read_manifest(self.folder)
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
        manifest = write_manifest(self.folder, replace(manifest, statistics={**statistics, **fresh}))
        (self.folder / PARTIAL).unlink(missing_ok=True)
        return Store(self.folder, manifest)

    def _read_journals(self) -> None:
        # A line that is damaged is of a block that counts as not done.
        for block in (block for path in self._journals() for block in read_jsonl(path, Block, remedy=None)):
            if all(is_whole(self.folder, shard) for column in block.columns.values() for shard in column.shards):
                self._blocks[block.index] = block

    def _join_journals(self) -> None:
        """Write all that was read into one journal. Appending to a torn line would spoil the next one too."""
        blocks = [self._blocks[index] for index in sorted(self._blocks)]
        write_text(self.folder / JOURNAL, "".join(json.dumps(plain(block)) + "\n" for block in blocks))
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


def write_shard(folder: Path, column: str, index: int, names: list[str], tensors: Mapping[str, Tensor]) -> Column:
    """Write shard `index` of a column: tensors (len(names), …) and the names of the images, whole or not at all."""
    path = folder / f"{column}-{index:05d}.safetensors"
    # One key alone, since safetensors writes several in random order, and the same shard must have the same bytes.
    metadata = {METADATA: json.dumps(plain(ShardMetadata(FORMAT, column, names)))}
    with replacing(path) as beside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()} if names else {}, beside, metadata)
        shard = Shard(path.name, len(names), beside.stat().st_size, file_sha256(beside))
    return Column({name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, (shard,))


def join_columns(columns: list[Column]) -> Column:
    """One column from its shards, of which those without rows know no shapes."""
    return Column(
        next(column.tensors for column in columns if column.shards[0].rows),
        tuple(shard for column in columns for shard in column.shards),
    )


def add_codes(store: Store, name: str, compressor: CompressorSpec, shards: Iterable[Tensor]) -> Store:
    """Write the codes of a compressor as a column (`codes_column`). See `add_column`."""
    return add_column(store, codes_column(name, compressor.column), shards, compressor)


def add_column(store: Store, column: str, shards: Iterable[Tensor], compressor: CompressorSpec | None = None) -> Store:
    """Write values of your own as a column of a store, which a recipe can learn, and return the store with it.

    `shards` gives the values, (n, K, h, w) or (n, K), of the store's shards in order, n rows each (none for an empty
    shard); `Store.shard_rows` says how many. `compressor` is what made them, if they are codes. The manifest changes
    last and at once: until then the store is what it was. Raises ValueError for another number of rows, and for the
    name of a column that is there already, unless it holds codes.
    """
    folder = store.folder
    if compressor is None and column in store.manifest.columns:
        raise ValueError(f"{folder} has a column {column} already; choose another name")
    written: list[Column] = []
    start = 0
    for index, (values, shard) in enumerate(zip(shards, store.manifest.columns["label"].shards, strict=True)):
        if len(values) != shard.rows:
            raise ValueError(f"shard {index} of {folder} has {shard.rows} rows, and column {column} {len(values)}")
        names = store.names(torch.arange(start, start + shard.rows))
        written.append(write_shard(folder, column, index, names, {value_of(column): values}))
        start += shard.rows
    content = join_columns(written)
    added = Store(folder, replace(store.manifest, columns={**store.manifest.columns, column: content}))
    statistics = added.statistics(column, torch.arange(len(store)))
    before = read_manifest(folder)  # Another process may have added other codes meanwhile.
    made_by = {compressor_of(column): compressor} if compressor else {}
    manifest = replace(
        before,
        columns={**before.columns, column: content},
        compressors={**before.compressors, **made_by},
        statistics={**before.statistics, column: statistics},
    )
    return Store(folder, write_manifest(folder, manifest))


def add_semantics(store: Store, other: Store) -> Store:
    """A store with all that another one of the same rows knows beside labels and latents: class tokens, features, codes
    and their compressors. Files are linked where that is possible, and copied otherwise.

    The manifest changes last and at once: until then the store is what it was.
    """
    before, there = store.manifest, other.manifest
    assert [s.rows for s in before.columns["label"].shards] == [s.rows for s in there.columns["label"].shards]
    taken = {name: column for name, column in there.columns.items() if name not in ("label", "latent")}
    for shard in Bar([s for column in taken.values() for s in column.shards], desc="semantics", unit="shard"):
        _link(other.folder / shard.file, store.folder / shard.file)
    for name in there.compressors:
        place = Path("compressors") / name
        shutil.copytree(other.folder / place, store.folder / place, dirs_exist_ok=True)
    statistics = {name: there.statistics[name] for name in taken if name in there.statistics}
    manifest = replace(
        before,
        encoder=there.encoder,
        features=there.features,
        features_dtype=there.features_dtype,
        columns={**before.columns, **taken},
        statistics={**before.statistics, **statistics},
        compressors=there.compressors,
    )
    return Store(store.folder, write_manifest(store.folder, manifest))


def replace_lost_files(store: Store, other: Store) -> None:
    """Take files that a store lacks, or that are cut short, from the one whose semantics it has (`add_semantics`).

    What only this one has is left to the commands that make it. Raises UserError if the other one's class tokens or
    features are not the same any more.
    """
    there = {shard for column in other.manifest.columns.values() for shard in column.shards}
    for name, column in store.manifest.columns.items():
        for shard in column.shards:
            if is_whole(store.folder, shard):
                continue
            if shard in there:
                _link(other.folder / shard.file, store.folder / shard.file)
            elif name in ("cls", "features"):
                raise UserError(
                    f"{store.folder / shard.file} is missing or cut short, and {other.folder} has another one now; "
                    "choose a new folder"
                )


def _link(source: Path, target: Path) -> None:
    """A second name for a file of a store, or a copy on another disk. Files of stores are replaced, never changed."""
    beside = target.with_name(target.name + BESIDE)
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
        beside.replace(target)
        beside.unlink(missing_ok=True)  # Renaming does nothing where both are names of one file.
    except OSError:
        with replacing(target) as beside:
            shutil.copyfile(source, beside)
