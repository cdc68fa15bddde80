"""Files: written whole or not at all, and read so that any damage becomes one line that names the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from filecmp import cmp
from functools import cache
from itertools import cycle
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cattrs import transform_error
from cattrs.errors import BaseValidationError
from cattrs.gen import mapping_structure_factory
from cattrs.preconf.json import make_converter
from safetensors import SafetensorError, safe_open

from reglue.errors import UnknownPart, UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    _N = TypeVar("_N", bound=nn.Module)

BESIDE = ".reglue-tmp"
"""What the name of a file or folder ends with that is being written, before it takes its place. Nobody else's."""
LONGEST_HEADER = 100_000_000
"""Bytes: what the safetensors library takes."""
LOCK = ".reglue-lock"
"""What the name of a lock ends with: `run.reglue-lock` lies beside a folder `run` while someone writes there."""
OWN = (BESIDE, LOCK)
"""What may lie in a folder that nobody has filled yet."""
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
            # Types take time to look up: only for values that need it, and no command has one when it is imported.
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
        beside.chmod(mode)  # Some libraries make files that only their owner may read; this one is as any other.
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in its own, of which only the text is left.
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error).rpartition("error: ")[2]
        raise UserError(
            f"cannot write {path}: {reason}; free some space, raise a limit (ulimit -f) or choose another folder, "
            "and run it again"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write text in UTF-8, whole or not at all, with the folder that it is in. Raises UserError as `replacing`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors=errors)


@contextmanager
def new_folder(path: Path, again: bool = False) -> Iterator[Path]:
    """A folder beside `path` to fill, which becomes `path` when the block ends well; otherwise nothing is left of it.

    With `again` all that the block writes may be at `path` already, and then stays. Raises UserError as
    `refuse_filled`, and where the system says that a file cannot be written but not which.
    """
    if not again:
        refuse_filled(path)
    place = path.resolve()  # "." has no name.
    beside = place.with_name(place.name + BESIDE)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        if again and _is_within(beside, place):
            return
        refuse_filled(path)
        if place == Path.cwd():
            # Whoever works in this folder would be left in one that is gone.
            for part in beside.iterdir():
                part.rename(place / part.name)
        else:
            if place.is_dir():
                place.rmdir()
            beside.rename(place)
    except OSError as error:
        if error.filename is not None or isinstance(error, shutil.Error):
            raise
        raise UserError(
            f"cannot write {path}: {one_line(error)}; free some space or choose another folder, and run it again"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _is_within(folder: Path, other: Path) -> bool:
    """Whether every file of a folder is in another one, too, with the same content."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return all((other / file).is_file() and cmp(folder / file, other / file, shallow=False) for file in files)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_filled(path: Path) -> None:
    """Raise UserError if `path` is there and not an empty folder, our own lock and unfinished work aside."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose a new or an empty folder")
    if path.is_dir() and (strangers := [part.name for part in path.iterdir() if part.suffix not in OWN]):
        raise UserError(f"{path} holds other files ({min(strangers)}); choose a new or an empty folder")


def plain(value: Any) -> Any:
    """A dataclass as what JSON can hold: dicts, lists, strings and numbers."""
    return _converter.unstructure(value)


def to_json(value: Any) -> str:
    """A dataclass of plain data as JSON, with ASCII characters alone."""
    return json.dumps(plain(value), indent=1)


