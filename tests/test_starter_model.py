"""The models that the package brings along: they draw what they are asked for, right after installing."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reglue
from helpers import reglue_command
from reglue.cli import parse
from reglue.errors import UserError
from reglue.run import BROUGHT

LARGEST_FILE = 12_000_000
SAMPLES = 4


@pytest.fixture(scope="module")
def model() -> reglue.ImageModel:
    return reglue.load("starter")


def lit(model: reglue.ImageModel, name: str) -> np.ndarray:
    """Where at least half of some samples of a class are not black, (H, W)."""
    images = model.generate([name] * SAMPLES, seed=0, output="tensor", steps=15)
    assert isinstance(images, torch.Tensor)
    return (images.float().mean(1) > 40).float().mean(0).numpy() >= 0.5


@pytest.mark.trains
def test_what_it_draws_has_the_shape_of_its_class(model: reglue.ImageModel) -> None:
    trousers, sneaker, shirt = (lit(model, name) for name in ("trousers", "sneaker", "shirt"))
    rows, columns = trousers.any(1).sum(), trousers.any(0).sum()
    assert rows > 1.5 * columns  # high and narrow …
    middle = trousers.shape[1] // 2
    assert trousers[-6:, middle - 1 : middle + 1].mean() < trousers[6:12, middle - 1 : middle + 1].mean()  # … with legs
    assert sneaker.any(1).sum() < 0.7 * sneaker.any(0).sum()  # low and wide
    assert shirt.sum() > 1.5 * max(sneaker.sum(), 1)


@pytest.mark.parametrize("name", BROUGHT)
def test_the_command_needs_no_network_and_no_folder(name: str, tmp_path: Path) -> None:
    # From a new interpreter and another folder, as a user starts it: other tests fork their processes.
    command = reglue_command("sample", name, "--out", "samples", "--count", "10", "--steps", "2")
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert len(list((tmp_path / "samples").glob("*.png"))) == 10
    protocol = json.loads((tmp_path / "samples" / "samples.json").read_text())
    classes = len(reglue.load(name).record.class_names)
    assert protocol["labels"] == [i % classes for i in range(10)]
    assert protocol["run"] == name


def test_a_folder_of_that_name_comes_first(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: reglue.ImageModel
) -> None:
    (tmp_path / "starter").symlink_to(tiny_run, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    assert reglue.load("starter").record != model.record


def test_its_files_are_small_and_name_no_folder() -> None:
    files = [file for file in Path(str(resources.files("reglue.starter"))).rglob("*") if file.is_file()]
    assert max(file.stat().st_size for file in files) < LARGEST_FILE
    assert not [file for file in files if file.suffix == ".json" and '"/' in file.read_text()]


@pytest.mark.trains
def test_flowers_have_the_colours_of_their_class() -> None:
    model = reglue.load("flowers")
    names = ["sunflower", "tulip"]

    def yellow(name: str) -> float:
        images = model.generate([name] * 8, seed=0, output="tensor", steps=12)
        assert isinstance(images, torch.Tensor)
        red, green, blue = images.float().unbind(1)
        return float(((red > 120) & (green > 90) & (blue < 0.6 * green)).float().mean())

    sunflower, tulip = map(yellow, names)
    assert sunflower > 1.5 * tulip


def test_a_model_that_only_draws_says_so(tmp_path: Path) -> None:
    model = reglue.load("flowers")
    with pytest.raises(UserError, match="the compressor of local is neither"):
        model.encode(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("name", BROUGHT)
def test_the_command_of_its_card_is_the_one_that_trained_it(name: str) -> None:
    model = reglue.load(name)
    assert model.folder is not None
    card = (model.folder / "README.md").read_text()
    (command,) = (line for line in card.splitlines() if line.startswith("reglue train "))
    asked = parse(shlex.split(command)[1:]).recipe
    assert replace(asked, optimisation=asked.optimisation.settled()) == model.record.recipe
