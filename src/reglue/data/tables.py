"""Images in tables: parquet files, and what `datasets` loads. On its own because these libraries take long to load."""

from __future__ import annotations

import glob
import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from reglue.data.images import ImageSource, OneAtATime, UnreadableImage
from reglue.data.label_tables import LABEL_COLUMNS
from reglue.data.labels import ClassIndex, index_labels
from reglue.data.reading import Reading
from reglue.data.sources import HUB, Computed, class_names_of, distinct_names, repeated
from reglue.errors import UserError, one_line, option

ROWS_AT_ONCE = 16
"""Rows of a parquet file that are held in memory together."""


def load(path: Path, files: Sequence[Path], reading: Reading) -> ImageSource:
    """What `datasets` loads by itself: from the hub, a folder, or tar or parquet files; downloaded or streamed.

    Raises UserError for whatever fails there.
    """
    builder = _builder(path, files, reading)
    split = _choose_split(builder.info.splits or builder.config.data_files or (), path, reading)
    with _loading(path):
        if reading.streaming:
            stream = cast(datasets.IterableDataset, builder.as_streaming_dataset(split))
            return StreamedImages(path, stream, reading, split)
        builder.download_and_prepare()
        return DatasetImages(path, cast(datasets.Dataset, builder.as_dataset(split)), reading)


def load_saved(path: Path, reading: Reading) -> ImageSource:
    """What `save_to_disk` of `datasets` has written. Raises UserError for whatever fails there."""
    with _loading(path):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_choose_split(saved, path, reading)]
        elif reading.split:
            raise UserError(f"{path} has no splits; leave {option('split')} out")
        return DatasetImages(path, saved, reading)


