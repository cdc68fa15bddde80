"""The same images in another latent space: rows and semantics stay, latents change."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

import reglue.commands.reencode
from helpers import TINY_RECIPE
from reglue.cli import parse
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.reencode import Reencode, reencode
from reglue.commands.train import train
from reglue.commands.verify import Verify, verify
from reglue.data.manifest import write_manifest
from reglue.data.store import Store
from reglue.errors import UserError


@pytest.fixture(scope="module")
def another_autoencoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("another")
    torch.manual_seed(1)
    AutoencoderKL(latent_channels=5, block_out_channels=(8,), norm_num_groups=4).save_pretrained(folder)
    return str(folder)


def test_latents_are_the_other_autoencoders_and_all_else_stays(
    tiny_store: Path, another_autoencoder: str, tmp_path: Path
) -> None:
    first = Store.open(tiny_store)
    second = reencode(Reencode(tiny_store, tmp_path / "second", another_autoencoder, workers=0))
    alone = prepare(
        Prepare(
            Path(first.manifest.source.path),
            tmp_path / "alone",
            16,
            another_autoencoder,
            "none",
            shard_size=10,
            workers=0,
        )
    )
    rows = torch.arange(len(first))
    for column in ("cls", "features", "local.conv-4", "local.pca-4", "label"):
        for name, tensor in first.read(column, rows).items():
            assert torch.equal(second.read(column, rows)[name], tensor)
        assert second.manifest.statistics.get(column) == first.manifest.statistics.get(column)
    assert second.names(rows) == first.names(rows)
    assert second.manifest.encoder == first.manifest.encoder
    assert second.manifest.compressors == first.manifest.compressors
    assert second.read("latent", rows)["mean"].shape[1:] == (5, 16, 16)
    for name, tensor in alone.read("latent", rows).items():
        assert torch.equal(second.read("latent", rows)[name], tensor)
    assert second.manifest.statistics["latent"] == alone.manifest.statistics["latent"]

    run = tmp_path / "run"
    arguments = ["--store", str(second.folder), "--out", str(run), *TINY_RECIPE, "--optimisation.steps=2"]
    train(parse(["train", "reglue", *arguments]))  # The compressor came along too.
    assert (run / "compressors" / "local").is_dir()


def test_features_take_no_second_disk(tiny_store: Path, another_autoencoder: str, tmp_path: Path) -> None:
    if tiny_store.stat().st_dev != tmp_path.stat().st_dev:
        pytest.skip("on two disks")
    reencode(Reencode(tiny_store, tmp_path / "second", another_autoencoder, workers=0))
    name = "features-00000.safetensors"
    assert (tmp_path / "second" / name).samefile(tiny_store / name)


def test_where_files_cannot_be_linked_they_are_copied(
    tiny_store: Path, another_autoencoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    second = reencode(Reencode(tiny_store, tmp_path / "second", another_autoencoder, workers=0))
    verify(Verify(second.folder))
    assert not list((tmp_path / "second").glob("*.tmp"))


def test_interrupted_before_the_semantics_it_continues(
    tiny_store: Path, another_autoencoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    options = Reencode(tiny_store, tmp_path / "second", another_autoencoder, workers=0)
    with monkeypatch.context() as patched:
        patched.setattr(reglue.commands.reencode, "add_semantics", stop)
        with pytest.raises(KeyboardInterrupt):
            reencode(options)
    assert "cls" not in Store.open(options.out).manifest.columns
    assert "features" in reencode(options).manifest.columns
    before = (options.out / "manifest.json").read_text()
    reencode(options)  # Finished: nothing is done again.
    assert (options.out / "manifest.json").read_text() == before


def test_a_folder_of_another_autoencoder_is_refused(
    tiny_store: Path, another_autoencoder: str, tiny_autoencoder: str, tmp_path: Path
) -> None:
    reencode(Reencode(tiny_store, tmp_path / "second", another_autoencoder, workers=0))
    with pytest.raises(UserError, match="was prepared with autoencoder"):
        reencode(Reencode(tiny_store, tmp_path / "second", tiny_autoencoder, workers=0))


def test_changed_images_are_refused(
    tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, another_autoencoder: str, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(tiny_images, tmp_path / "images"))
    prepare(Prepare(images, tmp_path / "first", 16, tiny_autoencoder, tiny_encoder, workers=0))
    next(images.rglob("*.png")).unlink()
    with pytest.raises(UserError, match="has changed since the store was made"):
        reencode(Reencode(tmp_path / "first", tmp_path / "second", another_autoencoder, workers=0))
    assert not (tmp_path / "second").exists()


def test_a_store_without_an_encoder_gets_latents_alone(
    tiny_images: Path, tiny_autoencoder: str, another_autoencoder: str, tmp_path: Path
) -> None:
    prepare(Prepare(tiny_images, tmp_path / "first", 16, tiny_autoencoder, "none", workers=0))
    options = Reencode(tmp_path / "first", tmp_path / "second", another_autoencoder, workers=0)
    for _ in range(2):
        assert set(reencode(options).manifest.columns) == {"label", "latent"}
    assert json.loads((tmp_path / "second" / "manifest.json").read_text())["encoder"] is None


def test_a_store_of_lower_precision_is_reencoded_once(
    tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str, another_autoencoder: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prepare(
        Prepare(tiny_images, tmp_path / "first", 16, tiny_autoencoder, tiny_encoder, precision="bfloat16", workers=0)
    )
    options = Reencode(tmp_path / "first", tmp_path / "second", another_autoencoder, workers=0)
    before = reencode(options).manifest
    assert (before.precision, "cls" in before.columns) == ("float32", True)
    capsys.readouterr()
    assert reencode(options).manifest == before
    assert "second is complete already: 24 images" in capsys.readouterr().out


def contents_of(store: Path) -> dict[str, bytes]:
    """Shards and manifest."""
    return {file.name: file.read_bytes() for file in store.iterdir() if file.suffix in (".safetensors", ".json")}


def test_what_a_reencoded_store_has_lost_is_made_again(
    tiny_store: Path, another_autoencoder: str, tmp_path: Path
) -> None:
    options = Reencode(tiny_store, tmp_path / "second", another_autoencoder, workers=0)
    second = reencode(options)
    compress(Compress(second.folder, "pca", channels=3, device="cpu"))  # What it has itself stays.
    before = contents_of(second.folder)
    times = {path.name: path.stat().st_mtime_ns for path in second.folder.iterdir()}
    lost = ("latent-00001.safetensors", "cls-00000.safetensors", "label-00002.safetensors")
    for name in (*lost, "local.conv-4-00000.safetensors"):
        (second.folder / name).unlink()  # It may be another name for the first store's file.
    with (second.folder / "latent-00000.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"missing or cut short; run the same `reglue prepare` or `reglue reencode` ag"):
        Store.open(second.folder)
    reencode(options)
    assert contents_of(second.folder) == before
    kept = (second.folder / "latent-00002.safetensors").stat().st_mtime_ns
    assert kept == times["latent-00002.safetensors"], "it was whole"
    verify(Verify(second.folder))


def test_class_tokens_that_the_first_store_has_no_more_are_named(
    tiny_store: Path, another_autoencoder: str, tmp_path: Path
) -> None:
    first = Path(shutil.copytree(tiny_store, tmp_path / "first"))
    options = Reencode(first, tmp_path / "second", another_autoencoder, workers=0)
    reencode(options)
    manifest = Store.open(first).manifest
    cls = manifest.columns["cls"]
    others = replace(cls, shards=tuple(replace(shard, sha256="0" * 64) for shard in cls.shards))
    write_manifest(first, replace(manifest, columns={**manifest.columns, "cls": others}))
    (options.out / "cls-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"second/cls-00001\.safetensors is missing .* has another one now"):
        reencode(options)
