"""Writing files whole or not at all, and dataclasses of plain data as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cattrs import transform_error
from cattrs.errors import BaseValidationError
from cattrs.preconf.json import make_converter
from safetensors import SafetensorError

from reglue.errors import UserError

BESIDE = ".reglue-tmp"
"""What the name of a file or folder ends with that is being written, before it takes its place. Nobody else's."""
_T = TypeVar("_T")
_converter = make_converter(forbid_extra_keys=True)


class TakesPaths:
    """For a frozen dataclass of options: values given in Python become what the command line makes of them.

    Text becomes a `Path`, and a list a tuple, wherever a field is one. Raises UserError, naming the field, for text
    where a field is a tuple, and for values that are not among the choices of a field.
    """

    def __post_init__(self) -> None:
        for part in fields(cast(Any, self)):
            value = getattr(self, part.name)
            # Types take time to look up: only for values that need it, which no job has when it is imported.
            if value is not part.default and not isinstance(value, bool):
                kinds = _kinds(type(self))[part.name]
                object.__setattr__(self, part.name, _as_typed(value, kinds, f"{type(self).__name__}({part.name}"))


@cache
def _kinds(options: type) -> dict[str, tuple[Any, ...]]:
    """The types that each field may have: those of a union one by one."""
    hints = get_type_hints(options).items()
    return {name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,) for name, hint in hints}


def _as_typed(value: Any, kinds: tuple[Any, ...], field: str) -> Any:
    """What a value stands for in a field of one of these types. `field` begins the messages."""
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    items = [get_args(kind)[:1] for kind in kinds if get_origin(kind) is tuple]
    others = {kind for kind in kinds if get_origin(kind) is not Literal}
    if isinstance(value, list | tuple) and items:
        return tuple(_as_typed(item, items[0], field) for item in value)
    is_text = isinstance(value, str) and str not in kinds and (choices or items)
    is_none = value is None and NoneType in kinds
    if (is_text or others <= {NoneType}) and value not in choices and not is_none:
        numbers = ["a number"] if {int, float} & others else []
        wanted = " or ".join([*map(repr, choices), *numbers, *(["a list"] if items else [])])
        raise UserError(f"{field}={value!r}): give {wanted}")
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes the place of `path` when the block ends well.

    When the block raises, or the process dies, whatever was at `path` is still there, whole. Raises UserError when the
    file cannot be written, a full disk for example.
    """
    beside = path.with_name(path.name + BESIDE)
    try:
        beside.touch()
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # safetensors makes files that only their owner may read; this one is as any other new file.
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in its own, of which only the text is left.
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error).rpartition("error: ")[2]
        raise UserError(
            f"cannot write {path}: {reason}; free some space or choose another folder, and run it again"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill, which becomes `path` when the block ends well; otherwise nothing is left of it.

    Raises UserError as `refuse_filled`.
    """
    refuse_filled(path)
    place = path.resolve()  # "." has no name.
    beside = place.with_name(place.name + BESIDE)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        if place == Path.cwd():
            # Whoever works in this folder would be left in one that is gone.
            for part in beside.iterdir():
                part.rename(place / part.name)
        else:
            if place.is_dir():
                place.rmdir()
            beside.rename(place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_filled(path: Path) -> None:
    """Raise UserError if `path` is there and not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} holds other files; choose a new or an empty folder for --out")


def accept_older(kind: Any, values: Mapping[Any, Any]) -> None:
    """Fields of the type `kind`, a Literal, may hold other values in older files: `values` says what those meant."""

    def structure(value: Any, _: Any) -> Any:
        # By identity, since True and 1 are equal.
        value = next((new for old, new in values.items() if old is value), value)
        if value not in get_args(kind):
            raise ValueError(f"{value!r} is none of {get_args(kind)}")
        return value

    _converter.register_structure_hook_func(lambda asked: asked == kind, structure)


def plain(value: Any) -> Any:
    """A dataclass as what JSON can hold: dicts, lists, strings and numbers."""
    return _converter.unstructure(value)


def to_json(value: Any) -> str:
    """A dataclass of plain data as JSON, with ASCII characters alone."""
    return json.dumps(plain(value), indent=1)


def structured(text: str, kind: type[_T]) -> _T:
    """Inverse of `to_json`. Raises ValueError, in one line, for anything but a `kind`; unknown keys are refused."""
    try:
        return _converter.structure(json.loads(text), kind)
    except BaseValidationError as error:
        raise ValueError(transform_error(error)[0]) from error
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"no {kind.__name__}") from error


def from_json(file: Path, kind: type[_T], remedy: str) -> _T:
    """Read what `to_json` wrote. Raises UserError that names the file and says what to do, for anything else."""
    try:
        return structured(file.read_text(), kind)
    except ValueError as error:
        raise UserError(f"{file} is damaged or of another version of this program ({error}); {remedy}") from error
