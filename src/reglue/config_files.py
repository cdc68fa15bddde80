"""Options in a YAML file: what `--config` reads and `--save-config` writes.

Keys are the names of options, with dots or as mappings in mappings, and values are what is typed. A file is read as
text and nothing else: whatever its tags say, it makes no object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, fields, replace
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any, cast, get_args, get_origin

import tyro
import yaml

from reglue import __version__
from reglue.errors import UserError, one_line, printable
from reglue.files import plain, write_text
from reglue.help import RECIPE, Option, declared
from reglue.mistakes import typed, wanted

WIDTH = 100
"""Of the lines that say what an option is about."""


def read(file: Path, options: Iterable[Option]) -> dict[str, Any]:
    """The values that a file has for options, by name.

    Raises UserError, naming the file, the line and the key, for what is no YAML, unknown, given twice or of another
    type. Whether values fit together is left to those who put them together with what is typed.
    """
    by_name = {option.name: option for option in options}
    try:
        text = file.read_bytes().decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise UserError(f"{file}: options take no aliases (*NAME); write the values out")
        root = yaml.compose(text, yaml.SafeLoader)
        found: dict[str, Any] = {}
        for name, line, words in _entries(root, by_name) if root else ():
            place = f"{file}, line {line}"
            if name not in by_name:
                near = "".join(f"; did you mean {other}?" for other in get_close_matches(name, by_name, 1))
                raise UserError(f"{place}: unknown option {name}{near}")
            if name in found:
                raise UserError(f"{place}: {name} is there twice; keep one")
            try:
                found[name] = typed(by_name[name].type, words)
            except ValueError:
                told = f"{place}: {' '.join([name, *words])}: give {wanted(by_name[name].type)}"
                raise UserError(told) from None
    except RecursionError:
        raise UserError(f"{file} is nested too deeply; options have single values, lists and pairs") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file} is no YAML file of options ({one_line(error)})") from None
    return found


def _entries(node: Any, options: Mapping[str, Option], prefix: str = "") -> Iterator[tuple[str, int, list[str]]]:
    """The name, the line and the words of every option in a mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("it begins with no name of an option and a colon")
    for key, value in node.value:
        name = prefix + " ".join(_words(key)).replace("_", "-")
        kind = options[name].type if name in options else str
        takes_names = Mapping in map(get_origin, (kind, *get_args(kind)))
        if isinstance(value, yaml.MappingNode) and not takes_names:
            yield from _entries(value, options, f"{name}.")
        else:
            yield name, key.start_mark.line + 1, [*_words(value)]


def _words(node: Any) -> Iterator[str]:
    """A value as the words that are typed for it."""
    if isinstance(node, yaml.ScalarNode):
        yield "None" if node.tag.endswith(":null") else node.value
    else:
        for part in node.value:
            for inner in part if isinstance(part, tuple) else (part,):
                yield from _words(inner)


def unchecked(options: type, values: Mapping[str, Any]) -> Any:
    """Options with values for some fields, else their defaults, else tyro's MISSING; nothing is checked."""
    made = object.__new__(options)
    for part in fields(cast(Any, options)):
        default = part.default if part.default_factory is MISSING else part.default_factory()
        value = values.get(part.name, default)
        object.__setattr__(made, part.name, tyro.MISSING if value is MISSING else value)
    return made


def with_values(options: Any, values: Mapping[str, Any]) -> Any:
    """Options with other values, by name. They are not checked, since what is typed may change more."""
    for option in declared(type(options)):
        if option.name in values:
            options = _with_value(options, option.path, values[option.name])
    return options


def _with_value(options: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    made = copy(options)
    object.__setattr__(made, name, _with_value(getattr(options, name), rest, value) if rest else value)
    return made


def save(file: Path, words: Sequence[str], options: Any, default: Any) -> None:
    """Write the options that differ from the default, each with what it is about.

    `words` are the command's name, for `train` with the recipe's.
    """
    kind = type(options)
    pairs = zip(declared(kind, options), declared(kind, default), strict=True)
    changed = [(before.required, option) for option, before in pairs if option.default != before.default]
    needed, others = ([option for required, option in changed if required is first] for first in (True, False))
    recipe = [replace(RECIPE, default=name) for name in words[1:]]
    lines = [
        f"# `reglue {words[0]} --config {printable(file.name)}` repeats this command.",
        f"# What is not here is as version {__version__} has it.",
    ]
    for option in (*recipe, *needed, *others):
        value = yaml.safe_dump(plain(option.default), default_flow_style=True, allow_unicode=True, width=2**30)
        entry = f"{option.name}: {value}".removesuffix("...\n").strip()
        lines += ["", *wrap(option.explanation, WIDTH, initial_indent="# ", subsequent_indent="# "), entry]
    write_text(file, "\n".join([*lines, ""]))
