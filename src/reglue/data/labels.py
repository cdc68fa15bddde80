"""Classes of images: from whatever labels them to the index of each class."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any

from reglue.errors import UserError, option

Label = str | int
"""The name of a class, or its number."""
NO_LABEL = frozenset(("nan", "na", "n/a", "null", "none"))
"""What programs write, in capitals or not, where a number is missing."""


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
        _refuse_unwritable(self.names, owner)

    def __call__(self, label: Any, image: str) -> int:
        """The index of a label's class; `image` is whose label it is."""
        if isinstance(label, str) and label in self._index_of:
            return self._index_of[label]
        number = whole_number(label)
        if number is not None and 0 <= number < len(self.names):
            return number
        if _is_missing(label):
            raise UserError(f"{image} has no label ({label!r}); remove it, or use {option('no_labels')}")
        raise UserError(
            f"{image} has label {brief(label)}, but {self.owner} has {len(self.names)} classes, such as "
            f"{', '.join(self.names[:2])}; fix the label, or use {option('no_labels')}"
        )


def index_labels(
    labels: Sequence[Any], name_of: Callable[[int], str], names: Sequence[str] | None, owner: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Classes of images as indices, and the names of the classes.

    `names` are the classes in their order, where they are known. Otherwise they are the labels that occur: numbers in
    ascending order (11.0 is 11), names in alphabetical order. `name_of(i)` names image i, and `owner` the whole, in
    messages. Raises UserError for labels that are missing (`NO_LABEL` among numbers, too), neither names nor whole
    numbers, without a class, or of characters that no file holds.
    """
    if names is not None:
        index = ClassIndex(names, owner)
        return tuple(index(label, name_of(i)) for i, label in enumerate(labels)), index.names

    def refused(i: int, what: str) -> UserError:
        return UserError(f"{name_of(i)} of {owner} has {what}; fix it, or use {option('no_labels')}")

    for i, label in enumerate(labels):
        if _is_missing(label):
            raise refused(i, f"no label ({label!r})")
        if not (isinstance(label, str) or whole_number(label) is not None):
            raise refused(i, f"label {brief(label)}, neither a name nor a whole number")
    numbers = {label: whole_number(label) for label in set(labels)}
    called_by_name = {label for label, number in numbers.items() if number is None}
    if called_by_name and NO_LABEL.issuperset(map(str.lower, called_by_name)):
        i = next(i for i, label in enumerate(labels) if label in called_by_name)
        raise refused(i, f"no label ({labels[i]!r})")
    called = {
        label: label if called_by_name and isinstance(label, str) else str(number) for label, number in numbers.items()
    }
    classes = in_class_order(set(called.values()))
    _refuse_unwritable(classes, owner)
    index_of = {name: index for index, name in enumerate(classes)}
    return tuple(index_of[called[label]] for label in labels), classes


def in_class_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes as they are numbered: by their numbers where all are numbers, in alphabetical order otherwise.

    The parts of paths count one by one: 2/10 comes after 2/9.
    """
    names = sorted(names)
    if all(part.isascii() and part.isdecimal() and len(part) < 1000 for name in names for part in name.split("/")):
        names.sort(key=lambda name: [int(part) for part in name.split("/")])
    return tuple(names)


def whole_number(label: Any) -> int | None:
    """The whole number that a label is, if it is one: 7, 7.0, or text as either would be printed, but not 07."""
    if isinstance(label, str):
        whole = re.fullmatch(r"(0|-?[1-9][0-9]{0,17})(\.0+)?", label)
        return int(whole[1]) if whole else None
    if isinstance(label, float):
        return int(label) if label.is_integer() else None
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def read_class_names(file: Path) -> tuple[str, ...]:
    """Names of classes in the order of their numbers: one per line.

    Blank lines may follow. Raises UserError if there are no names, and for a blank line before one: leaving it out
    would give the classes after it other numbers.
    """
    names = tuple(line.strip() for line in io.StringIO(read_text(file).rstrip(), newline=None))
    if not names:
        raise UserError(f"{file} holds no names of classes; write one per line, in the order of the labels")
    if "" in names:
        raise UserError(f"{file}, line {names.index('') + 1} is blank; name its class, or remove the line")
    return names


def read_text(file: Path) -> str:
    """The text of a file, in UTF-8 or, as Excel saves it, UTF-16, with its line ends as they are.

    Raises UserError for other encodings, and for a file that cannot be read.
    """
    try:
        content = file.read_bytes()
        in_two_bytes = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if in_two_bytes else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8 ({error}); save it as such") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _refuse_unwritable(names: Sequence[str], owner: str) -> None:
    """Raise UserError for a name that the name of a folder could not be: a zero in it, or half of a character."""
    for name in names:
        try:
            unwritable = b"\0" in name.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            unwritable = True
        if unwritable:
            raise UserError(f"{owner} has a class called {brief(name)}, which no file can hold; rename it")


def _is_missing(label: Any) -> bool:
    """Whether a label stands for none: nothing, or a negative number, as data sets without labels have on the hub."""
    number = whole_number(label)
    return label is None or label == "" or label != label or (number is not None and number < 0)
