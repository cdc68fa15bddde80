"""Reading ahead: threads read what is used next while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

READERS = 4
"""Threads that read ahead for a GPU."""
CPU = torch.device("cpu")

_Part = TypeVar("_Part")
_Batch = TypeVar("_Batch")


def in_batches(count: int, size: int) -> list[range]:
    """The numbers below `count`, so many at a time."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def prefetch(
    read: Callable[[_Part], _Batch], parts: Iterable[_Part], workers: int, device: torch.device = CPU
) -> Generator[_Batch, None, None]:
    """What `read` gives for each of the parts, in order. So many threads read ahead; 0 reads when asked.

    Parts may go on without end. What a thread raises is raised here, in its place in the order. The threads end with
    the iterator. `device` is that of the process, whose GPU the threads may use.
    """
    if not workers:
        yield from map(read, parts)
        return
    # A new thread begins on the first GPU, and would take memory of it that is another process's.
    own = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    reader = ThreadPoolExecutor(workers, "read ahead", initializer=own)
    ahead: deque[Future[_Batch]] = deque()
    try:
        for part in parts:
            ahead.append(reader.submit(read, part))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        reader.shutdown(cancel_futures=True)
