"""Start-up: seconds until a command answers, and until the first training step is made."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image

from common import Comparison, report, seconds_of_process
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.training import distributed


@dataclass(frozen=True)
class Starting:
    """Time `import reglue`, `reglue --help`, and `reglue train` until its first step, each in new processes.

    Theirs: `train.py --help`. Their first step cannot be had without a hub.
    """

    conditions: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)


def starting(options: Starting) -> str:
    """Run each command several times."""
    conditions = options.conditions
    python = [sys.executable]
    commands = {
        "import reglue": [*python, "-c", "import reglue"],
        "reglue --help": [*python, "-m", "reglue", "--help"],
    }
    if not conditions.toy:
        commands["import torch"] = [*python, "-c", "import torch"]
        commands["reglue train --help"] = [*python, "-m", "reglue", "train", "--help"]
    if conditions.official:
        commands["theirs: train.py --help"] = [*python, str(conditions.official / "train.py"), "--help"]
    with TemporaryDirectory() as folder:
        if not conditions.toy:
            store = small_store(Path(folder))
            arguments = ["--model", "2x32x2/2", "--local.compressor", "conv-4", "--optimisation.precision", "float32"]
            arguments += ["--optimisation.batch-size", "4", "--preview-every", "0", "--device", conditions.device]
            first = ["-m", "reglue", "train", "reglue", *arguments, "--optimisation.steps", "1"]
            commands["reglue train, one step"] = [*python, *first, "--store", str(store), "--out", f"{folder}/run-%d"]
        figures = {name: seconds(command, conditions.repeats) for name, command in commands.items()}
    return report("startup", options, {"seconds": figures}, distributed.resolve_device("cpu"))


def seconds(command: list[str], repeats: int) -> dict[str, Any]:
    """Wall and processor seconds of a command; `%d` in its last word becomes the number of the repeat."""
    wall, cpu = [], []
    for number in range(repeats + 1):
        numbered = [*command[:-1], command[-1].replace("%d", str(number))]
        by_clock, of_cores = seconds_of_process(numbered, OMP_NUM_THREADS="1")
        wall.append(by_clock)
        cpu.append(of_cores)
    # The first one warms the caches: byte code, and files in memory.
    return {"minimum": min(wall[1:]), "median": median(wall[1:]), "cpu_median": median(cpu[1:])}


def small_store(folder: Path) -> Path:
    """Sixteen random images, prepared with the starter kit and compressed."""
    random = np.random.default_rng(0)
    for i in range(16):
        file = folder / "images" / str(i % 2) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    store = folder / "store"
    prepare(Prepare(folder / "images", store, 32, "starter", "starter", features=True, workers=0, device="cpu"))
    compress(Compress(store, channels=4, hidden=8, epochs=1, device="cpu"))
    return store
