"""Every figure of `docs/performance.md` on a GPU, in calls of less than ten minutes: run it again and it goes on.

    python benchmarks/gpu_session.py --official PATH --official-sit PATH --out results

The tests that need a GPU come first: what they find wrong, no figure makes right.

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
TELLING = ("passed", "failed", "skipped", "times_faster", "images_per_second", "share_of_matrix_rate")
"""Figures that are shown when a benchmark ends; the rest is in its file."""


@dataclass(frozen=True)
class Session:
    """Options of the session."""

    out: Path
    """Folder for the files of JSON."""
    official: Path | None = None
    """A checkout of the published REGLUE code; ours alone if not given."""
    official_sit: Path | None = None
    """A checkout of SiT's own code; its step is not timed if not given."""
    images: Path | None = None
    """Photographs to prepare; random ones if not given."""
    autoencoder: str = "starter"
    """The one to prepare with, as `reglue prepare` calls it."""
    encoder: str = "starter"
    """The vision encoder to prepare with."""
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
    """Of which the first is the script."""
    seconds: float
    toy: tuple[str, ...] | None = None
    """Arguments, behind the script, at toy size. None: the script has `--toy` itself."""


WAYS = ("no", "blocks", "model")
"""Of compilation."""


def train(model: str, *more: str, ways: tuple[str, ...] = WAYS) -> tuple[str, ...]:
    """A comparison of training steps: theirs as in their train.sh, ours in some ways of compilation."""
    turns = ("--steps", "20", "--repeats", "3")
    return (OFFICIAL, "train", "--model", model, "--official-precision", "fp16", "--compile", *ways, *turns, *more)


def sample(model: str, *more: str) -> tuple[str, ...]:
    """A comparison of samplers, at the published 250 steps."""
    return (OFFICIAL, "sample", "--model", model, "--steps", "250", "--compile", "no", "model", "--repeats", "2", *more)


def step(name: str, *more: str, seconds: float = 60) -> Figure:
    """Our training step in one variant."""
    toy = ("--data", "toy", "--batch-size", "4", "--repeats", "1", "--precision", "float32")
    return Figure(f"step-{name}", ("train_speed.py", *more), seconds, toy)


OFFICIAL = "against_official.py"
WITHOUT_DEVICE = ("store_reads.py", "gpu_tests.py")
"""Scripts without `--device`."""
FIGURES = (
    Figure("tests", ("gpu_tests.py",), 240, ("--folders", str(HERE.parent / "tests" / "gpu"))),
    # The most telling first, should the time not suffice.
    Figure("train-b2", train("B/2"), 180),
    Figure("train-xl2", train("XL/2"), 360),
    Figure("train-sit-xl2", train("XL/2", "--recipe", "sit", ways=("blocks",)), 180),
    step("b2-compiled-blocks", "--compile", "blocks"),
    step("b2-int8", "--compile", "blocks", "--targets", "int8"),
    step("b2-decoded", "--compile", "blocks", "--targets", "decoded"),
    step("b2-online", "--compile", "blocks", "--targets", "online"),
    step("b2-recomputed", "--compile", "blocks", "--checkpoint-blocks", "1"),
    step("b2-compiled-model", "--compile", "model", seconds=90),
    step("b2-eager"),
    step("xl2-compiled-blocks", "--model", "XL/2", "--compile", "blocks", seconds=90),
    step("xl2-recomputed", "--model", "XL/2", "--compile", "blocks", "--checkpoint-blocks", "0.5", seconds=90),
    Figure("sample-b2", sample("B/2"), 150),
    Figure("train-b2-encoder-in-step", train("B/2", "--encoder-in-step", ways=("blocks",)), 180),
    Figure("sample-xl2", sample("XL/2", "--batch-size", "32"), 330),
    Figure("train-xl2-encoder-in-step", train("XL/2", "--encoder-in-step", ways=("blocks",)), 300),
    Figure("prepare", (OFFICIAL, "prepare", "--count", "512", "--repeats", "1"), 90),
    Figure(
        "prepare-speed",
        ("prepare_speed.py", "--count", "512", "--batch-sizes", "16", "64", "--precision", "bfloat16"),
        120,
        ("--resolution", "32", "--count", "4", "--batch-sizes", "2", "--workers", "0", "--repeats", "1"),
    ),
    Figure(
        "store-reads",
        ("store_reads.py", "--rows", "4096", "--processes", "1", "8", "--pinned"),
        150,
        ("--data", "toy", "--rows", "8", "--images", "8", "--batch-sizes", "4", "--processes", "1"),
    ),
    Figure("checkpoint-b2", (OFFICIAL, "checkpoint", "--model", "B/2"), 60),
    Figure("checkpoint-xl2", (OFFICIAL, "checkpoint", "--model", "XL/2", "--repeats", "3"), 120),
    Figure("startup", (OFFICIAL, "startup"), 120),
    Figure("compressor", (OFFICIAL, "compressor", "--images", "256"), 60),
    Figure(
        "evaluate-speed",
        ("evaluate_speed.py", "--count", "10000"),
        120,
        ("--count", "64", "--width", "16", "--classes", "8", "--resamples", "10"),
    ),
)


def session(options: Session) -> int:
    """Run what is not measured yet, while there is time. Returns how many figures are left."""
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    left = []
    for figure in FIGURES:
        file, error = (options.out / f"{figure.name}{suffix}" for suffix in (".json", ".error"))
        if file.is_file():
            continue
        remaining = options.seconds - (time.monotonic() - started)
        if remaining < (0 if options.toy else figure.seconds):
            left.append(figure.name)
            continue
        print(f"── {figure.name}", flush=True)
        command = [sys.executable, *command_of(figure, options), "--out", str(file)]
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
            figures = json.loads(file.read_text())["figures"]
            print(json.dumps({name: figures[name] for name in TELLING if name in figures}), flush=True)
    print(f"left: {', '.join(left) or 'nothing'}", flush=True)
    return len(left)


def command_of(figure: Figure, options: Session) -> list[str]:
    """The script and its arguments for what the session has."""
    script, *arguments = figure.arguments
    if options.toy:
        arguments = at_toy_size(arguments) if figure.toy is None else list(figure.toy)
    if script not in WITHOUT_DEVICE:
        arguments += ["--device", options.device]
    official = options.official_sit if "sit" in arguments else options.official
    if script == OFFICIAL and official:
        arguments += ["--official", str(official)]
    if script == "store_reads.py":
        arguments += ["--made", str(options.out / "made-store")]
    if script == "prepare_speed.py":
        arguments += ["--autoencoder", options.autoencoder, "--encoder", options.encoder]
        arguments += ["--images", str(options.images)] if options.images else []
    return [str(HERE / script), *arguments]


def at_toy_size(arguments: list[str]) -> list[str]:
    """Arguments for `against_official.py`: no compilation, one repeat, and a precision that a CPU has."""
    command, *rest = arguments
    kept = ["--encoder-in-step"] if "--encoder-in-step" in rest else []
    kept += ["--recipe", "sit"] if "sit" in rest else []
    return [command, *kept, "--toy", "--repeats", "1"]


if __name__ == "__main__":
    session(tyro.cli(Session, description=__doc__))
