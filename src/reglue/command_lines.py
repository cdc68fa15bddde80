"""Options as the command line that has them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def words(options: Mapping[str, Any]) -> list[str]:
    """The words of a command line for options by the names of their fields; what is off or empty is left out."""
    found: list[str] = []
    for name, value in options.items():
        values = [*_flat(value)]
        if value is True or values:
            found += [f"--{name.replace('_', '-')}", *values]
    return found


def _flat(value: Any) -> Iterator[str]:
    """What stands behind the name of an option: nothing for a switch, names and numbers in turn for a mapping."""
    if isinstance(value, tuple | list | Mapping):
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from _flat(item)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def command_line(command: str, *given: object, **options: Any) -> str:
    """`reglue COMMAND GIVEN … --OPTION VALUE …`, quoted for a shell."""
    return shlex.join(["reglue", command, *map(str, given), *words(options)])


def changed(options: Mapping[str, Any], default: object) -> dict[str, Any]:
    """The options whose values are not those of a dataclass of defaults."""
    return {name: value for name, value in options.items() if value != getattr(default, name)}


def changed_options(before: Any, now: Any, prefix: str = "") -> Iterator[str]:
    """The words that turn one dataclass of options into another one, those of its parts included."""
    for part in fields(before):
        was, is_ = getattr(before, part.name), getattr(now, part.name)
        own = part.name.replace("_", "-")
        if was == is_:
            continue
        if is_dataclass(was):
            yield from changed_options(was, is_, f"{prefix}{own}.")
        else:
            yield f"--{prefix}{'no-' if is_ is False else ''}{own}"
            yield from _flat(is_)
