"""Every figure of `docs/performance.md` on a GPU, in calls of less than ten minutes: run it again and it goes on.

    python benchmarks/gpu_session.py --official PATH --official-sit PATH --out results

All of it may take an hour and a half on an H200. If a GPU is lent to you for half an hour at a time, call it until the
time is up, keep the folder of results, and bring it along the next time. So the most telling figures come first:
training B/2 and XL/2, then sampling. Before them come the tests that need a GPU: what they find wrong, no figure makes
right.

Each benchmark writes one file of JSON into the folder; what is there is not measured again, but for tests of another
commit or with a failure. A benchmark that fails or takes too long leaves NAME.error with the end of what it said; at
the same commit its turn comes again after all others. The exit code is 1 as long as a figure is missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import tyro

from common import ROOT, commit_of
from reglue.config import Compile

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
    """Folder of photographs to prepare; random ones if not given."""
    autoencoder: str = "starter"
    """The one to prepare with: starter, or a folder, as the published code knows no short names."""
    encoder: str = "starter"
    """The vision encoder to prepare with."""
    seconds: float = 540
    """Until this call ends. A benchmark is not begun unless it should fit."""
    threads: int | None = None
    """Of the CPU, for each operation of what a GPU waits for. Default: one for each core."""
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


def train(model: str, *more: str, way: Compile = "blocks") -> tuple[str, ...]:
    """A comparison of training steps: theirs as in their train.sh, ours in one way of compilation.

    A turn takes ten seconds of ours, so that it does not matter that it begins with reading.
    """
    turns = ("--steps", "100" if model == "B/2" else "20", "--repeats", "2")
    return (OFFICIAL, "train", "--model", model, "--official-precision", "fp16", "--compile", way, *turns, *more)


def sample(model: str, *more: str) -> tuple[str, ...]:
    """A comparison of samplers, at the published 250 steps."""
    return (OFFICIAL, "sample", "--model", model, "--steps", "250", "--compile", "no", "model", "--repeats", "2", *more)


def step(name: str, *more: str, seconds: float = 60) -> Figure:
    """Our training step in one variant."""
    toy = ("--data", "toy", "--batch-size", "4", "--repeats", "1", "--precision", "float32")
    return Figure(f"step-{name}", ("train_speed.py", *more), seconds, toy)


OFFICIAL, TESTS = "against_official.py", "gpu_tests.py"
WITHOUT_DEVICE = ("store_reads.py", TESTS)
"""Scripts without `--device`."""
PREPARED = ("--count", "8192", "--batch-sizes", "16", "64", "--precision", "bfloat16", "--repeats", "2")
TOY_PREPARED = ("--resolution", "32", "--count", "4", "--batch-sizes", "2", "--workers", "0", "--repeats", "1")
READ = ("--rows", "4096", "--processes", "1", "8", "--batch-sizes", "256", "--pinned")
TOY_READ = ("--data", "toy", "--rows", "8", "--images", "8", "--batch-sizes", "4", "--processes", "1")
TOY_EVALUATED = ("--count", "64", "--width", "16", "--classes", "8", "--resamples", "10")
FIGURES = (
    Figure("tests", (TESTS,), 300, ("--folders", str(HERE.parent / "tests" / "gpu"))),
    # The most telling first, should the time not suffice.
    Figure("train-b2", train("B/2"), 180),
    Figure("train-xl2", train("XL/2"), 270),
    Figure("sample-b2", sample("B/2"), 150),
    Figure("sample-xl2", sample("XL/2", "--batch-size", "32"), 330),
    Figure("train-sit-xl2", train("XL/2", "--recipe", "sit"), 240),
    Figure("train-b2-encoder-in-step", train("B/2", "--encoder-in-step"), 300),
    step("b2-compiled-blocks", "--compile", "blocks"),
    step("b2-int8", "--compile", "blocks", "--targets", "int8"),
    step("b2-decoded", "--compile", "blocks", "--targets", "decoded"),
    step("b2-online", "--compile", "blocks", "--targets", "online"),
    step("b2-recomputed", "--compile", "blocks", "--checkpoint-blocks", "1"),
    step("b2-compiled-model", "--compile", "model", seconds=90),
    step("b2-eager"),
    step("b2-not-deterministic", "--compile", "blocks", "--no-deterministic"),
    step("xl2-compiled-blocks", "--model", "XL/2", "--compile", "blocks", seconds=90),
    step("xl2-recomputed", "--model", "XL/2", "--compile", "blocks", "--checkpoint-blocks", "0.5", seconds=90),
    Figure("prepare", (OFFICIAL, "prepare", "--count", "4096", "--repeats", "1"), 300),
    Figure("prepare-speed", ("prepare_speed.py", *PREPARED), 240, TOY_PREPARED),
    Figure("store-reads", ("store_reads.py", *READ), 150, TOY_READ),
    Figure("checkpoint-b2", (OFFICIAL, "checkpoint", "--model", "B/2"), 60),
    Figure("checkpoint-xl2", (OFFICIAL, "checkpoint", "--model", "XL/2", "--repeats", "3"), 120),
    Figure("startup", (OFFICIAL, "startup"), 120),
    Figure("compressor", (OFFICIAL, "compressor", "--images", "256"), 60),
    Figure("evaluate-speed", ("evaluate_speed.py", "--count", "10000"), 120, TOY_EVALUATED),
    Figure("train-xl2-encoder-in-step", train("XL/2", "--encoder-in-step"), 330),
    Figure("train-b2-eager", train("B/2", way="no"), 180),
    Figure("train-xl2-eager", train("XL/2", way="no"), 270),
    Figure("train-b2-compiled-model", train("B/2", way="model"), 240),
    Figure("train-xl2-compiled-model", train("XL/2", way="model"), 330),
)


def session(options: Session) -> int:
    """Run what is not measured yet, while there is time. Returns how many figures are left."""
    started, commit = time.monotonic(), commit_of(ROOT)
    options.out.mkdir(parents=True, exist_ok=True)
    left = []
    missing = [figure for figure in FIGURES if not is_measured(figure, options, commit)]
    for figure in sorted(missing, key=lambda figure: has_failed(figure, options, commit)):
        remaining = options.seconds - (time.monotonic() - started)
        if remaining < (0 if options.toy else figure.seconds):
            left.append(figure.name)
            continue
        print(f"── {figure.name}", flush=True)
        file, error = files_of(figure, options)
        file.unlink(missing_ok=True)
        said = run([sys.executable, *command_of(figure, options), "--out", str(file)], remaining)
        if file.is_file():
            figures = json.loads(file.read_text())["figures"]
            print(json.dumps({name: figures[name] for name in TELLING if name in figures}), flush=True)
        if is_measured(figure, options, commit):
            error.unlink(missing_ok=True)
        else:
            error.write_text(f"{begun_at(commit)}{said}\n")
            left.append(figure.name)
            print(said.splitlines()[-1], flush=True)
    print(f"left: {', '.join(left) or 'nothing'}", flush=True)
    return len(left)


def files_of(figure: Figure, options: Session) -> tuple[Path, Path]:
    """Where a figure is, and where it says why it is not."""
    return options.out / f"{figure.name}.json", options.out / f"{figure.name}.error"


def is_measured(figure: Figure, options: Session, commit: str | None) -> bool:
    """Whether a figure is there. Tests have to have passed, at this commit; those that no GPU is for are skipped."""
    file, _ = files_of(figure, options)
    if not file.is_file() or figure.arguments[0] != TESTS:
        return file.is_file()
    line = json.loads(file.read_text())
    passed = line["figures"]["passed"] > 0 or options.device == "cpu"
    return passed and line["figures"]["failed"] == 0 and line["commit"] == commit


def has_failed(figure: Figure, options: Session, commit: str | None) -> bool:
    """Whether a figure could not be had at this commit: it may not hold up the others again."""
    _, error = files_of(figure, options)
    return error.is_file() and error.read_text().startswith(begun_at(commit))


def begun_at(commit: str | None) -> str:
    """How the words of a benchmark that failed begin."""
    return f"at commit {commit}: "


def run(command: list[str], seconds: float) -> str:
    """Run a command for so long at most. Returns how it ended, with the end of what it said.

    Nothing that it has started is left, workers that decode or compile included: they would disturb the next one.
    """
    with TemporaryFile("w+", errors="replace") as words:
        # A group of its own, that can be ended as a whole, but of this session: who ends that ends the command too.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            how = f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            how = f"took longer than {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        words.seek(0)
        return f"{how}\n{words.read()[-4000:]}".strip()


def command_of(figure: Figure, options: Session) -> list[str]:
    """The script and its arguments for what the session has."""
    script, *arguments = figure.arguments
    if options.toy:
        arguments = at_toy_size(arguments) if figure.toy is None else list(figure.toy)
    if script not in WITHOUT_DEVICE:
        arguments += ["--device", options.device]
    if script != "store_reads.py":  # Its processes are as many as there should be.
        arguments += ["--threads", str(options.threads or len(os.sched_getaffinity(0)))]
    official = options.official_sit if "sit" in arguments else options.official
    if script == OFFICIAL and official:
        arguments += ["--official", str(official)]
    if script == "store_reads.py":
        # Gigabytes, which are no result, and which a later call finds again. The toy's is another one.
        arguments += ["--made", str(Path(gettempdir()) / f"reglue-store-reads{'-toy' if options.toy else ''}")]
    if script == "prepare_speed.py":
        arguments += ["--encoder", options.encoder]
    if script == "prepare_speed.py" or "prepare" in arguments:
        arguments += ["--autoencoder", options.autoencoder]
        arguments += ["--images", str(options.images)] if options.images else []
    return [str(HERE / script), *arguments]


def at_toy_size(arguments: list[str]) -> list[str]:
    """Arguments for `against_official.py`: no compilation, one repeat, and a precision that a CPU has."""
    command, *rest = arguments
    kept = ["--encoder-in-step"] if "--encoder-in-step" in rest else []
    kept += ["--recipe", "sit"] if "sit" in rest else []
    return [command, *kept, "--toy", "--repeats", "1"]


if __name__ == "__main__":
    options = tyro.cli(Session, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # So that the benchmark that runs is ended, too.
    sys.exit(bool(session(options)))
