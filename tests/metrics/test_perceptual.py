"""LPIPS against torch-fidelity's, and distances by a vision encoder."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch_fidelity.sample_similarity_lpips as theirs
from safetensors.torch import save_file

from reglue.encoders.vision import load_encoder
from reglue.errors import UserError
from reglue.metrics.perceptual import Lpips, encoder_distance, encoder_features, load_lpips


@pytest.fixture(scope="module")
def network(random_lpips: Path) -> Lpips:
    return load_lpips([random_lpips])


def as_package(network: Lpips) -> dict[str, torch.Tensor]:
    """The weights under the names of the package lpips."""
    slices = {0: 1, 2: 1, 5: 2, 7: 2, 10: 3, 12: 3, 14: 3, 17: 4, 19: 4, 21: 4, 24: 5, 26: 5, 28: 5}
    named: dict[str, torch.Tensor] = {}
    for name, value in network.state_dict().items():
        match name.split("."):
            case ["features", index, kind]:
                named[f"net.slice{slices[int(index)]}.{index}.{kind}"] = value
            case ["layers", index, kind]:
                named[f"lin{index}.model.1.{kind}"] = value
    return named


def test_distances_are_torch_fidelitys(network: Lpips, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {name: value for name, value in as_package(network).items() if name.startswith("lin")}
    vgg = SimpleNamespace(features=deepcopy(network.features))
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: layers)
    monkeypatch.setattr(theirs, "torchvision_load_pretrained_vgg16", lambda: vgg)
    reference = theirs.SampleSimilarityLPIPS("lpips")
    first, second = torch.randint(0, 256, (2, 2, 3, 40, 32), dtype=torch.uint8)
    expected = reference(first, second)
    assert expected.min() > 0
    found = network(*(images / 127.5 - 1 for images in (first, second)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert network(first / 255, first / 255).tolist() == [0, 0]


def test_one_file_or_two_of_either_naming_load_alike(network: Lpips, tmp_path: Path) -> None:
    package = as_package(network)
    save_file(package, tmp_path / "both.safetensors")
    backbone = {name: value for name, value in network.state_dict().items() if name.startswith("features")}
    torch.save({**backbone, "classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.pth")
    torch.save({name: value for name, value in package.items() if name.startswith("lin")}, tmp_path / "vgg.pth")
    first, second = torch.rand(2, 1, 3, 16, 16) * 2 - 1
    for files in ([tmp_path / "both.safetensors"], [tmp_path / "vgg16.pth", tmp_path / "vgg.pth"]):
        loaded = load_lpips(files)
        assert torch.equal(loaded(first, second), network(first, second))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(UserError, match=r"vgg16\.pth: LPIPS's linear layers"):
        load_lpips([tmp_path / "vgg16.pth"])
    with pytest.raises(UserError, match=r"^measure_lpips .*vgg\.pth: VGG16 is missing"):
        load_lpips([tmp_path / "vgg.pth"], "measure_lpips")


@pytest.mark.parametrize("content", [None, b"nonsense", b""])
def test_files_that_hold_no_tensors_are_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "vgg.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"vgg\.pth") as caught:
        load_lpips([file])
    assert "\n" not in str(caught.value)


class Trap:
    """Unpickling it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"features.0.weight": Trap(tmp_path / "sprung")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: holds more than data"):
        load_lpips([tmp_path / "evil.pth"])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.trains
def test_gradients_flow_through_both(network: Lpips, tiny_encoder: str) -> None:
    encoder = load_encoder(tiny_encoder, 16, (1, 4))
    original = torch.rand(1, 3, 16, 16) * 2 - 1
    for distance in (
        lambda x: network(original, x),
        lambda x: encoder_distance(encoder_features(encoder, original), encoder_features(encoder, x), 2),
    ):
        image = (torch.rand(1, 3, 16, 16) * 1.8 - 0.9).requires_grad_()
        before = distance(image)
        before.sum().backward()
        assert image.grad is not None
        with torch.no_grad():
            after = distance(image - 0.01 * image.grad / image.grad.norm())
        assert after < before


def test_features_are_those_that_the_encoder_describes(tiny_encoder: str) -> None:
    encoder = load_encoder(tiny_encoder, 16, (1, 4))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    described = encoder.describe(pixels).features
    torch.testing.assert_close(encoder_features(encoder, pixels / 127.5 - 1), described, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder_distance(described, described * 2, 2), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder_distance(described, -described, 2), torch.full((2,), 2.0))
