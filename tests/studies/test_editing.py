"""The program that measures edits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import editing
from helpers import draw_images, draw_masks
from reglue.cli import parse
from reglue.commands.train_head import train_head


def test_all_is_measured_once(
    tiny_run: Path,
    tiny_store: Path,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    masks = draw_masks(tmp_path / "masks", tiny_images)
    line = ["head", str(tiny_store), "--masks", str(masks), "--out", str(tmp_path / "head"), "--layers=all"]
    train_head(parse([*line, "--steps=2", "--device=cpu"]))
    images = draw_images(tmp_path / "images", 4)
    draw_masks(tmp_path / "painted", images, most=12)
    ends = {title: [*rows.items()][:1] + [*rows.items()][-1:] for title, rows in editing.WAYS.items()}
    monkeypatch.setattr(editing, "WAYS", {title: dict(rows) for title, rows in ends.items()})
    line = ["--train", str(images), "--masks", str(tmp_path / "painted"), "--head", str(tmp_path / "head")]
    line = [str(tiny_run), str(images), *line, "--out", str(tmp_path / "out"), "--count=3", "--realism=6", "--judge=6"]
    editing.main(line)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name.partition(":")[0] for name in results} == {
        "real images", "curves", "painting", "inpainting", "conflicts", "realism"
    }  # fmt: skip
    assert results["real images: the image"]["cosine"] == pytest.approx(1, abs=1e-3)
    assert results["curves: until 0"]["cosine"] > 0
    assert {"miou", "class", "seconds"} == {*results["painting: scale 30"]}
    assert "| curves | cosine | error | pixels |" in (tmp_path / "out" / "tables.md").read_text()
    assert (tmp_path / "out" / "pictures" / "curves-until-0.png").is_file()
    assert (tmp_path / "out" / "curves.png").is_file()
    capsys.readouterr()
    editing.main(line)
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit):
        editing.main([*line, "--count=99"])
    assert "has too few images for 198" in capsys.readouterr().err
