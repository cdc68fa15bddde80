"""NumPy's files: .npz archives and single .npy arrays, read so that any damage becomes one line that names the file.

Nothing in them is executed, and no shape is believed before there are as many bytes.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from reglue.errors import UserError, one_line

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


def _header(name: str, file: IO[bytes], size: int) -> Header:
    """Raises ValueError, or whatever NumPy raises, for an array that cannot be read from a file of so many bytes."""
    first = np.lib.format.read_magic(file) == (1, 0)
    header = Header(*(np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file))
    if header.dtype.kind not in "biufU" or header.dtype.subdtype:
        raise ValueError(f"{name} holds {header.dtype}, not numbers")
    wanted = math.prod(header.shape) * header.dtype.itemsize
    if min(header.shape, default=0) < 0 or wanted > size - file.tell():
        raise ValueError(f"{name} has fewer numbers than its shape {header.shape} says")
    return header


def _exactly(file: IO[bytes], size: int, name: str) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"{name} ends after {len(content)} of {size} bytes")
    return content
