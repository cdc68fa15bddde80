"""What of each kind of folder or file can be read, so that `reglue verify` knows whether it is still as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from zipfile import ZipFile

import torch

from reglue import graphs
from reglue.arrays import ArrayFile
from reglue.contact_sheet import TABLE, holds, read_hashes, refuse_changed, table
from reglue.contact_sheet import picture as picture_name
from reglue.data.images import open_picture
from reglue.data.manifest import Shard, is_intact, read_manifest
from reglue.editing.folder import RECORD as EDITS
from reglue.editing.folder import read_record as read_edits
from reglue.editing.options import SHEET
from reglue.editing.painting import load_prototypes
from reglue.encoders.alignment import FILE as ALIGNMENT
from reglue.encoders.alignment import load_alignment
from reglue.encoders.autoencoders import DIFFUSERS_WEIGHTS, PART_OF_PIPELINE, load_autoencoder
from reglue.encoders.compressors import CompressorSpec, load_compressor
from reglue.errors import UserError, one_line
from reglue.files import file_sha256, opened_tensors, read_json
from reglue.perception import records
from reglue.perception.heads import TRAINING as HEAD_RECORD
from reglue.perception.heads import load_head
from reglue.perception.records import HeadRecord
from reglue.portable import CODE, INDEX, NODES, TRANSFORMER, pipeline_record, template
from reglue.published.containers import read_official
from reglue.reals.record import CONFIG, TrainingRecord
from reglue.reals.record import RECORD as TRAINING_RECORD
from reglue.run import COMPRESSORS, RunRecord, decoder
from reglue.samples import PROTOCOL, archived_protocol, read_protocol
from reglue.training import checkpoints, tracking

COPY = "copy it again, or delete it and run the command that made it again"


@dataclass(frozen=True)
class Check:
    """Something to be read: a file, or a folder whose files belong together."""

    path: Path
    read: Callable[[], object]
    """Raises UserError if it is missing or damaged."""

    @property
    def size(self) -> int:
        """In bytes."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


def store(folder: Path) -> Iterator[Check]:
    """The shards and compressors of a store."""
    manifest = read_manifest(folder)
    for column in manifest.columns.values():
        for shard in column.shards:
            yield Check(folder / shard.file, lambda shard=shard: whole_shard(folder, shard))
    for name, spec in manifest.compressors.items():
        yield compressor(folder / COMPRESSORS / name, spec)


def whole_shard(folder: Path, shard: Shard) -> None:
    """Raises UserError if a file of a store is not the one in its manifest."""
    if not is_intact(folder, shard):
        raise UserError(f"{folder / shard.file} is missing or damaged; {COPY}")


def compressor(folder: Path, spec: CompressorSpec) -> Check:
    """A compressor whose codes are known by its specification."""

    def read() -> None:
        if load_compressor(folder, COPY).spec() != spec:
            raise UserError(f"{folder} is not the compressor of the codes that were made with it; {COPY}")

    return Check(folder, read)


def run(folder: Path) -> Iterator[Check]:
    """The record, log, checkpoints, compressors, pictures and the autoencoder of a run."""
    record = RunRecord.read(folder)
    yield from training(folder)
    if (folder / graphs.DESCRIPTION).is_file():
        described = graphs.Description.read(folder)
        yield from (Check(folder / g.file, partial(whole_file, folder / g.file, g.sha256)) for g in described.graphs)
    if (folder / NODES).is_file():
        yield code(folder / NODES, "nodes.py")
    if record.origin is not None and not checkpoints.steps(folder):
        # Who trains a run may not have come to a checkpoint; who imports one has it at once.
        yield Check(folder / checkpoints.FOLDER, partial(checkpoints.find, folder))
    for modality, spec in record.compressors.items():
        if (place := folder / COMPRESSORS / modality).is_dir():
            yield compressor(place, spec)
    own = folder / (record.decoder or record.autoencoder.name)
    if own.is_dir() and own.is_relative_to(folder):
        yield Check(own, lambda: decoder(record, torch.device("cpu"), folder=folder))


def pipeline(folder: Path) -> Iterator[Check]:
    """The record, the code and the networks of a run as a pipeline of diffusers."""
    yield Check(folder / INDEX, lambda: pipeline_record(folder))
    yield code(folder / CODE, CODE)
    decoder = folder / PART_OF_PIPELINE
    yield Check(decoder / CONFIG, lambda: load_autoencoder(str(decoder)))
    for part in (folder / TRANSFORMER, decoder):
        yield from map(tensors, sorted(part.glob("*.safetensors")) or [part / DIFFUSERS_WEIGHTS])


def code(file: Path, name: str) -> Check:
    """A file of code in an exported folder, which another program runs: one of `portable.templates`."""

    def read() -> None:
        if not file.is_file() or file.read_bytes() != template(name).encode():
            raise UserError(f"{file} is missing or is not the code that was written; {COPY}")

    return Check(file, read)


def training(folder: Path) -> Iterator[Check]:
    """What every training writes: log, checkpoints and previews."""
    yield Check(folder / tracking.FILE, lambda: tracking.read(folder))
    for checkpoint in sorted((folder / checkpoints.FOLDER).glob("[0-9]" * 8)):
        yield Check(checkpoint / checkpoints.PROGRESS, partial(checkpoints.read_step, checkpoint))
        if any((checkpoint / name).is_file() for name in (checkpoints.GRAPH, checkpoints.PROGRAM)):
            continue  # Of an exported run: see `run`.
        # A run that was imported or shared has averaged weights alone.
        others = [checkpoint / name for name in (checkpoints.MODEL, checkpoints.OPTIMISER)]
        yield from map(tensors, [checkpoint / checkpoints.EMA, *(others if any(map(Path.exists, others)) else ())])
    yield from map(picture, [*sorted(folder.glob("previews/*.png")), *folder.glob(tracking.PROGRESS)])


