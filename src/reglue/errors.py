"""What ends a command without being a defect: a mistake of the user's, or a request to stop."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any, cast

_on_command_line = False


class UserError(Exception):
    """A mistake that the user can fix.

    The message is one line: it names the file or the option and says what to change. The command line prints it and
    exits with code 2, without a traceback.
    """


class UnknownPart(UserError):  # noqa: N818, it is a UserError
    """A part that is asked for by a name under which nothing is registered."""


class Stopped(Exception):  # noqa: N818, since it is no error
    """A command was asked to stop (SIGTERM, SIGINT) and has stopped: its work is saved, and the same command continues.

    All of its processes raise it. The command line prints the message and exits with code 130 or 143.
    """


def printable(text: str) -> str:
    """Text as one line: what is not printable, a newline in the name of a file for example, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an error as one line of at most so many characters; its type where it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(text.split()))[:most] or type(error).__name__


def refused_by_system(error: OSError) -> str:
    """Which file the system refused, and why, as one line; of several that were copied (`shutil.Error`), the first."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        _, file, reason = error.args[0][0]
        return f"cannot copy to {file}: {re.sub(r'^.Errno [0-9]+. |: .*$', '', reason)}"
    reason = one_line(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason


@contextmanager
def command_line() -> Iterator[None]:
    """Inside, messages spell options as on the command line, whichever thread writes them."""
    global _on_command_line
    before, _on_command_line = _on_command_line, True
    try:
        yield
    finally:
        _on_command_line = before


def option(name: str, on_command_line: str = "") -> str:
    """How whoever is asked spells an option: `alignment.targets` in Python, `--alignment.targets` on the command line.

    `name` is the field's, with underscores; `on_command_line` is what the command line calls it, if that is another.
    """
    return f"--{(on_command_line or name).replace('_', '-')}" if _on_command_line else name


def require(
    options: object,
    *names: str,
    prefix: str = "",
    at_least: float = -inf,
    more_than: float = -inf,
    at_most: float = inf,
    less_than: float = inf,
) -> None:
    """Raise UserError unless these fields of a dataclass of options hold finite numbers within the bounds.

    A field may be a number, a tuple of them or numbers by name; None passes. `prefix` names the parts that hold the
    dataclass: `optimisation.`.
    """
    for name in names:
        typed = _typed(getattr(options, name))
        # Comparisons with NaN are false, so that it is in no bounds.
        if not all(at_least <= number <= at_most and more_than < number < less_than for _, number in typed):
            bounds = {"at least": at_least, "more than": more_than, "at most": at_most, "less than": less_than}
            wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if isfinite(bound))
            if not all(isfinite(number) for _, number in typed):
                wanted = "a finite number" + (f", {wanted}" if wanted else "")
            raise UserError(f"{option(prefix + name)} {' '.join(text for text, _ in typed)}: choose {wanted}")


def _typed(value: Any) -> list[tuple[str, float]]:
    """Every number in the value of an option, and what is typed to give it."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        named = cast(Mapping[str, float], value)
        return [(f"{name} {number}", number) for name, number in named.items()]
    several: Sequence[float] = value if isinstance(value, tuple | list) else [value]
    return [(str(number), number) for number in several]
