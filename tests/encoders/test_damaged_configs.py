"""Every value of a network's configuration put out of place: one line that names the file, at once, in little memory.

timm and diffusers check nothing of what they are told to build.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from encoders import test_autoencoders as autoencoders
from reglue.encoders.autoencoders import load_autoencoder
from reglue.encoders.vision import load_encoder
from reglue.errors import UserError

FEW: list[Any] = [None, -1, 10**18, 0.5, "a\nb", []]
MANY: list[Any] = [
    *FEW,
    *(True, 0, 3, 10**4, 10**6, 10**9, -0.5, 1e6, 1e300),
    *("", [[]], [10**9], [0.5], ["text"], {}, {"a": 1}),
]
TEXTS = {
    "empty": b"",
    "cut short": b'{"_class_name": "Auto',
    "a list": b"[]",
    "null": b"null",
    "UTF-16": '{"architecture": "vit"}'.encode("utf-16"),
    "not UTF-8": b'{"architecture": "\xff"}',
    "deep lists": b'{"a":' + b"[" * 100_000,
    "deep lists that end": b'{"model_args": ' + b"[" * 900 + b"]" * 900 + b"}",
    "10^19": b'{"a": 10000000000000000000}',
    "many digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "NaN": b'{"a": NaN}',
}


def write_encoder(folder: Path, architecture: str = "vit_tiny_patch16_224", **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0, **changes}
    network = timm.create_model(architecture, num_classes=0, **sizes)
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "model_args": {**sizes, "in_chans": 3, "qkv_bias": True, "init_values": None, "drop_path_rate": 0.0},
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 1000, "first_conv": "patch_embed.proj"},
        "reglue_input": {"image_pixels_per_patch": 4, "minimum_input": 16},
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_dino_v3(folder: Path) -> None:
    write_encoder(folder, "vit_small_patch16_dinov3")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["qkv_bias"] = False
    (folder / "config.json").write_text(json.dumps(config))


def encode(folder: Path) -> torch.Tensor:
    encoder = load_encoder(str(folder), 16)
    return encoder.describe(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).class_token


def decode(folder: Path) -> torch.Tensor:
    autoencoder = load_autoencoder(str(folder))
    moments = autoencoder.encode(torch.zeros(1, 3, 16, 16))
    assert moments.mean.shape == (1, autoencoder.spec.latent_channels, *autoencoder.spec.latent_size((16, 16)))
    return autoencoder.decode(moments.mean)


NETWORKS: dict[str, tuple[Callable[[Path], Any], Callable[[Path], torch.Tensor]]] = {
    "a vision transformer": (write_encoder, encode),
    "DINOv3": (write_dino_v3, encode),
    "AutoencoderKL": (autoencoders.write_kl, decode),
    "AsymmetricAutoencoderKL": (autoencoders.write_asymmetric, decode),
    "AutoencoderKLFlux2": (autoencoders.write_flux2, decode),
    "VQModel": (autoencoders.write_vq, decode),
    "AutoencoderTiny": (autoencoders.write_tiny, decode),
    "AutoencoderDC": (autoencoders.write_dc, decode),
}


def changes_of(content: Any, others: list[Any]) -> Iterator[Any]:
    """JSON with one of its values another, or gone, everywhere; of a list its first item alone."""
    yield from others
    if isinstance(content, dict):
        for key, value in content.items():
            yield {name: item for name, item in content.items() if name != key}
            yield from ({**content, key: changed} for changed in changes_of(value, others))
    if isinstance(content, list) and content:
        yield content[1:]
        yield content * 2
        yield from ([changed, *content[1:]] for changed in changes_of(content[0], others))


def outcome(use: Callable[[Path], torch.Tensor], folder: Path) -> str:
    try:
        assert use(folder).isfinite().all()
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert len(message) < 700, message
        assert str(folder) in message, message
        return "refused"
    return "read"


def change_everything(network: str, folder: Path, others: list[Any]) -> None:
    write, use = NETWORKS[network]
    write(folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    assert outcome(use, folder) == "read"
    for changed in changes_of(content, others):
        file.write_text(json.dumps(changed))
        started = time.perf_counter()
        outcome(use, folder)
        assert time.perf_counter() - started < 5, changed


@pytest.mark.parametrize("network", ["a vision transformer", "AutoencoderKL"])
def test_any_value_of_a_configuration_may_be_wrong(network: str, tmp_path: Path) -> None:
    change_everything(network, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_any_value_of_any_configuration_may_be_anything(network: str, tmp_path: Path) -> None:
    change_everything(network, tmp_path, MANY)


@pytest.mark.parametrize("network", ["a vision transformer", "AutoencoderKL"])
@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_configuration_is_refused(network: str, text: str, tmp_path: Path) -> None:
    write, use = NETWORKS[network]
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(TEXTS[text])
    assert outcome(use, tmp_path) == "refused"
