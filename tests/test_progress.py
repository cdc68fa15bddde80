"""Bars on terminals, and a line every half minute in logs."""

from __future__ import annotations

import io
import os
import pty
import sys

import pytest

from reglue import progress
from reglue.progress import Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_for_every_half_minute(clock: list[float]) -> None:
    log = io.StringIO()
    with Bar(total=100, desc="train", unit="step", file=log, mininterval=0) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update()
            bar.set_postfix(loss=1)
            Bar.write("said between", file=log)
    lines = [line for line in log.getvalue().splitlines() if line != "said between"]
    assert [line.partition(" [")[0] for line in lines] == [f"train: {n}%, {n}/100 step" for n in (30, 60, 90, 100)]
    assert "loss=1" in lines[1]
    assert "\r" not in log.getvalue()


def test_what_is_short_leaves_a_log_alone(clock: list[float]) -> None:
    log = io.StringIO()
    for leave in (True, False):
        for _ in Bar(range(5), file=log, leave=leave, mininterval=0):
            clock[0] += 1
    with Bar(total=None, file=log, disable=True) as bar:
        bar.update()
    assert not log.getvalue()
    with Bar(total=None, desc="long", unit="step", file=log, mininterval=0) as bar:
        clock[0] += 40
        bar.update()
    assert log.getvalue().startswith("long: ")


def test_a_terminal_has_a_bar() -> None:
    shown, written = pty.openpty()
    with os.fdopen(written, "w") as terminal, Bar(total=2, desc="draw", file=terminal, ascii=True) as bar:
        bar.update()
    assert b"\rdraw:   0%|" in os.read(shown, 1000)
    assert sys.stderr is not terminal