@contextmanager
def _loading(path: Path) -> Iterator[None]:
    """Whatever goes wrong in the block, in one line: `datasets` raises errors of network, disk and every format."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"`datasets` cannot load {path}: {one_line(error)}") from error


def files_of_split(folder: Path, ending: str, files: Sequence[Path], reading: Reading) -> list[Path]:
    """The data files of a folder, by their ending, that make up the split asked for, as `datasets` sorts them.

    Raises UserError if it would pass over one of `files`.
    """
    builder = _builder(folder, (), reading, ending)
    splits = {
        str(name): sorted(path for path in map(Path, found) if path.suffix == ending)
        for name, found in (builder.config.data_files or {}).items()
    }
    splits = {name: found for name, found in splits.items() if found}
    taken = {file.resolve() for found in splits.values() for file in found}
    for file in files:
        if file.resolve() not in taken:
            raise UserError(
                f"`datasets` sorts the files of {folder} into splits by their names and passes over {file.name}; "
                f"rename it, or name the files by a pattern such as '{folder}/*{file.suffix}'"
            )
    return splits[_choose_split(splits, folder, reading)]


def _builder(path: Path, files: Sequence[Path], reading: Reading, ending: str = "") -> datasets.DatasetBuilder:
    """What `datasets` knows of files, or of a path; `ending` is that of the data files in a folder."""
    kinds = {".tar": "webdataset", ".parquet": "parquet"}
    place = str(path).removeprefix(HUB)
    with _loading(path):
        if files:  # They are patterns there, as folders are.
            patterns = [glob.escape(str(file.resolve())) for file in files]
            return datasets.load_dataset_builder(kinds[files[0].suffix], data_files=patterns)
        if ending == ".tar" or (ending and glob.has_magic(str(path.resolve()))):
            return datasets.load_dataset_builder(kinds[ending], data_dir=glob.escape(str(path.resolve())))
        return datasets.load_dataset_builder(place, reading.configuration)


def _choose_split(splits: Iterable[Any], path: Path, reading: Reading) -> str:
    known = [str(name) for name in splits]
    wanted = reading.split or (known[0] if len(known) == 1 else "train")
    if known and wanted not in known:
        raise UserError(f"{path} has no split {wanted} (it has {', '.join(known)}); choose one with {option('split')}")
    return wanted


class _Columns(NamedTuple):
    """What to read of a table."""

    image: str
    label: str | None
    class_names: tuple[str, ...] | None
    """None where the table does not list them."""


class _TableImages(ImageSource):
    """The images of a table, whose rows one thread reads at a time."""

    def __init__(self, path: Path, names: Sequence[str], columns: _Columns, labels: Sequence[Any] | None):
        """`labels` are those of all rows, None where there are no classes. Raises UserError for ambiguous ones."""
        self.path, self.names, self._columns = path, names, columns
        self.labels = Computed(len(names), lambda _: 0)
        if labels is not None:
            self.labels, self.class_names = index_labels(labels, names.__getitem__, columns.class_names, str(path))
        self._one_at_a_time = OneAtATime()

    def find(self, index: int) -> Path | bytes:
        """See `ImageSource.find`."""
        with self._one_at_a_time:
            return _file_of(self._cell(index))

    @abstractmethod
    def _cell(self, index: int) -> Any:
        """What the table has for an image."""


class ParquetImages(_TableImages):
    """The images of parquet files. A row is named FILE/ROW, with the folders of FILE where two files have one name.

    Rows are read `ROWS_AT_ONCE` at a time, forwards from the beginning of their row group.
    """

    def __init__(self, path: Path, files: Sequence[Path], reading: Reading):
        """Raises UserError for a damaged file, one named twice, and for ambiguous columns or labels."""
        self._files, self._file_names = files, distinct_names(path, files)
        self._groups: list[tuple[int, int]] = []  # File and group within the file.
        ends: list[int] = []
        file_starts: list[int] = []
        labels: list[Any] = []
        columns: _Columns | None = None
        for index, file in enumerate(files):
            with _parquet(file) as opened:
                found = _columns(_features(file, opened.schema_arrow), reading, file)
                if columns and found != columns:
                    raise UserError(f"{file} has other columns than {files[0]}; choose files of one kind")
                columns = found
                file_starts.append(ends[-1] if ends else 0)
                for group, rows in enumerate(_rows_of_groups(opened)):
                    self._groups.append((index, group))
                    ends.append((ends[-1] if ends else 0) + rows)
                if columns.label:
                    labels += opened.read([columns.label]).column(columns.label).to_pylist()
                    if len(labels) != (ends[-1] if ends else 0):
                        raise ValueError("its columns are of different lengths")
        if columns is None or not ends or not ends[-1]:
            raise UserError(f"{path} holds no images: its tables have no rows")
        self._ends, self._file_starts, self._rows = ends, file_starts, _Rows()
        super().__init__(path, Computed(ends[-1], self._name), columns, labels if columns.label else None)

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes, of the columns and of the labels."""
        sizes = [(name, file.stat().st_size) for name, file in zip(self._file_names, self._files, strict=True)]
        digest = hashlib.sha256(repr((self._columns, sizes)).encode())
        digest.update(np.asarray(self.labels, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def _name(self, index: int) -> str:
        file = bisect_right(self._file_starts, index) - 1
        return f"{self._file_names[file]}/{index - self._file_starts[file]}"

    def _cell(self, index: int) -> Any:
        group = bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        rows = self._rows
        if rows.group != group or row < rows.start:
            file, within = self._groups[group]
            rows = _Rows(group, iter(_batches(self._files[file], within, self._columns.image)))
        self._rows = _Rows()  # As long as it may fail: a generator that has failed gives no reason again.
        while row >= rows.start + len(rows.cells):
            rows.start += len(rows.cells)
            rows.cells = next(rows.ahead, ())
            if not len(rows.cells):
                raise ValueError("the file has fewer rows than it says")
        self._rows = rows
        return rows.cells[row - rows.start].as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": _Rows()}  # A process reads its own files.


@dataclass
class _Rows:
    """Where reading a row group has come to."""

    group: int = -1
    ahead: Iterator[Any] = iter(())
    start: int = 0
    cells: Any = ()


def _batches(file: Path, group: int, column: str) -> Iterator[pa.Array]:
    with _parquet(file) as opened:
        for batch in opened.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
            yield batch.column(0)


@contextmanager
def _parquet(file: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file, open in the block. Raises UserError for whatever goes wrong there: any damage, in one line."""
    try:
        with pq.ParquetFile(file, memory_map=True) as opened:
            yield opened
    except UserError:
        raise
    except Exception as error:  # Arrow and `datasets` raise nearly anything for damaged metadata.
        raise UserError(f"{file} is not a whole parquet file ({one_line(error)}); fetch it again") from error


def _features(file: Path, schema: pa.Schema) -> datasets.Features:
    """The columns of a parquet file as `datasets` knows them."""
    if twice := repeated(schema.names):
        raise UserError(f"{file} has two columns called {twice}; rename one")
    try:
        return datasets.Features.from_arrow_schema(schema)
    except Exception as error:  # It trusts what its own metadata say.
        raise UserError(
            f"{file} has metadata that `datasets` cannot read ({one_line(error)}); write the file again without them"
        ) from error


def _rows_of_groups(opened: pq.ParquetFile) -> list[int]:
    """The rows of each row group. Raises ValueError where they cannot be."""
    rows = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != opened.metadata.num_rows:
        raise ValueError(f"its {opened.metadata.num_rows} rows are not those of its row groups")
    return rows


class DatasetImages(_TableImages):
    """The images of a `datasets.Dataset`. They are named row-0, row-1 and so on."""

    def __init__(self, path: Path, dataset: datasets.Dataset, reading: Reading):
        """Raises UserError for ambiguous columns or labels."""
        columns = _columns(dataset.features, reading, path)
        self._dataset = _undecoded(dataset, columns)
        labels = dataset.select_columns([columns.label])[:][columns.label] if columns.label else None
        super().__init__(path, Computed(len(dataset), _row_name), columns, labels)

    def _cell(self, index: int) -> Any:
        return self._dataset[index][self._columns.image]

    def fingerprint(self) -> str:
        """SHA-256 of the labels and of the sizes of the images."""
        digest = hashlib.sha256(repr((self._columns.image, self.class_names)).encode())
        digest.update(np.asarray(self.labels, dtype=np.int64).tobytes())
        with _loading(self.path):
            for batch in self._dataset.with_format("arrow").iter(1000):  # As Arrow, the images themselves are not read.
                cells = batch[self._columns.image]
                if pa.types.is_struct(cells.type):
                    cells = pc.call_function("struct_field", [cells], pc.StructFieldOptions("bytes"))
                sizes = pc.call_function("binary_length", [cells])
                digest.update(repr(sizes.to_pylist()).encode())
        return digest.hexdigest()


class StreamedImages(ImageSource):
    """The first `count` images of a `datasets.IterableDataset`, read in order, named row-0, row-1 and so on."""

    sequential = True

    def __init__(self, path: Path, stream: datasets.IterableDataset, reading: Reading, split: str):
        """Raises UserError if neither the stream nor the user states its columns, classes and length."""
        self.path = path
        if stream.features is None:
            raise UserError(f"{path} does not list its columns until it is read; leave {option('streaming')} out")
        columns = _columns(stream.features, reading, path)
        if columns.label and columns.class_names is None:
            raise UserError(
                f"{path} does not list its classes until it is read; name them with "
                f"{option('class_names')}, or use {option('no_labels')}"
            )
        known = stream.info.splits[split].num_examples if stream.info.splits and split in stream.info.splits else None
        count = reading.count or known
        if not count:
            raise UserError(f"{path} does not state how many images it has; choose a number with {option('count')}")
        self._count = count
        self._columns = columns
        self._stream = _undecoded(stream, columns)
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._next, self._row = -1, {}
        self.names = Computed(count, _row_name)
        self.labels = Computed(count, self._label)
        self.class_names = columns.class_names or ()
        self._class_index = ClassIndex(self.class_names, str(path))

    def load(self, index: int, resolution: tuple[int, int]) -> Tensor | UnreadableImage:
        """As every source. Raises UserError if the stream has fewer images than `count`, or cannot be read on."""
        self._at(index)
        return super().load(index, resolution)

    def find(self, index: int) -> Path | bytes:
        """See `ImageSource.find`."""
        return _file_of(self._at(index)[self._columns.image])

    def fingerprint(self) -> str:
        """SHA-256 of its name, columns, classes and length: nothing else is known of it before it is read."""
        info = self._stream.info
        about = (str(self.path), info.config_name, self._columns, info.dataset_size, self._count)
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def _label(self, index: int) -> int:
        if not self._columns.label:
            return 0
        row = self._at(index)
        label = row[self._columns.label] if self._columns.label in row else row["json"][self._columns.label]
        return self._class_index(label, _row_name(index))

    def _at(self, index: int) -> dict[str, Any]:
        """A row. The last one is kept; going back starts again."""
        if index == self._next - 1:
            return self._row
        try:
            if index < self._next or self._next < 0:
                self._rows, self._next = iter(self._stream.skip(index)), index
            while self._next <= index:
                self._row = next(self._rows)
                self._next += 1
        except StopIteration:
            raise UserError(
                f"{self.path} ends before image {index} of {option('count')} {self._count}; lower it"
            ) from None
        except Exception as error:  # The network and any file format may fail here.
            self._next = -1
            raise UserError(f"cannot read on in {self.path} ({one_line(error)}); run the same again") from error
        return self._row


def _columns(features: datasets.Features, reading: Reading, path: Path) -> _Columns:
    """Which columns hold images and labels: those that were named, or the only ones that can."""
    has = f"it has {', '.join(features)}"
    if reading.labels:
        raise UserError(
            f"{option('labels')} is for folders and tar shards; name a column of {path} with "
            f"{option('label_column')} ({has})"
        )
    for name in ("image_column", "label_column"):
        column = getattr(reading, name)
        in_json = name == "label_column" and column in _keys_of_json(features)
        if column is not None and column not in features and not in_json:
            raise UserError(f"{path} has no column {column} ({has}); change {option(name)}")
    image = reading.image_column
    if image is None:
        typed = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        possible = typed or [name for name, kind in features.items() if _may_be_image(kind)]
        if len(possible) != 1:
            raise UserError(
                f"{path} has {len(possible) or 'no'} columns of images ({has}); name one with {option('image_column')}"
            )
        image = possible[0]
    elif not _may_be_image(features[image]):
        raise UserError(f"column {image} of {path} holds no image files ({has}); change {option('image_column')}")
    if reading.no_labels:
        return _Columns(image, None, None)
    label = reading.label_column or _label_column(features, path)
    kind = features.get(label)
    own = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) and kind.names else None
    if own and not all(isinstance(name, str) for name in own):
        raise UserError(
            f"{path} has classes in column {label} whose names are no text; name them with {option('class_names')}"
        )
    return _Columns(image, label, class_names_of(reading) or own)


def _label_column(features: datasets.Features, path: Path) -> str:
    typed = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    possible = typed or [name for name in LABEL_COLUMNS if name in features][:1]
    if not possible and "label" in _keys_of_json(features):
        possible = ["label"]
    if len(possible) != 1:
        raise UserError(
            f"{path} has {len(possible) or 'no'} columns of labels (it has {', '.join(features)}); name one with "
            f"{option('label_column')}, or use {option('no_labels')}"
        )
    return possible[0]


def _keys_of_json(features: datasets.Features) -> Iterable[str]:
    """What a sample of WebDataset may have in its .json."""
    return features["json"] if isinstance(features.get("json"), dict) else ()


def _may_be_image(kind: Any) -> bool:
    if isinstance(kind, dict):
        return "bytes" in kind
    return isinstance(kind, datasets.Image) or (isinstance(kind, datasets.Value) and "binary" in kind.dtype)


def _undecoded(dataset: Any, columns: _Columns) -> Any:
    """A data set, or a stream of one, that gives image files as they are: they are decoded by our rules."""
    for name, kind in dataset.features.items():
        if isinstance(kind, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    wanted = [name for name in {columns.image, columns.label, "json"} if name in dataset.features]
    return dataset.select_columns(wanted)


def _file_of(cell: Any) -> Path | bytes:
    """The image file in a cell: its content, or where it is."""
    content, path = (cell, None) if isinstance(cell, bytes) else ((cell or {}).get(key) for key in ("bytes", "path"))
    if content is not None:
        return content
    if path:
        return Path(path)
    raise ValueError("the row has no image")


def _row_name(index: int) -> str:
    return f"row-{index}"
