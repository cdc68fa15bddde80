"""What ends a job without being a defect: the user's mistakes, and a request to stop."""

from __future__ import annotations

from math import inf, isfinite


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line: it names the file or the option and says what to change. The command line prints it and
    exits with code 2, without a traceback.
    """


class Stopped(Exception):  # noqa: N818, since it is no error
    """A job was asked to stop (SIGTERM, SIGINT) and has: what it had done is saved, and the same command continues.

    All of its processes raise it. The command line prints the message and exits with code 143.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """The message of an error as one line of at most so many characters; its type where it has none."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:most] or type(error).__name__


def require(
    options: object,
    *names: str,
    prefix: str = "--",
    at_least: float = -inf,
    more_than: float = -inf,
    at_most: float = inf,
    less_than: float = inf,
) -> None:
    """Raise UserError unless these fields of a dataclass of options hold finite numbers within the bounds.

    A field may be a number or a tuple of them; None passes. `prefix` is what stands before the field's name on the
    command line.
    """
    for name in names:
        value = getattr(options, name)
        numbers = value if isinstance(value, tuple | list) else () if value is None else (value,)
        # Comparisons with NaN are false, so that it is in no bounds.
        if not all(at_least <= number <= at_most and more_than < number < less_than for number in numbers):
            bounds = {"at least": at_least, "more than": more_than, "at most": at_most, "less than": less_than}
            wanted = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if isfinite(bound))
            given = " ".join(map(str, numbers))
            raise UserError(f"{prefix}{name.replace('_', '-')} {given}: choose {wanted or 'a finite number'}")
