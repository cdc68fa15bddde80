"""`compress`: what it learns, what it adds to the store, and how it continues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

import reglue.jobs.compress
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.jobs.compress import Compress, compress
from reglue.jobs.prepare import Prepare, prepare
from reglue.semantics.compressors import load_compressor


@pytest.fixture
def folder(tiny_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def metrics(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "compressors" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["conv", "pca"])
def test_codes_in_the_store_are_those_of_the_saved_compressor(folder: Path, kind: Literal["conv", "pca"]):
    options = Compress(folder, kind, channels=3, hidden=8, epochs=3, device="cpu")
    store = compress(options)
    name = f"{kind}-3"
    compressor = load_compressor(folder / "compressors" / name)
    rows = torch.arange(len(store))
    with torch.no_grad():
        codes = compressor.encode(store.read("features", rows)["features"])
    torch.testing.assert_close(store.read(f"local.{name}", rows)["local"], codes, atol=1e-4, rtol=1e-4)
    assert store.manifest.compressors[name] == compressor.spec()
    torch.testing.assert_close(
        torch.tensor(store.manifest.statistics[f"local.{name}"].std),
        codes.std((0, 2, 3), correction=0),
        atol=1e-4,
        rtol=1e-4,
    )
    assert Store.open(folder).manifest == store.manifest
    picture = Image.open(folder / "compressors" / name / "codes.png")
    assert picture.height > 2 * 16


def test_training_lowers_the_error_and_the_last_epoch_is_kept(folder: Path):
    store = compress(
        Compress(folder, channels=4, hidden=16, epochs=12, batch_size=8, learning_rate=5e-3, name="long", device="cpu")
    )
    records = metrics(folder, "long")
    assert [record["epoch"] for record in records] == list(range(1, 13))
    assert records[-1]["train_mse"] < 0.8 * records[0]["train_mse"]
    assert records[-1]["explained_variance"] > 0.1
    assert all(0 < record["validation_mse"] < 2 for record in records)

    compressor = load_compressor(folder / "compressors" / "long")
    _, held_out = reglue.jobs.compress._split(Compress(folder), len(store))
    features = compressor.standardise(store.read("features", held_out)["features"])
    with torch.no_grad():
        mse = (compressor.expand(compressor.compress(features)) - features).square().mean()
    assert float(mse) == pytest.approx(records[-1]["validation_mse"], rel=1e-4)


def test_principal_components_explain_more_the_more_there_are(folder: Path):
    explained = []
    for channels in (1, 8, 64):
        compress(Compress(folder, "pca", channels=channels, validation=0.25, device="cpu"))
        explained.append(metrics(folder, f"pca-{channels}")[0]["explained_variance"])
    assert explained == sorted(explained)
    assert explained[-1] == pytest.approx(1, abs=1e-4)


def test_again_does_nothing_and_other_options_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    first = compress(Compress(folder, channels=4, hidden=8, epochs=1, device="cpu"))
    assert "already" in capsys.readouterr().out
    manifest = (folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="made with hidden 8, not 9; choose another --name"):
        compress(Compress(folder, channels=4, hidden=9, epochs=1, device="cpu"))
    assert (folder / "manifest.json").read_bytes() == manifest
    assert Store.open(folder).manifest == first.manifest


def test_interrupted_training_continues_to_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    options = {"channels": 3, "hidden": 8, "epochs": 4, "batch_size": 8, "device": "cpu"}
    whole = compress(Compress(other, **options))

    measure, epochs = reglue.jobs.compress._measure, iter(range(10))

    def dying(*arguments):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reglue.jobs.compress, "_measure", dying)
        with pytest.raises(KeyboardInterrupt):
            compress(Compress(folder, **options))
    assert "conv-3" not in Store.open(folder).manifest.compressors
    with pytest.raises(UserError, match="hidden"):
        compress(Compress(folder, **{**options, "hidden": 9}))

    store = compress(Compress(folder, **options))

    assert store.manifest.compressors["conv-3"] == whole.manifest.compressors["conv-3"]
    assert metrics(folder, "conv-3") == metrics(other, "conv-3")
    assert not list((folder / "compressors" / "conv-3").glob("training*"))


def test_lost_codes_are_made_again_from_the_saved_compressor(folder: Path):
    before = Store.open(folder).manifest
    shard = folder / "local.conv-4-00001.safetensors"
    codes = shard.read_bytes()
    shard.unlink()
    assert compress(Compress(folder, channels=4, hidden=8, epochs=1, device="cpu")).manifest == before
    assert shard.read_bytes() == codes


def test_micro_batches_are_parts_of_a_batch(folder: Path):
    """Without batch statistics the gradient would be the same; with them it is close."""
    whole = {"channels": 3, "hidden": 8, "epochs": 3, "batch_size": 8, "device": "cpu"}
    compress(Compress(folder, **whole))
    compress(Compress(folder, micro_batch=4, name="parts", **whole))
    errors = [metrics(folder, name)[-1]["train_mse"] for name in ("conv-3", "parts")]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"validation": 1.0}, "--validation 1.0"),
        ({"epochs": 0}, "--epochs 0"),
        ({"seed": -1}, "--seed -1"),
        ({"name": "../escape"}, "--name"),
        ({"kind": "pca", "channels": 1000}, "--channels 1000"),
        ({"store": Path("nowhere")}, "nowhere is not a store"),
        ({"learning_rate": 1e30, "channels": 2}, "learning-rate"),
    ],
)
def test_what_cannot_be_is_refused_and_the_store_stays(folder: Path, changes, says: str):
    manifest = (folder / "manifest.json").read_bytes()
    options = {"store": folder, "hidden": 4, "epochs": 2, "device": "cpu"}
    with pytest.raises(UserError, match=says) as caught:
        compress(Compress(**{**options, **changes}))
    assert "\n" not in str(caught.value)
    assert (folder / "manifest.json").read_bytes() == manifest


def test_a_store_without_features_is_refused(tiny_images: Path, tiny_autoencoder: str, tmp_path: Path):
    out = tmp_path / "bare"
    prepare(Prepare(tiny_images, out, 16, tiny_autoencoder, "none", workers=0, device="cpu"))
    with pytest.raises(UserError, match="--features"):
        compress(Compress(out, device="cpu"))
