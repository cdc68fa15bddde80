"""NumPy's files: .npz archives and single .npy arrays, read so that any damage becomes one line that names the file.

Nothing in them is executed, and no shape is believed unless there are just as many bytes.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from reglue.errors import UserError, one_line
from reglue.files import UNSEALED as NO_DIGITS
from reglue.files import sha256_around

ONLY = "arr_0"
"""What the array of an .npy file is called here: what NumPy calls the first of an archive that was given no name."""
MOST_AT_ONCE = 2**30
"""Bytes of an array that is read whole. Images are read in blocks."""


class Header(NamedTuple):
    """What is said of an array before its numbers."""

    shape: tuple[int, ...]
    fortran: bool
    """Whether the first index runs fastest."""
    dtype: np.dtype


class ArrayFile:
    """The arrays of an .npz archive, or the one of an .npy file, of numbers or text. Opened for each that is read."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is missing, or no archive although its name says so."""
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self.path = path
        self.names: tuple[str, ...] = (ONLY,)
        self._is_archive = path.suffix.lower() != ".npy"
        if self._is_archive:
            with self._naming(), zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if name.endswith(".npy")]
                if len(set(members)) < len(members):
                    raise ValueError("two of its arrays have one name")
                self.names = tuple(name.removesuffix(".npy") for name in members)

    def refuse_changed(self, *, sealed: bool = False) -> None:
        """Raise UserError if the file is not what was written, where its seal (`seal_archive`) tells; if it must be
        `sealed`, also where it has none."""
        with self._naming():
            written, found = _seal(self.path)
            if written != found and (written or sealed):
                raise ValueError("its content is not what was written")

    def header(self, name: str) -> Header:
        """Shape, order and type of an array. Raises UserError for damage, and for what is neither numbers nor text."""
        with self._naming(), self._opened(name) as (header, _):
            return header

    def read(self, name: str) -> np.ndarray:
        """A whole array of at most `MOST_AT_ONCE` bytes. Raises UserError as `header`."""
        with self._naming(), self._opened(name) as (header, file):
            size = math.prod(header.shape) * header.dtype.itemsize
            if size > MOST_AT_ONCE:
                raise ValueError(f"{name} has {size} bytes, more than {MOST_AT_ONCE}")
            numbers = np.frombuffer(_exactly(file, size, name), header.dtype)
            return numbers.reshape(header.shape, order="F" if header.fortran else "C").copy()

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """An array in C order, so many rows of it at a time: it is never whole in memory. Raises UserError as
        `header`."""
        with ExitStack() as stack:
            with self._naming():
                header, file = stack.enter_context(self._opened(name))
            count, *inner = header.shape
            for start in range(0, count, rows):
                shape = (min(rows, count - start), *inner)
                with self._naming():
                    content = _exactly(file, math.prod(shape) * header.dtype.itemsize, name)
                yield np.frombuffer(content, header.dtype).reshape(shape)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
        """An array's header, and the file at its first number."""
        if not self._is_archive:
            with self.path.open("rb") as file:
                yield _header(name, file, self.path.stat().st_size), file
            return
        with zipfile.ZipFile(self.path) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.flag_bits & 1:
                raise ValueError(f"{name} is encrypted")
            with archive.open(member) as file:
                yield _header(name, file, member.file_size), file

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Bytes that mean nothing can end anywhere in zipfile, its compressions and NumPy.
            raise UserError(f"{self.path} is damaged ({one_line(error)}); fetch or make it again") from error


SEAL = b"sha256="
"""The comment of an archive of ours: this and the SHA-256 of the file as it is with zeros in the place of that one."""
UNSEALED = SEAL + NO_DIGITS.encode()
"""The comment until `seal_archive`."""
_SEALED = re.compile(SEAL + rb"([0-9a-f]{64})")


def seal_archive(path: Path) -> None:
    """Put its hash into the comment of an archive that was written with the comment `UNSEALED`.

    The sums that archives have are of their members alone: not of names, dates, and how the members are found.
    """
    digest = _seal(path)[1]
    with path.open("r+b") as file:
        file.seek(-64, 2)
        file.write(digest.encode())


def _seal(path: Path) -> tuple[str | None, str]:
    """The hash at the end of an archive, None if it has none, and the one that it should be."""
    with path.open("rb") as file:
        place = max(path.stat().st_size - len(UNSEALED), 0)
        file.seek(place)
        written = _SEALED.fullmatch(file.read())
        return written and written[1].decode(), sha256_around(file, place + len(SEAL))


def _header(name: str, file: IO[bytes], size: int) -> Header:
    """Raises ValueError, or whatever NumPy raises, for an array that cannot be read from a file of so many bytes."""
    first = np.lib.format.read_magic(file) == (1, 0)
    header = Header(*(np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file))
    if header.dtype.kind not in "biufU" or header.dtype.subdtype:
        raise ValueError(f"{name} holds {header.dtype}, not numbers")
    wanted = math.prod(header.shape) * header.dtype.itemsize
    if min(header.shape, default=0) < 0 or wanted != size - file.tell():
        raise ValueError(f"{name} has more or fewer numbers than its shape {header.shape} says")
    return header


def _exactly(file: IO[bytes], size: int, name: str) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"{name} ends after {len(content)} of {size} bytes")
    return content
