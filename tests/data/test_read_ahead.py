import ctypes
import mmap
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from reglue.data import read_ahead
from reglue.data.read_ahead import READ_AROUND, expect

ROWS, CHANNELS = 4, 3


def in_memory(mapped: np.ndarray) -> np.ndarray:
    """Which pages of a mapped file are in memory; unlike reading them, asking changes nothing."""
    pages = np.zeros(-(-mapped.nbytes // mmap.PAGESIZE), np.uint8)
    found = ctypes.CDLL(None).mincore(
        ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.nbytes), ctypes.c_void_p(pages.ctypes.data)
    )
    assert found == 0
    return (pages & 1).astype(bool)


def forget(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it has in memory")
def test_what_is_expected_is_read_and_nothing_else(tmp_path):
    file, shape = tmp_path / "rows", (ROWS, CHANNELS, READ_AROUND)
    np.zeros(shape, np.uint8).tofile(file)
    mapped = np.memmap(file, np.uint8, "r", shape=shape)
    forget(file)
    if in_memory(mapped).any():
        pytest.skip("this file system keeps everything in memory")

    expect(mapped[1:3][:, 2:])

    asked = np.zeros((ROWS, CHANNELS), bool)
    asked[1:3, 2] = True
    patience = time.monotonic() + 10
    while True:
        found = in_memory(mapped).reshape(ROWS, CHANNELS, -1)
        if found[asked].all() or time.monotonic() > patience:
            break
        time.sleep(0.01)
    assert found[asked].all()
    assert not found[~asked].any()


@pytest.mark.parametrize(
    "rows", [np.zeros((0, 5)), np.zeros((2, 3, READ_AROUND)), np.zeros((2, 3, READ_AROUND))[:, 1:]]
)
def test_any_array_may_be_expected(rows):
    expect(rows)


def test_nothing_is_asked_for_small_rows(monkeypatch):
    asked = []
    monkeypatch.setattr(read_ahead, "_madvise", lambda *arguments: asked.append(arguments))
    expect(np.zeros((8, READ_AROUND - 1), np.uint8))
    assert not asked
    expect(np.zeros((8, READ_AROUND), np.uint8))
    assert len(asked) == 1
