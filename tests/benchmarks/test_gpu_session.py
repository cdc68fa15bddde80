"""A session on a GPU: its steps parse, it continues where it stopped, and nothing that it started is left."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tyro

import gpu_session
from gpu_session import Session, Step
from prepare_speed import PrepareSpeed
from sample_speed import SampleSpeed
from train_speed import TrainSpeed


def test_a_session_fits_a_quarter_of_an_hour_and_begins_with_the_tests() -> None:
    """Then come the most telling figures."""
    names = [step.name for step in gpu_session.STEPS]
    assert names[:5] == ["tests", "train-b2", "train-xl2", "sample-b2", "sample-xl2"]
    assert sum(step.seconds for step in gpu_session.STEPS) <= 15 * 60
    assert gpu_session.command_of(gpu_session.STEPS[0], Session(Path("out")))[1:5] == ["-m", "pytest", "-m", "gpu"]


def test_every_step_of_a_session_parses(tmp_path: Path) -> None:
    kinds = {"train_speed.py": TrainSpeed, "sample_speed.py": SampleSpeed, "prepare_speed.py": PrepareSpeed}
    for session in (Session(tmp_path, official=tmp_path), Session(tmp_path, toy=True)):
        for step in gpu_session.STEPS[1:]:
            _, script, *arguments = gpu_session.command_of(step, session)
            parsed = tyro.cli(kinds[Path(script).name], args=arguments)
            assert (parsed.official, parsed.toy) == (session.official, session.toy)
    parsed = tyro.cli(TrainSpeed, args=gpu_session.command_of(gpu_session.STEPS[1], Session(tmp_path))[2:])
    assert (parsed.official_precision, parsed.compile, parsed.steps) == ("fp16", ("blocks",), 50)


def test_a_session_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, script = tmp_path / "results", tmp_path / "script.py"
    script.write_text("import sys\nprint('begun')\nassert sys.argv[1] == '1', 'never right'\nprint('{}')\n")
    steps = (Step("right", (str(script), "1"), 1), Step("wrong", (str(script), "2"), 1))
    monkeypatch.setattr(gpu_session, "STEPS", steps)
    assert gpu_session.session(Session(out, seconds=-1)) == 2
    assert not list(out.iterdir())
    assert gpu_session.session(Session(out)) == 1
    assert (out / "right.json").read_text() == "{}\n"
    error = (out / "wrong.error").read_text()
    assert error.startswith("exit code 1\nbegun\n")
    assert "AssertionError: never right" in error
    assert capsys.readouterr().out.splitlines()[-1] == "missing: wrong"
    (out / "right.json").write_text("measured before")
    monkeypatch.setattr(gpu_session, "STEPS", (steps[0], Step("wrong", (str(script), "1"), 1)))
    assert gpu_session.session(Session(out)) == 0
    assert {file.name for file in out.iterdir()} == {"right.json", "wrong.json"}
    assert (out / "right.json").read_text() == "measured before"


@pytest.mark.parametrize(
    ("line", "device", "missing"),
    [("3 passed in 2.1s", "auto", 0), ("3 skipped in 0.1s", "auto", 1), ("3 skipped in 0.1s", "cpu", 0)],
)
def test_tests_that_saw_no_gpu_do_not_count(
    line: str, device: str, missing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"print({line!r})\n")
    monkeypatch.setattr(gpu_session, "STEPS", (Step("tests", (str(script),), 1),))
    assert gpu_session.session(Session(tmp_path / "out", device=device)) == missing


@pytest.mark.parametrize(("waits", "code"), [(True, None), (False, 0)])
def test_nothing_that_a_step_started_is_left(waits: bool, code: int | None, tmp_path: Path) -> None:
    file = tmp_path / "worker"
    script = f"sleep 600 & echo $! > {file}; echo begun >&2; {'wait' * waits}"
    assert gpu_session.run(["sh", "-c", script], 1) == (code, "begun")
    status = Path(f"/proc/{int(file.read_text())}/status")
    deadline = time.monotonic() + 10
    while status.is_file() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline, "the worker lives"
        time.sleep(0.01)
