"""Have the kernel read pages of mapped files before they are looked at."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

READ_AROUND = 2**17
"""Bytes that Linux reads around a page that is looked at and missing."""
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_WILLNEED") else None
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def expect(rows: np.ndarray) -> None:
    """Have the kernel begin to read an array that lies in a mapped file; nothing waits for it.

    Reads asked for together are under way together. Without that each would be waited for where its row is copied, a
    small piece at a time. `rows` (n, …) is contiguous, or each of its rows is. Where rows are so small that the kernel
    reads as much by itself, or there is no `madvise`, nothing happens.
    """
    if _madvise is None or not len(rows) or rows[0].nbytes < READ_AROUND:
        return
    for part in [rows] if rows.flags.c_contiguous else rows:
        start = part.__array_interface__["data"][0]
        page = start - start % mmap.PAGESIZE
        _madvise(page, start + part.nbytes - page, mmap.MADV_WILLNEED)
