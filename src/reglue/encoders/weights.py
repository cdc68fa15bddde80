"""The files in which others publish networks: which of a folder hold the weights, what is in them, what is too much.

All of it is decided here. Safetensors go before PyTorch's pickles, whole files before shards, full precision before
half. Nothing in a file is executed, and no configuration makes more of a network than its weights can fill.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from reglue.errors import UserError, one_line
from reglue.files import file_sha256, opened_tensors, read_json, read_tensors
from reglue.pickles import read_untrusted

CONFIG = "config.json"
REMEDY = "fetch it again"
SAFETENSORS, PICKLED = ".safetensors", (".bin", ".pth", ".pt", ".ckpt", ".pkl")
VARIANTS = ("", ".fp32", ".fp16", ".bf16")
"""What stands before the ending in names of files, those that are taken first at first."""
WRAPPERS = ("state_dict", "model", "teacher", "model_state_dict", "module")
"""Under which a checkpoint may keep its tensors, beside what else training needs."""
PREFIXES = ("module.", "_orig_mod.", "backbone.")
"""Of names, left by what wrapped a network in training."""
LARGEST = 2**16
"""No network has a size or a number of parts beyond this."""
DEEPEST = 64
"""No configuration is nested deeper."""
_N = TypeVar("_N", bound=nn.Module)


def weight_files(folder: Path, stems: Sequence[str], remedy: str = REMEDY) -> tuple[Path, ...]:
    """The files of a folder that hold a network's weights: one, or all of its shards.

    `stems` are what their names begin with: `model` finds `model.safetensors`, its shards, `model.fp16.safetensors` and
    `model.bin`, in this order. Raises UserError for a folder without them, or without some of the shards.
    """
    names = "|".join(map(re.escape, stems))
    whole = re.compile(rf"({names})((?:\.[\w-]+)?)({re.escape(SAFETENSORS)}|\.bin|\.pth|\.pt)")
    index = re.compile(rf"({names})({re.escape(SAFETENSORS)}|\.bin)\.index((?:\.[\w-]+)?)\.json")
    found: list[tuple[tuple[bool, int, bool], Path]] = []
    for file in sorted(folder.iterdir()):
        if (match := whole.fullmatch(file.name)) and file.is_file():
            found.append(((match[3] != SAFETENSORS, _rank(match[2]), False), file))
        elif match := index.fullmatch(file.name):
            found.append(((match[2] != SAFETENSORS, _rank(match[3]), True), file))
    if not found:
        raise UserError(f"{folder / stems[0]}{SAFETENSORS} is missing; {remedy}")
    (_, _, is_index), file = min(found)
    return _shards(file, remedy) if is_index else (file,)


def _rank(variant: str) -> int:
    return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)


def _shards(index: Path, remedy: str) -> tuple[Path, ...]:
    """The files that an index names. They lie beside it."""
    places = read_json(index, dict[str, Any], remedy).get("weight_map")
    texts = [*places.values()] if isinstance(places, dict) else []
    names = sorted({*texts}) if all(isinstance(text, str) for text in texts) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index} is damaged (its weight_map names no files beside it); {remedy}")
    files = tuple(index.with_name(name) for name in names)
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} is missing, of the {len(files)} files of {index.name}; {remedy}")
    return files


def is_pickled(file: Path) -> bool:
    """Whether a file is PyTorch's, and not safetensors: by its first bytes where they show it, else by its ending.

    Raises UserError for one of PyTorch's that is called safetensors, which PyTorch takes at its word.
    """
    with file.open("rb") as opened:
        head = opened.read(9)
    if head[8:] == b"{":  # After eight bytes for its length, the header of safetensors begins.
        return False
    zipped = head.startswith(b"PK\x03\x04")
    if zipped and file.suffix == SAFETENSORS:
        raise UserError(f"{file} is PyTorch's and no safetensors; rename it to {file.with_suffix('.pth').name}")
    return zipped or file.suffix in PICKLED


def read_weights(files: Sequence[Path], remedy: str = REMEDY) -> dict[str, Tensor]:
    """The tensors by name, on the CPU, as they are in the files; without what wraps them in a checkpoint.

    Raises UserError, naming the file, for one that is missing, damaged, or holds no tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_pickled(file) if file.is_file() and is_pickled(file) else read_tensors(file, remedy)
    if not tensors:
        raise UserError(f"{files[0]} is damaged (it holds no weights); {remedy}")
    return _unprefixed(tensors)