def parse_json(text: str | bytes, kind: type[_T]) -> _T:
    """Inverse of `to_json`: a value of the type `kind`, checked against its type hints.

    Raises ValueError, with a reason of one line, for anything else: what is no JSON, NaN and infinite numbers, numbers
    beyond 64 bits, keys that are unknown or missing, and values of another type.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        content = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    try:
        return _converter.structure(content, kind)
    except BaseValidationError as error:
        if unknown := _unknown_part(error):
            raise unknown from error
        raise ValueError(transform_error(error)[0]) from error
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"it is not a valid {getattr(kind, '__name__', kind)}") from error


def _unknown_part(error: BaseException) -> UnknownPart | None:
    """The one among what went wrong, if any."""
    if isinstance(error, UnknownPart):
        return error
    inside = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return next((found for each in inside if (found := _unknown_part(each))), None)


def read_json(file: Path, kind: type[_T], remedy: str) -> _T:
    """What `to_json` wrote into a file. Raises UserError, naming the file, if it is missing or anything else.

    `remedy` says what the user can do then, and ends the message.
    """
    with _naming(file, remedy):
        return parse_json(file.read_bytes(), kind)


def read_jsonl(file: Path, kind: type[_T], remedy: str | None) -> list[_T]:
    """The lines of a file to which one is added at a time; none if there is no file yet.

    A last line that was cut short is passed over: the process died while it wrote it. Any other damage raises UserError
    as `read_json` does, or, with a `remedy` of None, has the line passed over too.
    """
    with _naming(file, remedy or "delete it"):
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    values: list[_T] = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                values.append(parse_json(line, kind))
        except ValueError as error:
            if remedy is not None and number < len(lines):
                raise _damaged(file, f"line {number}: {one_line(error)}", remedy) from error
    return values


SEAL = "sha256"
"""In the header of a tensor file of ours: the SHA-256 of the file as it is with zeros in the place of this one."""
UNSEALED = "0" * 64


def sha256_around(stream: BinaryIO, place: int) -> str:
    """The SHA-256 of a file with zeros in the place of the one that is in it, 64 digits from `place` on."""
    stream.seek(0)
    digest = hashlib.sha256()
    while part := stream.read(min(2**20, place - stream.tell())):
        digest.update(part)
    digest.update(UNSEALED.encode())
    stream.seek(len(UNSEALED), 1)
    while part := stream.read(2**20):
        digest.update(part)
    return digest.hexdigest()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, with its own hash in its header (`SEAL`).

    Raises UserError if it cannot be written.
    """
    with replacing(file) as beside:
        save_tensors(beside, tensors, metadata)


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """As `write_tensors`, for a file that takes its place later: raises OSError or SafetensorError."""
    from safetensors.torch import save_file  # imports torch

    file.touch()
    mode = file.stat().st_mode
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors writes several keys in random order, and the same tensors must have the same bytes: `seal` sorts them.
    save_file(own, file, dict(metadata or {SEAL: UNSEALED}))
    file.chmod(mode)  # safetensors makes files that only their owner may read; this one is as any other new file.
    seal(file)


def seal(file: Path) -> None:
    """Put the hash of a safetensors file into its header: in place where there is room for it, else as a new file.

    For files that other libraries have written; a process that dies meanwhile leaves a damaged one.
    """
    with file.open("r+b") as stream:
        header = _header(stream)
        metadata = header.get("__metadata__", {})
        if metadata.get(SEAL) != UNSEALED:
            header["__metadata__"] = dict(sorted({**metadata, SEAL: UNSEALED}.items()))
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # The format wants tensors aligned.
            with replacing(file) as beside, beside.open("wb") as other:
                other.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(stream, other, 2**20)
            return seal(file)
        digest, place = _digest(stream)
        stream.seek(place)
        stream.write(digest.encode())


def seal_of(file: Path) -> tuple[str | None, str]:
    """The hash in the header of a safetensors file, None if it has none, and the one that it should be.

    Raises ValueError if the header is damaged.
    """
    with file.open("rb") as stream:
        written = _header(stream).get("__metadata__", {}).get(SEAL)
        return written, _digest(stream)[0]


