"""Files of other programs, read without executing anything that is in them.

A pickle is a program: it names functions and has them called. Here no function that a file names is ever looked up. The
few names that the published files need are bound to stand-ins that only keep what they are given, and every other
name refuses the file. NumPy's own functions are not among them: a forged `dtype` can make its arrays read memory that
is not theirs. Arrays are put together from the numbers in the file once it has been read.

A small pickle can also stand for more than any memory holds, and keep whoever reads it busy for ever: a list of two
lists of two lists and so on. So there are bounds on its operations, on what it unpacks to and on what is found in it,
far above those of any checkpoint. PyTorch's reader has none; what it is given has been read here first.
"""

from __future__ import annotations

import bz2
import io
import lzma
import mmap
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable
from math import prod
from pathlib import Path
from types import NoneType
from typing import IO, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from reglue.errors import UserError

TORCH_BEFORE_ZIP = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that PyTorch wrote before version 1.6."""
MOST_OPERATIONS = 500_000
"""Of one pickle. Checkpoints of the largest models have 60,000, their optimiser included."""
MOST_OBJECTS = 500_000
"""In the contents of a file, each counted as often as it is there."""
DEEPEST = 100
"""How many lists and dicts may stand inside each other."""
DEEPEST_GIVEN = 2
"""How far into the arguments of a call its time is counted."""
LONGEST_KEY = 2**16
"""Characters: two long keys are compared whenever one is looked for."""
MOST_BYTES = 2**27
"""That a compressed file, or a pickle in an archive, may unpack to."""
COMPRESSED: dict[bytes, Callable[[], Any]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(zlib.MAX_WBITS | 32),
    b"\x78": lambda: zlib.decompressobj(zlib.MAX_WBITS | 32),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lambda: lzma.LZMADecompressor(memlimit=MOST_BYTES),
}
"""How compressed files begin, and what unpacks them. 32: zlib tells its own streams from gzip's."""
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


class TooMuchError(ValueError):
    """A file stands for more than any published one holds."""


class Inert:
    """Stands for an object of a class that is not needed: keeps its state and does nothing."""

    state: Any = None

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Keep the arguments. Not in `__init__`: pickles may call the class, or its `__new__` alone."""
        inert = super().__new__(cls)
        inert.arguments = arguments
        return inert

    # Its being there also keeps a pickle from setting attributes of the class itself.
    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertDict(Inert):
    """`collections.OrderedDict` and other kinds of dict: keeps what is put into it."""

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Take the pairs of keys and values that Python 2 gave to `OrderedDict`."""
        made = super().__new__(cls, *arguments, **named)
        made.state = {}
        for pairs in arguments:
            for key, value in pairs if isinstance(pairs, list) else ():
                made[key] = value
        return made

    def __setitem__(self, key: Any, value: Any) -> None:
        refuse_slow([key])
        self.state[key] = value

    def __setstate__(self, state: Any) -> None:
        """Attributes besides the contents: of no use."""


class InertCounter(InertDict):
    """`collections.Counter` of a dict, as schedules of the learning rate have it."""

    def __new__(cls, *arguments: Any) -> Self:
        """Anything but a dict would be counted, and found as the key that it becomes."""
        if not all(isinstance(each, dict) for each in arguments):
            raise TooMuchError("a count of other things than those of a dict")
        return super().__new__(cls, *arguments)


class InertSet(Inert):
    """`set`."""

    def __new__(cls, values: Any = ()) -> Self:
        """Of a list, of values that are quickly found."""
        if not isinstance(values, list | tuple):
            raise TooMuchError(f"a set of what a {type(values).__name__} has in it")
        refuse_slow(values)
        return super().__new__(cls, values)


class InertType(Inert):
    """A type that files name and do not call: whoever did could ask for a tensor of any size."""

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Refuse it."""
        raise TooMuchError("new tensors, which are not in it")


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
        self.contents = file.read(prod(_shape(shape)) * dtype.to_numpy().itemsize)

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
    "collections.Counter": InertCounter,
    "collections.OrderedDict": InertDict,
    "collections.defaultdict": InertDict,
    "lightning.fabric.utilities.data.AttributeDict": InertDict,
    "lightning_fabric.utilities.data.AttributeDict": InertDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": InertDict,
    "copyreg._reconstructor": Inert,
    "builtins.object": Inert,
    "builtins.set": InertSet,
    **{f"builtins.{name}": Inert for name in ("dict", "float", "int", "list", "str", "tuple")},
    "typing.Any": Inert,
    "pathlib.PosixPath": Inert,
    "pathlib._local.PosixPath": Inert,
    "argparse.Namespace": Inert,
}
PYTHON_3 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules that older pickles name as Python 2 called them."""
KEPT_AS_STATE = ("numpy.", "sklearn.", "omegaconf.", "pytorch_lightning.", "lightning.", "lightning_fabric.")
"""Objects of these packages are read as their state."""
OF_TENSORS = re.compile(
    r"torch\.(_utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|_tensor\._rebuild_from_type_v2|nn\.parameter\.Parameter|Size|device)"
)
TYPES_OF_TENSORS = re.compile(r"torch\.(Tensor|(cuda\.|storage\.)?\w+Storage|b?float\w+|u?int\d+|bool|complex\d+)")
"""What PyTorch's own reader is left to make: tensors of numbers, and nothing sparse, quantised or without contents."""


