"""Bars on terminals, and a line every half minute in logs."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import mistake, run_reglue
from reglue import progress
from reglue.progress import Bar, is_quiet, quiet, stage


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


def test_bars_say_to_which_stage_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    def told(what: str) -> str:
        with Bar(total=1, desc=what, file=io.StringIO()) as bar:
            return bar.desc.removesuffix(": ")

    assert told("statistics") == "statistics"
    with stage("prepare"):
        assert [told(what) for what in ("prepare", "statistics", "")] == ["prepare", "prepare: statistics", "prepare"]
        with stage("train REGLUE", announced=True):
            assert told("train reglue") == "train reglue"
        assert told("images") == "prepare: images"
    assert capsys.readouterr().out == "── train REGLUE\n"


def test_quiet_shows_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with quiet(), stage("prepare", announced=True):
        assert is_quiet()
        for _ in Bar(range(100), mininterval=0):
            clock[0] += 1
    assert not is_quiet()
    assert capsys.readouterr() == ("", "")


def test_every_command_takes_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sample", "starter", "--out", tmp_path / "clothes", "--count=1", "--steps=1", "--device=cpu"]
    assert "is ready" in run_reglue(*arguments).stdout
    for words in ([*arguments, "--quiet"], ["--quiet", *arguments]):
        result = run_reglue(*words)
        assert result.stdout == ""
        assert "sample" not in result.stderr
    assert "did you mean --quiet?" in mistake(capsys, monkeypatch, "verify", "starter", "--quite")
    assert "--quiet takes no value" in mistake(capsys, monkeypatch, "verify", "starter", "--quiet=yes")


def test_a_notebook_has_bars_of_its_own() -> None:
    program = """
import sys, types
import IPython
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")  # as in a kernel
from reglue.progress import Bar, quiet
with Bar(total=3, desc="draw") as bar:
    bar.update()
    bar.refresh()
    print([getattr(part, "value", None) for part in bar.container.children][1])
with quiet(), Bar(total=3) as bar:
    bar.update()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "1.0"
