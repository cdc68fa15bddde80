"""Classes of images: from whatever labels them to the index of each class, and tables of labels in files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from reglue.data.images import is_image
from reglue.errors import UserError, option

Label = str | int
"""The name of a class, or its number."""


class ClassIndex:
    """From a label to the index of its class.

    Numbers are indices of the class names. Raises UserError for a label that has no class.
    """

    def __init__(self, names: Sequence[str], owner: str):
        self.names, self.owner = tuple(names), owner
        self._index_of = {name: index for index, name in enumerate(self.names)}
        if len(self._index_of) < len(self.names):
            twice = next(name for index, name in enumerate(self.names) if self._index_of[name] != index)
            raise UserError(f"{owner} has two classes called {twice}; give each a name of its own")

    def __call__(self, label: Any, image: str) -> int:
        """The index of a label's class; `image` is whose label it is."""
        if isinstance(label, str) and label in self._index_of:
            return self._index_of[label]
        number = int(label) if _is_number(label) else label
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(self.names):
            return number
        if _is_missing(label):
            raise UserError(f"{image} has no label ({label!r}); remove it, or use {option('no_labels')}")
        raise UserError(
            f"{image} has label {label!r}, but {self.owner} has {len(self.names)} classes, such as "
            f"{', '.join(self.names[:2])}; fix the label, or use {option('no_labels')}"
        )


def index_labels(
    labels: Sequence[Any], name_of: Callable[[int], str], names: Sequence[str] | None, owner: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Classes of images as indices, and the names of the classes.

    `names` are the classes in their order, where they are known. Otherwise they are the labels that occur: numbers in
    ascending order, names in alphabetical order. `name_of(i)` names image i, and `owner` the whole, in messages. Raises
    UserError for labels that are missing, that are neither names nor numbers, or that have no class.
    """
    if names is not None:
        index = ClassIndex(names, owner)
        return tuple(index(label, name_of(i)) for i, label in enumerate(labels)), index.names
    for i, label in enumerate(labels):
        missing = _is_missing(label)
        if missing or isinstance(label, bool) or not isinstance(label, Label):
            what = f"no label ({label!r})" if missing else f"label {label!r}, neither a name nor a whole number"
            raise UserError(f"{name_of(i)} of {owner} has {what}; fix it, or use {option('no_labels')}")
    kinds = set(labels)
    numbers = {label: int(label) for label in kinds if isinstance(label, int) or _is_number(label)}
    all_numbers = len(numbers) == len(kinds)
    in_order = sorted(kinds, key=lambda label: numbers[label]) if all_numbers else sorted(map(str, kinds))
    classes = tuple(dict.fromkeys(map(str, in_order)))
    index_of = {name: index for index, name in enumerate(classes)}
    return tuple(index_of[str(label)] for label in labels), classes


def read_class_names(file: Path) -> tuple[str, ...]:
    """Names of classes in the order of their numbers: one per line.

    Blank lines may follow. Raises UserError if there are no names, and for a blank line before one: leaving it out
    would give the classes after it other numbers.
    """
    names = tuple(line.strip() for line in io.StringIO(_text(file).rstrip(), newline=None))
    if not names:
        raise UserError(f"{file} holds no names of classes; write one per line, in the order of the labels")
    if "" in names:
        raise UserError(f"{file}, line {names.index('') + 1} is blank; name its class, or remove the line")
    return names


def read_table(file: Path, named: Callable[[str], str] = str) -> dict[str, Label]:
    """A label for each image, by its name, from a file. `named` turns a name in the table into the name here.

    `.csv`: the columns `file` and `label`, or the first two. `.json`: {"name": label, …}, or the dataset.json of ADM
    and EDM, {"labels": [["name", number], …]}. Raises UserError, naming the line or image, for anything else.
    """
    kinds = {".csv": _csv_rows, ".json": _json_rows}
    if file.suffix.lower() not in kinds:
        raise UserError(f"{option('labels')} {file}: give a .csv or a .json file")
    table: dict[str, Label] = {}
    for name, label in kinds[file.suffix.lower()](file):
        if not isinstance(name, str) or isinstance(label, bool) or not isinstance(label, Label) or label == "":
            raise UserError(f"{file}: {name!r} has label {label!r}; give every image a name or a whole number")
        name = named(PurePosixPath(name).as_posix())  # ./a.png is a.png
        if name in table:
            raise UserError(f"{file} has {name} twice; keep one of its lines")
        table[name] = label
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


def _csv_rows(file: Path) -> Iterator[tuple[str, str]]:
    reader = csv.reader(io.StringIO(_text(file), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{file} is not CSV: {error}") from error
    first = [cell.strip() for cell in rows[0][1]] if rows else []
    columns = (first.index("file"), first.index("label")) if {"file", "label"} <= set(first) else (0, 1)
    has_heading = bool(first) and not is_image(first[columns[0]])
    for line, row in rows[1:] if has_heading else rows:
        if not row:
            continue
        if len(row) <= max(columns):
            raise UserError(f"{file}, line {line}: it has {len(row)} column(s); give the image's file and its label")
        yield row[columns[0]].strip(), row[columns[1]].strip()


def _json_rows(file: Path) -> Iterator[tuple[Any, Any]]:
    try:
        # Pairs and not a dict, which would keep the last of several labels without a word.
        content = json.loads(_text(file), object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    pairs = content[0][1] if _is_pairs(content) and content and content[0][0] == "labels" else content
    if not _is_pairs(pairs):
        raise UserError(f'{file} labels no images; write {{"FILE": LABEL, …}} or {{"labels": [["FILE", LABEL], …]}}')
    yield from (tuple(pair) for pair in pairs)


def _text(file: Path) -> str:
    """The text of a file, with its line ends as they are."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _is_pairs(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in content)


def _is_number(label: Any) -> bool:
    """Whether text is a number as it would be printed: 7, but not 07."""
    short = isinstance(label, str) and len(label) < 19 and label.isascii() and label.isdecimal()
    return short and str(int(label)) == label


def _is_missing(label: Any) -> bool:
    """Whether a label stands for none: nothing, or a negative number, as data sets without labels have on the hub."""
    if isinstance(label, str):
        return label == "" or (label.startswith("-") and _is_number(label[1:]))
    return label is None or (isinstance(label, int) and label < 0)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
