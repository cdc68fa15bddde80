"""Every figure of `docs/performance.md` on a GPU, in calls of less than ten minutes: run it again and it goes on.

    python benchmarks/gpu_session.py --official PATH --out results

Each benchmark writes one file of JSON into the folder; what is there is not measured again. A benchmark that fails or
takes too long leaves NAME.error with the end of what it said, and the next one begins.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Session:
    """Options of the session."""

    out: Path
    """Folder for the files of JSON."""
    official: Path | None = None
    """A checkout of the published REGLUE code; ours alone if not given."""
    seconds: float = 540
    """Until this call ends. A benchmark is not begun unless it should fit."""
    device: str = "auto"
    toy: bool = False
    """Sizes that take seconds, to see that all of it runs."""


@dataclass(frozen=True)
class Figure:
    """One benchmark and the seconds that it should take on an H200, start and compilation included."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


def train(model: str, *more: str) -> tuple[str, ...]:
    """Arguments of a comparison of training steps: theirs as in their train.sh, ours eager and compiled."""
    return ("train", "--model", model, "--official-precision", "fp16", "--compile", "--repeats", "10", *more)


def sample(model: str, *more: str) -> tuple[str, ...]:
    """Arguments of a comparison of samplers, at the published 250 steps."""
    return ("sample", "--model", model, "--steps", "250", "--compile", "--repeats", "2", *more)


FIGURES = (
    # The most telling first, should the time not suffice.
    Figure("train-b2", train("B/2"), 150),
    Figure("train-xl2", train("XL/2"), 210),
    Figure("sample-b2", sample("B/2"), 150),
    Figure("train-b2-encoder-in-step", train("B/2", "--encoder-in-step"), 180),
    Figure("sample-xl2", sample("XL/2", "--batch-size", "32"), 330),
    Figure("train-xl2-encoder-in-step", train("XL/2", "--encoder-in-step"), 240),
    Figure("prepare", ("prepare", "--count", "512", "--repeats", "1"), 90),
    Figure("checkpoint-b2", ("checkpoint", "--model", "B/2"), 60),
    Figure("checkpoint-xl2", ("checkpoint", "--model", "XL/2", "--repeats", "3"), 120),
    Figure("startup", ("startup",), 120),
    Figure("compressor", ("compressor", "--images", "256"), 60),
)


def session(options: Session) -> int:
    """Run what is not measured yet, while there is time. Returns how many figures are left."""
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    common = ["--device", options.device, *(["--toy"] if options.toy else [])]
    if options.official:
        common += ["--official", str(options.official)]
    left = []
    for figure in FIGURES:
        file, error = (options.out / f"{figure.name}{suffix}" for suffix in (".json", ".error"))
        if file.is_file():
            continue
        remaining = options.seconds - (time.monotonic() - started)
        arguments = adapted(figure.arguments, options)
        if remaining < (0 if options.toy else figure.seconds):
            left.append(figure.name)
            continue
        print(f"── {figure.name}", flush=True)
        command = [sys.executable, str(HERE / "against_official.py"), *arguments, *common, "--out", str(file)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=remaining, check=False)
            said = "" if file.is_file() else f"exit code {result.returncode}\n{result.stderr[-4000:]}"
        except subprocess.TimeoutExpired:
            said = f"took longer than {remaining:.0f} s"
        if said:
            error.write_text(said + "\n")
            left.append(figure.name)
            print(said.splitlines()[-1], flush=True)
        else:
            error.unlink(missing_ok=True)
            print(json.dumps(json.loads(file.read_text())["figures"].get("times_faster")), flush=True)
    print(f"left: {', '.join(left) or 'nothing'}", flush=True)
    return len(left)


def adapted(arguments: tuple[str, ...], options: Session) -> list[str]:
    """At toy size: no compilation, few repeats, and a precision that a CPU has."""
    if not options.toy:
        return list(arguments)
    kept = [word for word in arguments if word != "--compile"]
    if "fp16" in kept:
        kept[kept.index("fp16")] = "no"
    if "--repeats" in kept:
        at = kept.index("--repeats")
        del kept[at : at + 2]
    return [*kept, "--repeats", "1"]


if __name__ == "__main__":
    session(tyro.cli(Session, description=__doc__))
