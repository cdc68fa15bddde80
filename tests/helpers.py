"""What tests share besides fixtures: drawn images, a tiny recipe, the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from processes import Reglue
from reglue import cli
from reglue.diffusion.samplers import SAMPLERS

CLASSES = ("circle", "square", "stripes")
OF_ANY_RUN = [name for name, sampler in SAMPLERS.items() if not sampler.spans]
"""The samplers but for those of students, which other runs refuse."""


def draw_images(folder: Path, per_class: int, size: int = 20) -> Path:
    """Simple coloured shapes, one sub-folder per class."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] - size // 2
    masks = {"circle": np.hypot(rows, columns) < size / 3, "square": abs(rows) + abs(columns) < size / 3}
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            mask = masks.get(name, (rows + i) % 6 < 3)
            colours = rng.integers(0, 256, (2, 3), dtype=np.uint8)
            Image.fromarray(np.where(mask[..., None], colours[0], colours[1])).save(folder / name / f"{i:03d}.png")
    return folder


def draw_masks(folder: Path, images: Path, most: int = 9) -> Path:
    """Masks of some of the images that `draw_images` made: class 1 is right, class 0 left."""
    values = np.zeros((20, 20), np.uint8)
    values[:, 10:] = 1
    for file in sorted(images.rglob("*.png"))[:most]:
        place = folder / file.relative_to(images)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(place)
    return folder


TINY_RECIPE = [
    "--model=2x32x2/2",
    "--local.compressor=conv-4",
    "--optimisation.batch-size=8",
    "--optimisation.precision=float32",
    "--optimisation.compile=no",
    "--optimisation.learning-rate=1e-3",
    "--alignment.hidden=32",
    "--sampling.steps=4",
    "--sampling.precision=float32",
    "--log-every=5",
    "--preview-every=0",
    "--device=cpu",
]


def reglue_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "reglue", *map(str, arguments)]


def run_reglue(
    *arguments: str | Path, check: bool = True, prelude: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return Reglue(*arguments, prelude=prelude, **environment).result(check)


def mistake(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> str:
    """What the command line says to a user's mistake: one line on stderr, exit code 2."""
    monkeypatch.setattr(sys, "argv", ["reglue", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("reglue: ")
    return lines[0]