def read_shapes(files: Sequence[Path], remedy: str = REMEDY) -> dict[str, Tensor]:
    """The same tensors without their numbers, as far as files need not be read for it: on the device `meta`."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.is_file() and is_pickled(file):
            tensors |= _read_pickled(file)
            continue
        with opened_tensors(file, remedy, sealed=False) as opened:
            for name in opened.keys():  # noqa: SIM118 not a dict
                tensors[name] = torch.empty(opened.get_slice(name).get_shape(), device="meta")
    return {name: tensor.to("meta") for name, tensor in _unprefixed(tensors).items()}


def _read_pickled(file: Path) -> dict[str, Tensor]:
    content = read_untrusted(file)
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None)
    named = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        # A view of one number can claim any shape, and would be of that size once it is converted.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{file}: {name} holds fewer numbers than its shape {list(tensor.shape)}; {REMEDY}")
    if not tensors:
        raise UserError(f"{file}: holds no tensors by name")
    return tensors


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if inside := {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}:
            tensors = inside
    return tensors


def sha256_of(*files: Path) -> str:
    """SHA-256 of the SHA-256 of each file, in hexadecimal."""
    return hashlib.sha256(b"".join(bytes.fromhex(file_sha256(file)) for file in files)).hexdigest()


def read_config(file: Path, remedy: str) -> dict[str, Any]:
    """A network's configuration. Raises UserError as `read_json`, and for nesting and integers beyond all reason."""
    config = read_json(file, dict[str, Any], remedy)
    waiting: list[tuple[Any, int]] = [(config, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise UserError(f"{file} is damaged (it is nested too deeply); {remedy}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{file} is damaged ({value} is no size of a network); {remedy}")
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(item, depth + 1) for item in inside]
    return config


@contextmanager
def at_most(tensors: int) -> Iterator[None]:
    """Networks that are made in the block have weights without memory, and not many more of them than `tensors`.

    Raises ValueError as soon as there are more parts: a configuration that is damaged may ask for 10⁹ layers.
    """
    left = 10 * tensors + 1000  # Most modules have weights of their own; some hold others, or only compute.

    def count(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it describes many more layers than the {tensors} tensors of the weights fill")

    handles = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def filled(make: Callable[[], _N], tensors: Mapping[str, Tensor], file: Path) -> _N:
    """The network that `make` builds, with these tensors for its weights, in float32 and on the CPU.

    Raises UserError, naming the file of the weights, if one is missing, too many, of another shape or no such number;
    and whatever `make` raises.
    """
    with at_most(len(tensors)):
        network = make()
    own = network.state_dict()
    for problem, names in (("missing", own.keys() - tensors.keys()), ("unexpected", tensors.keys() - own.keys())):
        if names:
            raise unfitting(file, f"{problem} keys {', '.join(sorted(names))}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape or own[name].is_floating_point() != tensor.is_floating_point():
            was, wanted = (f"{list(one.shape)} {str(one.dtype)[6:]}" for one in (tensor, own[name]))
            raise unfitting(file, f"{name} is {was}, not {wanted}")
    network.load_state_dict({name: one.to(own[name].dtype, copy=True) for name, one in tensors.items()}, assign=True)
    return network


def unfitting(file: Path, reason: str | Exception) -> UserError:
    """For weights of another network than the one that they were read for."""
    reason = one_line(reason) if isinstance(reason, Exception) else reason
    return UserError(f"{file} does not fit the network it should hold: {reason[:200]}")
