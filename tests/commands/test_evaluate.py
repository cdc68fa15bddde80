import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from helpers import mistake
from processes import run_ranks
from reglue.cli import parse
from reglue.commands import evaluate as command
from reglue.commands.evaluate import Evaluate, evaluate
from reglue.commands.prepare import Prepare, prepare
from reglue.commands.sample import Sample, sample
from reglue.data.manifest import read_manifest, write_manifest
from reglue.data.store import Store
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError
from reglue.files import write_tensors
from reglue.metrics import evaluation as figures
from reglue.metrics.distances import Gaussian, GaussianStatistics, frechet_distance, manifold_scores
from reglue.metrics.evaluation import Evaluation, Figure
from reglue.metrics.features import (
    Description,
    DinoV2Features,
    EncoderFeatures,
    _dinov2_distance_name,
    load_encoder_features,
)
from reglue.metrics.inception import FIRST_TENSOR, INCEPTION, Inception, load_inception
from reglue.pipeline import load
from reglue.run import RunRecord

EVALUATED = shutil.ignore_patterns("reports", "evaluated")
"""What other tests may have left in a run that they share."""


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    return folder


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)


def settings(images: Path, reference: Path, **changes) -> Evaluate:
    quick = {"device": "cpu", "kernel_subsets": 3, "batch_size": 4, "resamples": 20, "feature_network": "store"}
    return Evaluate(images, reference, **{**quick, **changes})


def value(figure: Figure | None) -> float:
    assert figure is not None
    return figure.value


def test_a_set_is_at_no_distance_from_itself(tmp_path, tiny_store, tiny_images, capsys):
    out = tmp_path / "new" / "report.json"
    evaluation = evaluate(settings(tiny_images, tiny_store, out=out))
    assert value(evaluation.metrics.frechet_distance) == pytest.approx(0, abs=1e-4)
    assert (value(evaluation.metrics.precision), value(evaluation.metrics.recall)) == (1, 1)
    assert evaluation.reference_features == "class tokens cached in the store"
    assert (evaluation.image_count, evaluation.reference_count) == (24, 24)
    report = json.loads(out.read_text())
    assert report["metrics"]["frechet_distance"]["value"] == evaluation.metrics.frechet_distance.value
    encoder = Store.open(tiny_store).manifest.encoder
    assert encoder
    assert report["feature_network_sha256"] == encoder.weights_sha256
    assert report["protocol"] is None
    printed = capsys.readouterr().out
    assert "Fréchet distance" in printed
    assert "not recorded" in printed
    assert printed == f"{evaluation}\n"
    assert {"sFID", "Inception Score"} == set(evaluation.absent)


def test_the_figures_are_those_of_the_features_and_the_sides_are_not_exchanged(
    tmp_path, tiny_store, tiny_encoder, noise
):
    images = write_images(tmp_path / "noise", noise)
    evaluation = evaluate(settings(images, tiny_store))
    encoder = load_encoder(tiny_encoder, 16)
    measured = encoder.describe(torch.from_numpy(noise).permute(0, 3, 1, 2)).class_token
    real = Store.open(tiny_store).read("cls", torch.arange(24))["cls"]
    gaussians = [GaussianStatistics(16).update(side).gaussian for side in (measured, real)]
    scores = manifold_scores(generated=measured, real=real)
    assert value(evaluation.metrics.frechet_distance) == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    for name in ("precision", "recall", "density", "coverage"):
        figure = getattr(evaluation.metrics, name)
        assert figure.value == pytest.approx(float(getattr(scores, name).mean()))
        if name in ("precision", "density"):  # Means over the images, which are resampled.
            assert figure.low <= figure.value <= figure.high
    distance = evaluation.metrics.frechet_distance
    assert distance.low is not None
    assert distance.high is not None
    assert distance.low < distance.value < distance.high
    assert evaluate(settings(images, tiny_store, resamples=0)).metrics.frechet_distance == Figure(distance.value)
    assert any("9 images for 16 features" in warning for warning in evaluation.warnings)
    few = evaluate(settings(images, images, feature_network="starter")).warnings
    assert any("9 reference images for 128 features" in warning for warning in few)


def test_folder_and_npz_of_the_same_images_give_the_same_figures(tmp_path, tiny_images, tiny_encoder, noise):
    folder = write_images(tmp_path / "noise", noise)
    protocol = {"seed": 3, "sampling": {"sampler": "heun"}}
    (folder / "samples.json").write_text(json.dumps(protocol))
    np.savez(tmp_path / "noise.npz", arr_0=noise, protocol=json.dumps(protocol))
    np.savez_compressed(tmp_path / "plain.npz", images=noise)
    made = [
        evaluate(settings(path, tiny_images, feature_network=tiny_encoder))
        for path in (folder, tmp_path / "noise.npz", tmp_path / "plain.npz")
    ]
    assert made[0].metrics == made[1].metrics == made[2].metrics
    assert made[0].protocol == made[1].protocol == protocol
    assert made[2].protocol is None
    assert made[0].image_size == made[0].reference_size == (16, 16)


