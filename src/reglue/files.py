"""Writing files whole or not at all, and dataclasses of plain data as JSON."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

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
    """For a frozen dataclass of options: text becomes a `Path` wherever a field is one, as on the command line."""

    def __post_init__(self) -> None:
        for part in fields(cast(Any, self)):
            value = getattr(self, part.name)
            if isinstance(value, str) and re.search(r"\bPath\b", str(part.type)):
                object.__setattr__(self, part.name, Path(value))


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
