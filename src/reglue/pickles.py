"""Files of other programs, read without executing anything that is in them.

A pickle is a program: it names functions and has them called. Here no function that a file names is ever looked up. The
few names that the published files need are bound to stand-ins that only keep what they are given, and every other
name refuses the file. NumPy's own functions are not among them: a forged `dtype` can make its arrays read memory that
is not theirs. Arrays are put together from the numbers in the file once it has been read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import re
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reglue.errors import UserError

TORCH_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that PyTorch wrote before version 1.6."""
COMPRESSED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma, b"\x78": zlib}
PLAIN_NUMBERS = re.compile(r"[?bBhHiIlLqQefd]|[fiub][1248]")
"""NumPy's codes of numbers of fixed size: no objects, no structures."""
REFUSED_BY_TORCH = re.compile(r"GLOBAL (\S+)")
"""The name in PyTorch's message about one that it refuses. The rest of it advises to execute the file."""
NO_CHECKPOINTS = {
    "a Git LFS pointer, which stands for the file itself: fetch that with `git lfs pull`": (
        b"version https://git-lfs",
    ),
    "a web page and no checkpoint: fetch the file itself": (b"<!doctype html", b"<html"),
}
"""What is often saved in place of a checkpoint, and how it begins."""


class MoreThanDataError(pickle.UnpicklingError):
    """A file asks for a global that no published file needs."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks for {name}, which no published file needs")


class NotNumbersError(ValueError):
    """A file has something else where it should have numbers."""


class Inert:
    """Stands for an object of a class that is not needed: keeps its state and does nothing."""

    state: Any = None

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        """Keep the arguments. Not in `__init__`: pickles may call the class, or its `__new__` alone."""
        inert = super().__new__(cls)
        inert.arguments = arguments
        return inert

    # Its being there also keeps a pickle from setting attributes of the class itself.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertNamespace(Inert):
    """`argparse.Namespace`: the options that a model was trained with."""


class InertDtype(Inert):
    """`numpy.dtype(code, …)`."""

    def to_numpy(self) -> np.dtype:
        """The type, if it is one of plain numbers. Raises NotNumbersError for any other."""
        code, order = self.arguments[0], "="
        if isinstance(self.state, tuple) and len(self.state) > 1 and self.state[1] in ("<", ">", "|"):
            order = self.state[1]
        if not isinstance(code, str) or not PLAIN_NUMBERS.fullmatch(code):
            raise NotNumbersError(f"an array of {code!r} where numbers were expected")
        return np.dtype(code).newbyteorder(order)


class InertArray(Inert):
    """`numpy.core.multiarray._reconstruct(ndarray, (0,), b"b")`, whose state holds the numbers."""

    def parts(self) -> tuple[Any, Any, bool, Any]:
        """Shape, type, Fortran order, and the bytes or list of contents."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise NotNumbersError("an array without contents")
        _, shape, dtype, fortran, contents = self.state
        return shape, dtype, bool(fortran), contents


class InertBuffer(InertArray):
    """`numpy.core.numeric._frombuffer(buffer, dtype, shape, order)`: arrays of pickle protocol 5."""

    def parts(self) -> tuple[Any, Any, bool, Any]:
        """See `InertArray.parts`."""
        buffer, dtype, shape, order = self.arguments
        return shape, dtype, order == "F", buffer


class StreamedArray(InertArray):
    """joblib's `NumpyArrayWrapper`: the numbers follow it in the file, outside the pickle."""

    contents: bytes

    def read(self, file: IO[bytes]) -> None:
        """Take the numbers from where the file is now."""
        shape, dtype, _, _ = self.parts()
        if self.state.get("numpy_array_alignment_bytes") is not None:
            file.read(file.read(1)[0])  # padding
        size = dtype.to_numpy().itemsize
        for side in shape:
            size *= side
        self.contents = file.read(size)

    def parts(self) -> tuple[Any, Any, bool, Any]:
        """See `InertArray.parts`."""
        if not isinstance(self.state, dict) or not isinstance(self.state.get("dtype"), InertDtype):
            raise NotNumbersError("an array without a type")
        return self.state["shape"], self.state["dtype"], self.state["order"] == "F", getattr(self, "contents", b"")


class Latin1(Inert):
    """`_codecs.encode(text, "latin1")`: how old pickle protocols keep bytes."""

    def __new__(cls, text: str, encoding: str = "latin1") -> Any:
        """The bytes."""
        if encoding != "latin1":
            raise NotNumbersError(f"text in the encoding {encoding!r}")
        return text.encode("latin1")


STAND_INS = {
    "numpy.dtype": InertDtype,
    "numpy.core.multiarray._reconstruct": InertArray,
    "numpy._core.multiarray._reconstruct": InertArray,
    "numpy.core.numeric._frombuffer": InertBuffer,
    "numpy._core.numeric._frombuffer": InertBuffer,
    "joblib.numpy_pickle.NumpyArrayWrapper": StreamedArray,
    "_codecs.encode": Latin1,
    "copyreg._reconstructor": Inert,
    "copy_reg._reconstructor": Inert,
    "builtins.object": Inert,
    "__builtin__.object": Inert,
    "pathlib.PosixPath": Inert,
    "pathlib._local.PosixPath": Inert,
    "argparse.Namespace": InertNamespace,
}
KEPT_AS_STATE = ("numpy.", "sklearn.")
"""Objects of these packages are read as their state."""


