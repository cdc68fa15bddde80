"""Whether `reglue train` could run for a day: memory, open files and threads of one that does everything often.

    python benchmarks/soak.py --folder soak --minutes 20

Trains the tiny recipe on digits with previews, checkpoints and trackers every few steps, and looks at the process (by
Linux's /proc) while it does. After the first third, which warms up, none of the three may rise; a figure shows them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from common import Benchmark, report, run
from reglue.commands.compress import Compress, compress
from reglue.commands.demo import DEMO_RECIPE, LOCAL_CHANNELS, RESOLUTION, write_digits
from reglue.commands.prepare import Prepare, prepare
from reglue.training.tracking import read

PAGE = os.sysconf("SC_PAGE_SIZE")
ALLOWED = {"memory, MiB": 0.01, "open files": 0.0, "threads": 0.0}
"""Share by which the median of the last third may be above that of the second and still be flat."""


@dataclass(frozen=True)
class Soak(Benchmark):
    """Train for some minutes, stop by SIGTERM, and say whether anything rose."""

    folder: Path = field(default=Path("soak"))
    """For the digits, the run and the figure `soak.png`."""
    minutes: float = 20
    every: float = 5
    """Seconds between two looks at the process."""
    steps: int = 20
    """Between two previews, and between two checkpoints."""
    track: tuple[str, ...] = ("tensorboard", "wandb", "trackio")


def look(process: int) -> dict[str, float]:
    """What the process holds at this moment: resident memory without its children's, open files, threads."""
    proc = Path(f"/proc/{process}")
    resident = int((proc / "statm").read_text().split()[1]) * PAGE
    files, threads = (len(list((proc / name).iterdir())) for name in ("fd", "task"))
    return {"memory, MiB": resident / 2**20, "open files": files, "threads": threads}


def command(options: Soak, store: Path, out: Path) -> list[str]:
    """The training, which would go on for weeks."""
    words = f"--model tiny --local.compressor conv-{LOCAL_CHANNELS} --alignment.hidden 64 --optimisation.batch-size 16"
    often = f"--log-every 5 --checkpoint-every {options.steps} --preview-every {options.steps} --preview-steps 4"
    many = f"--optimisation.steps {10**7} --optimisation.compile no --preview-count 4 --device cpu"
    where = ["--store", str(store), "--out", str(out), "--track", *options.track]
    return [sys.executable, "-m", "reglue", "train", DEMO_RECIPE.name, *where, *f"{words} {often} {many}".split()]


def judged(looks: list[dict[str, float]]) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Medians of the second third and of the last, and what rose between them."""
    third = len(looks) // 3
    parts = looks[third:-third], looks[-third:]
    middle, last = ({name: median(found[name] for found in part) for name in ALLOWED} for part in parts)
    return middle, last, [name for name, share in ALLOWED.items() if last[name] > middle[name] * (1 + share)]


def main(options: Soak) -> str:
    """Prepare, train, look, judge and draw. Returns the line of JSON."""
    digits, store, out = (options.folder / name for name in ("digits", "store", "run"))
    write_digits(digits)
    if not store.exists():
        prepare(Prepare(digits / "held-out", store, RESOLUTION, "starter", "starter", features=True, workers=0))
        compress(Compress(store, channels=LOCAL_CHANNELS, hidden=32, epochs=1, cosine_epochs=1))
    environment = {**os.environ, "TRACKIO_DIR": str(options.folder / "trackio")}
    begun, looks = time.monotonic(), list[dict[str, float]]()
    with subprocess.Popen(command(options, store, out), env=environment) as training:
        while time.monotonic() - begun < 60 * options.minutes and training.poll() is None:
            looks.append({"minutes": (time.monotonic() - begun) / 60, **look(training.pid)})
            time.sleep(options.every)
        training.send_signal(signal.SIGTERM)
    middle, last, rose = judged(looks)
    figure = Figure((8, 6), layout="constrained")
    for axes, name in zip(figure.subplots(3, sharex=True), ALLOWED, strict=True):
        axes.plot([found["minutes"] for found in looks], [found[name] for found in looks])
        axes.set(xlabel="minutes", ylabel=name, ylim=(0, None))
        axes.label_outer()
    figure.savefig(options.folder / "soak.png")
    print("flat" if not rose else f"not flat: {', '.join(rose)}")
    figures = {"steps": read(out)[-1]["step"], "exit code": training.returncode, "second third": middle}
    return report(options, {**figures, "last third": last, "rose": rose, "looks": len(looks)})


if __name__ == "__main__":
    run(Soak, main, __doc__)