def stand_in(name: str) -> type:
    """What stands for a global `module.name`. Raises MoreThanDataError for all that no file needs."""
    if name in STAND_INS:
        return STAND_INS[name]
    if name.startswith(KEPT_AS_STATE):
        return Inert
    raise MoreThanDataError(name)


def refuse_slow(keys: Iterable[Any]) -> None:
    """Raise TooMuchError unless all of these are quickly found in a dict.

    Tuples and long texts take time with all that is in them, and large integers can be chosen so that all are looked
    for in one place.
    """
    for key in keys:
        small = abs(key) < 2**60 if isinstance(key, int) else not isinstance(key, str | bytes) or len(key) < LONGEST_KEY
        if not isinstance(key, str | bytes | int | float | NoneType | Inert | type) or not small:
            raise TooMuchError(f"a key of the type {type(key).__name__}, which no published file has")


class Counted(dict[int, Any]):
    """What a pickle's operations do, of which it may ask for so many."""

    left = MOST_OPERATIONS

    def spend(self, count: int) -> None:
        """Raise TooMuchError once there were too many."""
        self.left -= count
        if self.left < 0:
            raise TooMuchError(f"more than {MOST_OPERATIONS:,} operations")

    def __getitem__(self, operation: int) -> Any:
        self.spend(1)
        return super().__getitem__(operation)


def _after(check: Callable[[InertUnpickler], None], operation: bytes) -> Callable[[InertUnpickler], None]:
    """An operation of pickles, after a check of what it is given."""
    plain: Any = pickle._Unpickler.dispatch[operation[0]]

    def checked(unpickler: InertUnpickler) -> None:
        check(unpickler)
        plain(unpickler)

    return checked


class InertUnpickler(pickle._Unpickler):
    """Reads pickles, and joblib's, with stand-ins for everything that they name."""

    # The variant in Python is the one whose operations can be extended.
    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    memo: dict[int, Any]
    readline: Callable[[], bytes]

    def __init__(self, file: Any) -> None:
        """`file` must not make room for more than it has, as mmap and BytesIO do not."""
        super().__init__(file)
        self.file = file
        self.bytes_left = MOST_BYTES
        self.dispatch = Counted(type(self).dispatch)  # type: ignore[reportAttributeAccessIssue], for `load`

    def find_class(self, module: str, name: str) -> type:
        """A stand-in, never what is really there."""
        return stand_in(f"{PYTHON_3.get(module, module)}.{name}")

    def charge(self, given: Any, depth: int = 0) -> None:
        """Count what a call is given, and what is in that, as operations: one list can be given again and again.

        To the depth to which a function may go through it: its arguments, those that are lists, and the pairs in them.
        """
        if isinstance(given, InertDict | dict):
            given = (given.state if isinstance(given, InertDict) else given).values()
        elif not isinstance(given, list | tuple | set | frozenset):
            return
        self.dispatch.spend(len(given))
        for each in given if depth < DEEPEST_GIVEN else ():
            self.charge(each, depth + 1)

    def load_build(self) -> None:
        """Set an object's state; an array of joblib's then has its numbers in the file."""
        self.charge(self.stack[-1])
        super().load_build()  # type: ignore[reportAttributeAccessIssue]
        built = self.stack[-1]
        if isinstance(built, StreamedArray):
            built.read(self.file)

    def load_reduce(self) -> None:
        """Call a stand-in; bytes of one text can be asked for again and again."""
        self.charge(self.stack[-1])
        super().load_reduce()  # type: ignore[reportAttributeAccessIssue]
        made = self.stack[-1]
        self.bytes_left -= len(made) if isinstance(made, bytes) else 0
        if self.bytes_left < 0:
            raise TooMuchError(f"more than {MOST_BYTES:,} bytes made of text")

    def _instantiate(self, kind: Any, arguments: list[Any]) -> None:
        """Call a stand-in, as the operations INST and OBJ have it."""
        self.charge(arguments)
        super()._instantiate(kind, arguments)  # type: ignore[reportAttributeAccessIssue]

    def load_put(self) -> None:
        """Note an object under a number of any length."""
        number = int(self.readline())
        if not 0 <= number <= MOST_OPERATIONS:
            raise TooMuchError(f"an object of the number {number % MOST_OPERATIONS}…")
        self.memo[number] = self.stack[-1]

    dispatch |= {  # of this class alone
        pickle.BUILD[0]: load_build,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: _after(lambda self: self.charge(self.stack[-1]), pickle.NEWOBJ),
        pickle.NEWOBJ_EX[0]: _after(lambda self: self.charge(self.stack[-2:]), pickle.NEWOBJ_EX),
        pickle.PUT[0]: load_put,
        pickle.SETITEM[0]: _after(lambda self: refuse_slow([self.stack[-2]]), pickle.SETITEM),
        # The stack holds nothing but keys and values, or values, since its mark.
        pickle.SETITEMS[0]: _after(lambda self: refuse_slow(self.stack[::2]), pickle.SETITEMS),
        pickle.DICT[0]: _after(lambda self: refuse_slow(self.stack[::2]), pickle.DICT),
        pickle.ADDITEMS[0]: _after(lambda self: refuse_slow(self.stack), pickle.ADDITEMS),
        pickle.FROZENSET[0]: _after(lambda self: refuse_slow(self.stack), pickle.FROZENSET),
        # Room for a bytearray would be made before it is read.
        pickle.BYTEARRAY8[0]: dispatch[pickle.BINBYTES8[0]],
    }