def stand_in(name: str) -> type:
    """What stands for a global `module.name`. Raises MoreThanDataError for all that no file needs."""
    if name in STAND_INS:
        return STAND_INS[name]
    if name.startswith(KEPT_AS_STATE):
        return Inert
    raise MoreThanDataError(name)


class InertUnpickler(pickle._Unpickler):
    """Reads pickles, and joblib's, with stand-ins for everything that they name."""

    # The variant in Python is the one whose reading of BUILD can be extended; it is made afresh for every file.
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.file = file

    def find_class(self, module: str, name: str) -> type:
        """A stand-in, never what is really there."""
        return stand_in(f"{module}.{name}")

    def load_build(self) -> None:
        """Set an object's state; an array of joblib's then has its numbers in the file."""
        pickle._Unpickler.load_build(self)  # type: ignore[reportAttributeAccessIssue]
        built = self.stack[-1]  # type: ignore[reportAttributeAccessIssue]
        if isinstance(built, StreamedArray):
            built.read(self.file)

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[reportArgumentType], of this class alone


def read_untrusted(file: Path) -> Any:
    """What a file of PyTorch, NumPy, pickle or joblib holds, told by its first bytes.

    Tensors come as tensors, arrays as `numpy.ndarray` of numbers, dicts, lists, strings and numbers as they are;
    objects of argparse and scikit-learn as the dict of their attributes, and what is of no use as None. Raises
    UserError, naming the file, if it is missing, damaged, or holds or does anything else.
    """
    try:
        return _contents(_read(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except MoreThanDataError as error:
        raise UserError(f"{file}: holds more than data and was not opened: {_first_line(error)}") from None
    except NotNumbersError as error:
        raise UserError(f"{file}: not a file of weights or numbers: {_first_line(error)}") from None
    except Exception as error:  # Bytes that mean nothing can end anywhere in three libraries.
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
        # Not the libraries' own words, which are for programmers, or advise to execute the file.
        problem = f"damaged, cut short, or no checkpoint; fetch it again ({type(error).__name__})"
        raise UserError(f"{file}: {_instead_of_checkpoint(file) or problem}") from None


def read_untrusted_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of safetensors, or of what `read_untrusted` reads, by name: those of its `state_dict`, if
    it has one. Raises UserError as that does, and for a file without tensors."""
    try:
        content = load_file(file) if file.suffix == ".safetensors" and file.is_file() else read_untrusted(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged, or no safetensors; fetch it again ({_first_line(error)})") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{file}: holds no tensors by name")
    return tensors


def _instead_of_checkpoint(file: Path) -> str | None:
    """What a file is that cannot be read, where its beginning tells."""
    with file.open("rb") as opened:
        head = opened.read(200).lstrip().lower()
    for what, beginnings in NO_CHECKPOINTS.items():
        if head.startswith(beginnings):
            return f"is {what}"
    return None


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(len(TORCH_BEFORE_ZIP))
        file.seek(0)
        if head == TORCH_BEFORE_ZIP:
            return _read_torch(path, STAND_INS)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                of_torch = any(name.endswith("data.pkl") for name in archive.namelist())
            if of_torch:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                return _read_torch(path, {name: stand_in(name) for name in names})
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        file.seek(0)
        if head.startswith(b"\x93NUMPY"):
            return _read_npy(file)
        for magic, library in COMPRESSED.items():
            if head.startswith(magic):
                return InertUnpickler(io.BytesIO(library.decompress(file.read()))).load()
        return InertUnpickler(file).load()


def _read_torch(path: Path, stand_ins: dict[str, type]) -> Any:
    pairs = [(kind, name) for name, kind in stand_ins.items()]
    with torch.serialization.safe_globals(pairs):  # type: ignore[reportArgumentType], which knows no pairs
        try:
            # A checkpoint of the largest models is 10 GB, of which the averaged weights are a quarter.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            refused = REFUSED_BY_TORCH.search(str(error))
            raise MoreThanDataError(refused[1]) if refused else error from None


def _read_npy(file: IO[bytes]) -> Any:
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    _, _, dtype = read_header[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:  # A dict that was saved as if it were an array.
        return InertUnpickler(file).load()
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _contents(value: Any) -> Any:
    """What was read, with arrays for their stand-ins."""
    if isinstance(value, InertArray):
        return _array(value)
    if isinstance(value, Inert):
        return _contents(value.state)
    if isinstance(value, dict):
        return {_key(key): _contents(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_contents(item) for item in value]) if type(value) in (list, tuple) else None
    return value if isinstance(value, str | int | float | bytes | Tensor | np.ndarray) else None


def _key(key: Any) -> Any:
    return key if isinstance(key, str | int) else repr(key)


def _array(value: InertArray) -> Any:
    shape, dtype, fortran, contents = value.parts()
    if isinstance(contents, list):
        return _contents(contents[0]) if len(contents) == 1 else [_contents(item) for item in contents]
    numbers = np.frombuffer(bytes(contents), dtype=dtype.to_numpy())
    return numbers.reshape(shape, order="F" if fortran else "C").copy()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
