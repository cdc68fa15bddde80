import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reglue.data.store import Store
from reglue.errors import UserError
from reglue.jobs import evaluate as job
from reglue.jobs.evaluate import Evaluate, evaluate
from reglue.jobs.prepare import Prepare, prepare
from reglue.metrics.distances import GaussianStatistics, frechet_distance, precision_recall


def write_images(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    return folder


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)


def settings(images: Path, reference: Path, **changes) -> Evaluate:
    return Evaluate(images, reference, **{"device": "cpu", "kernel_subsets": 3, "batch_size": 4, **changes})


def test_a_set_is_at_no_distance_from_itself(tmp_path, tiny_store, tiny_images, capsys):
    out = tmp_path / "new" / "report.json"
    evaluation = evaluate(settings(tiny_images, tiny_store, out=out))
    assert evaluation.metrics.frechet_distance == pytest.approx(0, abs=1e-4)
    assert (evaluation.metrics.precision, evaluation.metrics.recall) == (1, 1)
    assert evaluation.reference_features == "class tokens cached in the store"
    assert (evaluation.image_count, evaluation.reference_count) == (24, 24)
    report = json.loads(out.read_text())
    assert report["metrics"]["frechet_distance"] == evaluation.metrics.frechet_distance
    encoder = Store.open(tiny_store).manifest.encoder
    assert encoder
    assert report["encoder_sha256"] == encoder.weights_sha256
    assert report["protocol"] is None
    printed = capsys.readouterr().out
    assert "Fréchet distance" in printed
    assert "unknown" in printed


def test_the_figures_are_those_of_the_features_and_the_sides_are_not_exchanged(
    tmp_path, tiny_store, tiny_encoder, noise
):
    images = write_images(tmp_path / "noise", noise)
    evaluation = evaluate(settings(images, tiny_store))
    encoder = job.load_encoder(tiny_encoder, 16)
    measured = encoder.describe(torch.from_numpy(noise).permute(0, 3, 1, 2)).class_token
    real = Store.open(tiny_store).read("cls", torch.arange(24))["cls"]
    gaussians = [GaussianStatistics(16).update(side) for side in (measured, real)]
    shares = precision_recall(generated=measured, real=real)
    assert evaluation.metrics.frechet_distance == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    assert (evaluation.metrics.precision, evaluation.metrics.recall) == (shares.precision, shares.recall)
    assert any("9 images for 16 features" in warning for warning in evaluation.warnings)


def test_folder_and_npz_of_the_same_images_give_the_same_figures(tmp_path, tiny_images, tiny_encoder, noise):
    folder = write_images(tmp_path / "noise", noise)
    protocol = {"seed": 3, "sampling": {"sampler": "heun"}}
    (folder / "samples.json").write_text(json.dumps(protocol))
    np.savez(tmp_path / "noise.npz", arr_0=noise, protocol=json.dumps(protocol))
    np.savez_compressed(tmp_path / "plain.npz", images=noise)
    made = [
        evaluate(settings(path, tiny_images, encoder=tiny_encoder))
        for path in (folder, tmp_path / "noise.npz", tmp_path / "plain.npz")
    ]
    assert made[0].metrics == made[1].metrics == made[2].metrics
    assert made[0].protocol == made[1].protocol == protocol
    assert made[2].protocol is None
    assert made[0].resolution == (16, 16)


def test_a_store_of_another_encoder_is_read_from_its_images(tmp_path, tiny_store, tiny_images, tiny_encoder):
    other = shutil.copytree(tiny_encoder, tmp_path / "other")
    weights = job.load_encoder(tiny_encoder, 16).network.state_dict()
    save_file({name: value + 0.1 for name, value in weights.items()}, other / "model.safetensors")
    for changes in ({"encoder": str(other)}, {"features": "patch-mean"}):
        evaluation = evaluate(settings(tiny_images, tiny_store, **changes))
        assert evaluation.reference_features == "computed from the images"
        assert evaluation.metrics.frechet_distance == pytest.approx(0, abs=1e-4)


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
        ({"arr_0": np.zeros((3, 16, 16, 3), np.uint8)}, "has 3 readable images; at least 4"),
        ({"arr_0": np.zeros((9, 3, 16, 16), np.uint8)}, r"uint8 \(N, H, W, 3\)"),
        ({"arr_0": np.zeros((9, 16, 16, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((0, 16, 16, 3), np.uint8)}, "no images"),
        ({"samples": np.zeros((9, 16, 16, 3), np.uint8)}, "no array arr_0 or images; it has samples"),
        ({"arr_0": np.zeros((9, 16, 16, 3), np.uint8), "protocol": "{"}, "not JSON"),
        ({"arr_0": np.array([{}], dtype=object)}, "object"),
    ],
)
def test_an_npz_that_holds_no_images_is_named(tmp_path, tiny_store, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as raised:
        evaluate(settings(tmp_path / "bad.npz", tiny_store))
    assert "bad.npz" in str(raised.value)


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
    with pytest.raises(UserError, match="--kernel-subset-size 1"):
        settings(tiny_images, tiny_store, kernel_subset_size=1)


def test_a_failed_evaluation_leaves_the_earlier_report(tmp_path, tiny_store, tiny_images):
    out = tmp_path / "report.json"
    out.write_text("before")
    with pytest.raises(UserError):
        evaluate(settings(tmp_path / "nowhere", tiny_store, out=out))
    assert out.read_text() == "before"
