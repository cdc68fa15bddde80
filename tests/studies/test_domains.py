"""From an archive to samples and a table, at toy size, and how archives are cut."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import domains
import editing

NAMES = [*domains.DOMAINS["streets"].masks, "unlabelled"]


def photographs(folder: Path, count: int, named: str = "") -> list[Path]:
    """Images of 40×32 pixels."""
    folder.mkdir(parents=True)
    files, draws = [folder / f"{named}{i:06d}.png" for i in range(count)], np.random.default_rng(0)
    for file in files:
        Image.fromarray(draws.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(file)
    return files


def packed(folder: Path) -> Path:
    """A folder as the only one in an archive."""
    with tarfile.open(folder.with_suffix(".tar"), "w") as archive:
        archive.add(folder, folder.name)
    return folder.with_suffix(".tar")


@pytest.fixture
def blood(tmp_path: Path) -> Path:
    """Ten photographs, of three cells each, one of which reaches over the edge."""
    files = photographs(tmp_path / "blood" / "images", 10)
    with (tmp_path / "blood" / "boxes.csv").open("w") as table:
        rows = csv.writer(table)
        rows.writerow(["image", "cell", "xmin", "ymin", "xmax", "ymax"])
        for file in files:
            for cell, box in zip(domains.BOXES, ((20, 20, 30, 26), (0, 0, 12, 14), (8, 4, 24, 30)), strict=True):
                rows.writerow([file.name, cell, *box])
    return packed(tmp_path / "blood")


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    """CamVid's folders, with a few images each."""
    folder = tmp_path / "camera"
    for part in ("train", "val", "test"):
        (folder / part / "masks").mkdir(parents=True)
        for file in photographs(folder / part / "images", 6, part):
            labels = np.arange(32 * 40, dtype=np.uint8).reshape(32, 40) % len(NAMES)
            Image.fromarray(labels).save(folder / part / "masks" / file.name)
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return packed(folder)


def line(domain: str, archive: Path, work: Path, encoder: str, autoencoder: str) -> list[str]:
    """The smallest of everything."""
    tiny = "--model 1x32x2/2 --optimisation.batch-size 4 --alignment.hidden 16 --optimisation.precision float32"
    return [domain, "--archive", str(archive), "--work", str(work), "--encoder", encoder, "--autoencoder", autoencoder,
            "--count", "8", "--milestones", "1", "2", "--prepare=--resolution 16 16 --workers 0",
            "--compress=--hidden 8 --epochs 1", f"--train={tiny} --optimisation.compile no", "--head=--steps 2",
            "--probe=--columns features.last --steps 2",
            "--sample=--steps 2"]  # fmt: skip


def test_no_photograph_is_on_both_sides(tmp_path: Path, blood: Path) -> None:
    for name in ("cells", "smears"):
        working = domains.Working(domains.Options(name, blood, tmp_path / name, "", ""))
        working.cut()
        images = tmp_path / name / "images"
        sides = [{file.stem[:6] for file in (images / side / "images").rglob("*.png")} for side in domains.SIDES]
        assert [len(side) for side in sides] == [8, 2]
        assert not sides[0] & sides[1]
        assert not (images / "archive").exists()
    for file in (tmp_path / "cells" / "images").rglob("*.png"):
        with Image.open(file) as image:
            assert image.width == image.height >= domains.CELL
    mask = next((tmp_path / "smears" / "images").rglob("masks/*.png"))
    with Image.open(mask) as opened:
        labels = np.asarray(opened)
    assert {*np.unique(labels)} == {0, 1, 2, 3}
    assert labels[7, 6] == 2
    assert labels[0, 0] == 0  # A corner of the red cell's box.


def test_from_an_archive_to_a_table(tmp_path: Path, blood: Path, tiny_encoder: str, tiny_autoencoder: str,
                                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    work = tmp_path / "work"
    given = line("cells", blood, work, tiny_encoder, tiny_autoencoder)
    domains.main(given)
    results = json.loads((work / "results.json").read_text())
    assert list(results) == ["training images", "from nothing, 1 steps", "from nothing, 2 steps"]
    assert all({"encoder", "precision", "recall", *domains.BOXES} == {*row} for row in results.values())
    assert "| from nothing, 2 steps | " in (work / "table.md").read_text()
    with Image.open(work / "grid.png") as grid:
        assert (grid.width, grid.height) == (6 * 16 + 5 * 2, 2 * 16 + 2)
    domains.main([*given, "--start", str(work / "runs" / "from-nothing")])
    results = json.loads((work / "results.json").read_text())
    assert {"from another run, 1 steps", "from another run, 2 steps"} < {*results}
    record = json.loads((work / "runs" / "from-another-run" / "run.json").read_text())
    assert record["start"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        domains.main(["forests", *given[1:]])
    assert capsys.readouterr().err == (
        "domains: forests is no domain of this study; choose of flowers, cells, smears, streets\n"
    )


def test_masks_make_a_head_which_edits_are_measured_by(
    tmp_path: Path, camera: Path, tiny_encoder: str, tiny_autoencoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    domains.main(line("streets", camera, work, tiny_encoder, tiny_autoencoder))
    assert (work / "head" / "head.safetensors").is_file()
    assert {path.name for path in (work / "images" / "training" / "masks").iterdir()} == {
        path.name for path in (work / "images" / "training" / "images").iterdir()
    }
    with Image.open(next((work / "images" / "held-out" / "masks").iterdir())) as mask:
        assert 11 not in np.unique(np.asarray(mask))
    ends = {title: [*rows.items()][:1] + [*rows.items()][-1:] for title, rows in editing.WAYS.items()}
    ends["curves"] = [*editing.ways("guidance", "guidance_scale", (2.0,)).items(), *ends["curves"][:1]]
    monkeypatch.setattr(editing, "WAYS", {title: dict(rows) for title, rows in ends.items()})
    images, out = work / "images", tmp_path / "measured"
    sides = [str(images / "held-out" / "images"), "--train", str(images / "training" / "images")]
    painted = ["--masks", str(images / "held-out" / "masks"), "--head", str(work / "head"), "--out", str(out)]
    few = ["--count=3", "--realism=6", "--sampler=euler", "--steps=2"]
    editing.main([str(work / "runs" / "from-nothing"), *sides, *painted, *few])
    results = json.loads((out / "results.json").read_text())
    assert {name.partition(":")[0] for name in results} == {
        "real images",
        "curves",
        "painting",
        "inpainting",
        "realism",
    }
    assert {"miou", "seconds"} == {*results["painting: scale 30"]}
    assert "curves: guidance 2" not in results  # There are no classes to guide to.
