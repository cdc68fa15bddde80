"""Opening images of whatever kind: folders, tar shards, parquet files, and whatever `datasets` loads.

Preparing resumes, and many processes share it, so images are read by their index. Three ways lead there without a
second copy on the disk: files of a folder, byte ranges of a tar file (found by `tarfile`), and rows of a parquet file
(found by pyarrow). `datasets` itself would first copy tar and parquet files into its own Arrow files, which doubles
the disk that they take; it is left to what only it can load: data sets it has saved, and the hub, which it downloads.
With `--streaming` it reads tar files, parquet files and the hub in order, and keeps nothing.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from braceexpand import braceexpand

from reglue.data.images import ImageFolder, ImageSource
from reglue.data.listing import is_hidden, list_runs
from reglue.data.reading import Reading, Subset
from reglue.data.sources import HUB, Chosen, Mirrored, Relabelled
from reglue.data.tars import TarImages, name_in_tar
from reglue.errors import UserError, option
from reglue.extras import need

DATA_FILES = (".tar", ".parquet")
MOST_FILES = 10**6
"""No pattern means more."""
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
"""The numbers from one to another, perhaps in steps, in a pattern."""


def is_on_hub(path: Path) -> bool:
    """Whether images are `hf:OWNER/NAME`, and no files here."""
    return str(path).startswith(HUB)


def open_images(
    path: Path, reading: Reading = Reading(), subset: Subset | None = None, flips: bool = False
) -> ImageSource:
    """Images at a path, of whatever kind is there.

    `path` is a folder of images, a .tar or .parquet file, a folder of such, a pattern (`shard-{00..99}.tar`,
    `*.parquet`), a data set that `datasets` has saved, or `hf:OWNER/NAME`. With `flips`, images 2i and 2i + 1 are an
    image and its mirror image. Raises UserError for what is missing or ambiguous.
    """
    images = _open_whole(path, reading)
    if subset:
        if images.sequential:
            raise UserError(
                f"{option('share')} and {option('per_class')} need all labels at once; leave them or "
                f"{option('streaming')} out"
            )
        images = Chosen(images, subset)
    return Mirrored(images) if flips else images


def _open_whole(path: Path, reading: Reading) -> ImageSource:
    if is_on_hub(path) or reading.streaming:
        return _load(path, reading)
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _tables().load_saved(path, reading)
    files = _files_in(path, reading) if path.is_dir() else _files(path, reading)
    if files and files[0].suffix == ".parquet":
        return _tables().ParquetImages(path, files, reading)
    images = TarImages(path, files, reading) if files else _open_folder(path, reading)
    return Relabelled(images, reading, name_in_tar if files else str) if reading.labels else images


def _load(path: Path, reading: Reading) -> ImageSource:
    """What `datasets` itself downloads or streams."""
    if is_on_hub(path):
        return _tables().load(path, (), reading)
    if not path.is_dir():
        return _tables().load(path, _files(path, reading), reading)
    files = _files_in(path, reading)
    if files and files[0].suffix == ".tar":  # `datasets` would take whatever files are more beside them.
        return _tables().load(path, files, replace(reading, split=None))
    return _tables().load(path, (), reading)


def _tables() -> ModuleType:
    need("reading tables and data sets", "datasets", "pyarrow")
    from reglue.data import tables  # Only now: `datasets` takes seconds to import.

    return tables


def _open_folder(path: Path, reading: Reading) -> ImageFolder:
    in_table = ("class_names", "image_column", "label_column") if reading.labels else ()
    for name in ("class_names", "image_column", "label_column", "configuration", "split"):
        if getattr(reading, name) and name not in in_table:
            raise UserError(f"{option(name)} is not for {path}, a folder of images; leave it out")
    if reading.no_labels or reading.labels:
        return ImageFolder.unlabelled(path)
    return ImageFolder.open(path, reading.class_level)


def _files(path: Path, reading: Reading) -> list[Path]:
    """The tar or parquet files that a path or a pattern means, in order."""
    if reading.split or reading.configuration:
        raise UserError(
            f"{option('split')} and {option('configuration')} are for data sets, not for {path}; name the files of one "
            "split"
        )
    files = [path] if path.exists() else _matches(path)
    for file in files:
        if file.suffix not in DATA_FILES:
            raise UserError(f"{file} is neither a folder nor a .tar or .parquet file; unpack it into a folder first")
        if not file.is_file():
            raise UserError(f"{file} is no file; give one folder, or name .tar or .parquet files")
    if len({file.suffix for file in files}) > 1:
        raise UserError(f"{path} means tar and parquet files; name the ones or the others")
    return files


def _matches(pattern: Path) -> list[Path]:
    """The files that a pattern means. As far as it is a folder that is there, its signs mean themselves."""
    folder = next(folder for folder in (*pattern.parents, Path()) if folder.is_dir())
    text = str(pattern.relative_to(folder) if folder.name else pattern)
    try:
        # braceexpand keeps every number in memory before it gives the first name.
        lengths = [abs(int(end) - int(start)) // (int(step or 1) or 1) + 1 for start, end, step in RANGE.findall(text)]
        if math.prod(lengths) > MOST_FILES:
            raise UserError(f"{pattern} means more than {MOST_FILES} files; name fewer, or their folder")
        names = braceexpand(text)
    except ValueError as error:
        raise UserError(f"{pattern} is not a pattern ({error}); write for example shard-{{00..99}}.tar") from error
    files: list[Path] = []
    for name in names:
        # Path.glob takes no pattern that begins at the root.
        found = [name] if (folder / name).exists() else sorted(glob.glob(name, root_dir=folder))  # noqa: PTH207
        if not found:
            raise UserError(f"{folder / name}: no such folder or file; give images, .tar, .parquet, or {HUB}OWNER/NAME")
        files += [folder / match for match in found]
    return files


def _files_in(folder: Path, reading: Reading) -> list[Path]:
    """The tar or parquet files of a folder and of its folders; none if it holds images."""
    found = list_runs(folder)
    beside = _data_files(folder)
    files = beside or _first_data_files([folder / name for name in found.folders])
    if not files:
        return []
    if found.images:
        raise UserError(f"{folder} holds images (such as {found.images[0]}) beside {files[0].name}; keep either")
    if len({file.suffix for file in files}) > 1:
        raise UserError(
            f"{folder} holds tar and parquet files, such as {files[0].name} and {files[-1].name}; name the ones or the "
            f"others by a pattern such as '{folder}/*{files[0].suffix}'"
        )
    return _tables().files_of_split(folder, files[0].suffix, beside, reading)


def _first_data_files(folders: Sequence[Path]) -> list[Path]:
    """The tar or parquet files of the first folder that has any; none if one before it holds images.

    To look into all of them would take as long as to list the images.
    """
    for folder in folders:
        if list_runs(folder).images:
            return []
        if files := _data_files(folder):
            return files
    return []


def _data_files(folder: Path) -> list[Path]:
    """The tar and parquet files in a folder, without the tables that img2dataset writes beside its tar files."""
    named = [file for file in sorted(folder.iterdir()) if file.suffix in DATA_FILES and not is_hidden(file.name)]
    files = [file for file in named if file.is_file()]  # A class may be called v1.tar.
    side_files = {file.with_suffix(".parquet") for file in files if file.suffix == ".tar"}
    return [file for file in files if file not in side_files]
