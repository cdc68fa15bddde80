"""The Inception network: what is read off it, and its weights from files. Random weights, real architecture."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from reglue.commands.evaluate import Evaluate, evaluate
from reglue.errors import UserError
from reglue.metrics import inception as module
from reglue.metrics.distances import GaussianStatistics
from reglue.metrics.features import describe_images
from reglue.metrics.inception import Inception, is_inception, load_inception
from reglue.metrics.inception_network import URL_INCEPTION_V3, InceptionNetwork

TORCHSCRIPT, PHOTOGRAPHS = "REGLUE_INCEPTION_TORCHSCRIPT", "REGLUE_PHOTOGRAPHS"
CIFAR = "REGLUE_CIFAR10_TRAIN", "REGLUE_CIFAR10_TEST"


@pytest.fixture(scope="module")
def inception(random_inception) -> Inception:
    return load_inception(random_inception)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 20, 30), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_spatial_features_are_seven_channels_of_mixed_6_in_tensorflows_order(inception, images):
    found, network = inception.describe(images), inception.network
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False) / 128 - 1
    with torch.no_grad():
        for name, block in network.named_children():  # in the order of the graph
            if name == "Mixed_6d":
                break
            x = block(x)
        branch = network.Mixed_6d.branch1x1
        x = F.batch_norm(
            branch.conv(x), branch.bn.running_mean, branch.bn.running_var, branch.bn.weight, branch.bn.bias, eps=1e-3
        ).relu()
    assert x.shape == (3, 192, 17, 17)
    assert found.spatial is not None
    assert found.spatial.shape == (3, 2023)
    for row, column, channel in ((0, 0, 6), (3, 16, 0), (16, 5, 2)):
        place = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(found.spatial[:, place], x[:, channel, row, column])


def test_features_and_logits_are_torch_fidelitys(inception, images):
    found = inception.describe(images)
    pool, logits = inception.network(images)
    assert found.features.shape == (3, 2048)
    torch.testing.assert_close(found.features, pool)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(logits, pool @ inception.network.fc.weight.T)  # without the bias


def test_its_weights_have_the_channels_last(inception):
    """What convolutions are fastest with."""
    for layer in inception.network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_images_are_streamed_and_the_spatial_features_not_kept(inception, images):
    alive: list[int] = []

    def batches():
        for i in range(3):
            alive.append(i)
            yield images[i : i + 1]

    class Watched(module.Inception):
        def describe(self, pixels):
            seen.append((len(pixels), len(alive)))
            return super().describe(pixels)

    seen: list[tuple[int, int]] = []
    watched = Watched(inception.network, "name", "hash")
    described = describe_images(watched, batches())
    assert seen == [(1, 1), (1, 2), (1, 3)]  # Each is described before the next one is read.
    whole = inception.describe(images)
    torch.testing.assert_close(described.features, whole.features, rtol=1e-3, atol=1e-5)
    assert described.spatial is not None
    assert whole.spatial is not None
    expected = GaussianStatistics(2023).update(whole.spatial)
    torch.testing.assert_close(described.spatial.mean, expected.mean, rtol=1e-3, atol=1e-5)
    assert described.spatial.count == 3


def test_weights_come_from_torch_fidelitys_pth_too_and_randomness_is_left_alone(inception, images, tmp_path):
    torch.save(inception.network.state_dict(), tmp_path / "weights.pth")
    before = torch.random.get_rng_state()
    other = load_inception(tmp_path / "weights.pth")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(other.describe(images).features, inception.describe(images).features)
    assert other.sha256 != inception.sha256


def test_a_file_without_class_scores_has_no_logits(inception, images, tmp_path):
    state = {name: value.contiguous() for name, value in inception.network.state_dict().items() if "fc." not in name}
    save_file(state, tmp_path / "pool.safetensors")
    found = load_inception(tmp_path / "pool.safetensors")
    assert found.describe(images).logits is None
    assert "pool.safetensors holds no layer of class scores" in found.without_logits


class Harmful:
    """Unpickling it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_damaged_foreign_and_harmful_files_are_named(tmp_path, tiny_encoder):
    torch.save({"weights": Harmful(tmp_path / "made")}, tmp_path / "harmful.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "damaged.pth").write_bytes(b"nothing of the kind")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name in ("harmful.pth", "damaged.safetensors", "damaged.pth", "empty.pth", "foreign.pth", "script.pt"):
        with pytest.raises(UserError, match=name) as raised:
            load_inception(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "made").exists()
    assert not is_inception(Path(tiny_encoder) / "model.safetensors")


def test_without_network_the_file_and_its_place_are_named(tmp_path, monkeypatch, inception, images):
    def refuse(url, target, **_):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match="unreachable") as raised:
        load_inception()
    assert str(file) in str(raised.value)
    assert URL_INCEPTION_V3 in str(raised.value)
    torch.save(inception.network.state_dict(), file)
    found = load_inception()
    assert found.name == "inception"
    assert torch.equal(found.describe(images).features, inception.describe(images).features)


@pytest.mark.skipif(TORCHSCRIPT not in os.environ, reason=f"set {TORCHSCRIPT} to the TorchScript file")
def test_the_converted_network_agrees_with_the_torchscript_one(tmp_path):
    """On the photographs of REGLUE_PHOTOGRAPHS (a folder, some of whose files are taken), or on noise."""
    from convert_inception import convert

    scripted = torch.jit.load(os.environ[TORCHSCRIPT], map_location="cpu").eval()
    save_file(convert(Path(os.environ[TORCHSCRIPT])), tmp_path / "inception.safetensors")
    inception = load_inception(tmp_path / "inception.safetensors")
    assert inception.without_logits
    if PHOTOGRAPHS in os.environ:
        files = sorted(file for file in Path(os.environ[PHOTOGRAPHS]).rglob("*") if file.is_file())
        pixels = [np.array(Image.open(file).convert("RGB")) for file in files[:: max(1, len(files) // 12)]]
    else:
        pixels = list(np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8))
    largest = 0.0
    for image in pixels:
        batch = torch.from_numpy(image).permute(2, 0, 1)[None]
        resized = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
        with torch.no_grad():
            expected = scripted(resized / 128 - 1)
        found = inception.describe(batch).features
        largest = max(largest, float((found - expected).abs().max() / expected.abs().max()))
    print(f"largest difference, relative to the largest feature, on {len(pixels)} images: {largest:.1e}")
    assert largest < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(any(name not in os.environ for name in CIFAR), reason=f"set {' and '.join(CIFAR)}")
def test_cifar_10_train_against_test_is_as_published():
    """Folders or .npz files of the 50,000 and the 10,000 images; the weights are torch-fidelity's own."""
    train, test = (Path(os.environ[name]) for name in CIFAR)
    weights = os.environ.get("REGLUE_INCEPTION", "inception")
    evaluation = evaluate(Evaluate(test, train, feature_network=weights, resamples=0))
    assert (evaluation.image_count, evaluation.reference_count) == (10_000, 50_000)
    assert evaluation.metrics.frechet_distance.value == pytest.approx(3.15, abs=0.02)


def test_the_network_is_given_nothing_to_unpickle(monkeypatch):
    loaded = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: loaded.append(file) or original(file, **options))
    InceptionNetwork()
    assert all(not isinstance(file, str | Path) for file in loaded)
