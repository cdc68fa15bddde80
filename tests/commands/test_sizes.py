"""The whole path at sizes that are not square: prepare, compress, train, sample, evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import TINY_RECIPE
from reglue import cli
from reglue.data.store import Store
from reglue.diffusion.backbones.sit import position_embedding
from reglue.run import RunRecord


def run(*arguments: object) -> None:
    options = cli.parse([str(argument) for argument in arguments])
    cli.execute(options)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (20, 12)], ids=["even", "odd"])
def test_oblong_images_go_all_the_way(
    height: int, width: int, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path
) -> None:
    store, trained, drawn = tmp_path / "store", tmp_path / "run", tmp_path / "drawn"
    networks = ["--autoencoder", tiny_autoencoder, "--encoder", tiny_encoder]
    run("prepare", tiny_images, store, "--resolution", height, width, *networks, "--features", "--device=cpu")
    run("compress", store, "--kind=pca", "--channels=4", "--device=cpu")
    recipe = [*TINY_RECIPE, "--local.compressor=pca-4", "--optimisation.steps=2", "--preview-every=2"]
    run("train", "reglue", "--store", store, "--out", trained, *recipe)
    run("sample", trained, "--out", drawn, "--count=6", "--device=cpu")
    run("evaluate", drawn, "--reference", store, "--feature-network=store", "--kernel-subsets=2", "--resamples=0",
        "--device=cpu", "--out", tmp_path / "report.json")  # fmt: skip

    manifest = Store.open(store).manifest
    assert manifest.source.resolution == (height, width)
    assert manifest.encoder is not None
    assert manifest.encoder.grid == (height // 4, width // 4)
    assert manifest.columns["latent"].tensors["mean"].shape == (3, height // 2, width // 2)
    assert RunRecord.read(trained).denoiser.token_grid == (height // 4, width // 4)
    assert {Image.open(file).size for file in drawn.glob("*.png")} == {(width, height)}
    assert (trained / "previews" / "00000002.png").is_file()
    assert json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (1, 7), (32, 48)])
def test_a_token_has_the_same_position_in_every_grid(grid: tuple[int, int]) -> None:
    side = max(grid)
    square = position_embedding((side, side), 16).unflatten(1, (side, side))
    assert torch.equal(position_embedding(grid, 16).unflatten(1, grid), square[:, : grid[0], : grid[1]])