def _header(stream: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file, after which the stream then stands. Raises ValueError if there is none."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError("its header is too long")
    header = parse_json(stream.read(length), dict[str, Any])
    if not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its metadata are no object")
    return header


def _digest(stream: BinaryIO) -> tuple[str, int]:
    """The SHA-256 of a safetensors file with zeros in the place of the one in its header, and that place."""
    written = str(_header(stream).get("__metadata__", {}).get(SEAL, ""))
    end = stream.tell()
    stream.seek(0)
    place = stream.read(end).find(written.encode()) if len(written) == len(UNSEALED) else -1
    return sha256_around(stream, place if place >= 0 else end), place


@contextmanager
def opened_tensors(file: Path, remedy: str, *, sealed: bool | None = None) -> Iterator[Any]:
    """A safetensors file as `safe_open` of safetensors opens it, to read some of it in the block.

    A thread compares it with the hash in its header meanwhile: always if `sealed`, which is for files of our own, never
    if that is False, and by default where there is one. Raises UserError as `read_json` does, also for a tensor that
    is asked for and not there, and when the block ends for another hash.
    """
    with _naming(file, remedy), ThreadPoolExecutor(1) as thread, safe_open(file, "pt") as opened:
        known = SEAL in (opened.metadata() or {})
        if sealed and not known:
            raise ValueError("its hash is missing")
        checked = thread.submit(seal_of, file) if known and sealed is not False else None
        yield opened
        if checked and len(set(checked.result())) > 1:
            raise ValueError("its content is not what was written")


def read_tensors(file: Path, remedy: str, *, sealed: bool | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises UserError as `opened_tensors` does."""
    with opened_tensors(file, remedy, sealed=sealed) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a dict


def read_network(make: Callable[[], _N], file: Path, remedy: str, *, sealed: bool | None = None) -> _N:
    """A network with the weights of a safetensors file, on the CPU, in the precision in which `make` builds it.

    It is built without memory, so that sizes in a damaged file cannot ask for too much of it. Raises UserError as
    `opened_tensors` does, also for weights of another network.
    """
    import torch  # slow to import

    tensors = read_tensors(file, remedy, sealed=sealed)
    refuse_not_finite(tensors, file)
    try:
        with torch.device("meta"):
            network = make()
        own = network.state_dict()
        network.load_state_dict(
            {key: value.to(own[key].dtype, copy=True) if key in own else value for key, value in tensors.items()},
            assign=True,
        )
    except (RuntimeError, ValueError, TypeError) as error:  # what torch raises for sizes that cannot be, or do not fit
        raise UserError(f"{file} does not fit the network it should hold ({one_line(error)}); {remedy}") from error
    return network


@contextmanager
def _naming(file: Path, remedy: str) -> Iterator[None]:
    """Whatever reading a file raises in the block, as one line that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; {remedy}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(file, one_line(error), remedy) from error
    except UnknownPart as error:
        raise UserError(f"{file} names a part that is not here: {error}; import the file that registers it") from error


def _damaged(file: Path, reason: str, remedy: str) -> UserError:
    return UserError(f"{file} is damaged ({reason}); {remedy}")


def _integer(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{digits[:20]} is not a 64-bit integer")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise ValueError(f"{digits[:20]} is not a finite number")
    return number


def _structure_plain(kind: type, *others: type) -> None:
    """Take values of a plain type for just that: cattrs by itself takes 2.7 for 2, and any text for True."""

    def structure(value: Any, _: Any) -> Any:
        if type(value) not in (kind, *others) or (kind is str and "\0" in value):
            raise ValueError(f"{value!r} is not of type {kind.__name__}")
        return kind(value)

    _converter.register_structure_hook(kind, structure)


@_converter.register_structure_hook_factory(lambda kind: get_origin(kind) is tuple)
def _structure_tuple(kind: Any, converter: Any) -> Callable[[Any, Any], Any]:
    """Take lists for tuples, and nothing else: cattrs by itself takes text for its letters."""
    parts = get_args(kind)
    endless = parts[-1] is ...
    hooks = [(part, converter.get_structure_hook(part)) for part in parts if part is not ...]

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, list) or (len(value) != len(hooks) and not endless):
            raise ValueError(f"it is not a list{'' if endless else f' of {len(hooks)}'}")
        return tuple(hook(item, part) for item, (part, hook) in zip(value, cycle(hooks), strict=False))

    return structure


@_converter.register_structure_hook_factory(lambda kind: get_origin(kind) is dict)
def _structure_dict(kind: Any, converter: Any) -> Callable[[Any, Any], Any]:
    """Take objects for dicts, and nothing else: cattrs by itself takes an empty list for an empty one."""
    inner = mapping_structure_factory(kind, converter)

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        return inner(value, kind)

    return structure


for _kind, _others in {bool: (), int: (), float: (int,), str: ()}.items():
    _structure_plain(_kind, *_others)


def refuse_not_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise UserError, naming the file and the tensor, if a number in one of them is NaN, or infinite in float32.

    Also if they are of a type with which no network computes: complex ones, those that torch can only store, and
    integers as weights, where they are no counters or indices. A sum is finite only if all that it adds are: it is
    taken at the speed of memory, and nothing is made for it. Large numbers may overflow it, so what it finds is looked
    at once more.
    """
    import torch  # slow to import

    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex() or name.endswith(("weight", "bias"))):
            continue
        reason = f"the numbers in {name} are of the type {tensor.dtype}"
        if tensor.is_floating_point():
            try:
                if tensor.sum(dtype=torch.float32).isfinite() or (finite := tensor.float().isfinite()).all():
                    continue
                reason = f"{int((~finite).sum())} of the {tensor.numel()} numbers in {name} are NaN or infinite"
            except (NotImplementedError, RuntimeError):  # from torch, for what it cannot convert
                pass
        raise UserError(f"{file} is damaged ({reason}); fetch or make it again")
