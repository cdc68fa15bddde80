"""The conversion of Keras' ResNet: a small one of random weights, against Keras' definition written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import convert_classifier
from measures import Judge, load_judge
from reglue.errors import UserError

SIDE, CLASSES, EPSILON = 32, 1000, 1e-3
MEAN_BGR = torch.tensor([103.939, 116.779, 123.68])


def keras_weights() -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Weights and layers of a ResNet with one block per stage."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    layers: list[dict[str, Any]] = [{"name": "input_1", "batch_input_shape": [None, SIDE, SIDE, 3]}]

    def add(conv: str, norm: str, kernel: int, width_in: int, width_out: int, stride: int) -> None:
        scale = (2 / (kernel**2 * width_in)) ** 0.5
        weights[f"{conv}/kernel"] = rng.normal(0, scale, (kernel, kernel, width_in, width_out))
        weights[f"{conv}/bias"] = rng.normal(0, 0.5, width_out)
        weights[f"{norm}/gamma"] = rng.uniform(0.5, 1.5, width_out)
        weights[f"{norm}/beta"] = rng.normal(0, 0.5, width_out)
        weights[f"{norm}/moving_mean"] = rng.normal(0, 0.5, width_out)
        weights[f"{norm}/moving_variance"] = rng.uniform(1e-4, 2, width_out)  # where ε matters, too
        layers.append({"name": conv, "strides": [stride, stride]})
        layers.append({"name": norm, "epsilon": EPSILON})

    add("conv1", "bn_conv1", 7, 3, 64, 2)
    width_in = 64
    for stage, width in zip(range(2, 6), (64, 128, 256, 512), strict=True):
        stride = 1 if stage == 2 else 2
        for branch, kernel, wide_in, wide_out, step in (
            ("2a", 1, width_in, width, stride),
            ("2b", 3, width, width, 1),
            ("2c", 1, width, 4 * width, 1),
            ("1", 1, width_in, 4 * width, stride),
        ):
            add(f"res{stage}a_branch{branch}", f"bn{stage}a_branch{branch}", kernel, wide_in, wide_out, step)
        width_in = 4 * width
    weights["fc1000/kernel"] = rng.normal(0, 0.02, (width_in, CLASSES))
    weights["fc1000/bias"] = rng.normal(0, 0.5, CLASSES)
    return {name: value.astype("<f4") for name, value in weights.items()}, layers


def keras_scores(weights: dict[str, np.ndarray], layers: list[dict[str, Any]], pixels: Tensor) -> Tensor:
    """What Keras computes, in float64."""
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    strides = {layer["name"]: layer["strides"][0] for layer in layers if "strides" in layer}

    def conv_norm(x: Tensor, conv: str, norm: str, padding: int) -> Tensor:
        x = F.conv2d(x, w[f"{conv}/kernel"].permute(3, 2, 0, 1), w[f"{conv}/bias"], strides[conv], padding)
        x = (x - w[f"{norm}/moving_mean"][:, None, None]) / (w[f"{norm}/moving_variance"] + EPSILON).sqrt()[
            :, None, None
        ]
        return x * w[f"{norm}/gamma"][:, None, None] + w[f"{norm}/beta"][:, None, None]

    x = pixels.double().flip(1) - MEAN_BGR[:, None, None].double()
    x = F.pad(conv_norm(x, "conv1", "bn_conv1", 3).relu(), (1, 1, 1, 1))
    x = F.max_pool2d(x, 3, 2)
    for stage in range(2, 6):
        short = conv_norm(x, f"res{stage}a_branch1", f"bn{stage}a_branch1", 0)
        for branch, padding in (("2a", 0), ("2b", 1), ("2c", 0)):
            x = conv_norm(x, f"res{stage}a_branch{branch}", f"bn{stage}a_branch{branch}", padding)
            x = x if branch == "2c" else x.relu()
        x = (x + short).relu()
    return x.mean((2, 3)) @ w["fc1000/kernel"] + w["fc1000/bias"]


def write_keras(folder: Path, weights: dict[str, np.ndarray], layers: list[dict[str, Any]]) -> Path:
    content = b"".join(value.tobytes() for value in weights.values())
    cut = len(content) // 3 + 1  # within a tensor, and within a number
    paths = []
    for index in range(3):
        paths.append(f"shard{index}.bin")
        (folder / paths[-1]).write_bytes(content[index * cut : (index + 1) * cut])
    manifest = [{"name": n, "shape": list(v.shape), "dtype": "float32"} for n, v in weights.items()]
    topology = {"model_config": {"config": {"layers": [{"config": layer} for layer in layers]}}}
    file = folder / "model.json"
    file.write_text(json.dumps({"modelTopology": topology, "weightsManifest": [{"paths": paths, "weights": manifest}]}))
    return file


def test_the_converted_network_gives_keras_scores(tmp_path: Path) -> None:
    weights, layers = keras_weights()
    file = tmp_path / "judge.safetensors"
    convert_classifier.main(write_keras(tmp_path, weights, layers), file)
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, last = load_judge(str(file), torch.device("cpu")).features(pixels.split(1)), load_file(file)
    expected = keras_scores(weights, layers, pixels)
    found = F.linear(features, last["fc.weight"], last["fc.bias"])
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_images_of_another_size_are_stretched() -> None:
    judge = Judge(torch.nn.Flatten(), [0.0] * 3, [1.0] * 3, 4, torch.device("cpu"))
    found = judge.features([torch.full((1, 3, 8, 6), 255, dtype=torch.uint8)])
    assert found.shape == (1, 48)
    assert torch.allclose(found, torch.ones(1))


def test_other_files_and_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"convert_classifier\.py"):
        load_judge(str(tmp_path / "other.safetensors"), torch.device("cpu"))
    with pytest.raises(UserError, match="timm has no network"):
        load_judge("timm:nothing", torch.device("cpu"))


def test_strides_elsewhere_are_refused() -> None:
    weights, layers = keras_weights()
    changed = {layer["name"]: layer for layer in layers}
    changed["res3a_branch2a"] = {"strides": [1, 1]}
    with pytest.raises(UserError, match="res3a_branch2a has a stride"):
        convert_classifier.convert({name: torch.from_numpy(value) for name, value in weights.items()}, changed)
