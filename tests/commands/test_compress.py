"""`compress`: what it learns, what it adds to the store, and how it continues."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

import reglue.commands.compress
from helpers import mistake
from reglue.commands.compress import Compress, compress
from reglue.commands.prepare import Prepare, prepare
from reglue.data.images import ImageFolder
from reglue.data.store import Store
from reglue.data.targets import DecodedTargets
from reglue.encoders.compressors import ConvCompressor, LearnedCompressor, PcaCompressor, as_map, load_compressor
from reglue.errors import UserError
from reglue.perception.labelled import compressor_figures


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


def test_the_picture_shows_mirror_images_too(
    tmp_path: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str
):
    folder = tmp_path / "store"
    made = {"resolution": 16, "features": True, "flips": True, "workers": 0, "device": "cpu"}
    prepare(Prepare(tiny_images, folder, autoencoder=tiny_autoencoder, encoder=tiny_encoder, **made))
    compress(Compress(folder, "pca", channels=3, device="cpu"))
    shown = np.asarray(Image.open(folder / "compressors" / "pca-3" / "codes.png"))
    assert shown.shape[0] > 2 * 16, "images over their codes"
    last = ImageFolder.open(tiny_images).load(23, (16, 16))
    assert isinstance(last, torch.Tensor)
    np.testing.assert_array_equal(shown[:16, -16:], last.flip(-1).permute(1, 2, 0).numpy())


@pytest.mark.trains
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
    _, held_out = reglue.commands.compress._split(Compress(folder), store)
    features = compressor.standardise(store.read("features", held_out)["features"])
    with torch.no_grad():
        mse = (compressor.expand(compressor.compress(features)) - features).square().mean()
    assert float(mse) == pytest.approx(records[-1]["validation_mse"], rel=1e-4)


@pytest.mark.trains
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
    for damaged in ("{", "[]"):
        (folder / "compressors" / "conv-4" / "options.json").write_text(damaged)
        with pytest.raises(UserError, match=r"options\.json is damaged.*; delete .*conv-4 and compress again"):
            compress(Compress(folder, channels=4, hidden=8, epochs=1, device="cpu"))


def test_interrupted_training_continues_to_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    options = {"channels": 3, "hidden": 8, "epochs": 4, "batch_size": 8, "device": "cpu"}
    whole = compress(Compress(other, **options))

    measure, epochs = reglue.commands.compress.measure, iter(range(10))

    def dying(*arguments):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reglue.commands.compress, "measure", dying)
        with pytest.raises(KeyboardInterrupt):
            compress(Compress(folder, **options))
    assert "conv-3" not in Store.open(folder).manifest.compressors
    with pytest.raises(UserError, match="hidden"):
        compress(Compress(folder, **{**options, "hidden": 9}))

    store = compress(Compress(folder, **options))

    assert store.manifest.compressors["conv-3"] == whole.manifest.compressors["conv-3"]
    assert metrics(folder, "conv-3") == metrics(other, "conv-3")
    assert not (folder / "compressors" / "conv-3" / "checkpoints").exists()


def overfitting(monkeypatch: pytest.MonkeyPatch, errors: list[float], dies_in: int | None = None) -> None:
    """Have the error of held-out images be these, epoch by epoch; the process is killed in one of them."""
    measure = reglue.commands.compress.measure
    epochs = iter(range(1, 100))

    def measured(*arguments):
        epoch = next(epochs)
        if epoch == dies_in:
            raise KeyboardInterrupt
        return measure(*arguments)._replace(mse=errors[epoch - 1])

    monkeypatch.setattr(reglue.commands.compress, "measure", measured)
    monkeypatch.setattr(reglue.commands.compress, "LEAST_PATIENCE", 1)


ERRORS = [9.0, 5.0, 6.0, 5.0, 7.0, 5.5, 5.6, 5.7]
"""The best epoch is the second one."""
FITTED = {"channels": 3, "hidden": 8, "batch_size": 8, "device": "cpu"}


def test_it_stops_where_it_over_fits_and_keeps_the_best_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    two = compress(Compress(Path(shutil.copytree(folder, tmp_path / "two")), epochs=2, **FITTED))
    overfitting(monkeypatch, ERRORS)
    store = compress(Compress(folder, epochs=8, patience=3, **FITTED))
    assert [line["epoch"] for line in metrics(folder, "conv-3")] == [1, 2, 3, 4, 5]
    says = "conv-3: stopped after epoch 5 of 8: the error of held-out images was least after epoch 2"
    assert says in capsys.readouterr().out
    made = store.manifest.compressors["conv-3"]
    assert made == two.manifest.compressors["conv-3"]
    assert made.epoch == load_compressor(folder / "compressors" / "conv-3").epoch == 2
    assert compressor_figures(store, "local.conv-3")["epoch"] == 2
    assert not (folder / "compressors" / "conv-3" / "checkpoints").exists()
    assert compress(Compress(folder, epochs=8, patience=3, **FITTED)).manifest == store.manifest


@pytest.mark.parametrize("dies_in", [2, 3, 5, "after the last"])
def test_what_was_killed_stops_at_the_same_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: int | str
):
    with monkeypatch.context() as patch:
        overfitting(patch, ERRORS)
        whole = compress(
            Compress(Path(shutil.copytree(folder, tmp_path / "whole")), epochs=8, patience=3, **FITTED)
        ).manifest
    with monkeypatch.context() as patch:
        if isinstance(dies_in, int):
            overfitting(patch, ERRORS, dies_in)
            done = dies_in - 1
        else:
            overfitting(patch, ERRORS)
            patch.setattr(reglue.commands.compress, "add_codes", lambda *_: next(iter(())))
            done = 5
        with pytest.raises((KeyboardInterrupt, StopIteration)):
            compress(Compress(folder, epochs=8, patience=3, **FITTED))
    overfitting(monkeypatch, ERRORS[done:])
    store = compress(Compress(folder, epochs=8, patience=3, **FITTED))
    assert store.manifest.compressors == whole.compressors
    assert metrics(folder, "conv-3") == metrics(tmp_path / "whole", "conv-3")


def test_without_patience_the_last_epoch_is_kept_and_over_fitting_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    overfitting(monkeypatch, ERRORS)
    store = compress(Compress(folder, epochs=8, patience=0, **FITTED))
    assert len(metrics(folder, "conv-3")) == 8
    assert store.manifest.compressors["conv-3"].epoch == 8
    says = "conv-3: 8 epochs, error of held-out images 5.7 (it was 5 after epoch 2: it over-fits)"
    assert says in capsys.readouterr().out


def test_an_error_that_is_no_number_ends_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    overfitting(monkeypatch, [9.0, float("nan")])
    with pytest.raises(UserError, match="not finite after epoch 2; choose a lower --learning-rate"):
        compress(Compress(folder, epochs=3, **FITTED))


def test_few_steps_are_no_reason_to_stop(folder: Path, monkeypatch: pytest.MonkeyPatch):
    overfitting(monkeypatch, ERRORS)
    monkeypatch.setattr(reglue.commands.compress, "LEAST_PATIENCE", 100)
    assert compress(Compress(folder, epochs=8, patience=1, **FITTED)).manifest.compressors["conv-3"].epoch == 8


def test_lost_codes_are_made_again_from_the_saved_compressor(folder: Path):
    before = Store.open(folder).manifest
    shard = folder / "local.conv-4-00001.safetensors"
    codes = shard.read_bytes()
    shard.unlink()
    assert compress(Compress(folder, channels=4, hidden=8, epochs=1, device="cpu")).manifest == before
    assert shard.read_bytes() == codes


def test_a_lost_compressor_is_fitted_again(folder: Path, capsys: pytest.CaptureFixture[str]):
    options = Compress(folder, "pca", channels=3, device="cpu")
    before = compress(options).manifest
    shutil.rmtree(folder / "compressors" / "pca-3")
    (folder / "compressors" / "pca-3").mkdir()
    capsys.readouterr()
    assert compress(options).manifest == before
    assert "already" not in capsys.readouterr().out
    assert load_compressor(folder / "compressors" / "pca-3").spec() == before.compressors["pca-3"]


def test_codes_that_two_processes_make_at_once_are_both_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    fit = PcaCompressor.fit.__func__

    def slowly(kind, batches, mean, std, channels):
        if channels == 3:  # Meanwhile another process begins and ends.
            compress(Compress(folder, "pca", channels=2, device="cpu"))
        return fit(kind, batches, mean, std, channels)

    monkeypatch.setattr(PcaCompressor, "fit", classmethod(slowly))
    made = compress(Compress(folder, "pca", channels=3, device="cpu"))
    assert {"pca-2", "pca-3"} <= made.manifest.compressors.keys()
    assert {"local.pca-2", "local.pca-3"} <= Store.open(folder).manifest.columns.keys()


@pytest.mark.trains
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
        ({"validation": 1.0}, "validation 1.0"),
        ({"epochs": 0}, "epochs 0"),
        ({"seed": -1}, "seed -1"),
        ({"patience": -1}, "patience -1"),
        ({"learning_rate": float("inf")}, "learning_rate inf"),
        ({"final_learning_rate": float("nan")}, "final_learning_rate nan"),
        ({"validation": float("nan")}, "validation nan"),
        ({"name": "../escape"}, "--name"),
        ({"kind": "pca", "channels": 1000}, "channels 1000"),
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


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_a_variational_code_is_the_mean_and_the_divergence_is_learned(folder: Path, kind: Literal["conv", "mlp"]):
    common = {"channels": 3, "hidden": 8, "epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "device": "cpu"}
    light, heavy = (
        compress(Compress(folder, kind, kl_weight=weight, name=name, **common))
        for weight, name in ((1e-6, "light"), (1.0, "heavy"))
    )
    assert Compress(folder, kind, kl_weight=1e-6, **common).compressor_name == f"{kind}-3-kl"
    records = {name: metrics(folder, name)[-1] for name in ("light", "heavy")}
    assert records["heavy"]["train_kl"] < 0.1 * records["light"]["train_kl"]
    assert records["heavy"]["train_mse"] > records["light"]["train_mse"]
    assert heavy.manifest.compressors["heavy"].variational

    compressor = load_compressor(folder / "compressors" / "light")
    assert isinstance(compressor, LearnedCompressor)
    rows = torch.arange(len(light))
    with torch.no_grad():
        posterior = compressor.posterior(compressor.standardise(light.read("features", rows)["features"]))
    torch.testing.assert_close(light.read("local.light", rows)["local"], posterior.mean, atol=1e-4, rtol=1e-4)


def test_a_variational_training_that_was_interrupted_draws_the_same_noise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    options = {"channels": 2, "hidden": 4, "kl_weight": 0.1, "epochs": 3, "batch_size": 8, "device": "cpu"}
    whole = compress(Compress(other, **options))

    measure, epochs = reglue.commands.compress.measure, iter(range(10))

    def dying(*arguments):
        if next(epochs) == 1:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reglue.commands.compress, "measure", dying)
        with pytest.raises(KeyboardInterrupt):
            compress(Compress(folder, **options))
    assert compress(Compress(folder, **options)).manifest.compressors == whole.manifest.compressors


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["pca", "mlp"])
def test_class_tokens_get_codes_in_a_column_of_their_own(folder: Path, kind: Literal["pca", "mlp"]):
    before = Store.open(folder).manifest
    options = Compress(folder, kind, "cls", channels=4, hidden=32, epochs=40, learning_rate=1e-2, device="cpu")
    store = compress(options)
    column = f"cls.{kind}-4"
    rows = torch.arange(len(store))
    codes, tokens = store.read(column, rows)["cls"], store.read("cls", rows)["cls"]
    assert codes.shape == (24, 4)
    compressor = load_compressor(folder / "compressors" / column)
    assert store.manifest.compressors[column] == compressor.spec()
    assert (compressor.spec().column, compressor.spec().channels_in) == ("cls", tokens.shape[1])
    with torch.no_grad():
        torch.testing.assert_close(compressor.encode(as_map(tokens)).flatten(1), codes, atol=1e-4, rtol=1e-4)
        restored = compressor.decode(as_map(codes)).flatten(1)
    error, spread = (restored - tokens).square().mean(), tokens.var(0, correction=0).mean()
    assert error < 0.5 * spread
    assert {name: store.manifest.columns[name] for name in before.columns} == before.columns
    assert compress(options).manifest == store.manifest

    (folder / f"{column}-00001.safetensors").unlink()
    with pytest.raises(UserError, match="reglue compress"):
        Store.open(folder)
    assert compress(options).manifest == store.manifest


def test_a_map_and_a_class_token_may_have_compressors_of_one_name(folder: Path):
    store = compress(Compress(folder, "pca", "cls", channels=4, device="cpu"))
    assert store.manifest.compressors.keys() == {"conv-4", "pca-4", "cls.pca-4"}
    assert store.manifest.compressors["pca-4"] != store.manifest.compressors["cls.pca-4"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"column": "cls"}, "--kind conv needs a map"),
        ({"kind": "pca", "kl_weight": 1e-6}, "--kl-weight is for"),
        ({"kl_weight": -1.0}, "kl_weight -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight nan"),
    ],
)
def test_kinds_and_columns_that_do_not_fit_are_refused(options, says: str):
    with pytest.raises(UserError, match=says):
        Compress(Path("store"), **options)


def test_a_store_without_an_encoder_has_no_class_tokens_to_compress(
    tiny_images: Path, tiny_autoencoder: str, tmp_path: Path
):
    prepare(Prepare(tiny_images, tmp_path / "bare", 16, tiny_autoencoder, "none", workers=0, device="cpu"))
    with pytest.raises(UserError, match=r"no class tokens.*--encoder"):
        compress(Compress(tmp_path / "bare", "pca", "cls", device="cpu"))


def test_held_out_images_are_not_learned_from_as_their_mirror_images(tmp_path, tiny_images, tiny_encoder):
    store = prepare(
        Prepare(tiny_images, tmp_path / "store", 16, "starter", tiny_encoder, flips=True, workers=0, device="cpu")
    )
    names = [
        {name.removesuffix("#flipped") for name in store.names(rows)}
        for rows in reglue.commands.compress._split(Compress(store.folder, validation=0.25), store)
    ]
    assert (len(names[0]), len(names[1])) == (18, 6)
    assert not names[0] & names[1]


def test_the_codes_of_images_in_a_parquet_file_are_drawn_under_them(tmp_path, tiny_images, tiny_encoder):
    files = sorted(tiny_images.rglob("*.png"))
    table = {"image": [{"bytes": file.read_bytes()} for file in files], "label": [file.parent.name for file in files]}
    pq.write_table(pa.table(table), tmp_path / "images.parquet")
    options = Prepare(tmp_path / "images.parquet", tmp_path / "store", 16, "starter", tiny_encoder, features=True)
    prepare(replace(options, flips=True, workers=0, device="cpu"))
    compress(Compress(tmp_path / "store", "pca", channels=3, device="cpu"))
    with Image.open(tmp_path / "store/compressors/pca-3/codes.png") as picture:
        assert picture.height > 2 * 16


def test_a_compressor_that_was_fitted_elsewhere_is_applied_as_it_is(
    folder: Path, tmp_path: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str
):
    fitted = folder / "compressors" / "conv-4"
    made = {"resolution": (16, 24), "autoencoder": tiny_autoencoder, "workers": 0, "device": "cpu"}
    prepare(Prepare(tiny_images, tmp_path / "oblong", encoder=tiny_encoder, features=True, **made))
    store = compress(Compress(tmp_path / "oblong", fitted=fitted, device="cpu"))
    compressor = load_compressor(fitted)
    assert store.manifest.compressors == {"conv-4": compressor.spec()}
    rows = torch.arange(len(store))
    with torch.no_grad():
        codes = compressor.encode(store.read("features", rows)["features"])
    torch.testing.assert_close(store.read("local.conv-4", rows)["local"], codes, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="was made with"):
        compress(Compress(tmp_path / "oblong", channels=4, device="cpu"))

    prepare(Prepare(tiny_images, tmp_path / "one", encoder=tiny_encoder, features=True, layers=(4,), **made))
    with pytest.raises(
        UserError, match=r"takes layers \[1, 2, 3, 4\], but .* holds \[4\]; prepare it with the same encoder"
    ):
        compress(Compress(tmp_path / "one", fitted=fitted, device="cpu"))
    assert not (tmp_path / "one" / "compressors").exists()


def published_reglue(folder: Path, channels_in: int) -> tuple[Path, Path, ConvCompressor]:
    """REGLUE's files of weights and statistics, with what they hold."""
    torch.manual_seed(0)
    mean, std = torch.randn(channels_in), torch.rand(channels_in) + 0.5
    compressor = ConvCompressor(channels_in, 8, 5, mean, std).eval()
    weights = compressor.state_dict()
    published = {f"module.{key.replace('coder.', 'coder.model.')}": weights[key] for key in weights if "coder." in key}
    torch.save(published, folder / "compressor.pth")
    np.savez(folder / "statistics.npz", mean=mean.numpy(), std=std.numpy())
    return folder / "compressor.pth", folder / "statistics.npz", compressor


