"""`reglue list`: the runs, stores and autoencoders below a folder, in one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from reglue.errors import UserError, printable
from reglue.options.list_runs import ListRuns
from reglue.watching import words
from reglue.watching.kinds import kind_among
from reglue.watching.rows import Row, size_of

NAME_WIDTH = 48
"""Characters of a name at most: its end is what tells it from others."""
TITLES = ("", "", "", "steps", "loss", "figure", "size")


@dataclass(frozen=True)
class Listed:
    """One line of the table."""

    name: str
    """Of its folder, from where the list begins."""
    kind: str
    row: Row
    size: int
    """In bytes."""
    changed: float
    """When, in seconds since 1970."""


ORDERS: dict[str, Callable[[Listed], Any]] = {
    "name": lambda one: one.name,
    "time": lambda one: -one.changed,
    "steps": lambda one: -number(one.row.steps),
    "loss": lambda one: number(one.row.loss or "inf"),
    "size": lambda one: -one.size,
}


def list_runs(options: ListRuns) -> list[Listed]:
    """Print the table. Returns its lines. Raises UserError for what is no folder.

    What is damaged has a line that says so.
    """
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is no folder; name one to look in")
    found = sorted(search(options.folder), key=lambda one: (ORDERS[options.sort](one), one.name))
    if not found:
        print(f"no run, store or autoencoder below {options.folder}")
        return found
    rows = [[shortened(one.name), one.kind, *vars(one.row).values(), words.size(one.size)] for one in found]
    print("\n".join(table([TITLES, *[[*map(printable, cells)] for cells in rows]])))
    return found


def search(folder: Path) -> Iterator[Listed]:
    """What there is below a folder, itself included. What lies within one, such as a run's samples, is part of it.

    Links are not followed, and neither are folders that cannot be read.
    """
    waiting = [str(folder)]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except OSError:
            continue
        kind = kind_among({name for name, is_folder in found if not is_folder})
        if kind is None:
            waiting += (os.path.join(place, name) for name, is_folder in found if is_folder and name[0] != ".")  # noqa: PTH118
        elif kind.row:
            path = Path(place)
            try:
                row = kind.row(path)
            except (UserError, OSError):
                row = Row("damaged: see `reglue verify`")
            name = os.path.relpath(place, folder)
            yield Listed(name, kind.name, row, size_of(path), path.stat().st_mtime)


def number(text: str) -> float:
    """That of a cell such as `1,500 of 2,000`; 0 for an empty one."""
    return float((text.split() or ["0"])[0].replace(",", ""))


def shortened(name: str) -> str:
    """A name that fits its column."""
    return name if len(name) <= NAME_WIDTH else f"…{name[1 - NAME_WIDTH :]}"


def table(rows: list[Any]) -> Iterator[str]:
    """Rows of cells as lines, numbers to the right; a column that is empty throughout is left out."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    right = {title for title in TITLES if title}
    widths = [max(map(len, column)) for column in columns]
    most = get_terminal_size((10_000, 0)).columns
    for cells in zip(*columns, strict=True):
        padded = [
            f"{cell:>{width}}" if column[0] in right else f"{cell:<{width}}"
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        yield "  ".join(padded).rstrip()[:most]
