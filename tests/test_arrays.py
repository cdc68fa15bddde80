"""NumPy's files, damaged in every way that files of their kind can be: one line that names the file."""

from __future__ import annotations

import io
import resource
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reglue.arrays import ArrayFile
from reglue.errors import UserError

NUMBERS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def npy(header: str, content: bytes = NUMBERS.tobytes(), version: bytes = b"\x01\x00") -> bytes:
    """An .npy file with any text for its header."""
    text = header.encode("latin1").ljust(118) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + content


def described(shape: object, descr: object = "|u1", order: object = False) -> bytes:
    return npy(repr({"descr": descr, "fortran_order": order, "shape": shape}))


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


MEMBERS: dict[str, bytes] = {
    "empty": b"",
    "no array": b"text",
    "cut in its header": saved(NUMBERS)[:50],
    "cut in its numbers": saved(NUMBERS)[:-3],
    "fewer numbers in its shape": described((1, 3, 4)),
    "no number in its shape": described((0, 3, 4)),
    "smaller numbers": described((2, 3), descr="<u2"),
    "a negative shape": described((-1, 3, 4)),
    "two negative sides": described((-2, -3, 4)),
    "a huge shape": described((10**9, 10**9, 10**9)),
    "a shape that overflows": described((2**32, 2**32, 2**32)),
    "a shape of 10^19": described((10**19,)),
    "a shape of floats": described((2.0, 3)),
    "a shape of text": described("shape"),
    "no shape": npy(repr({"descr": "|u1", "fortran_order": False})),
    "an order of text": described((2, 3, 4), order="C"),
    "objects": saved(np.array([{}], dtype=object)),
    "structures": saved(np.zeros(3, dtype=[("a", "u1"), ("b", "f4")])),
    "dates": saved(np.zeros(3, dtype="datetime64[s]")),
    "complex numbers": saved(np.zeros(3, dtype=complex)),
    "bytes": saved(np.array([b"abc"])),
    "an unknown type": described((3,), descr="zz"),
    "a type of tuples": described((3,), descr=[("a", "|u1", (10**9,))]),
    "a subarray": described((3,), descr=("|u1", (10**9,))),
    "a deep header": npy("(" * 5000 + ")" * 5000),
    "a header that is code": npy("{'descr': exit(3), 'fortran_order': False, 'shape': (3,)}"),
    "another version": npy("{}", version=b"\x09\x00"),
}


def archive(path: Path, content: bytes, name: str = "arr_0.npy", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, content)
    return path


def read_everything(path: Path) -> list[np.ndarray]:
    arrays = ArrayFile(path)
    for name in arrays.names:
        shape = arrays.header(name).shape
        if shape and shape[0]:
            list(arrays.blocks(name, 2))
    return [arrays.read(name) for name in arrays.names]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_everything(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert len(message) < 500, message
    return message


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_of_any_compression_are_read(compression: int, tmp_path: Path) -> None:
    (found,) = read_everything(archive(tmp_path / "a.npz", saved(NUMBERS), compression=compression))
    assert np.array_equal(found, NUMBERS)
    blocks = list(ArrayFile(tmp_path / "a.npz").blocks("arr_0", 1))
    assert np.array_equal(np.concatenate(blocks), NUMBERS)


HALVES = np.asfortranarray(NUMBERS.astype(np.float16))


@pytest.mark.parametrize("array", [NUMBERS, HALVES, np.array("text"), np.zeros(0)])
def test_single_arrays_are_read(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    arrays = ArrayFile(tmp_path / "a.npy")
    assert arrays.names == ("arr_0",)
    assert np.array_equal(arrays.read("arr_0"), array)


@pytest.mark.parametrize("member", MEMBERS)
def test_an_array_that_is_none_is_one_line(member: str, tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(archive(tmp_path / "a.npz", MEMBERS[member]))
    (tmp_path / "a.npy").write_bytes(MEMBERS[member])
    refusal(tmp_path / "a.npy")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 50_000  # kB


def encrypted(path: Path) -> None:
    """The bit that says so, in both headers of the member."""
    content = bytearray(archive(path, saved(NUMBERS)).read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


def unknown_compression(path: Path) -> None:
    content = bytearray(archive(path, saved(NUMBERS)).read_bytes())
    content[8] = content[content.rindex(b"PK\x01\x02") + 10] = 99
    path.write_bytes(content)


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", saved(NUMBERS))
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("arr_0.npy", saved(NUMBERS))


def inflated(path: Path) -> None:
    """The directory claims more bytes than there are."""
    content = bytearray(archive(path, described((10**9,))).read_bytes())
    place = content.rindex(b"PK\x01\x02") + 20
    content[place : place + 8] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)


ARCHIVES: dict[str, Callable[[Path], object]] = {
    "encrypted": encrypted,
    "of an unknown compression": unknown_compression,
    "of two arrays of one name": twice,
    "of a forged size": inflated,
    "that is text": lambda path: path.write_text("text"),
    "that is empty": lambda path: path.write_bytes(b""),
    "that is missing": lambda path: None,
    "that is a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_that_is_none_is_one_line(kind: str, tmp_path: Path) -> None:
    ARCHIVES[kind](tmp_path / "a.npz")
    refusal(tmp_path / "a.npz")


def test_what_is_larger_than_memory_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        size = file.write(npy(repr({"descr": "|u1", "fortran_order": False, "shape": (2**31,)}), b""))
        file.truncate(size + 2**31)
    with pytest.raises(UserError, match=r"a\.npy is damaged \(arr_0 has 2147483648 bytes, more than"):
        ArrayFile(tmp_path / "a.npy").read("arr_0")


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_LZMA])
def test_any_bytes_changed_are_one_line_or_nothing(compression: int, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(archive(tmp_path / "a.npz", saved(NUMBERS), compression=compression).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "a.npz").write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(UserError):  # Nothing else.
        read_everything(tmp_path / "a.npz")