class TorchScan(InertUnpickler):
    """Reads what PyTorch's reader is to read, without its tensors: it raises what InertUnpickler raises."""

    def __init__(self, file: Any, file_size: int) -> None:
        """`file_size` is that of the whole file, in bytes, the tensors' numbers included."""
        super().__init__(file)
        self.file_size = file_size
        self.asked: dict[str, type] = {}
        """What the file names and PyTorch's reader does not know, and what stands for it."""

    def find_class(self, module: str, name: str) -> type:
        """A stand-in."""
        full = f"{PYTHON_3.get(module, module)}.{name}"
        if OF_TENSORS.fullmatch(full):
            return Inert
        if TYPES_OF_TENSORS.fullmatch(full):
            return InertType
        return self.asked.setdefault(full, stand_in(full))

    def persistent_load(self, pid: Any) -> Inert:
        """A storage, ("storage", type, key, location, count of numbers, …), that must be in the file."""
        count = pid[4] if isinstance(pid, tuple) and len(pid) > 4 else -1
        if not isinstance(count, int) or not 0 <= count <= self.file_size:
            raise TooMuchError("tensors larger than the file")
        return Inert()


def read_untrusted(file: Path) -> Any:
    """What a file of PyTorch, NumPy, pickle or joblib holds, recognised by its first bytes.

    Tensors come as tensors, arrays as `numpy.ndarray` of numbers, dicts, lists, strings and numbers as they are;
    objects of argparse and scikit-learn as the dict of their attributes, and what is of no use as None. Raises
    UserError, naming the file, if it is missing, damaged, or holds or does anything else.
    """
    try:
        content = _read(file)
        _refuse_large(content)
        return _contents(content)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except MoreThanDataError as error:
        raise UserError(f"{file}: holds more than data and was not opened: {_first_line(error)}") from None
    except NotNumbersError as error:
        raise UserError(f"{file}: not a file of weights or numbers: {_first_line(error)}") from None
    except TooMuchError as error:
        raise UserError(f"{file}: no checkpoint, but a small file that stands for {_first_line(error)}") from None
    except Exception as error:  # Bytes that mean nothing can end anywhere in three libraries.
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
        # Not the libraries' own words, which are for programmers, or advise to execute the file.
        problem = f"damaged, cut short, or no checkpoint; fetch it again ({type(error).__name__})"
        raise UserError(f"{file}: {_instead_of_checkpoint(file) or problem}") from None


