"""Tables of labels in files: which column names the images, which one labels them, and which image a name means."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from reprlib import repr as brief
from typing import Any, NamedTuple

from reglue.data.labels import Label, read_text, whole_number
from reglue.data.listing import is_image
from reglue.errors import UserError, one_line, option

NAME_COLUMNS = (
    *("file", "file_name", "filename", "file_path", "filepath", "path"),
    *("image", "image_name", "image_file", "image_path", "img", "name", "image_id", "id"),
)
"""What columns with the names of images are called, the surest first."""
LABEL_COLUMNS = (
    *("label", "class", "category", "class_name", "label_name", "category_name", "target", "cls"),
    *("class_id", "class_label", "label_id", "category_id"),
)
"""What columns with labels are called, the surest first."""
NO_LABEL_COLUMNS = frozenset(
    (
        *("width", "height", "size", "w", "h", "area", "aspect_ratio", "channels", "format", "mode"),
        *("split", "subset", "set", "fold", "partition", "phase"),
        *("url", "uri", "link", "license", "author", "caption", "text", "prompt", "description"),
        *("bytes", "file_size", "filesize", "hash", "md5", "sha1", "sha256", "checksum"),
        *("date", "time", "datetime", "timestamp", "created", "score", "confidence", "weight", "bbox"),
    )
)
"""What columns are called that say something else of an image: of two columns, such a one is no label."""
REMEDY = f"call them {NAME_COLUMNS[1]} and {LABEL_COLUMNS[0]}"


class Asked(NamedTuple):
    """The columns that the user named, if any."""

    image: str | None = None
    label: str | None = None


class ImageNames:
    """The images that a table means.

    It may name an image by its path from the folder of the images or from its own, either without the ending, or by the
    last part of the path alone.
    """

    def __init__(self, names: Collection[str], images: Path, table: Path, named: Callable[[str], str] = str):
        """`named` turns a name in the table into the name here: a.JPG of a tar file is a.jpg."""
        self._names, self._named = set(names), named
        self._images, self._table = images.absolute(), table.absolute().parent

    def meant(self, name: str) -> list[str]:
        """The names here that a name may mean: none, one or several."""
        written = PurePosixPath(name if name in self._names else name.replace("\\", "/"))
        for path in (str(written), os.path.relpath(self._table / written, self._images)):
            for spelled in (path, self._named(path)):
                if spelled in self._names:
                    return [spelled]
            if path in self._without_ending:
                return self._without_ending[path]
        return self._last_parts.get(str(written)) or self._last_parts.get(self._named(str(written)), [])

    @cached_property
    def _without_ending(self) -> dict[str, list[str]]:
        return _grouped((_stem(name), name) for name in self._names)

    @cached_property
    def _last_parts(self) -> dict[str, list[str]]:
        parts = [(name.rpartition("/")[2], name) for name in self._names]
        return _grouped({*parts, *((_stem(part), name) for part, name in parts)})


def read_table(file: Path, images: ImageNames, asked: Asked = Asked()) -> dict[str, Label]:
    """A label for each image, by its name here.

    `.csv` and `.tsv` (whatever stands between columns: a comma, a semicolon, a tab) and `.jsonl`, or a list of objects
    in `.json`, have columns: those that are asked for, those that are called as `NAME_COLUMNS` and `LABEL_COLUMNS`, or
    of two the other one, unless it is one of `NO_LABEL_COLUMNS`. Two columns need no heading. `.json` may also be
    {"name": label, …}, or the dataset.json of ADM and EDM, {"labels": [["name", number], …]}. Raises UserError for
    anything else, naming the line or image, or listing the columns.
    """
    readers = {".csv": _separated, ".tsv": _separated, ".json": _json, ".jsonl": _json_lines}
    if file.suffix.lower() not in readers:
        raise UserError(f"{option('labels')} {file}: give a .csv or a .json file, a .tsv or a .jsonl")
    table: dict[str, Label] = {}
    for name, label in readers[file.suffix.lower()](file, images, asked):
        name = str(name) if isinstance(name, int) else name
        if not isinstance(label, str):
            label = whole_number(label) if whole_number(label) is not None else label
        if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, Label) or label == "":
            raise UserError(
                f"{file}: {brief(name)} has label {brief(label)}; give every image a name or a whole number"
            )
        meant = images.meant(name) or [PurePosixPath(name).as_posix()]
        if len(meant) > 1:
            raise UserError(f"{file} has {name}, which may be {min(meant)} or {max(meant)}; write out its path")
        if meant[0] in table:
            raise UserError(f"{file} has {meant[0]} twice; keep one of its lines")
        table[meant[0]] = label
    if not table:
        raise UserError(f"{file} labels no image; give each a line with its file and its label")
    return table


def look_up(table: dict[str, Label], names: Collection[str], file: Path, path: Path) -> list[Label]:
    """The labels of images in the order of their names. Raises UserError unless images and table match one to one."""
    unlabelled = [name for name in names if name not in table]
    missing = sorted(table.keys() - set(names))
    if unlabelled:
        raise UserError(f"{file} has no label for {_some(unlabelled)} of {path}; add one, or remove the image")
    if missing:
        raise UserError(f"{file} has a label for {_some(missing)}, which {path} lacks; put it back, or remove the line")
    return [table[name] for name in names]


def _separated(file: Path, images: ImageNames, asked: Asked) -> Iterator[tuple[str, str]]:
    text = read_text(file)

    def parsed(delimiter: str) -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        return ((reader.line_num, [cell.strip() for cell in row]) for row in reader)

    try:
        # What makes the most columns of the first line; of equals, what the file's ending promises.
        delimiters = "\t,;" if file.suffix.lower() == ".tsv" else ",;\t"
        delimiter = max(delimiters, key=lambda delimiter: len(next(parsed(delimiter), (0, []))[1]))
        rows = [(line, row) for line, row in parsed(delimiter) if any(row)]
    except csv.Error as error:
        raise UserError(f"{file} is not CSV: {error}") from error
    if not rows:
        return
    first = rows[0][1]
    if _is_heading(first, images, asked):
        rows = rows[1:]
        at = _columns(file, first, rows[0][1] if rows else (), images, asked)
    elif len(first) == 2 and not any(asked):
        at = _columns(file, ("", ""), first, images, asked)
    else:
        raise UserError(f"{file} has {len(first)} columns without names (the first line is {brief(first)}); {REMEDY}")
    for line, row in rows:
        if len(row) <= max(at):
            raise UserError(f"{file}, line {line}: it has {len(row)} column(s); give the image's file and its label")
        yield row[at[0]], row[at[1]]


def _json(file: Path, images: ImageNames, asked: Asked) -> Iterator[tuple[Any, Any]]:
    # Pairs and not a dict, which would keep the last of several labels without a word.
    content = _parsed(file, read_text(file), list)
    if isinstance(content, list) and content and all(_is_pairs(row) and row for row in content):
        yield from _objects(file, content, images, asked)
        return
    pairs = content[0][1] if _is_pairs(content) and content and content[0][0] == "labels" else content
    if not _is_pairs(pairs):
        raise UserError(f'{file} labels no images; write {{"FILE": LABEL, …}} or {{"labels": [["FILE", LABEL], …]}}')
    yield from (tuple(pair) for pair in pairs)


def _json_lines(file: Path, images: ImageNames, asked: Asked) -> Iterator[tuple[Any, Any]]:
    lines = [line for line in io.StringIO(read_text(file), newline=None) if line.strip()]
    return _objects(file, [_parsed(file, line, list) for line in lines], images, asked)


def _objects(file: Path, rows: list[Any], images: ImageNames, asked: Asked) -> Iterator[tuple[Any, Any]]:
    """Rows that are objects, each as pairs of a key and a value: its keys are the columns."""
    if not all(map(_is_pairs, rows)):
        raise UserError(f'{file} labels no images; write {{"{NAME_COLUMNS[1]}": FILE, "{LABEL_COLUMNS[0]}": LABEL}}')
    heading = [key for key, _ in rows[0]] if rows else []
    at = _columns(file, heading, [value for _, value in rows[0]], images, asked) if rows else (0, 0)
    for number, row in enumerate(map(dict, rows), 1):
        for column in (heading[index] for index in at):
            if column not in row:
                raise UserError(f"{file}: object {number} has no {column}; give each the image's file and its label")
        yield row[heading[at[0]]], row[heading[at[1]]]


def _is_heading(row: Sequence[str], images: ImageNames, asked: Asked) -> bool:
    """Whether the first row of a table names columns, and not an image."""
    known = {*asked, *LABEL_COLUMNS}
    return not {*row, *map(_plain, row)}.isdisjoint(known) or not any(
        is_image(cell) or images.meant(cell) for cell in row
    )


def _columns(
    file: Path, heading: Sequence[str], row: Sequence[Any], images: ImageNames, asked: Asked
) -> tuple[int, int]:
    """Which columns hold names and labels; `row` is the first one. Raises UserError where that cannot be told."""
    has = f"it has {', '.join(map(str, heading))}"
    for field, column in zip(("image_column", "label_column"), asked, strict=True):
        if column and heading.count(column) != 1:
            raise UserError(
                f"{file} has {heading.count(column) or 'no'} column {column} ({has}); change {option(field)}"
            )

    def called(asked: str | None, known: Sequence[str]) -> list[int]:
        if asked:
            return [heading.index(asked)]
        return [at for name in known for at, column in enumerate(heading) if _plain(column) == name]

    names, labels = called(asked.image, NAME_COLUMNS), called(asked.label, LABEL_COLUMNS)
    naming = [at for at, cell in enumerate(row) if isinstance(cell, str | int) and images.meant(str(cell))]
    names = [at for at in names if at in naming] or names
    if len(heading) == 2:  # One column tells the other.
        names = names or naming or [1 - at for at in labels] or [0]
        other = 1 - names[0]
        labels = [at for at in labels if at == other] or [other] * (_plain(heading[other]) not in NO_LABEL_COLUMNS)
    if not names or not labels:
        what, field = ("labels", "label_column") if names else ("names of images", "image_column")
        raise UserError(f"{file} has no column that is known to hold {what} ({has}); name it with {option(field)}")
    for at in (names[0], labels[0]):
        if heading[at] and list(heading).count(heading[at]) > 1:
            raise UserError(f"{file} has two columns {heading[at]} ({has}); rename one")
    return names[0], labels[0]


def _parsed(file: Path, text: str, pairs: Callable[[list[tuple[str, Any]]], Any]) -> Any:
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {one_line(error)}") from error


def _is_pairs(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in content)


def _plain(column: Any) -> str:
    """The name of a column without its capitals, blanks and dashes."""
    return str(column).strip().lower().replace(" ", "_").replace("-", "_")


def _stem(name: str) -> str:
    """A name without the ending of an image's file."""
    return name.rpartition(".")[0] if is_image(name) else name


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