def test_a_published_compressor_is_applied_to_ones_own_store(folder: Path, tmp_path: Path):
    file, statistics, compressor = published_reglue(tmp_path, channels_in=64)
    options = Compress(folder, fitted=file, statistics=statistics, name="published", device="cpu")
    store = compress(options)
    assert store.manifest.compressors["published"] == compressor.spec()
    rows = torch.arange(len(store))
    with torch.no_grad():
        codes = compressor.encode(store.read("features", rows)["features"])
    torch.testing.assert_close(store.read("local.published", rows)["local"], codes, atol=1e-4, rtol=1e-4)
    assert compress(options).manifest == store.manifest

    np.savez(statistics, mean=np.zeros(64), std=np.ones(64))
    with pytest.raises(UserError, match=r"was made with fitted .* choose another --name"):
        compress(options)


def test_published_principal_components_are_applied_to_ones_own_store(folder: Path, tmp_path: Path):
    rows = torch.arange(24)
    features = Store.open(folder).read("features", rows)["features"]
    flat = features.float().movedim(1, -1).flatten(0, -2).numpy()
    mean, std = flat.mean(0), flat.std(0) + 0.1
    model = PCA(8).fit((flat - mean) / std)
    (tmp_path / "pca.pkl").write_bytes(pickle.dumps({"pca_model": model, "mean": mean, "std": std}))
    store = compress(Compress(folder, fitted=tmp_path / "pca.pkl", channels=6, device="cpu"))
    codes = store.read("local.pca-6", rows)["local"].movedim(1, -1).flatten(0, -2).numpy()
    np.testing.assert_allclose(codes, model.transform((flat - mean) / std)[:, :6], atol=1e-3)


