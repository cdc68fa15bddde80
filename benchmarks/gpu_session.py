"""A quarter of an hour of a GPU: the tests that need one, then ours beside the published code.

    python benchmarks/gpu_session.py --official PUBLISHED --out results

Each step leaves the last line that it printed as NAME.json, or the end of its output as NAME.error. What is in the
folder is not done again, so the same command continues in another call. The exit code is 1 while something is missing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import tyro

from common import ROOT


@dataclass(frozen=True)
class Session:
    """Run what is not in the folder yet, while there is time."""

    out: Path
    """Folder for the results."""
    official: Path | None = None
    """A checkout of the published REGLUE code; ours alone if not given."""
    seconds: float = 840
    """Until this call ends. A step is not begun unless it should fit."""
    device: str = "auto"
    toy: bool = False
    """Sizes that take seconds, to see that all of it runs."""


@dataclass(frozen=True)
class Step:
    """A command and the seconds that it should take on an H200, compilation included."""

    name: str
    command: Sequence[str]
    seconds: float


TRAIN = "train_speed.py --repeats 3 --official-precision fp16 --compile blocks"
"""Theirs as in their train.sh, ours as by default on a GPU."""
SAMPLE = "sample_speed.py --repeats 2 --compile no model"
"""At the published 250 steps."""
STEPS = (
    Step("tests", ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")), 240),
    Step("train-b2", f"{TRAIN} --model B/2 --steps 50".split(), 90),
    Step("train-xl2", f"{TRAIN} --model XL/2 --steps 20 --batch-size 64".split(), 120),
    Step("sample-b2", f"{SAMPLE} --model B/2 --batch-size 64".split(), 90),
    Step("sample-xl2", f"{SAMPLE} --model XL/2 --batch-size 16".split(), 120),
    Step("prepare", ["prepare_speed.py", "--count", "2048", "--repeats", "1", "--precision", "bfloat16"], 150),
)


def session(options: Session) -> int:
    """Run the steps. Returns how many are missing."""
    ends, missing = time.monotonic() + options.seconds, []
    options.out.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        file, failed = options.out / f"{step.name}.json", options.out / f"{step.name}.error"
        remaining = ends - time.monotonic()
        if file.is_file():
            continue
        missing.append(step.name)
        if remaining < (0 if options.toy else step.seconds):
            continue
        print(f"── {step.name}", flush=True)
        code, output = run(command_of(step, options), remaining)
        # Tests that see no GPU are skipped, which is no failure for pytest.
        if code == 0 and (step.name != "tests" or options.device == "cpu" or " passed" in output.splitlines()[-1]):
            missing.pop()
            failed.unlink(missing_ok=True)
            file.write_text(output.splitlines()[-1] + "\n")
        else:
            failed.write_text(f"exit code {code}\n{output[-4000:]}\n")
        print(output[-1000:], flush=True)
    print(f"missing: {', '.join(missing) or 'nothing'}", flush=True)
    return len(missing)


def command_of(step: Step, options: Session) -> list[str]:
    """A step's command, with what the session has."""
    first, *arguments = step.command
    if first == "-m":
        return [sys.executable, *step.command]
    if options.toy:  # A CPU has no fp16, and compiling takes minutes.
        arguments = ["--toy", "--repeats", "1"]
    official = ["--official", str(options.official)] if options.official else []
    machine = ["--device", options.device, "--threads", str(len(os.sched_getaffinity(0)))]
    return [sys.executable, str(Path(__file__).parent / first), *arguments, *official, *machine]


def run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Run a command for so long at most. Returns its exit code, None after that time, and what it printed.

    Nothing that it has started is left, as that would disturb the next step.
    """
    with TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
        code = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read().strip()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that the step that runs is ended, too.
    sys.exit(bool(session(tyro.cli(Session, description=__doc__))))