def test_a_store_of_another_encoder_is_read_from_its_images(tmp_path, tiny_store, tiny_images, tiny_encoder):
    other = shutil.copytree(tiny_encoder, tmp_path / "other")
    weights = load_encoder(tiny_encoder, 16).network.state_dict()
    save_file({name: value + 0.1 for name, value in weights.items()}, other / "model.safetensors")
    for changes in ({"feature_network": str(other)}, {"features": "patch-mean"}):
        evaluation = evaluate(settings(tiny_images, tiny_store, **changes))
        assert evaluation.reference_features == "computed from the images"
        assert value(evaluation.metrics.frechet_distance) == pytest.approx(0, abs=1e-4)


def test_intervals_stay_within_what_a_figure_can_be(tiny_store, tiny_images):
    evaluation = evaluate(settings(tiny_images, tiny_store, resamples=200))
    metrics = evaluation.metrics
    for figure, most in ((metrics.precision, 1), (metrics.density, 99)):
        assert figure is not None
        assert figure.low is not None
        assert figure.high is not None
        assert 0 <= figure.low <= figure.value <= figure.high <= most
    for figure in (metrics.recall, metrics.coverage):
        assert figure is not None
        assert figure.low is None, "means over reference images have no interval that could be trusted"
    assert metrics.frechet_distance.low is not None
    assert metrics.frechet_distance.low >= 0
    assert evaluation.kernel_subsets == 1, "a subset is all of either side"


@pytest.mark.parametrize("features", ["class-token", "patch-mean"])
def test_mirror_images_of_a_store_are_no_reference(tmp_path, tiny_images, tiny_encoder, tiny_autoencoder, features):
    store = tmp_path / "store"
    prepare(Prepare(tiny_images, store, 16, tiny_autoencoder, tiny_encoder, flips=True, workers=0, device="cpu"))
    evaluation = evaluate(settings(tiny_images, store, features=features))
    assert evaluation.reference_count == evaluation.image_count == 24
    assert value(evaluation.metrics.frechet_distance) == pytest.approx(0, abs=1e-4)


def test_a_store_whose_images_are_others_or_gone_is_named(tmp_path, tiny_images, tiny_encoder, tiny_autoencoder):
    images = shutil.copytree(tiny_images, tmp_path / "moved")
    prepare(Prepare(images, tmp_path / "store", 16, tiny_autoencoder, tiny_encoder, workers=0, device="cpu"))
    options = settings(tiny_images, tmp_path / "store", features="patch-mean")
    (images / "circle" / "000.png").rename(images / "circle" / "999.png")
    with pytest.raises(UserError, match=r"moved has changed since"):
        evaluate(options)
    shutil.rmtree(images)
    with pytest.raises(UserError, match=r"moved: no such folder"):
        evaluate(options)


