"""Ctrl-C and SIGTERM end a command in one line and with one exit code, whenever they come."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from helpers import TINY_RECIPE, reglue_command, run_reglue
from processes import Reglue

MOMENTS = (0.3, 0.9, 1.6, 2.5, 4.0)
"""Seconds after the start: within the imports of Python, PyTorch and the command, and at work."""
PYTHON_STARTS = ("Fatal Python error: init_import_site", "Could not import runpy module")
"""What Python says, with exit code 1, of a Ctrl-C before it has come to any module of ours: on a busy machine."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_ends_in_one_line(number: signal.Signals, tiny_store: Path, tmp_path: Path) -> None:
    started = []
    for moment in MOMENTS:
        command = reglue_command("probe", tiny_store, "--out", tmp_path / str(moment), "--device=cpu", "--steps=100000")
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append((time.monotonic() + moment, process))
    for due, process in started:
        time.sleep(max(0.0, due - time.monotonic()))
        os.killpg(process.pid, number)
    for _, process in started:
        _, told = process.communicate(timeout=60)
        if process.returncode == -number or (process.returncode == 1 and told.startswith(PYTHON_STARTS)):
            continue  # Before Python had come to our first line: as its own.
        assert process.returncode == 128 + number
        assert told.strip().splitlines()[-1].startswith("reglue: ")
        assert "Traceback" not in told
        assert "Exception ignored" not in told


def test_a_signal_that_has_become_another_exception_is_still_one(tmp_path: Path) -> None:
    prelude = (
        "import os, signal, reglue.commands.export_run as job\n"
        "def export_run(options):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT); [None for _ in range(10**6)]\n"
        "    except BaseException: raise RuntimeError('swallowed')\n"
        "job.export_run = export_run"
    )
    result = Reglue("export", "starter", "--out", tmp_path / "x.pt", prelude=prelude).result(check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (130, 1)


def test_a_call_that_does_not_return_is_left(tmp_path: Path) -> None:
    prelude = (
        "import os, signal, threading, time, ctypes, reglue.training.stopping as s, reglue.commands.export_run as job\n"
        "s.PATIENCE = 0.5\n"
        "def export_run(options):\n"
        "    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()\n"
        "    lock = threading.Lock(); lock.acquire()\n"
        "    while True:\n"
        "        try: lock.acquire()\n"
        "        except KeyboardInterrupt: pass\n"
        "job.export_run = export_run"
    )
    result = Reglue("export", "starter", "--out", tmp_path / "x.pt", prelude=prelude).result(check=False, timeout=30)
    assert result.returncode == 143
    assert result.stderr == "reglue: stopped by SIGTERM; run the same command again, which keeps what was finished\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "sit", "--help"], ["verify", "starter"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(reglue_command(*arguments), stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert result.returncode == 141
    assert "Traceback" not in result.stderr
    assert "Broken pipe" not in result.stderr


def test_a_name_with_a_newline_stays_in_one_line(tmp_path: Path) -> None:
    result = run_reglue("verify", tmp_path / "a\nb\x1b[31m\udc80", check=False)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert r"a\nb\x1b[31m\udc80" in result.stderr


def test_whatever_is_written_has_the_mode_of_new_files(tiny_store: Path, tmp_path: Path) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported.safetensors"
    run_reglue("train", "reglue", "--store", tiny_store, "--out", run, *TINY_RECIPE, "--optimisation.steps=2")
    run_reglue("export", run, "--out", exported)
    run_reglue("sample", run, "--out", tmp_path / "samples", "--count=2", "--device=cpu")
    run_reglue("head", tiny_store, "--out", tmp_path / "head", "--device=cpu")
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import reglue; reglue.load({str(run)!r}, device='cpu').save({str(tmp_path / 'saved')!r})",
        ],
        check=True,
    )
    (tmp_path / "new").touch()
    mode = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    for folder in (tmp_path, tiny_store):
        for file in folder.rglob("*"):
            assert file.is_dir() or stat.S_IMODE(file.stat().st_mode) == mode, file


STATE = re.compile(
    r"reglue: train reglue: \d+%, \d+/20 step \[[^]]*loss [\d.e+-]+, images per second [^]]*checkpoint at \d+\], "
    r"(last checkpoint at (\d+)|no checkpoint yet), memory now [\d,]+ MiB, at most [\d,]+ MiB"
)


def train_20(store: Path, out: Path, *more: str, prelude: str = "") -> Reglue:
    often = ("--optimisation.steps=20", "--checkpoint-every=5", "--preview-every=10", "--preview-steps=2")
    return Reglue(
        "train", "reglue", "--store", store, "--out", out, *TINY_RECIPE, "--log-every=1", *often, *more, prelude=prelude
    )


@pytest.mark.parametrize("shown", [(), ("--quiet",)], ids=["shown", "quiet"])
def test_sigusr1_has_a_training_say_where_it_is_and_disturbs_nothing(
    shown: tuple[str, ...], tiny_store: Path, tmp_path: Path
) -> None:
    undisturbed, asked = (train_20(tiny_store, tmp_path / name, *shown) for name in ("undisturbed", "asked"))
    while not (tmp_path / "asked/run.json").exists():
        time.sleep(0.02)
    while asked.poll() is None:
        with suppress(ProcessLookupError):  # It may have ended just now.
            asked.send_signal(signal.SIGUSR1)
        time.sleep(0.02)
    told = [line for line in asked.result().stderr.splitlines() if line.startswith("reglue: ")]
    answers = [line for line in told if STATE.fullmatch(line)]
    assert len({line.partition(" [")[0] for line in answers}) > 1, told
    assert re.search(r"last checkpoint at \d", answers[-1])
    assert [line for line in told if not re.fullmatch(r"reglue: (begun|train.*, memory now .* MiB)", line)] == []
    assert undisturbed.result().returncode == 0
    for name in ("model", "ema", "optimiser"):
        files = (tmp_path / run / f"checkpoints/00000020/{name}.safetensors" for run in ("undisturbed", "asked"))
        assert len({file.read_bytes() for file in files}) == 1


ENDS = {
    0: "pass",
    1: "raise ValueError('a defect')",
    2: "from reglue.errors import UserError; raise UserError('a mistake')",
    128 + signal.SIGINT: "os.kill(os.getpid(), signal.SIGINT)",
    128 + signal.SIGPIPE: "raise BrokenPipeError",
    128 + signal.SIGTERM: "os.kill(os.getpid(), signal.SIGTERM)",
}
"""Every exit code, and what a command does to end with it."""


def test_exit_codes_are_those_of_the_table(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/long-runs.md").read_text()
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == sorted(ENDS)
    for code, end in ENDS.items():
        job = f"def export_run(options):\n    {end}\n    [None for _ in range(10**6)]"
        prelude = f"import os, signal, reglue.commands.export_run as job\n{job}\njob.export_run = export_run"
        result = Reglue("export", "starter", "--out", tmp_path / "x.pt", prelude=prelude).result(check=False)
        assert result.returncode == code
        assert len(result.stderr.splitlines()) == {0: 0, 128 + signal.SIGPIPE: 0}.get(code, 1) or code == 1
