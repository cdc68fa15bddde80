"""A folder without classes, other sizes than usual, and a non-square grid: from images to images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import TINY_RECIPE
from reglue.cli import parse
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.sample import Sample, sample
from reglue.commands.train import train
from reglue.errors import UserError


def test_unlabelled_images_of_another_shape(
    tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, file in enumerate(sorted(tiny_images.rglob("*.png"))):
        Image.open(file).resize((40, 24)).save(images / f"{i}.png")
    store = tmp_path / "store"
    prepare(Prepare(images, store, (16, 32), tiny_autoencoder, tiny_encoder, features=True, workers=0, device="cpu"))
    compress(Compress(store, "conv", channels=4, hidden=8, epochs=1, device="cpu"))
    steps = ["--optimisation.steps=4", "--preview-every=4", "--preview-count=4"]
    run = train(parse(["train", "reglue", "--store", str(store), "--out", str(tmp_path / "run"), *TINY_RECIPE, *steps]))
    out = sample(Sample(run, tmp_path / "out", count=3, device="cpu"))
    assert np.asarray(Image.open(out / "000002.png")).shape == (16, 32, 3)
    with pytest.raises(UserError, match=r"guidance_scale 2\.0: this model has no classes"):
        sample(Sample(run, tmp_path / "guided", count=1, guidance_scale=2.0, device="cpu"))
    with pytest.raises(UserError, match="without classes"):
        sample(Sample(run, tmp_path / "class", count=1, classes=("0",), device="cpu"))