def test_images_of_another_size_are_scaled_and_unreadable_ones_named(tmp_path, tiny_store, noise, capsys):
    folder = write_images(tmp_path / "large", noise.repeat(3, 1).repeat(3, 2))
    (folder / "000002.png").write_bytes(b"no image")
    evaluation = evaluate(settings(folder, tiny_store))
    assert evaluation.image_count == 8
    assert evaluation.skipped == ("000002.png",)
    assert "000002.png" in capsys.readouterr().err
    np.savez(tmp_path / "large.npz", noise.repeat(3, 1).repeat(3, 2))
    assert evaluate(settings(tmp_path / "large.npz", tiny_store)).image_count == 9


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((3, 16, 16, 3), np.uint8)}, "has 3 images; at least 6"),
        ({"arr_0": np.zeros((9, 3, 16, 16), np.uint8)}, r"uint8 \(N, H, W, 3\)"),
        ({"arr_0": np.zeros((9, 16, 16, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((0, 16, 16, 3), np.uint8)}, "no images"),
        (
            {"samples": np.zeros((9, 16, 16, 3), np.uint8)},
            "no array arr_0 or images, nor statistics mu and sigma; it has samples",
        ),
        (
            {"arr_0": np.zeros((9, 16, 16, 3), np.uint8), "protocol": "{"},
            r"bad\.npz is damaged \(its protocol",
        ),
        ({"arr_0": np.array([{}], dtype=object)}, "object"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"mu is \(3,\) and sigma \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "with D from 1"),
        ({"mu": np.zeros(4), "sigma": -np.eye(4)}, "sigma is no covariance"),
        ({"mu": np.zeros(4), "sigma": np.diag([1e9, 1, -1e6, 1])}, "sigma is no covariance"),
        ({"mu": np.zeros(4), "sigma": np.triu(np.ones((4, 4)))}, "sigma is no covariance"),
        ({"mu": np.zeros(2), "sigma": np.zeros((2, 2))}, "holds no images, and its statistics are the Inception's"),
    ],
)
def test_an_npz_that_holds_no_images_is_named(tmp_path, tiny_store, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as raised:
        evaluate(settings(tmp_path / "bad.npz", tiny_store))
    assert "bad.npz" in str(raised.value)


def test_a_single_array_is_read_as_an_archive_of_it(tmp_path, tiny_store, noise):
    np.savez(tmp_path / "noise.npz", noise)
    np.save(tmp_path / "noise.npy", noise)
    archived, single = (evaluate(settings(tmp_path / name, tiny_store)) for name in ("noise.npz", "noise.npy"))
    assert single.metrics == archived.metrics
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match=r"notes\.txt is a file; give a folder of images, an \.npz or \.npy file"):
        evaluate(settings(tmp_path / "notes.txt", tiny_store))


def test_copies_are_said(tmp_path, tiny_store, noise):
    def warnings(images: np.ndarray, reference: Path) -> list[str]:
        np.savez(tmp_path / "images.npz", images)
        found = evaluate(settings(tmp_path / "images.npz", reference)).warnings
        return [line for line in found if "singular" not in line]

    np.savez(tmp_path / "reference.npz", noise[::-1])
    copies = "warning: {} of 9 images are copies of others among them: the figures take each for an image of its own"
    shared = "warning: {} of 9 images are in the reference too, pixel for pixel"
    reference = tmp_path / "reference.npz"
    encoder = settings(reference, tiny_store)
    assert encoder.feature_network == "store"
    assert warnings(noise, tiny_store) == []
    assert warnings(np.repeat(noise[:3], 3, axis=0), tiny_store) == [copies.format(6)]
    found = evaluate(settings(tmp_path / "images.npz", reference, feature_network="starter"))
    assert copies.format(6) in found.warnings
    assert shared.format(9) in found.warnings


def test_images_of_another_size_than_the_first_are_said(tmp_path, tiny_store, noise):
    folder = write_images(tmp_path / "images", noise)
    Image.fromarray(noise[0, :10, :12]).save(folder / "000000.png")
    said = "warning: 8 of 9 images are of another size than the first, and were scaled and cropped to its 10×12 pixels"
    with pytest.raises(UserError, match="10×12"):  # The starter sees multiples of 8 pixels.
        evaluate(settings(folder, folder, feature_network="starter"))
    Image.fromarray(noise[0, :8, :8]).save(folder / "000000.png")
    said = said.replace("10×12", "8×8")
    assert any(line.startswith(said) for line in evaluate(settings(folder, folder, feature_network="starter")).warnings)
    asked = evaluate(settings(folder, folder, feature_network="starter", resolution=16))
    assert not any("another size" in line for line in asked.warnings)


def test_class_tokens_of_another_precision_are_computed_again(tmp_path, tiny_store):
    """They differ from those of the other side by more than the sides may."""
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    whole = evaluate(settings(store, store))
    write_manifest(store, replace(read_manifest(store), precision="bfloat16"))
    found = evaluate(settings(store, store))
    assert whole.image_features == "class tokens cached in the store"
    said = "computed from the images, as the store's class tokens are in bfloat16"
    assert found.image_features == found.reference_features == said
    assert value(found.metrics.frechet_distance) == pytest.approx(value(whole.metrics.frechet_distance), abs=1e-4)


@pytest.mark.parametrize("kept", [0, 100, 0.5])
def test_a_damaged_npz_is_named(tmp_path, tiny_store, noise, kept):
    path = tmp_path / "cut.npz"
    np.savez(path, noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=r"cut\.npz"):
        evaluate(settings(path, tiny_store))


def test_missing_input_and_senseless_options_are_named(tmp_path, tiny_store, tiny_images):
    with pytest.raises(UserError, match=r"nothing\.npz: no such file"):
        evaluate(settings(tmp_path / "nothing.npz", tiny_store))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        evaluate(settings(tiny_images, tmp_path / "nowhere"))
    with pytest.raises(UserError, match="kernel_subset_size 1"):
        settings(tiny_images, tiny_store, kernel_subset_size=1)


def test_a_failed_evaluation_leaves_the_earlier_report(tmp_path, tiny_store, tiny_images):
    out = tmp_path / "report.json"
    out.write_text("before")
    with pytest.raises(UserError):
        evaluate(settings(tmp_path / "nowhere", tiny_store, out=out))
    assert out.read_text() == "before"


class SmallInception(Inception):
    """Takes the Inception's place with few features, of random projections: the real one takes seconds per image."""

    width, spatial_width = 3, 2
    name, sha256, without_logits = "small", "hash", ""

    def __init__(self) -> None:
        self.weights = torch.randn(3 * 8 * 8, 3 + 2 + 4, generator=torch.Generator().manual_seed(0))

    def describe(self, pixels: torch.Tensor) -> Description:
        small = torch.nn.functional.interpolate(pixels / 255, (8, 8), mode="bilinear", antialias=True)
        return Description(*(small.flatten(1) @ self.weights).split((3, 2, 4), dim=1))


@pytest.fixture
def small_inception(monkeypatch) -> SmallInception:
    monkeypatch.setattr(command, "load_inception", lambda *_: SmallInception())
    return SmallInception()


def test_an_adm_reference_batch_gives_its_statistics_and_its_images(tmp_path, small_inception, noise):
    images = write_images(tmp_path / "noise", noise)
    real = noise[::-1].copy() // 2
    pixels = torch.from_numpy(real).permute(0, 3, 1, 2)
    found = small_inception.describe(pixels)
    assert found.spatial is not None
    gaussians = [GaussianStatistics(side.shape[1]).update(side).gaussian for side in (found.features, found.spatial)]
    adm = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (x for pair in gaussians for x in pair), strict=True))
    np.savez(tmp_path / "whole.npz", arr_0=real)
    np.savez(tmp_path / "adm.npz", arr_0=real[:7], **adm)
    np.savez(tmp_path / "bare.npz", **adm)
    whole, batch, bare = (
        evaluate(settings(images, tmp_path / name, feature_network=INCEPTION, resamples=0))
        for name in ("whole.npz", "adm.npz", "bare.npz")
    )
    assert whole.distance_name == "FID"
    assert whole.absent == {}
    for evaluation in (batch, bare):
        for name in ("frechet_distance", "spatial_frechet_distance"):
            expected = value(getattr(whole.metrics, name))
            assert value(getattr(evaluation.metrics, name)) == pytest.approx(expected, rel=1e-3)
        assert value(evaluation.metrics.inception_score) == pytest.approx(value(whole.metrics.inception_score))
    assert batch.reference_count == 7
    assert "FID and sFID from the statistics in the file" in str(batch)
    assert bare.reference_count is None
    assert bare.metrics.precision is None
    assert bare.absent["precision"] == "the reference has statistics and no images"


