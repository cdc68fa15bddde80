"""`reglue verify`: whether the files of a store, or those that a run rests on, are the ones that were written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from reglue.data.manifest import MANIFEST, PARTIAL, is_intact, read_manifest
from reglue.data.store import Store
from reglue.encoders.compressors import CompressorSpec, load_compressor
from reglue.errors import UserError
from reglue.options.verify import Verify
from reglue.run import COMPRESSORS, RunRecord
from reglue.run import FILE as RECORD
from reglue.training import checkpoints


def verify(options: Verify) -> Path:
    """Read everything. Returns the folder.

    Every damaged file is named on stderr as it is found. Raises UserError if there is one, and for a folder that is
    neither a store nor a run.
    """
    folder = options.folder
    if (folder / RECORD).is_file():
        return verify_run(folder)
    if not any((folder / name).is_file() for name in (MANIFEST, PARTIAL)):
        raise UserError(f"{folder} has neither a {MANIFEST} nor a {RECORD}; give the folder of a store or a run")
    return verify_store(folder)


def verify_store(folder: Path) -> Path:
    """Compare shards and compressors of a store with its manifest. Raises UserError if any differs."""
    manifest = read_manifest(folder)
    shards = [shard for column in manifest.columns.values() for shard in column.shards]
    size = sum(shard.bytes for shard in shards)
    damaged: list[str] = []
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"verify {folder}") as progress:
        for shard in shards:
            before = progress.n
            if not is_intact(folder, shard, progress.update):
                damaged.append(shard.file)
                tqdm.write(f"{folder / shard.file} is missing or damaged", file=sys.stderr)
            progress.update(before + shard.bytes - progress.n)
    damaged += [f"compressors/{name}" for name in damaged_compressors(folder, manifest.compressors)]
    if damaged:
        raise UserError(
            f"{folder}: {len(damaged)} of {len(shards) + len(manifest.compressors)} parts are missing or damaged, "
            f"{damaged[0]} first; copy them again, or delete them and run the commands that made the store again"
        )
    print(f"{folder}: {len(shards)} files of {size:,} bytes in all are as they were written")
    return folder


def damaged_compressors(folder: Path, compressors: dict[str, CompressorSpec]) -> Iterator[str]:
    """The names of a store's compressors that are missing or others than those that made its codes."""
    for name, spec in compressors.items():
        try:
            intact = load_compressor(folder / "compressors" / name, "run `reglue compress` again").spec() == spec
        except UserError as error:
            print(error, file=sys.stderr)
            intact = False
        if not intact:
            yield name


def verify_run(folder: Path) -> Path:
    """Read checkpoints and compressor of a run, verify its store. Raises UserError for what is damaged or another."""
    record = RunRecord.read(folder)
    for step in tqdm(checkpoints.steps(folder), desc=f"read the checkpoints of {folder}", unit="checkpoint"):
        checkpoint = checkpoints.find(folder, step)
        # A run that was imported or shared has averaged weights alone.
        for_training = [checkpoint / name for name in (checkpoints.MODEL, checkpoints.OPTIMISER)]
        for file in (checkpoint / checkpoints.EMA, *(for_training if any(map(Path.exists, for_training)) else ())):
            checkpoints.read_weights(file)
    for modality, spec in record.compressors.items():
        compressor = folder / COMPRESSORS / modality
        if compressor.is_dir() and load_compressor(compressor, "copy it again").spec() != spec:
            raise UserError(f"{compressor} is not the compressor that the run was trained with; copy it again")
    print(f"{folder}: checkpoints {', '.join(map(str, checkpoints.steps(folder))) or '(none)'} can be read whole")
    if record.store is None or record.store_hash is None:
        return folder
    store = Path(record.store)
    if not store.is_dir():
        print(f"Its training store {store} is not there (any more), and was not verified.")
        return folder
    verify_store(store)
    if not record.trained_on(Store.open(store)):
        raise UserError(f"{store} is whole, but not the store that {folder} was trained on; put that one back")
    return folder
