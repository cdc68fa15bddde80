"""What is wrong with the options of a command, in one line: tyro decides that something is, and this says what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from reglue.help import Option

_ONE = {int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}
_NAMED: dict[Any, dict[str, Any]] = {
    NoneType: {"None": None},
    bool: {"True": True, "true": True, "False": False, "false": False},
}
"""The values of types that have few, as they are typed."""
_COUNTED = {1: "one", 2: "two", 3: "three", 4: "four"}


def mistake(command: Sequence[str], options: Iterable[Option], arguments: Sequence[str]) -> str:
    """The first mistake in the arguments of a command that tyro has refused, and the remedy.

    `command` is its name, for `train` with the recipe's; `options` are those that it takes.
    """
    options = list(options)
    flags = {flag: option for option in options if not option.positional for flag in option.flags}
    flags |= {f"--{option.name}": option for option in options if not option.positional}
    places, missing = [option for option in options if option.positional], {o.name: o for o in options if o.required}
    refer = f"`reglue {' '.join(command)} --help` lists the options"
    free, *given = _split(arguments)
    for word, place in zip(free, places, strict=False):
        missing.pop(place.name, None)
        if not fits(place.type, [word]):
            return f"{place.name.upper()} {word}: give {wanted(place.type)}"
    for typed, values in given:
        flag = typed.replace("_", "-")
        if flag not in flags:
            near = get_close_matches(flag, flags, 1)
            return f"unknown option {typed}; " + (f"did you mean {near[0]}? {refer}" if near else refer)
        option = flags[flag]
        missing.pop(option.name, None)
        if option.type is bool:
            if values:
                opposite = f"; the opposite is {option.flags[1]}" if len(option.flags) > 1 else "; leave it out"
                return f"{' '.join([typed, *values])}: {typed} takes no value{opposite}"
        elif not fits(option.type, values):
            return f"{' '.join([typed, *values])}: give {wanted(option.type)}"
    if surplus := free[len(places) :]:
        return f"unexpected {surplus[0]}: {_takes(places)}; {refer}"
    if missing:
        option = next(iter(missing.values()))
        return f"no {option.flags[0]} given; {refer}"
    return f"the options {' '.join(arguments)} do not fit; {refer}"


def _split(arguments: Sequence[str]) -> Iterator[Any]:
    """The words before the first option, then each option with its values."""
    words = list(arguments)
    is_value = lambda word: not word.startswith("-") or word == "-" or re.match(r"-\.?\d|-inf$|-nan$", word)  # noqa: E731
    free = list(takewhile(is_value, words))
    yield free
    words = words[len(free) :]
    while words:
        option, equals, value = words.pop(0).partition("=")
        values = list(takewhile(is_value, words))
        words = words[len(values) :]
        yield option, [value, *values] if equals else values


def _takes(places: Sequence[Option]) -> str:
    names = " ".join(place.name.upper() for place in places)
    return f"{names} comes first, and nothing else without an option" if names else "every value needs its option"


def fits(kind: Any, words: Sequence[str]) -> bool:
    """Whether words can be a value of a type."""
    try:
        typed(kind, words)
    except ValueError:
        return False
    return True


def typed(kind: Any, words: Sequence[str]) -> Any:
    """The value of a type that words stand for. Raises ValueError if they stand for none."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Mapping:
        names, numbers = (typed(tuple[part, ...], words[i::2]) for i, part in enumerate(parts))
        return dict(zip(names, numbers, strict=True))
    if origin is tuple and parts[-1] is ...:
        size = len(get_args(parts[0])) or 1
        return tuple(typed(parts[0], words[i : i + size]) for i in range(0, len(words), size))
    if origin is tuple:
        return tuple(typed(part, [word]) for part, word in zip(parts, words, strict=True))
    if parts and origin is not Literal:  # a union
        for part in sorted(parts, key=lambda part: part is not NoneType):
            with suppress(ValueError):
                return typed(part, words)
        raise ValueError(f"none of {parts}")
    (word,) = words
    if origin is Literal or kind in _NAMED:
        values = _NAMED.get(kind) or {str(part): part for part in parts}
        if word not in values:
            raise ValueError(f"none of {', '.join(values)}")
        return values[word]
    return kind(word)


def wanted(kind: Any) -> str:
    """The values of a type, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin is Mapping:
        return "pairs of a name and a number"
    if origin is tuple and parts[-1] is ... and get_origin(parts[0]) is tuple:
        return f"pairs of {' and '.join(map(wanted, get_args(parts[0])))}"
    if origin is tuple and parts[-1] is ...:
        return _MANY.get(parts[0]) or wanted(parts[0])
    if origin is tuple:
        return f"{_COUNTED[len(parts)]} {_MANY[parts[0]]}"
    if parts:  # a union
        return " or ".join(wanted(part) for part in parts if part is not NoneType)
    return _ONE[kind]