def test_a_published_compressor_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file, statistics, _ = published_reglue(tmp_path, channels_in=48)
    (tmp_path / "page.pth").write_text("<html>")
    fitted = ["--fitted", file]
    for says, arguments in {
        f"--fitted {file} takes 48 channels, but {folder} has 64": [*fitted, "--statistics", statistics],
        "give their file with --statistics": fitted,
        "give it too, with --fitted": ["--statistics", statistics],
        "page.pth: is a web page": ["--fitted", tmp_path / "page.pth"],
        "nowhere.pth: no such file": ["--fitted", tmp_path / "nowhere.pth"],
        "leave it out, since": ["--fitted", folder / "compressors" / "conv-4", "--statistics", statistics],
    }.items():
        assert says in mistake(capsys, monkeypatch, "compress", folder, *arguments)
    assert {path.name for path in (folder / "compressors").iterdir()} == {"conv-4", "pca-4"}


@pytest.mark.parametrize(("kind", "layers"), [("pca", "last"), ("conv", (2, 3))])
def test_codes_of_some_layers_alone(folder: Path, kind: Literal["conv", "pca"], layers):
    options = Compress(folder, kind, layers=layers, channels=3, hidden=8, epochs=1, device="cpu")
    store = compress(options)
    compress(options)  # Nothing to do, and nothing to complain of.
    name, blocks = (f"{kind}-3-last", (4,)) if layers == "last" else (f"{kind}-3-layers-2-3", (2, 3))
    compressor = load_compressor(folder / "compressors" / name)
    assert compressor.layers == store.manifest.compressors[name].layers == blocks
    rows = torch.arange(len(store))
    features = store.read("features", rows)["features"].unflatten(1, (4, 16))  # of blocks 1 to 4
    taken = torch.cat([features[:, block - 1] for block in blocks], dim=1)
    assert taken.shape[1] == compressor.spec().channels_in
    with torch.no_grad():
        torch.testing.assert_close(
            store.read(f"local.{name}", rows)["local"], compressor.encode(taken), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(compressor.mean, taken.float().mean((0, 2, 3)), atol=1e-3, rtol=1e-3)


@pytest.mark.trains
def test_codes_of_the_last_layer_are_those_of_a_store_that_has_it_alone(
    folder: Path, tmp_path: Path, tiny_images: Path, tiny_encoder: str, tiny_autoencoder: str
):
    made = {"resolution": 16, "features": True, "workers": 0, "device": "cpu"}
    alone = tmp_path / "alone"
    prepare(Prepare(tiny_images, alone, autoencoder=tiny_autoencoder, encoder=tiny_encoder, layers=(4,), **made))
    compress(Compress(alone, "pca", channels=3, device="cpu"))
    compress(Compress(folder, "pca", layers="last", channels=3, device="cpu"))
    compressors = [load_compressor(alone / "compressors/pca-3"), load_compressor(folder / "compressors/pca-3-last")]
    specs = [replace(compressor.spec(), weights_sha256="") for compressor in compressors]
    assert specs[0] == specs[1]
    weights = [compressor.state_dict() for compressor in compressors]
    for name, value in weights[0].items():  # To rounding: a processor may sum what lies apart in another order.
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)
    # And so each can be applied to the other's store.
    codes = [Store.open(alone).read("local.pca-3", torch.arange(24))["local"]]
    applied = compress(Compress(folder, fitted=alone / "compressors/pca-3", name="alone", device="cpu"))
    codes.append(applied.read("local.alone", torch.arange(24))["local"])
    torch.testing.assert_close(*codes, rtol=1e-3, atol=1e-3)  # float16


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": (0, 1)}, r"--layers: layers \[0, 1\] are not neighbours among \[1, 2, 3, 4\]"),
        ({"layers": (1, 3)}, r"--layers: layers \[1, 3\] are not neighbours"),
        ({"layers": "last", "kind": "pca", "column": "cls"}, "--layers is for --column features"),
    ],
)
def test_layers_that_cannot_be_taken_are_refused(folder: Path, changes, says: str):
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=says):
        compress(Compress(folder, channels=3, device="cpu", **changes))
    assert (folder / "manifest.json").read_bytes() == before


def test_other_layers_than_a_compressor_was_fitted_to_are_refused(folder: Path):
    with pytest.raises(UserError, match=r"takes layers \[1, 2, 3, 4\]: leave out --layers"):
        compress(Compress(folder, fitted=folder / "compressors/pca-4", layers="last", name="other", device="cpu"))


def test_targets_are_decoded_from_the_last_layer_or_refused(folder: Path, tmp_path: Path):
    store = compress(Compress(folder, "pca", layers="last", channels=16, device="cpu"))
    compress(Compress(folder, "pca", layers=(2, 3), channels=4, device="cpu"))
    encoder, rows = store.manifest.encoder, torch.arange(4)
    assert encoder is not None
    targets = DecodedTargets(store, encoder, "pca-16-last", torch.device("cpu"))
    features = store.read("features", rows)["features"][:, -16:].float()
    torch.testing.assert_close(targets.tokens(targets.read(rows)).features, features, atol=1e-2, rtol=1e-2)
    with pytest.raises(UserError, match=r"pca-4-layers-2-3 has layers \[2, 3\], not the last one \(4\)"):
        DecodedTargets(Store.open(folder), encoder, "pca-4-layers-2-3", torch.device("cpu"))