def test_sfid_has_an_interval_from_its_own_features(tmp_path, small_inception, noise, monkeypatch):
    images = write_images(tmp_path / "noise", noise)
    resampled: list[torch.Tensor] = []

    def influence(features: torch.Tensor, own: Gaussian, reference: Gaussian) -> torch.Tensor:
        torch.testing.assert_close(features.double().mean(0), own.mean, rtol=1e-4, atol=1e-5)
        resampled.append(features)
        return torch.linspace(-1, 1, len(features))

    monkeypatch.setattr(figures, "frechet_influence", influence)
    found = evaluate(settings(images, images, feature_network=INCEPTION, resamples=20, batch_size=3))
    assert [features.shape for features in resampled] == [(len(noise), 3), (len(noise), 2)]
    for figure in (found.metrics.frechet_distance, found.metrics.spatial_frechet_distance):
        assert figure is not None
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low < figure.high


def test_statistics_of_another_size_are_not_used(tmp_path, small_inception, monkeypatch):
    """With --resolution both sides are scaled, and a file's statistics are of its images as they are."""
    files = {}
    for name, seed in (("images", 0), ("reference", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
        files[name] = tmp_path / f"{name}.npz"
        np.savez(files[name], pixels)
    other = {"mu": np.ones(3), "sigma": np.eye(3), "mu_s": np.ones(2), "sigma_s": np.eye(2)}
    adm, bare = tmp_path / "adm.npz", tmp_path / "bare.npz"
    np.savez(adm, np.load(files["reference"])["arr_0"], **other)
    np.savez(bare, **other)

    def measured(reference: Path, resolution: int) -> Evaluation:
        options = {"feature_network": INCEPTION, "resolution": resolution, "resamples": 0}
        return evaluate(settings(files["images"], reference, **options))

    scaled, expected, native = measured(adm, 8), measured(files["reference"], 8), measured(adm, 16)
    assert scaled.metrics == expected.metrics
    assert scaled.reference_features == "computed from the images"
    assert scaled.reference_size == (8, 8)
    assert "statistics in the file" in native.reference_features
    assert value(native.metrics.frechet_distance) != pytest.approx(value(expected.metrics.frechet_distance), rel=1e-2)
    monkeypatch.setattr(command, "describe_side", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=r"^--resolution: .*bare\.npz holds statistics alone") as raised:
        measured(bare, 16)
    assert "\n" not in str(raised.value)


def test_images_go_into_the_inception_at_their_own_size(tmp_path, random_inception, noise, monkeypatch):
    """The real network, with some distance of Gaussians: matrix roots of 2048 features take seconds."""

    def distance(first: Gaussian, second: Gaussian) -> float:
        return float((first.mean - 2 * second.mean).norm() + (first.covariance - 2 * second.covariance).norm())

    monkeypatch.setattr(figures, "frechet_distance", distance)
    small, large = noise[:6], noise[:6].repeat(2, 1).repeat(2, 2)
    np.savez(tmp_path / "small.npz", small)
    np.savez(tmp_path / "large.npz", large)
    network = {"feature_network": str(random_inception), "resamples": 0}
    evaluation = evaluate(settings(tmp_path / "large.npz", tmp_path / "small.npz", **network))
    assert evaluation.distance_name == "FID"
    assert (evaluation.image_size, evaluation.reference_size) == ((32, 32), (16, 16))
    assert any("images of 32×32 pixels are compared with a reference of 16×16" in w for w in evaluation.warnings)
    inception = load_inception(random_inception)
    sides = [inception.describe(torch.from_numpy(side).permute(0, 3, 1, 2)).features for side in (large, small)]
    expected = distance(*(GaussianStatistics(2048).update(side).gaussian for side in sides))
    assert evaluation.metrics.frechet_distance.value == pytest.approx(expected, rel=1e-3)


def test_a_run_draws_its_images_once_and_is_compared_with_its_store(tmp_path, tiny_run, tiny_store):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    options = {"feature_network": "store", "device": "cpu", "resamples": 5, "kernel_subsets": 2, "batch_size": 4}
    first = evaluate(Evaluate(run, count=9, **options))
    folder = run / "evaluated" / "step-00000006"
    files = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    assert len(files) == first.image_count == 9
    assert first.reference == RunRecord.read(run).store
    assert first.reference_features == "class tokens cached in the store"
    assert first.protocol is not None
    printed = str(first)
    recipe = RunRecord.read(run).recipe
    for part in (recipe.sampling.sampler, "label_policy balanced", "rounding truncate", "guidance_scale", "seed 0"):
        assert part in printed
    fewer = evaluate(Evaluate(run, run, count=7, **options))
    assert fewer.image_count == 7
    assert fewer.protocol is not None
    assert len(fewer.protocol["labels"]) == 7
    assert len(json.loads((folder / "samples.json").read_text())["labels"]) == 9
    more = evaluate(Evaluate(run, tiny_store, count=11, **options))
    assert more.image_count == 11
    assert {name: (folder / name).stat().st_mtime_ns for name in files} == files


def test_images_of_trained_weights_have_a_folder_of_their_own_and_no_place_on_the_card(tmp_path, tiny_run, tiny_store):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    options = {"feature_network": "store", "device": "cpu", "resamples": 0, "kernel_subsets": 2, "weights": "model"}
    evaluation = evaluate(Evaluate(run, count=7, out=tmp_path / "report.json", **options))
    assert evaluation.protocol is not None
    assert evaluation.protocol["weights"] == "model"
    assert [folder.name for folder in (run / "evaluated").iterdir()] == ["step-00000006-model"]
    assert (tmp_path / "report.json").is_file()
    assert not (run / "reports").exists()
    with pytest.raises(UserError, match=r"--weights model: .* is not a run, and only runs draw images; leave it out"):
        evaluate(Evaluate(tiny_store, run, **options))


def test_a_run_that_has_moved_keeps_its_images(tmp_path, tiny_run, monkeypatch):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    options = {"count": 8, "feature_network": "store", "device": "cpu", "resamples": 0, "kernel_subsets": 2}
    evaluate(Evaluate(run, **options))
    moved = run.rename(tmp_path / "moved")
    drawn = {file: file.stat().st_mtime_ns for file in (moved / "evaluated").rglob("*.png")}
    assert len(drawn) == 8
    monkeypatch.chdir(tmp_path)
    evaluation = evaluate(Evaluate(Path("moved"), **options))
    assert evaluation.protocol is not None
    assert evaluation.protocol["run"] == str(moved)
    assert {file: file.stat().st_mtime_ns for file in drawn} == drawn
    weights = moved / "checkpoints" / "00000006" / "ema.safetensors"
    write_tensors(weights, {name: value + 1 for name, value in load_file(weights).items()})
    with pytest.raises(UserError, match=r"another protocol \(weights_sha256\)"):
        evaluate(Evaluate(moved, **options))


def test_samples_of_a_run_at_a_relative_path_are_evaluated_from_elsewhere(tmp_path, tiny_run, tiny_store, monkeypatch):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    monkeypatch.chdir(tmp_path)
    sample(Sample(Path("run"), Path("samples"), count=8, steps=1, device="cpu"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate(settings(tmp_path / "samples", tiny_store, resamples=0))
    assert len(list((run / "reports").glob("*.json"))) == 1


def test_the_size_is_that_of_the_first_image_that_can_be_read_upright(tmp_path, tiny_encoder, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photographs"
    folder.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # A camera held upright stores rows as columns.
    for i in range(2, 10):
        lying = Image.fromarray(rng.integers(0, 256, (16, 32, 3), np.uint8))
        lying.save(folder / f"{i}.png", exif=exif)
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    (folder / "1.png").write_bytes(b"no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 40)  # The first is a bomb, at more than twice that.
    evaluation = evaluate(settings(folder, folder, feature_network=tiny_encoder, resamples=0))
    assert evaluation.image_size == (32, 16)
    assert set(evaluation.skipped) == {"0.png", "1.png"}
    for file in folder.glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"no image in .*photographs can be read; the first, 0\.png: cannot identify"):
        evaluate(settings(folder, folder, feature_network=tiny_encoder))


def test_the_report_about_a_runs_images_goes_into_the_run(
    tmp_path, tiny_run, tiny_store, tiny_images, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    samples = sample(Sample(Path("run"), tmp_path / "samples", count=8, steps=2, device="cpu"))
    others = sample(Sample(Path("run"), tmp_path / "others", count=8, steps=3, device="cpu"))

    def reports() -> list[str]:
        return sorted(file.name for file in (run / "reports").glob("*"))

    evaluate(settings(samples, tiny_store, resamples=0))
    (name,) = reports()
    assert re.fullmatch(r"step-00000006-encoder\d+-[0-9a-f]{8}\.json", name)
    evaluation = evaluate(settings(samples, tiny_store, resamples=0, out=tmp_path / "report.json"))
    assert reports() == [name], "the same again"
    assert (run / "reports" / name).read_text() == (tmp_path / "report.json").read_text()
    evaluate(settings(others, tiny_store, resamples=0))
    evaluate(settings(samples, tiny_store, resamples=0, seed=1))
    evaluate(settings(run, tiny_store, resamples=0, count=6))
    assert len(reports()) == 4
    evaluate(settings(samples, tiny_store, resamples=2, out=run / "reports" / "mine.json"))
    assert len(reports()) == 5, "not there twice"

    card = model_card_of(load(run, device="cpu").save(tmp_path / "saved"))
    assert f"{evaluation.metrics.frechet_distance.value:.6g}" in card
    assert card.count("samples.step 6") == 5
    (run / "reports" / name).write_text((tmp_path / "report.json").read_text().replace('"step": 6', '"step": 5'))
    card = model_card_of(load(run, device="cpu").save(tmp_path / "later"))
    assert card.count("samples.step") == 4, "a report about another step"

    shutil.rmtree(run / "reports")
    (run / "reports").write_text("no folder can be here")
    capsys.readouterr()
    evaluate(settings(samples, tiny_store, resamples=0, out=tmp_path / "again.json"))
    assert f"The report is not in {run}/reports, so no model card will show it" in capsys.readouterr().err
    assert (tmp_path / "again.json").is_file()


def model_card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_numbers_are_not_printed_without_their_protocol(tmp_path, tiny_store, noise):
    evaluation = evaluate(settings(write_images(tmp_path / "noise", noise), tiny_store))
    for bare in (evaluation.metrics, evaluation.metrics.frechet_distance, [evaluation.metrics.recall]):
        assert not re.search(r"\d", f"{bare}{bare!r}")
        assert "Evaluation" in str(bare)
    assert not re.search(r"\d\.\d", repr(evaluation.metrics))
    assert "recall" in repr(evaluation.metrics)
    assert "inception_score" not in repr(evaluation.metrics)
    distance = f"{evaluation.metrics.frechet_distance.value:.4f}"
    (row,) = [line for line in str(evaluation).splitlines() if line.startswith(evaluation.distance_name)]
    assert distance in row
    assert row.endswith("protocol not recorded")


def test_the_user_states_how_images_of_elsewhere_were_made(tmp_path, tiny_store, tiny_run, noise):
    folder = write_images(tmp_path / "noise", noise)
    (tmp_path / "how.json").write_text(json.dumps({"sampler": "heun", "guidance": {"scale": 1.5}}))
    sentence = "drawn by another program,\n50 steps of Heun, " + "with many more words " * 9
    out = tmp_path / "report.json"
    said = evaluate(settings(folder, tiny_store, protocol=sentence, out=out))
    assert json.loads(out.read_text())["protocol"] == {"stated_by_user": " ".join(sentence.split())}
    assert "stated_by_user drawn by another program, 50 steps of Heun" in str(said)
    assert "not recorded" not in str(said)
    saved = load(tiny_run, device="cpu").save(tmp_path / "saved", reports=[out])
    assert f"samples.stated_by_user {' '.join(sentence.split())}" in model_card_of(saved)
    assert "stated_by_user.guidance.scale 1.5" in str(
        evaluate(settings(folder, tiny_store, protocol=str(tmp_path / "how.json")))
    )


def test_the_card_says_that_a_protocol_is_not_recorded(tmp_path, tiny_store, tiny_run, noise):
    evaluate(settings(write_images(tmp_path / "noise", noise), tiny_store, out=tmp_path / "report.json"))
    saved = load(tiny_run, device="cpu").save(tmp_path / "saved", reports=[tmp_path / "report.json"])
    assert "samples protocol not recorded" in model_card_of(saved)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("gone.json", "--protocol .*gone.json: no such file"),
        ("list.json", "holds no JSON object"),
        ("cut.json", "holds no JSON object"),
        ("deep.json", "holds no JSON object"),
        ("folder.json", "folder.json: Is a directory"),
        (" ", "--protocol says nothing"),
        ("empty.json", "--protocol says nothing"),
    ],
)
def test_a_statement_must_say_something(said, message, tmp_path, tiny_store, tiny_images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    for name, content in (("list", "[1]"), ("cut", "{"), ("empty", "{}"), ("deep", '{"a": ' + "[" * 100_000)):
        (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        evaluate(settings(tiny_images, tiny_store, protocol=said))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        *(b"\xff\xfe", b"", b"null", b"[]", b"3", b'"text"', b"[" * 100_000),
        *(
            b'{"labels": 5}',
            b'{"labels": null}',
            b'{"labels": {"a": 1}}',
            b'{"labels": ["cat"]}',
            b'{"labels": [true]}',
        ),
        *(b'{"class_names": 3}', b'{"class_names": [3]}', b'{"class_names": ["a"], "labels": [1]}', b'{"sampling": 4}'),
        b'{"sha256": 5}',
    ],
)
def test_a_protocol_that_is_none_is_one_line(content, tmp_path, tiny_store, noise):
    folder = write_images(tmp_path / "noise", noise)
    (folder / "samples.json").write_bytes(content)
    np.savez(tmp_path / "noise.npz", arr_0=noise, protocol=np.array(content.decode(errors="replace")))
    for images in (folder, tmp_path / "noise.npz"):
        with pytest.raises(
            UserError, match=r"(samples\.json|noise\.npz) is damaged \(it.*\); fix or remove it"
        ) as raised:
            evaluate(settings(images, tiny_store))
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500


def test_a_statement_does_not_replace_a_record(tmp_path, tiny_run, tiny_store, noise):
    folder = write_images(tmp_path / "noise", noise)
    (folder / "samples.json").write_text(json.dumps({"seed": 3}))
    for images in (folder, tiny_run):
        with pytest.raises(UserError, match="is recorded already; leave it out"):
            evaluate(settings(images, tiny_store, protocol="otherwise"))


def test_another_run_at_the_path_gets_no_report(tmp_path, tiny_run, tiny_store):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    samples = sample(Sample(run, tmp_path / "samples", count=8, steps=2, device="cpu"))
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["name"] = "another"
    before = (run / "run.json").read_text()
    for content in (json.dumps(record), "{"):
        (run / "run.json").write_text(content)
        evaluate(settings(samples, tiny_store, resamples=0))
        assert not (run / "reports").exists()
    (run / "run.json").write_text(before)
    weights = run / "checkpoints" / "00000006" / "ema.safetensors"
    write_tensors(weights, {name: value + 1 for name, value in load_file(weights).items()})
    evaluate(settings(samples, tiny_store, resamples=0))
    assert not (run / "reports").exists()


def test_a_run_whose_store_is_gone_or_another_is_named(tmp_path, tiny_run, tiny_images):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    record = json.loads((run / "run.json").read_text())
    for changes, message in (
        ({"store": str(tmp_path / "gone")}, r"gone, which is gone; give the training store"),
        ({"store_hash": "0" * 64}, "is not the store that"),
    ):
        (run / "run.json").write_text(json.dumps({**record, **changes}))
        with pytest.raises(UserError, match=message):
            evaluate(settings(tiny_images, run))


def test_a_store_is_measured_too(tiny_store):
    evaluation = evaluate(settings(tiny_store, tiny_store))
    assert evaluation.image_features == evaluation.reference_features == "class tokens cached in the store"
    assert value(evaluation.metrics.coverage) == 1


def test_options_that_do_not_fit_are_named(tmp_path, tiny_images, tiny_store):
    inception = tmp_path / "inception.safetensors"
    save_file({FIRST_TENSOR: torch.zeros(1)}, inception)
    for options, message in (
        (settings(tiny_images, tiny_images), "--feature-network store"),
        (settings(tiny_images, tiny_store, count=5), "--count 5"),
        (Evaluate(tiny_images), "--reference is missing"),
        (settings(tiny_images, tiny_store, feature_network="no-such-network"), "no-such-network"),
        (
            settings(tiny_images, tiny_store, feature_network=str(inception), features="patch-mean"),
            "--features patch-mean",
        ),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(options)


def test_fd_dinov2_takes_images_that_fit_no_grid_of_patches(monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr("reglue.metrics.features.DinoV2Features", lambda name, device: made.append(name))
    load_encoder_features("dinov2-l", (100, 90), "class-token")
    assert made == ["dinov2-l"]


def test_only_dinov2_large_is_called_fd_dinov2(tmp_path, tiny_encoder):
    assert load_encoder_features(tiny_encoder, (16, 16), "class-token").distance_name.startswith("Fréchet distance (")
    network = timm.create_model("vit_large_patch14_dinov2.lvd142m", num_classes=0, img_size=224, depth=1)
    folder = tmp_path / "large"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_large_patch14_dinov2.lvd142m", "model_args": {"depth": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(load_encoder_features(str(folder), (256, 256), "patch-mean"), EncoderFeatures)
    large = load_encoder_features(str(folder), (256, 256), "class-token")
    assert isinstance(large, DinoV2Features)
    assert large.distance_name == "Fréchet distance (large, preprocessed as for FD-DINOv2)"  # Weights of a file.
    for name in ("dinov2-l", "timm:vit_large_patch14_dinov2.lvd142m"):
        assert _dinov2_distance_name(name) == "FD-DINOv2"
    assert _dinov2_distance_name("dinov2-l@/weights/tuned.safetensors") != "FD-DINOv2"
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    resized = np.array(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    standardised = torch.from_numpy((resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float()
    with torch.no_grad():
        expected = cast(Any, network).eval().forward_features(standardised.permute(2, 0, 1)[None])[:, 0]
    found = large.describe(torch.from_numpy(image).permute(2, 0, 1)[None]).features
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_too_few_images_are_refused_before_the_work(tmp_path, tiny_run, tiny_images, tiny_store, noise, monkeypatch):
    folder = write_images(tmp_path / "noise", noise[:6])
    (folder / "000002.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="noise has 5 readable images; at least 6"):
        evaluate(settings(folder, tiny_store))
    monkeypatch.setattr(command, "load_network", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match="--count 5; at least 6 are needed"):
        evaluate(Evaluate(tiny_run, count=5, feature_network="store", device="cpu"))
    (folder / "000001.png").unlink()
    with pytest.raises(UserError, match="noise has 5 images; at least 6"):
        evaluate(settings(tiny_images, folder))


@pytest.mark.parametrize("kind", ["folder", "npz", "run"])
def test_two_processes_share_the_images(kind, tmp_path, tiny_run, tiny_images, tiny_encoder, noise):
    if kind == "folder":
        images = write_images(tmp_path / "noise", noise)
        (images / "000002.png").write_bytes(b"no image")
        (images / "000007.png").write_bytes(b"no image")
    elif kind == "npz":
        images = tmp_path / "noise.npz"
        np.savez(images, noise)
    else:
        images = Path(shutil.copytree(tiny_run, tmp_path / "run", ignore=EVALUATED))
    common = ["--feature-network", tiny_encoder, "--resamples=5", "--device=cpu"]
    # Of a run's images the second process gets none to describe, but drawing them is common work.
    common += ["--count=7", "--batch-size=8"] if kind == "run" else ["--batch-size=2"]
    reports = {name: tmp_path / f"{name}.json" for name in ("one", "two")}
    command = ["evaluate", str(images), "--reference", str(tiny_images), *common, "--out"]
    first, second = run_ranks(2, *command, reports["two"])
    assert first.stdout.count("coverage  ") == 1
    assert not second.stdout
    evaluate(parse([*command, str(reports["one"])]))
    one, two = (json.loads(file.read_text()) for file in reports.values())
    metrics = [report.pop("metrics") for report in (one, two)]
    stds = [side.pop("kernel_distance_std") for side in metrics]
    assert stds[0] == pytest.approx(stds[1], rel=1e-4)
    assert one == two
    assert one["image_count"] == {"folder": 7, "npz": 9, "run": 7}[kind]
    assert one["skipped"] == (["000002.png", "000007.png"] if kind == "folder" else [])
    for name, figure in metrics[0].items():
        both = (figure, metrics[1][name])
        expected, found = ({part: n for part, n in (x or {}).items() if n is not None} for x in both)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_a_report_that_cannot_be_written_stops_before_the_work(tmp_path, tiny_images, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_network", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").touch()
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "report.json", r"file: (File exists|Not a)")):
        told = mistake(capsys, monkeypatch, "evaluate", tiny_images, "--reference", tiny_images, "--out", out)
        assert re.search(message, told)
