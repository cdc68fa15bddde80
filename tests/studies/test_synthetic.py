"""The program that trains a segmenter with and without made images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import synthetic
from helpers import draw_images, draw_masks


def test_every_arm_has_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test", "made"):
        images = draw_images(tmp_path / name / "images", 4)
        draw_masks(tmp_path / name / "masks", images, most=12)
    line = [word for name in ("train", "test", "made") for word in (f"--{name}", str(tmp_path / name))]
    line += [
        "--out",
        str(tmp_path / "out"),
        "--size",
        "32",
        "32",
        "--steps",
        "2",
        "--shares",
        "0.5",
        "1",
        "--seeds",
        "3",
    ]
    synthetic.main(line)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    arms = ["made alone", "50% real", "50% real and made", "100% real", "100% real and made"]
    assert list(results) == [f"{arm}, seed 3" for arm in arms]
    assert all(0 <= figures["miou"] <= 1 for figures in results.values())
    table = capsys.readouterr().out.partition("| mean IoU")[2]
    assert "| 50% real and made | " in table
    synthetic.main(line)  # Nothing is trained again.
    assert "seed 3 0" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "made" / "masks")
    with pytest.raises(SystemExit):
        synthetic.main(line)
    assert capsys.readouterr().err.count("\n") == 1
