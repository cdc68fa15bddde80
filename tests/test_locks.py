"""One writer for each folder and file, whichever command it is; and what a dead one leaves is swept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import run_reglue
from processes import Reglue
from reglue.errors import UserError
from reglue.files import BESIDE, LOCK, refuse_filled
from reglue.locks import sweep, writes, writing
from test_crashes import COMMANDS, EACH, Inputs, begin, inputs, tree  # noqa: F401, a fixture

PAUSE = """
import os, sys, time
changes = 0
def audit(event, arguments):
    global changes
    if event != "open" or not str(arguments[0]).startswith({root!r}):
        return
    changes += 1
    if changes == 3:
        open({ready!r}, "w").close()
        while not os.path.exists({go!r}):
            time.sleep(0.02)
sys.addaudithook(audit)
"""


def wait_for(file: Path, process: Reglue) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", EACH)
def test_the_second_process_is_told_who_the_first_is(name: str, inputs: Inputs, tmp_path: Path) -> None:  # noqa: F811
    out = begin(name, inputs, tmp_path / "raced")
    ready, go = tmp_path / "ready", tmp_path / "go"
    prelude = PAUSE.format(root=f"{out.parent}/", ready=str(ready), go=str(go))
    first = Reglue(*COMMANDS[name](inputs, out), prelude=prelude)
    wait_for(ready, first)
    before = tree(out)
    second = run_reglue(*COMMANDS[name](inputs, out), check=False)
    assert second.returncode == 2, second.stderr
    (line,) = second.stderr.strip().splitlines()[-1:]
    assert f"process {first.pid} on " in line
    assert f"is writing to {tmp_path}" in line
    assert "Traceback" not in second.stderr
    assert tree(out) == before
    go.touch()
    assert first.result().returncode == 0
    assert not [file for file in tree(out) if file.endswith((BESIDE, LOCK))]


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    place = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from reglue.locks import writing
with writing(Path({str(place)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (tmp_path / f"out{LOCK}").is_file()
    with writing(place):
        pass
    assert not list(tmp_path.iterdir())


def test_the_children_of_a_dead_process_are_waited_for(tmp_path: Path) -> None:
    """Processes that decode images hold the lock of the one that forked them for as long as they live."""
    place, ready = tmp_path / "out", tmp_path / "ready"
    code = f"""
import os, signal, time
from pathlib import Path
from reglue.locks import writing
with writing(Path({str(place)!r})):
    if not os.fork():
        Path({str(ready)!r}).touch()
        time.sleep(1)
        os._exit(0)
    while not os.path.exists({str(ready)!r}):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert process.returncode == -signal.SIGKILL
    with writing(place):
        pass


def test_within_a_process_a_place_is_held_once(tmp_path: Path) -> None:
    with writing(tmp_path / "out"), writing(tmp_path / "other" / ".." / "out"):
        assert (tmp_path / f"out{LOCK}").is_file()
    assert not list(tmp_path.iterdir())


def test_of_processes_that_work_together_the_first_one_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with writing(tmp_path / "out"):
        assert not list(tmp_path.iterdir())


def test_what_is_left_half_written_is_swept_but_not_what_others_write(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / f"folder{BESIDE}" / "inside").mkdir(parents=True)
    (out / "samples").mkdir()
    kept = [out / "file", out / "samples" / f"picture{BESIDE}", out / f"samples{LOCK}", out / f"other.json{BESIDE}"]
    kept.append(out / f"other.json{LOCK}")
    for file in [*kept, out / f"file{BESIDE}", tmp_path / f"out{BESIDE}"]:
        file.touch()
    sweep(out)
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted(kept)
    assert not (out / f"folder{BESIDE}").exists()


def test_a_folder_in_one_where_nothing_may_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container has it; the tests may run as root, who may do anything."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with writing(out):
        assert [file.suffix for file in out.iterdir()] == [LOCK]
        refuse_filled(out)
    assert not list(out.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file/out \("), writing(tmp_path / "file" / "out"):
        pass


def test_a_command_without_output_holds_nothing(tmp_path: Path) -> None:
    class Options:
        out = None

    assert writes()(lambda options: options.out)(Options()) is None
