"""Options as the command line that has them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def words(options: Mapping[str, Any]) -> list[str]:
    """The words of a command line for options by the names of their fields; what is off or empty is left out."""
    found: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
        elif isinstance(value, Mapping):
            found += [flag, *(str(word) for pair in value.items() for word in pair)] if value else []
        elif isinstance(value, tuple | list):
            found += [flag, *map(str, value)] if value else []
        elif value is not None and value is not False:
            found += [flag, str(value)]
    return found


def command_line(command: str, *given: object, **options: Any) -> str:
    """`reglue COMMAND GIVEN … --OPTION VALUE …`, quoted for a shell."""
    return shlex.join(["reglue", command, *map(str, given), *words(options)])


def changed(options: Mapping[str, Any], default: object) -> dict[str, Any]:
    """The options whose values are not those of a dataclass of defaults."""
    return {name: value for name, value in options.items() if value != getattr(default, name)}