def _instead_of_checkpoint(file: Path) -> str | None:
    """What an unreadable file is, where its beginning shows it."""
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
            return _read_old_torch(path)
        if zipfile.is_zipfile(file):
            return _read_zip(path)
        file.seek(0)
        if head.startswith(b"\x93NUMPY"):
            return _read_npy(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            for magic, decompressor in COMPRESSED.items():
                if head.startswith(magic):
                    return InertUnpickler(io.BytesIO(_unpacked(decompressor(), whole))).load()
            return InertUnpickler(whole).load()


def _read_zip(path: Path) -> Any:
    """What an archive of PyTorch, or else of NumPy, holds."""
    with zipfile.ZipFile(path) as archive:
        pickles = [info for info in archive.infolist() if info.filename.lower().endswith("data.pkl")]
        if pickles:
            [info] = pickles  # Of two, PyTorch's reader might take the other one.
            _refuse_size(info.file_size)
            scan = TorchScan(io.BytesIO(archive.read(info)), path.stat().st_size)
            scan.load()
            return _read_torch(path, scan.asked)
        _refuse_size(sum(info.file_size for info in archive.infolist()))
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _read_old_torch(path: Path) -> Any:
    """What PyTorch wrote before version 1.6: a magic number, the format, the machine, the contents, and their keys."""
    asked: dict[str, type] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        for _ in range(5):
            scan = TorchScan(whole, len(whole))
            scan.load()
            asked |= scan.asked
    return _read_torch(path, asked)


def _unpacked(decompressor: Any, compressed: mmap.mmap) -> bytes:
    content = decompressor.decompress(compressed, MOST_BYTES + 1)
    _refuse_size(len(content))
    if not decompressor.eof:
        raise EOFError
    return content


def _refuse_size(size: int) -> None:
    if size > MOST_BYTES:
        raise TooMuchError(f"more than {MOST_BYTES:,} bytes")


def _empty(*factory: Any) -> dict[Any, Any]:
    """In place of `defaultdict(factory)`."""
    return {}


def _read_torch(path: Path, stand_ins: dict[str, type]) -> Any:
    # PyTorch's reader puts values into true dicts alone.
    dicts = {name: _empty if name == "collections.defaultdict" else dict for name in stand_ins}
    pairs = [(dicts[name] if kind is InertDict else kind, name) for name, kind in stand_ins.items()]
    with torch.serialization.safe_globals(pairs), warnings.catch_warnings():  # type: ignore[reportArgumentType], which knows no pairs
        warnings.simplefilter("ignore")  # about newer formats of pickles, which it refuses where they are too new
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
        return InertUnpickler(io.BytesIO(file.read(MOST_BYTES))).load()
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _refuse_large(value: Any) -> None:
    """Raise TooMuchError for what stands for too many objects, in the time that it takes to see each of them once."""
    counts: dict[int, int] = {}

    def count(value: Any, depth: int) -> int:
        if isinstance(value, Inert):
            inside: Collection[Any] = (value.state, value.arguments)
        elif isinstance(value, dict):
            inside = value.values()
        elif isinstance(value, list | tuple):
            inside = value
        else:
            return 1
        if depth > DEEPEST:
            raise TooMuchError("objects nested too deeply")
        if id(value) not in counts:
            counts[id(value)] = MOST_OBJECTS  # should it be in itself
            counts[id(value)] = 1 + sum(count(each, depth + 1) for each in inside)
        return counts[id(value)]

    if count(value, 0) > MOST_OBJECTS:
        raise TooMuchError(f"more than {MOST_OBJECTS:,} objects")


def _contents(value: Any) -> Any:
    """What was read, with arrays for their stand-ins: a tree, however it was written."""
    if isinstance(value, InertArray):
        return _array(value)
    if isinstance(value, Inert):
        return _contents(value.state)
    if isinstance(value, dict):
        return {key if isinstance(key, str | int) else repr(key): _contents(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_contents(item) for item in value])
    if isinstance(value, Tensor):
        # One number can be written as a tensor of any size.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise TooMuchError(f"a tensor of {value.numel():,} numbers")
        return value.detach()
    return value if isinstance(value, str | int | float | bytes | np.ndarray) else None


def _array(value: InertArray) -> Any:
    shape, dtype, fortran, contents = value.parts()
    if isinstance(contents, list):
        return _contents(contents[0] if len(contents) == 1 else contents)
    if not isinstance(contents, bytes):
        raise NotNumbersError("an array without contents")
    numbers = np.frombuffer(contents, dtype=dtype.to_numpy())  # in place: many arrays can be of the same bytes
    return numbers.reshape(_shape(shape), order="F" if fortran else "C")


def _shape(shape: Any) -> tuple[int, ...]:
    """The shape of an array. Raises NotNumbersError for what is none."""
    sides = shape if isinstance(shape, list | tuple) and len(shape) <= 32 else (None,)
    if not all(isinstance(side, int) and 0 <= side < 2**48 for side in sides):
        raise NotNumbersError("an array of no shape")
    return tuple(sides)  # type: ignore[reportReturnType], which are integers now


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
