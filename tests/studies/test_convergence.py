"""The study of convergence at toy size: its files, resuming, adding arms, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import convergence
from compare import compare

TINY = (
    *("--model", "1x32x2/2", "--steps", "4", "--checkpoints", "2", "--batch-size", "4", "--warmup", "0"),
    *("--alignment-hidden", "16", "--precision", "float32", "--count", "8", "--sampling-steps", "2"),
    *("--resamples", "10", "--redi-compressor", "pca-4", "--reglue-compressor", "conv-4", "--device", "cpu"),
)


def run(store: Path, images: Path, out: Path, *arguments: str) -> dict:
    convergence.main([str(store), "--reference", str(images), "--out", str(out), *TINY, *arguments])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path, tiny_images: Path) -> Path:
    out = tmp_path_factory.mktemp("study") / "study"
    run(tiny_store, tiny_images, out, "--arms", "sit", "reglue")
    return out


def test_every_arm_has_every_figure_at_every_checkpoint(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert list(results["arms"]) == ["sit-seed-0", "reglue-seed-0"]
    for trial in results["arms"].values():
        assert list(trial["steps"]) == ["2", "4"]
        for figures in (*trial["steps"].values(), trial["guided"]):
            assert figures["encoder"]["frechet_distance"]["value"] > 0
            assert figures["encoder"]["images"] == 8
            # The held-out images of this test are the training images.
            assert figures["encoder"]["nearest_training_image_of_held_out"] == 0
            assert figures["encoder"]["nearest_training_image"] > 0
            assert {"kernel_distance", "precision", "recall"} <= figures["encoder"].keys()
        assert 0 < trial["steps"]["2"]["training_seconds"] < trial["steps"]["4"]["training_seconds"]
    assert results["arms"]["sit-seed-0"]["parameters"] < results["arms"]["reglue-seed-0"]["parameters"]
    assert {"table.md", "quality-by-steps.png", "quality-by-time.png"} <= {file.name for file in finished.iterdir()}
    grids = [file.name for file in sorted((finished / "grids").iterdir())]
    assert grids == ["guided-00000004.png", "step-00000002.png", "step-00000004.png"]
    assert "| 4, guided | reglue, seed 0 |" in (finished / "table.md").read_text()


def test_a_killed_study_continues_elsewhere_to_the_same_figures(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    began, continued = tmp_path / "began", tmp_path / "continued"
    script = str(Path(convergence.__file__))
    options = [str(tiny_store), "--reference", str(tiny_images), "--out", str(began), *TINY, "--arms", "reglue"]
    process = subprocess.Popen([sys.executable, script, *options], stderr=subprocess.DEVNULL)
    drawn = began / "reglue-seed-0" / "step-00000002"
    while process.poll() is None and not list(drawn.glob("*.png")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (began / "reglue-seed-0" / "guided-00000004.encoder.json").exists()  # It was not done.
    shutil.move(began, continued)
    after = run(tiny_store, tiny_images, continued, "--arms", "reglue")["arms"]["reglue-seed-0"]
    before = json.loads((finished / "results.json").read_text())["arms"]["reglue-seed-0"]
    for step in ("2", "4"):
        for name in ("frechet_distance", "kernel_distance", "precision"):
            figures = [trial["steps"][step]["encoder"][name]["value"] for trial in (before, after)]
            assert figures[1] == pytest.approx(figures[0], rel=1e-4)  # Batches may differ.


def test_samples_are_measured_again_when_their_checkpoint_is_gone(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "study"))
    shutil.rmtree(out / "sit-seed-0" / "run" / "checkpoints" / "00000002")
    (out / "sit-seed-0" / "step-00000002.encoder.json").unlink()
    after = run(tiny_store, tiny_images, out, "--arms", "sit")["arms"]
    before = json.loads((finished / "results.json").read_text())["arms"]
    for arms in (before, after):  # but for the time
        del arms["sit-seed-0"]["steps"]["2"]["encoder"]["circumstances"]
    assert after == before  # REGLUE's stay, too.


def test_a_prolonged_study_keeps_its_figures_and_draws_guided_samples_anew(
    finished: Path, tmp_path: Path, tiny_store: Path, tiny_images: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "study"))
    before = json.loads((out / "results.json").read_text())["arms"]["sit-seed-0"]
    after = run(tiny_store, tiny_images, out, "--arms", "sit", "--steps", "8", "--checkpoints", "3")["arms"][
        "sit-seed-0"
    ]
    assert list(after["steps"]) == ["2", "4", "8"]
    assert {step: after["steps"][step] for step in ("2", "4")} == before["steps"]
    assert after["guided_step"] == 8
    assert after["guided"] != before["guided"]


def test_another_study_in_the_same_folder_is_refused(finished: Path, tiny_store: Path, tiny_images: Path) -> None:
    with pytest.raises(SystemExit, match="another --sampling-steps"):
        run(tiny_store, tiny_images, finished, "--arms", "sit", "--sampling-steps", "3")
    with pytest.raises(SystemExit, match="another --reference"):
        run(tiny_store, tiny_images / "circle", finished, "--arms", "sit")


def test_unknown_arms_are_refused(tmp_path: Path, tiny_store: Path, tiny_images: Path) -> None:
    with pytest.raises(SystemExit, match="--arms dit: choose of sit"):
        run(tiny_store, tiny_images, tmp_path, "--arms", "dit")
    with pytest.raises(SystemExit, match="--repeated-arms reg is none of the arms"):
        run(tiny_store, tiny_images, tmp_path, "--arms", "sit", "--repeated-arms", "reg")


def test_compare_sets_studies_side_by_side(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "results.json", tmp_path / "results.json")
    compare((finished, tmp_path), tmp_path / "compared")
    table = (tmp_path / "compared" / "table.md").read_text()
    assert f"| {finished.name} | 2 | sit, seed 0 |" in table
    assert f"| {tmp_path.name} | 2 | sit, seed 0 |" in table


def test_a_plan_times_the_arms_and_leaves_nothing(
    tmp_path: Path, tiny_store: Path, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    arguments = ["--arms", "sit", "redi", "--plan"]
    convergence.main([str(tiny_store), "--reference", str(tiny_images), "--out", str(out), *TINY, *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["sit-seed-0", "redi-seed-0"]
    assert not out.exists()
