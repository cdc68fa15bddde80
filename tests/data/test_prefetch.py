"""Reading ahead: in order, as far as asked, and no thread is left behind."""

from __future__ import annotations

import threading
from itertools import count

import pytest

from reglue.data.prefetch import prefetch
from reglue.errors import UserError


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read ahead")]


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_come_in_order_and_the_threads_end(workers: int) -> None:
    first = threading.Event()

    def read(part: int) -> int:
        if part == 0:
            first.wait(0.05)  # The others overtake it.
        return part**2

    assert list(prefetch(read, range(20), workers)) == [part**2 for part in range(20)]
    assert not readers()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_more_is_read_than_is_wanted_soon(workers: int) -> None:
    asked: list[int] = []
    batches = prefetch(asked.append, count(), workers)
    for used in range(1, 5):
        next(batches)
        assert len(asked) <= used + workers
    batches.close()


def test_the_threads_end_when_nothing_more_is_wanted() -> None:
    batches = prefetch(str, count(), 3)
    next(batches)
    assert readers()
    batches.close()
    assert not readers()


def test_what_a_thread_raises_is_raised_in_its_place() -> None:
    def read(part: int) -> int:
        if part == 3:
            raise UserError("shard 3 is damaged")
        return part

    batches = prefetch(read, range(10), 4)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="shard 3 is damaged"):
        next(batches)
    assert not readers()
