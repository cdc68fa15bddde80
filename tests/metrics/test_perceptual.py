"""LPIPS against its own package, and distances by a vision encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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


def test_distances_are_those_of_the_package(network: Lpips) -> None:
    package = pytest.importorskip("lpips")
    theirs = package.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    theirs.load_state_dict(as_package(network), strict=False)
    first, second = torch.rand(2, 2, 3, 40, 32) * 2 - 1
    expected = theirs(first, second).flatten()
    assert expected.min() > 0
    torch.testing.assert_close(network(first, second), expected, rtol=1e-5, atol=1e-7)
    assert network(first, first).tolist() == [0, 0]


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
    with pytest.raises(UserError, match=r"^--measure-lpips .*vgg\.pth: VGG16 is missing"):
        load_lpips([tmp_path / "vgg.pth"], "--measure-lpips")


@pytest.mark.parametrize("content", [None, b"nonsense", b""])
def test_files_that_hold_no_tensors_are_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "vgg.pth"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"vgg\.pth") as caught:
        load_lpips([file])
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"features.0.weight": Path("/")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: no file of tensors"):
        load_lpips([tmp_path / "evil.pth"])


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