def tensors(file: Path) -> Check:
    """A tensor file with its hash in its header."""

    def read() -> None:
        with opened_tensors(file, COPY, sealed=True):
            pass

    return Check(file, read)


def picture(file: Path, hashes: Mapping[str, str] = MappingProxyType({})) -> Check:
    """A PNG file, whose parts have sums of their own, and perhaps a hash by its name."""

    def read() -> None:
        try:
            with open_picture(file) as opened:
                opened.verify()
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{file} is missing or damaged ({one_line(error)}); {COPY}") from error
        refuse_changed(file, hashes)

    return Check(file, read)


def autoencoder(folder: Path) -> Iterator[Check]:
    """What `reglue autoencode` writes: the record, the training and, once it is done, the result."""
    record = read_json(folder / TRAINING_RECORD, TrainingRecord, COPY)
    yield from training(folder)
    if record.steps_done == record.recipe.optimisation.steps:
        yield Check(folder / CONFIG, lambda: load_autoencoder(str(folder)))
        yield tensors(folder / DIFFUSERS_WEIGHTS)
        if record.recipe.alignment.present:
            yield Check(folder / ALIGNMENT, lambda: load_alignment(folder))


def head(folder: Path) -> Iterator[Check]:
    """What `reglue head` writes."""
    yield Check(folder, lambda: load_head(folder))
    yield Check(folder / HEAD_RECORD, lambda: read_json(folder / HEAD_RECORD, HeadRecord, COPY))


def samples(folder: Path) -> Iterator[Check]:
    """The pictures of a folder that `reglue sample` writes, and the table that describes them."""
    protocol = read_protocol(folder / PROTOCOL)
    yield Check(folder / PROTOCOL, lambda: read_protocol(folder / PROTOCOL))
    yield Check(folder / TABLE, lambda: whole_table(folder, protocol))
    hashes = read_hashes(folder)
    yield from (picture(folder / file, hashes) for file in hashes)


def whole_table(folder: Path, protocol: Mapping[str, Any]) -> None:
    """Raises UserError if the table of samples lacks a picture that was to be drawn, or is not as the protocol is."""
    hashes, wanted = read_hashes(folder), [*map(picture_name, range(len(protocol["labels"])))]
    if missing := [name for name in wanted if name not in hashes]:
        raise UserError(
            f"{folder / TABLE} does not have all {len(wanted)} pictures ({missing[0]} is missing); `reglue sample` "
            "with the same options adds them"
        )
    if not holds(folder / TABLE, table(protocol, {name: hashes[name] for name in wanted})):
        raise UserError(
            f"{folder / TABLE} is damaged (it does not say of the pictures what {PROTOCOL} does); delete it, and "
            "`reglue sample` with the same options writes it again"
        )


def archive(file: Path) -> Iterator[Check]:
    """The members of an archive, which have sums of their own; one of samples has a hash of all of it, too."""

    def read() -> None:
        try:
            with ZipFile(file) as opened:
                if broken := opened.testzip():
                    raise ValueError(f"{broken} in it is not what was written")
        except Exception as error:  # Bytes that mean nothing can end anywhere in zipfile and its compressions.
            raise UserError(f"{file} is damaged ({one_line(error)}); {COPY}") from error
        ArrayFile(file).refuse_changed(sealed=archived_protocol(file) is not None)

    yield Check(file, read)


def edits(folder: Path) -> Iterator[Check]:
    """The pictures of a folder that `reglue edit` writes, and the record with their hashes."""
    record = read_edits(folder)
    yield Check(folder / EDITS, lambda: whole_edits(folder))
    yield picture(folder / SHEET)
    yield from (picture(folder / file, record.pictures) for file in record.pictures)


def whole_edits(folder: Path) -> None:
    """Raises UserError if the record of edits does not have as many pictures as were to be drawn."""
    record = read_edits(folder)
    if len(record.pictures) < len(record.images) * record.count:
        raise UserError(
            f"{folder / EDITS} does not have all {len(record.images) * record.count} pictures; `reglue edit` with the "
            "same options adds them"
        )


def prototypes(folder: Path) -> Iterator[Check]:
    """What `reglue prototypes` writes."""
    yield Check(folder, lambda: load_prototypes(folder))


def dataset(folder: Path) -> Iterator[Check]:
    """What `reglue synthesise` writes: all files that its record has the hashes of."""
    record = records.read_record(folder)
    yield Check(folder / records.RECORD, lambda: whole_dataset(folder))
    yield from (Check(folder / name, partial(whole_file, folder / name, sha)) for name, sha in record.files.items())


def whole_dataset(folder: Path) -> None:
    """Raises UserError if the record of a data set does not have all images that were to be drawn."""
    record, rows = records.read_record(folder), records.read_rows(folder)
    if records.JOURNAL not in record.files or len(rows) < len(record.protocol.get("labels", ())):
        raise UserError(
            f"{folder / records.RECORD} does not have all images; `reglue synthesise` with the same options adds them"
        )


def whole_file(file: Path, digest: str) -> None:
    """Raises UserError if a file is not the one that was written."""
    if not file.is_file() or file_sha256(file) != digest:
        raise UserError(f"{file} is missing or damaged; {COPY}")


def published(file: Path) -> Iterator[Check]:
    """A published checkpoint, which has no hash to compare: whether it can be read."""
    yield Check(file, lambda: read_official(file))
